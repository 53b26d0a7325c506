"""What a device has done so far, from the counters of its state."""

from __future__ import annotations

from edge_sdk.exchange import Traffic
from edge_sdk.ledger import bits_per_sample
from edge_sdk.station import Station

__all__ = ["Figures"]


class Figures:
    """The figures of one device.

    Args:
        station: its parts.
    """

    def __init__(self, station: Station) -> None:
        self._station = station

    @property
    def steps(self) -> int:
        """Training steps that the server answered and the front has taken, in this run."""
        return self._station.count("trained")

    @property
    def round(self) -> int:
        """Rounds that the server had finished when it last answered a training step."""
        return self._station.count("round")

    @property
    def batches(self) -> int:
        """Batches that were drawn for training in this run, refused ones included."""
        return self._station.count("batches")

    @property
    def sent(self) -> int:
        """Samples that were handed to ``store`` in this run."""
        return self._station.count("sent")

    @property
    def unperturbed(self) -> int:
        """Training samples that passed as they are, since their perturbation was zero everywhere."""
        return self._station.count("unperturbed")

    @property
    def bytes_per_sample(self) -> float:
        """Bytes that one training sample's activations cost on the wire, envelope included, repeats not."""
        return self._station.count("sample_bytes") / max(self._station.count("samples"), 1)

    @property
    def samples_sent(self) -> int:
        """Samples whose activations went out in this run, for training and for decisions; repeated frames do not count.

        A sample that is sent anew counts each time. Under the same front it has the same noise and the same bytes,
        which tell nothing new; so what was told is at most this many times ``bits_per_sample``.
        """
        return self._station.count("samples_sent")

    @property
    def bits_sent(self) -> float | None:
        """Upper bound on what activations told about this device's samples so far, in bits, or None for no bound.

        Counted for each send, as ``samples_sent`` is; see ``ledger.bits_per_sample`` for what it rests on.
        """
        each = bits_per_sample(self._station.manifest)
        return None if each is None else each * self.samples_sent

    @property
    def traffic(self) -> Traffic:
        """What this client has sent, received and rejected so far."""
        return self._station.exchange.traffic
