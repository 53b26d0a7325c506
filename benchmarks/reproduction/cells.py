"""One cell: train, attack, score. Everything that it draws follows from its seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.reproduction.networks import Saliency, SplitNetwork, unperturbed
from benchmarks.reproduction.plan import HEADLINE, Attack, Cell, Settings
from benchmarks.reproduction.samples import Parts
from benchmarks.reproduction.scores import fit_weights, follow, relative, score
from server_sdk.audit.attacks import Knowledge, LearnedDecoder
from server_sdk.audit.metrics import likeness
from server_sdk.fusion import BASE_WEIGHTS, fuse
from server_sdk.recovery import recover
from server_sdk.reference.guide import Guide, fit_guide

__all__ = ["Tensors", "compute", "trained"]

Tensors = dict[str, Tensor]
_SWEEP = tuple((step, iterations) for step in (0.1, 0.3, 0.55, 0.9, 1.0) for iterations in (1, 3, 10, 50))
_SCORED = 10  # iterations at which the sweep scores the stream too
# Added to the seed, for nobody shares initial weights: the undefended network that guides attack, its twin that nobody
# asks for gradients, and the foe's own classifier.
_PLAIN = {"victim": 0, "twin": 1000, "judge": 2000}
_DECODER = 3000


def compute(
    cell: Cell, parts: Parts, settings: Settings, given: Mapping[str, Tensor], device: str = "cpu"
) -> tuple[dict[str, Any], Tensors]:
    """Work on one cell.

    Args:
        cell: which.
        parts: the samples.
        settings: of this data set.
        given: tensors of the ``networks`` cell, and for ``foes`` those of the network that is attacked.
        device: where guides and networks are asked and decoders train. Split networks train on the CPU.

    Returns:
        The result, JSON values, and the tensors that other cells need.
    """
    if cell.kind == "networks":
        return _networks(cell, parts, settings, device)
    if cell.kind == "foes":
        return _foes(cell, parts, settings, given, device), {}
    return _training(cell, parts, settings, given, device)


def _networks(cell: Cell, parts: Parts, settings: Settings, device: str) -> tuple[dict[str, Any], Tensors]:
    plain = {name: _plain(parts, cell.seed + offset, device) for name, offset in _PLAIN.items()}
    for name, network in plain.items():
        mine = parts.auxiliary if name == "judge" else parts.train
        network.train(unperturbed(mine.x), mine.y, settings, cell.seed + _PLAIN[name])
    guide = fit_guide(
        parts.guide.x.numpy(),
        parts.guide.y.numpy(),
        classes=parts.classes,
        seed=cell.seed,
        epochs=settings.guide_epochs,
    )
    with torch.inference_mode():
        guided = torch.softmax(guide(parts.test.x), dim=1)
    result = {
        "sizes": parts.sizes(),
        "clean": {
            **{name: _score(network, parts.test.x, parts.test.y) for name, network in plain.items()},
            "transferred": score(guided, parts.test.y),
        },
    }
    tensors = {f"{who}.{name}": value for who, network in plain.items() for name, value in network.state().items()}
    return result, tensors | {f"guide.{name}": value for name, value in guide.state_dict().items()}


def _training(
    cell: Cell, parts: Parts, settings: Settings, given: Mapping[str, Tensor], device: str
) -> tuple[dict[str, Any], Tensors]:
    victim, twin = (_plain(parts, cell.seed, device).load(_of(name, given)) for name in ("victim", "twin"))
    network = trained(cell, parts, settings, given, device)
    attacks = cell.attacks(settings)
    guides = {attack.guide: _guide(attack, victim, network, given) for attack in attacks}
    views = {
        name: (Saliency(guide, parts.test, device), Saliency(guide, parts.validation, device))
        for name, guide in guides.items()
    }
    batch = settings.batch if cell.kind == "batch" else 512
    clean = network.probabilities(network.send(unperturbed(parts.test.x)), batch)
    plain = {"undefended": victim, "twin": twin}
    rows: list[dict[str, Any]] = [
        {"attack": None, "scores": {**_each(plain, parts.test.x, parts.test.y), **_scores(clean, parts.test.y)}}
    ]
    for attack in attacks:
        test, validation = views[attack.guide]
        sent = test.attack(attack)
        streams = network.probabilities(network.send(sent), batch)
        held = network.probabilities(network.send(validation.attack(attack)), batch)
        weights = fit_weights(held, parts.validation.y)
        rows.append(
            {
                "attack": asdict(attack),
                "scores": {
                    **_each(plain, sent.perturbed, parts.test.y),
                    **_scores(streams, parts.test.y),
                    "fitted": score(fuse(streams, weights), parts.test.y),
                    "fitted_clean": score(fuse(clean, weights), parts.test.y),
                },
                "follow": {
                    name: follow(fuse(streams, chosen).argmax(dim=1), test.classes, parts.test.y)
                    for name, chosen in (("paper", BASE_WEIGHTS), ("fitted", weights))
                },
                "weights": weights,
                "untouched": 100.0 * float((sent.map.flatten(1).amax(dim=1) == 0).double().mean()),
            }
        )
    result: dict[str, Any] = {"rows": rows}
    if cell.kind == "residual" and HEADLINE in attacks:
        activations = network.send(views[HEADLINE.guide][0].attack(HEADLINE))[: settings.swept]
        result["sweep"] = _sweep(network, activations, parts.test.y[: settings.swept])
    return result, network.state()


def trained(
    cell: Cell, parts: Parts, settings: Settings, given: Mapping[str, Tensor], device: str = "cpu"
) -> SplitNetwork:
    """The defended network of a cell, trained clean or under the cell's attack."""
    network = SplitNetwork(_shape(parts), parts.classes, cell.seed, defended=True, kind=cell.kind, device=device)
    sent = unperturbed(parts.train.x)
    if cell.attack is not None:
        victim = _plain(parts, cell.seed, device).load(_of("victim", given))
        sent = Saliency(_guide(cell.attack, victim, network, given), parts.train, device).attack(cell.attack)
    network.train(sent, parts.train.y, settings, cell.seed)
    return network


