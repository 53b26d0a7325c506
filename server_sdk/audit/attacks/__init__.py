"""Inversion attacks: one interface, one file for each family."""

from __future__ import annotations

from server_sdk.audit.attacks.attack import Attack, Knowledge, Progress
from server_sdk.audit.attacks.averaging import Averaging
from server_sdk.audit.attacks.decoder import LearnedDecoder
from server_sdk.audit.attacks.whitebox import WhiteBox

__all__ = ["Attack", "Averaging", "Knowledge", "LearnedDecoder", "Progress", "WhiteBox"]
