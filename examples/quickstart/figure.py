"""One picture of what happened: inputs, what crosses the wire, how the runs learned, and what a foe rebuilds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import numpy.typing as npt

from edge_sdk.batch import Samples, as_batch
from edge_sdk.bundle import load_bundle
from edge_sdk.codec import unpack_tensors
from edge_sdk.errors import ConfigError
from edge_sdk.front import Front, FrontState
from examples.quickstart.foe import FLOOR, Rebuilt
from server_sdk.local_fleet import FleetRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

_SAMPLES = 5
_CHANNELS = (2, 4)
_INK = "#1d2433"
_SOFT = "#8a94a6"
_COLOURS = {"attacked": "#e0777d", "recovered": "#4c9f9f", "fused": "#e9a23b", "hardened": "#7b5ea7"}
_PAPER = "#fbfaf7"
_WIDTH, _HEIGHT, _BAND = 14.0, 10.0, 1.8  # inches; the band of what a foe rebuilds is at the bottom


def draw(path: Path, folder: Path, samples: Samples, runs: dict[str, FleetRun], rebuilt: Mapping[str, Rebuilt]) -> None:
    """Draw the figure.

    Args:
        path: the PNG to write.
        folder: of the run with the defence: its bundle and the first device's trained front.
        samples: that device's test samples.
        runs: ``vanilla``, ``paper`` and ``hardened``.
        rebuilt: of these samples, by profile, and from the decisions alone.

    Raises:
        ConfigError: the disk refuses.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bundle = load_bundle(folder / "net.psgl")
    front = Front(bundle)
    state = FrontState(0, unpack_tensors((folder / "device-1.front.cbor").read_bytes()))
    positions = _one_of_each(samples.y)
    chosen = samples.take(positions)
    x = as_batch(chosen.x, bundle.manifest.input_shape, max_batch=bundle.manifest.max_batch)
    forward = front.forward(state, x, None, training=False)
    attack = forward.map if forward.map is not None else np.zeros_like(x)

    plt.rcParams.update({"font.family": "DejaVu Sans", "text.color": _INK, "axes.labelcolor": _INK})
    figure = plt.figure(figsize=(_WIDTH, _HEIGHT), facecolor=_PAPER)
    outer = figure.add_gridspec(
        *(1, 2),
        width_ratios=(1.28, 1),
        left=0.045,
        right=0.975,
        top=1 - 1.31 / _HEIGHT,
        bottom=(0.7 + _BAND) / _HEIGHT,
        wspace=0.13,
    )
    left = outer[0].subgridspec(len(x), 4, width_ratios=(1, 1, 1, 2), hspace=0.07, wspace=0.05)
    headings = ("input", "its attack (map)", "perturbed input", "activations on the wire")
    for row in range(len(x)):
        pictures = (
            _image(x[row]),
            attack[row].mean(axis=0),
            _image(forward.perturbed[row]),
            _mosaic(forward.activations[row]),
        )
        maps = ("gray", "magma", "gray", "viridis")
        for column, (picture, colours) in enumerate(zip(pictures, maps, strict=True)):
            axes = figure.add_subplot(left[row, column])
            top = (1.0, max(bundle.manifest.epsilon, 1e-6), 1.0, None)[column]
            axes.imshow(
                picture,
                cmap=colours,
                interpolation="nearest",
                aspect="auto" if column == 3 else "equal",
                vmin=None if top is None else 0.0,
                vmax=top,
            )
            axes.set_axis_off()
            if row == 0:
                axes.set_title(headings[column], fontsize=10.5, color=_INK, pad=7)
            if column == 0:
                axes.text(
                    -0.08,
                    0.5,
                    bundle.manifest.classes[int(chosen.y[row])],
                    transform=axes.transAxes,
                    ha="right",
                    va="center",
                    fontsize=11,
                    color=_SOFT,
                )
    right = outer[1].subgridspec(2, 1, height_ratios=(1.75, 1), hspace=0.33)
    _curves(figure.add_subplot(right[0]), runs)
    _losses(figure.add_subplot(right[1]), runs)
    _band(figure, x, {name: each.pictures[positions] for name, each in rebuilt.items()}, rebuilt)
    figure.text(0.045, 1 - 0.45 / _HEIGHT, "Split learning with the defence on", fontsize=19, weight="bold")
    share, bare, hardened = (runs[name].figures["evaluation"]["accuracy"] for name in ("paper", "vanilla", "hardened"))
    figure.text(
        0.045,
        1 - 0.78 / _HEIGHT,
        f"paper: each device attacks its own input before anything leaves it; the server recovers, fuses and decides: "
        f"{share:.1%} right; vanilla {bare:.1%}, hardened {hardened:.1%}.",
        fontsize=11.5,
        color=_SOFT,
    )
    try:
        figure.savefig(path, dpi=130, facecolor=_PAPER)
    except OSError as exc:
        raise ConfigError(f"{path} cannot be written: {exc.strerror or exc}") from exc
    finally:
        plt.close(figure)