def _each(networks: Mapping[str, SplitNetwork], x: Tensor, y: Tensor) -> dict[str, dict[str, float]]:
    return {name: _score(network, x, y) for name, network in networks.items()}


def _scores(streams: Mapping[str, Tensor], y: Tensor) -> dict[str, dict[str, float]]:
    found = {name: score(each, y) for name, each in streams.items()}
    return found | {"paper": score(fuse(streams), y)}


def _sweep(network: SplitNetwork, activations: Tensor, y: Tensor) -> list[dict[str, Any]]:
    """Iterations against the closed form: how far off is M, and is it the factor 1 - (1 - mu)^k that is missing?"""
    closed = recover(activations, threshold=network.streams.threshold)

    def scored(recovered: Tensor) -> float:
        with torch.inference_mode():
            logits = network.streams.recovered(recovered.to(network.device))  # type: ignore[operator]
        return score(torch.softmax(logits.cpu(), dim=1), y)["accuracy"]

    rows: list[dict[str, Any]] = [
        {"step": None, "iterations": None, "missing": 0.0, "beyond": 0.0, "accuracy": scored(closed.recovered)}
    ]
    for step, iterations in _SWEEP:
        found = recover(
            activations, threshold=network.streams.threshold, method="iterate", step=step, iterations=iterations
        )
        factor = 1.0 - (1.0 - step) ** iterations
        rows.append(
            {
                "step": step,
                "iterations": iterations,
                "missing": relative(found.trace, closed.trace),
                "beyond": relative(found.trace / factor, closed.trace),
                "accuracy": scored(found.recovered) if iterations == _SCORED else None,
            }
        )
    return rows


def _foes(cell: Cell, parts: Parts, settings: Settings, given: Mapping[str, Tensor], device: str) -> dict[str, Any]:
    """Both foes have the same samples, the same decoder and the same activations; what they aim at differs."""
    victim, judge = (_plain(parts, cell.seed, device).load(_of(name, given)) for name in ("victim", "judge"))
    if cell.attack is None:
        network = victim
        seen, known = unperturbed(parts.test.x), unperturbed(parts.auxiliary.x)
    else:
        network = SplitNetwork(_shape(parts), parts.classes, cell.seed, defended=True, device=device).load(given)
        guide = _guide(cell.attack, victim, network, given)
        seen = Saliency(guide, parts.test, device).attack(cell.attack)
        known = Saliency(guide, parts.auxiliary, device).attack(cell.attack)
    decoder = LearnedDecoder(epochs=settings.decoder_epochs, width=settings.decoder_width, device=device)
    activations, learned = network.send(seen).numpy(), network.send(known).numpy()
    targets = {"naive": known.perturbed, "adaptive": parts.auxiliary.x}

    def judged(x: Tensor) -> dict[str, float]:
        each = _each({"victim": victim, "judge": judge}, x, parts.test.y)
        return {name: found["accuracy"] for name, found in each.items()}

    result: dict[str, Any] = {"sent": judged(seen.perturbed), "clean": judged(parts.test.x)}
    if cell.attack is not None:
        streams = network.probabilities(network.send(seen))
        result["fused"] = score(fuse(streams), parts.test.y)["accuracy"]
    for name, target in targets.items():
        if cell.attack is None and name == "naive":
            continue  # nothing is perturbed: the same foe twice
        rebuilt = decoder.rebuild(Knowledge(target.numpy(), learned), activations, seed=cell.seed + _DECODER)
        shown = likeness(rebuilt, np.ascontiguousarray(parts.test.x.numpy()))
        result[name] = {**judged(torch.from_numpy(rebuilt)), "ssim": shown.ssim, "mse": shown.mse}
    return result


def _plain(parts: Parts, seed: int, device: str) -> SplitNetwork:
    return SplitNetwork(_shape(parts), parts.classes, seed, defended=False, device=device)


def _guide(
    attack: Attack, victim: SplitNetwork, network: SplitNetwork, given: Mapping[str, Tensor]
) -> Callable[[Tensor], Tensor]:
    if attack.guide != "transferred":
        return (victim if attack.guide == "victim" else network).classify
    guide = Guide(victim.shape, victim.classes)
    guide.load_state_dict(_of("guide", given))
    return guide.to(victim.device).eval()


def _score(network: SplitNetwork, x: Tensor, y: Tensor) -> dict[str, float]:
    with torch.inference_mode():
        logits = torch.cat([network.classify(part.to(network.device)).cpu() for part in torch.split(x, 512)])
    return score(torch.softmax(logits, dim=1), y)


def _of(part: str, given: Mapping[str, Tensor]) -> Tensors:
    return {name.removeprefix(f"{part}."): value for name, value in given.items() if name.startswith(f"{part}.")}


def _shape(parts: Parts) -> tuple[int, ...]:
    return tuple(int(size) for size in parts.test.x.shape[1:])
