"""How often a device's samples cross the wire, and how many bits that can come to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

__all__ = ["Exposure", "exposure_in_words"]


@dataclass(frozen=True)
class Exposure:
    """Sends of one device.

    The device draws its noise from all that its activations depend on. So a sample that is sent again under the same
    front tells nothing new, and one that is sent under another version of the front tells its bits once more.

    Attributes:
        bits_per_sample: the most that one send tells, from ``edge_sdk.ledger``; None: no bound is known.
        training_samples: how many the device has.
        training_sends: how many of them crossed in training, repeats counted.
        versions: of the front that they crossed under.
        decisions: samples that were sent for a decision, once each.
    """

    bits_per_sample: float | None
    training_samples: int
    training_sends: int
    versions: int
    decisions: int

    @property
    def most_sends(self) -> int:
        """How often the most often sent training sample crossed: every pass over the data takes each once."""
        return math.ceil(self.training_sends / max(self.training_samples, 1))

    def as_fields(self) -> dict[str, Any]:
        """As JSON values; bits are None where there is no bound."""
        each = self.bits_per_sample
        return {
            "bits_per_sample": each,
            "training_samples": self.training_samples,
            "training_sends": self.training_sends,
            "front_versions": self.versions,
            "most_sends_of_a_sample": self.most_sends,
            "decisions": self.decisions,
            "bits_of_a_training_sample": None if each is None else each * self.most_sends,
            "bits_in_training": None if each is None else each * self.training_sends,
            "bits_in_decisions": None if each is None else each * self.decisions,
        }


def exposure_in_words(fields: dict[str, Any]) -> str:
    """One sentence for people, from ``Exposure.as_fields``."""
    often = fields["most_sends_of_a_sample"]
    times = "once" if often == 1 else f"up to {often} times"
    versions = fields["front_versions"]
    under = f"under {versions:,} versions of the front" if versions > 1 else "under one version of the front"
    each = fields["bits_per_sample"]
    if each is None:
        return (
            f"No bound: nothing limits what one send tells of its sample; each of the {fields['training_samples']:,} "
            f"training samples crossed {times}, {under}, and each decision is one send more."
        )
    return (
        f"One send tells at most {each:,.1f} bits of its sample, whoever reads it; each of the "
        f"{fields['training_samples']:,} training samples crossed {times}, {under}, which comes to at most "
        f"{fields['bits_of_a_training_sample']:,.0f} bits of a sample and {fields['bits_in_training']:,.0f} of all "
        f"(their labels are sent as they are), and {fields['decisions']:,} decisions to "
        f"{fields['bits_in_decisions']:,.0f}."
    )