def _band(
    figure: Figure,
    x: npt.NDArray[np.float32],
    pictures: Mapping[str, npt.NDArray[np.float32]],
    rebuilt: Mapping[str, Rebuilt],
) -> None:
    """The same inputs in one group, and what the foe made of them in one group each, with the SSIM of all victims."""
    headings = {"vanilla": "vanilla", "paper": "paper", "hardened": "hardened", FLOOR: "from the decision alone"}
    victims = len(rebuilt[FLOOR].pictures)
    figure.text(0.045, (_BAND - 0.27) / _HEIGHT, "what a foe rebuilds from what the first device sends", fontsize=11.5)
    figure.text(
        0.975,
        (_BAND - 0.27) / _HEIGHT,
        f"one small learned decoder each, mean SSIM over {victims} test samples; psgl-server audit is the judge",
        fontsize=9.5,
        color=_SOFT,
        ha="right",
    )
    top = (_BAND - 1.0) / _HEIGHT
    groups = figure.add_gridspec(
        1, 1 + len(headings), left=0.045, right=0.975, top=top, bottom=top - 0.5 / _HEIGHT, wspace=0.1
    )
    shown = [("input", "", x)]
    shown += [(heading, f"SSIM {rebuilt[name].ssim:.2f}", pictures[name]) for name, heading in headings.items()]
    for number, (heading, about, images) in enumerate(shown):
        tiles = groups[number].subgridspec(1, len(images), wspace=0.06)
        place = groups[number].get_position(figure)
        middle = (place.x0 + place.x1) / 2
        figure.text(middle, top + 0.33 / _HEIGHT, heading, fontsize=10.5, ha="center")
        figure.text(middle, top + 0.11 / _HEIGHT, about, fontsize=9.5, color=_SOFT, ha="center")
        for column, image in enumerate(images):
            axes = figure.add_subplot(tiles[column])
            axes.imshow(_image(image), cmap="gray", interpolation="nearest", vmin=0.0, vmax=1.0)
            axes.set_axis_off()


def _one_of_each(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Positions of a few samples, of as many classes as possible."""
    _, first = np.unique(labels, return_index=True)
    rest = np.setdiff1d(np.arange(len(labels)), first)
    return np.concatenate([first, rest])[:_SAMPLES]


def _image(sample: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return sample[0] if len(sample) == 1 else sample.transpose(1, 2, 0)


def _mosaic(activations: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The first channels side by side, each scaled to itself, with a gap between."""
    rows, columns = _CHANNELS
    tiles = []
    for channel in activations[: rows * columns]:
        scaled = (channel - channel.min()) / max(float(channel.max() - channel.min()), 1e-6)
        tiles.append(np.pad(scaled, 1, constant_values=np.nan))
    while len(tiles) < rows * columns:
        tiles.append(np.full_like(tiles[0], np.nan))
    mosaic: npt.NDArray[np.float32] = np.block([[tiles[r * columns + c] for c in range(columns)] for r in range(rows)])
    return mosaic


def _curves(axes: Axes, runs: dict[str, FleetRun]) -> None:
    paper = runs["paper"].curve
    rounds = [number for number, _ in paper]
    for name in paper[-1][1]["streams"]:
        axes.plot(
            rounds,
            [100 * e["streams"][name] for _, e in paper],
            color=_COLOURS[name],
            linewidth=1.4,
            label=f"stream {name}",
        )
    bare = runs["vanilla"].curve
    axes.plot(
        [n for n, _ in bare],
        [100 * e["accuracy"] for _, e in bare],
        color=_SOFT,
        linewidth=2,
        linestyle=(0, (4, 2)),
        label="vanilla",
    )
    level = runs["hardened"].figures["evaluation"]
    axes.axhline(
        100 * level["accuracy"],
        color=_COLOURS["hardened"],
        linewidth=2,
        linestyle=(0, (1, 1)),
        label="hardened, at its end",
    )
    axes.plot(
        rounds,
        [100 * e["accuracy"] for _, e in paper],
        color=_INK,
        linewidth=2.8,
        marker="o",
        markersize=4.5,
        label="fused decision",
    )
    shown = [100 * e["accuracy"] for _, e in [*paper, *bare]] + [100 * level["accuracy"]]
    axes.set_ylim(max(0.0, min(shown) - 3.0), min(100.5, max(shown) + 1.5))
    axes.set_title("accuracy on held-out samples, over the wire", loc="left", fontsize=11.5, pad=9)
    axes.set_ylabel("%")
    _dress(axes)
    axes.legend(frameon=False, fontsize=9.5, loc="lower right")


def _losses(axes: Axes, runs: dict[str, FleetRun]) -> None:
    shown = (
        ("vanilla", _SOFT, "vanilla"),
        ("hardened", _COLOURS["hardened"], "hardened"),
        ("paper", _INK, "fused stream"),
    )
    for name, colour, label in shown:
        losses: Any = np.asarray(runs[name].losses)
        window = max(len(losses) // 40, 1)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(np.arange(len(smooth)) + window, smooth, color=colour, linewidth=1.6, label=label)
    axes.set_yscale("log")
    axes.set_title("training loss", loc="left", fontsize=11.5, pad=9)
    axes.set_xlabel("round")
    _dress(axes)
    axes.legend(frameon=False, fontsize=9.5, loc="best")


def _dress(axes: Axes) -> None:
    axes.set_facecolor(_PAPER)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#d6d9df")
    axes.tick_params(colors=_SOFT, labelsize=9.5, length=3)
    axes.grid(axis="y", color="#e7e6e1", linewidth=0.9)
    axes.set_axisbelow(True)
