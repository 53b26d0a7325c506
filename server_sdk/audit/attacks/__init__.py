"""Inversion attacks: one interface, one file for each family."""

from __future__ import annotations

from server_sdk.audit.attacks.attack import Attack, Knowledge, Progress
from server_sdk.audit.attacks.decoder import LearnedDecoder
from server_sdk.audit.attacks.whitebox import WhiteBox

__all__ = ["Attack", "Knowledge", "LearnedDecoder", "Progress", "WhiteBox"]
