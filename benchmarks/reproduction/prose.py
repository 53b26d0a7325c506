"""The page's sentences: what was done, and what the figures of this very run come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from benchmarks.reproduction.plan import HEADLINE
from benchmarks.reproduction.tables import Row, find, spread

__all__ = ["LIMITS", "METHOD", "PROTOCOLS", "SWEEP", "plain", "short", "signed"]

GOAL = 36.9
"""Points of the fused decision over attacked images that the paper claims."""

PROTOCOLS = {"P1": "perturbed in training and at test", "P2": "trained clean, perturbed at test"}

METHOD = """\
## How it was measured

- **Networks.** The reference network (`server_sdk/reference/networks.py`), cut at `relu2`, on space-to-depth 2;
  trained in torch in one process through the server's own `Trainer` (batches, streams, losses, the gradient of the
  fused stream to the front). No broker and no ONNX: that the exported graphs compute what this torch code computes
  is tested in `tests/export`.
- **Parts.** The training samples are dealt out by class (and by patient, where the file names patients) so that no
  part shares one: the split network's, the foe's (auxiliary), the transferred guide's, and a validation part for
  the weights. The test samples are the file's own.
- **Labels.** The attacked class is always the guide's own decision; labels of test samples are used to score,
  nothing else.
- **P2.** The device trains with epsilon 0 (the map's channel is all zero) and perturbs at test; the map's channel
  then carries what the device sends. **P1** perturbs in both, with the same guide.
- **Guides.** `victim` is the undefended classifier itself, as in the paper: in P1 it has seen the training samples
  that it perturbs, in P2 that does not matter. `transferred` is the SDK's small guide, trained on the guide's part
  alone. `own` (P2) is the defended network's own attacked stream: a foe, or a device, that takes gradients of the
  very network which must withstand them.
- **Undefended** is a plain split network without map channel, trained clean on the same samples, given x_hat at its
  input. With the `victim` guide it is attacked by its own gradients and the defended network by somebody else's.
  **Its twin** is the same plain network with other initial weights: what it keeps is no merit of recovery or
  fusion. So `fused - undefended` is what the paper compares and `fused - twin` is what the defence adds.
- **Streams.** a, r and f are the attacked, recovered and fused streams by themselves; `fused` is the decision of
  all three with the paper's weights (r 0.5, f 0.3, a 0.2), `fitted` with those on a grid of 0.05 that decide the
  validation part best under the same attack (labels of validation samples used; among equals the nearest to the
  paper's). `clean` is the same decision on the unperturbed test samples.
- **Recovered** is the residual R = A - M of each sample. Beside it: M itself (the paper's words can be read so),
  and R where a whole batch is one matrix (N*C', H'W'), another reading, since the paper writes A without a sample's
  index; then a sample's result depends on who else is in its batch, in training and at test, and with one sample a
  batch both are the same.
- **Foes** see the activations of the perturbed test samples and train the same convolutional decoder on the same
  auxiliary samples, sent through the same pipeline. The naive one aims at x_hat, what the device fed in; the
  adaptive one at x. A clean classifier then reads the reconstructions: the undefended network (as in the paper; the
  very one whose gradients made x_hat), and one of the foe's own, trained on the auxiliary part. Likeness is
  measured against x.
- **Guide, agrees, follows when wrong**: accuracy of the guide, how often the fused decision is the guide's, and in
  how many of the guide's mistakes it is too: a defended network that follows reads the label off the perturbation."""

SWEEP = """\
k iterations from zero against the closed form M*, on activations of perturbed test samples (relative distances in the
Frobenius norm). What is missing after k iterations is the factor (1-mu)^k and nothing else, so mu decides how fast, not
where to. Stream r was trained with the closed form; it is given what ten iterations leave."""

LIMITS = """\
## What this does not show

- Recovery and fusion run after the wire. They change what the server decides, not what a foe sees; whoever trains a
  decoder for the pipeline is measured above as the adaptive foe, and the naive foe must never be quoted without it.
- A foe that chooses its perturbation through recovery and fusion (differentiating r and f too) was not tried;
  stream r is never attacked by its own gradients here.
- One decoder for each foe (convolutions on the wide cut): the stronger of the audit's two there, no bound on what
  others find.
- Few patients make wide spreads: differences of a few points on mini-MIAS are not findings, and its lesions are
  centred while normal patches are not, which is a cue of its own."""


def short(name: str, data: Row, samples: Mapping[str, Sequence[float]]) -> list[str]:
    """The first lines on a data set: goal, what of it is the defence's, foes side by side."""
    lines = [f"**{name}**, P2, `sign`, eps {HEADLINE.epsilon:g}, predicted labels:", ""]
    victim, own = (
        find(data["rows"], kind="residual", **asdict(replace(HEADLINE, guide=guide))) for guide in ("victim", "own")
    )
    if victim is None:
        return [*lines, "- not measured"]

    def figure(part: str) -> Sequence[float]:
        return samples[f"reproduce.{name}.{part}"]

    for part, label in (("paper_weights", "the paper's weights"), ("fitted", "fitted weights")):
        values = figure(f"fused_minus_undefended_{part}")
        met = "reached" if sum(values) / len(values) >= GOAL else "missed"
        lines.append(
            f"- fused minus undefended, {label}: **{signed(values)}** points (goal +{GOAL}: {met}); "
            f"minus its twin: {signed(figure(f'fused_minus_twin_{part}'))}."
        )
    parts = {"undefended": "undefended", "twin": "its twin", "attacked": "a", "recovered": "r", "fused": "f"}
    parts |= {"paper": "fused", "fitted": "fitted"}
    scores = ", ".join(f"{label} {_score(victim, part)}" for part, label in parts.items())
    lines.append(
        f"- Accuracies: {scores}. What the twin keeps is not the defence's: the attack was made for another network."
    )
    if own is not None:
        scores = ", ".join(
            f"{parts[part]} {_score(own, part)}" for part in ("attacked", "recovered", "paper", "fitted")
        )
        lines.append(
            "- Each network attacked by its own gradients (of the defended one: those of stream a): undefended "
            f"{_score(victim, 'undefended')}; defended {scores}."
        )
    if "scores.paper.auc" in victim["values"]:
        pairs = ", ".join(
            f"{parts[part]} {_score(victim, part, 'balanced')} / {_score(victim, part, 'auc')}"
            for part in ("undefended", "twin", "paper", "fitted")
        )
        lines.append(f"- Classes are unequal; balanced accuracy / area under the ROC curve: {pairs}; 50 is chance.")
    if f"reproduce.{name}.fused_minus_reconstructed_naive" not in samples:
        return [*lines, "- Fused minus reconstructed: not measured in this run."]
    read = {
        f"{foe}{whose}": signed(figure(f"fused_minus_reconstructed_{foe}{whose}"))
        for foe in ("naive", "adaptive")
        for whose in ("", "_own_classifier")
    }
    lines.append(
        f"- Fused minus reconstructed, read by the undefended network: naive foe **{read['naive']}**, adaptive foe "
        f"**{read['adaptive']}**; read by the foe's own classifier: naive {read['naive_own_classifier']}, adaptive "
        f"{read['adaptive_own_classifier']}. Negative: more is read there than the fused decision gets right."
    )
    return lines


def signed(values: Sequence[float]) -> str:
    """``+12.3 ± 0.4``, mean and sample standard deviation."""
    found = spread(values)
    return "-" if found is None else f"{found[0]:+.1f} ± {found[1]:.1f}"


def plain(found: tuple[float, float], digits: int = 1) -> str:
    """``12.3 ± 0.4``."""
    return f"{found[0]:.{digits}f} ± {found[1]:.{digits}f}"


def _score(row: Row, name: str, what: str = "accuracy") -> str:
    found = spread(row["values"][f"scores.{name}.{what}"])
    return "-" if found is None else plain(found)
