"""The reproduction's arithmetic, on tiny data: parts, attacks, weights, cells, the cache, tables and the page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import reproduce
from benchmarks.reproduction.cache import Cache, code_version
from benchmarks.reproduction.cells import compute
from benchmarks.reproduction.networks import Saliency, SplitNetwork, unperturbed
from benchmarks.reproduction.page import render
from benchmarks.reproduction.plan import HEADLINE, STAGES, Attack, Cell, Settings, cells_of, settings_of
from benchmarks.reproduction.samples import DataSet, Labelled, Parts, divide, read
from benchmarks.reproduction.scores import fit_weights, follow, score
from benchmarks.reproduction.tables import collect, figures_of, find, spread
from edge_sdk.batch import Samples
from edge_sdk.dataset import save_dataset
from edge_sdk.errors import BatchError
from server_sdk.fusion import BASE_WEIGHTS, fuse
from server_sdk.reference.guide import Guide
from server_sdk.reference.perturbation import perturb
from server_sdk.streams import STREAMS

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = Settings(
    epochs=2,
    batch=16,
    guide_epochs=1,
    decoder_epochs=1,
    decoder_width=4,
    epsilons=(0.2,),
    trained_epsilons=(0.2,),
    swept=8,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def dataset(samples: int = 160, *, patients: bool = True) -> DataSet:
    """Two classes that differ in where they are bright."""
    generator = np.random.default_rng(0)

    def draw(count: int) -> Samples:
        y = generator.integers(0, 2, count)
        x = generator.uniform(0.0, 0.4, (count, 1, 16, 16)).astype(np.float32)
        x[y == 1, :, :8] += 0.5
        return Samples(x, y)

    groups = np.arange(samples) // 2 if patients else None
    return DataSet("tiny", draw(samples), draw(60), 2, groups, "digest")


@pytest.fixture(scope="module")
def parts() -> Parts:
    return divide(dataset(), 0)


@pytest.fixture(scope="module")
def results(parts: Parts) -> dict[Cell, dict[str, object]]:
    torch.set_num_threads(1)
    found: dict[Cell, dict[str, object]] = {}
    kept: dict[Cell, dict[str, torch.Tensor]] = {}
    for cell in cells_of("tiny", [0], TINY):
        given = {name: value for need in reproduce._needs(cell) for name, value in kept[need].items()}
        found[cell], kept[cell] = compute(cell, parts, TINY, given)
        found[cell]["machine"] = "here"
    return found


def test_parts_share_neither_sample_nor_patient() -> None:
    data = dataset()
    marked = data.train.x.copy()
    marked[:, 0, 0, 0] = np.arange(len(marked)) / 1000  # who a sample is
    parts = divide(replace(data, train=Samples(marked, data.train.y)), 3)
    named = [
        set((np.round(part.x[:, 0, 0, 0].numpy() * 1000).astype(int) // 2).tolist())
        for part in (parts.train, parts.auxiliary, parts.guide, parts.validation)
    ]
    assert sum(map(len, named)) == len(set().union(*named)) == 80  # patients
    assert parts.sizes()["train"] == pytest.approx(80, abs=8)
    assert parts.sizes()["validation"] == pytest.approx(16, abs=6)
    assert len(parts.test) == 60


def test_parts_depend_on_the_seed_and_can_be_limited() -> None:
    data = dataset(patients=False)
    one, again, other = (divide(data, seed) for seed in (0, 0, 1))
    assert torch.equal(one.train.x, again.train.x)
    assert not torch.equal(one.train.x, other.train.x)
    few = divide(data, 0, most=40)
    assert few.sizes() == {"train": 20, "auxiliary": 10, "guide": 6, "validation": 4, "test": 40}


def test_an_attack_is_the_sdks_perturbation_towards_the_guides_own_decision() -> None:
    torch.manual_seed(0)
    guide = Guide((1, 16, 16), 2).eval()
    samples = Labelled(torch.rand(9, 1, 16, 16), torch.zeros(9, dtype=torch.int64))
    for attack in (HEADLINE, Attack("transferred", "max", 0.1)):
        found = Saliency(guide, samples).attack(attack)
        wanted = perturb(
            guide,
            samples.x,
            torch.full((9,), -1),
            normalisation=attack.normalisation,
            epsilon=attack.epsilon,
        )
        torch.testing.assert_close(found.perturbed, wanted.perturbed)
        torch.testing.assert_close(found.map, wanted.map)
    swapped = Labelled(samples.x, 1 - samples.y)
    assert torch.equal(Saliency(guide, swapped).attack(HEADLINE).map, Saliency(guide, samples).attack(HEADLINE).map)


def test_the_plain_network_has_no_map_channel_and_one_stream() -> None:
    plain = SplitNetwork((1, 16, 16), 2, 0, defended=False)
    defended = SplitNetwork((1, 16, 16), 2, 0, defended=True)
    sent = unperturbed(torch.rand(3, 1, 16, 16))
    assert plain.sees(sent).shape[1] == 4
    assert defended.sees(sent).shape[1] == 5
    assert not defended.sees(sent)[:, 4].any()
    assert (plain.streams.names, defended.streams.names) == (("attacked",), STREAMS)


def test_a_network_that_was_loaded_decides_as_the_one_that_was_trained(parts: Parts) -> None:
    network = SplitNetwork((1, 16, 16), 2, 0, defended=True)
    network.train(unperturbed(parts.train.x), parts.train.y, TINY, 0)
    twin = SplitNetwork((1, 16, 16), 2, 9, defended=True).load(network.state())
    sent = unperturbed(parts.test.x)
    for name, found in network.probabilities(network.send(sent)).items():
        assert torch.equal(found, twin.probabilities(twin.send(sent))[name])
    assert torch.equal(
        network.classify(parts.test.x).argmax(1), network.probabilities(network.send(sent))["attacked"].argmax(1)
    )


def test_scores() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]])
    found = score(probabilities, torch.tensor([0, 0, 0, 1]))
    assert found == {"accuracy": 100.0, "balanced": 100.0, "auc": 100.0}
    found = score(probabilities, torch.tensor([0, 0, 1, 1]))
    assert (found["accuracy"], found["balanced"], found["auc"]) == (75.0, 75.0, 75.0)
    assert set(score(torch.eye(3), torch.arange(3))) == {"accuracy", "balanced"}


def test_following_counts_the_guides_mistakes_alone() -> None:
    y, guided, classes = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 1, 1])
    assert follow(classes, guided, y) == {"guide": 50.0, "agreement": 75.0, "follow_when_wrong": 50.0}
    assert follow(classes, y, y)["follow_when_wrong"] is None


def test_fitted_weights_find_the_stream_that_is_right() -> None:
    y = torch.arange(60) % 3
    right, wrong = torch.full((60, 3), 0.2), torch.full((60, 3), 0.05)
    right[torch.arange(60), y] = 0.6
    wrong[torch.arange(60), (y + 1) % 3] = 0.9  # sure, and wrong
    streams = {"attacked": wrong, "recovered": right, "fused": wrong}
    weights = fit_weights(streams, y)
    assert weights["recovered"] > 0.6
    assert score(fuse(streams, weights), y)["accuracy"] == 100.0
    assert score(fuse(streams), y)["accuracy"] == 0.0
    assert sum(weights.values()) == pytest.approx(1.0, abs=1e-5)


def test_weights_that_nothing_speaks_against_stay_the_papers() -> None:
    y = torch.arange(30) % 3
    same = torch.eye(3)[y]
    assert fit_weights(dict.fromkeys(STREAMS, same), y) == pytest.approx(dict(BASE_WEIGHTS))


def test_cells_come_after_what_they_need() -> None:
    cells = cells_of("mnist_10k", range(2), settings_of("mnist_10k", quick=False))
    assert len(set(cells)) == len(cells)
    stages = {kind: number for number, stage in enumerate(STAGES) for kind in stage}
    for cell in cells:
        for need in reproduce._needs(cell):
            assert need in cells
            assert stages[need.kind] < stages[cell.kind]


def test_the_shares_of_a_difference_belong_to_the_same_network(results: dict[Cell, dict[str, object]]) -> None:
    found = collect("tiny", [0], TINY, results)  # type: ignore[arg-type]
    figures = figures_of("tiny", found)
    row = find(found["rows"], kind="residual", guide="victim", normalisation="sign", epsilon=0.2)
    foe = find(found["foes"], kind="residual", guide="victim")
    assert row is not None
    assert foe is not None
    scores = {name: row["values"][f"scores.{name}.accuracy"][0] for name in ("paper", "fitted", "undefended", "twin")}
    wanted = scores["paper"] - scores["undefended"]
    assert figures["reproduce.tiny.fused_minus_undefended_paper_weights"] == [pytest.approx(wanted)]
    assert figures["reproduce.tiny.fused_minus_twin_fitted"] == [pytest.approx(scores["fitted"] - scores["twin"])]
    assert foe["values"]["fused"] == row["values"]["scores.paper.accuracy"]
    for who in ("naive", "adaptive"):
        gap = foe["values"]["fused"][0] - foe["values"][f"{who}.victim"][0]
        assert figures[f"reproduce.tiny.fused_minus_reconstructed_{who}"] == [pytest.approx(gap)]


def test_the_sweep_finds_the_factor_of_the_iteration(results: dict[Cell, dict[str, object]]) -> None:
    sweep = results[Cell("tiny", 0, "residual")]["sweep"]
    assert isinstance(sweep, list)
    for row in sweep[1:]:
        assert row["missing"] == pytest.approx((1 - row["step"]) ** row["iterations"], abs=1e-4)
        assert row["beyond"] < 1e-4
    assert {kind: len(results[Cell("tiny", 0, kind)]["rows"]) for kind in ("trace", "batch")} == {  # type: ignore
        "trace": 7,
        "batch": 7,
    }


def test_values_are_kept_by_seed_and_read_as_mean_and_spread(results: dict[Cell, dict[str, object]]) -> None:
    twice = results | {replace(cell, seed=1): result for cell, result in results.items()}
    found = collect("tiny", [0, 1], TINY, twice)  # type: ignore[arg-type]
    assert all(len(values) == 2 for row in found["rows"] for values in row["values"].values())
    assert len(found["rows"]) == 3 * 7 + 4 * 2
    assert spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert spread([2.0]) == (2.0, 0.0)
    assert spread([1.0, None]) is None


def test_what_is_not_done_for_every_seed_is_left_out_and_named(results: dict[Cell, dict[str, object]]) -> None:
    late = Cell("tiny", 1, "foes", HEADLINE, "residual")
    some = results | {replace(cell, seed=1): result for cell, result in results.items()}
    del some[late]
    found = collect("tiny", [0, 1], TINY, some)  # type: ignore[arg-type]
    assert find(found["foes"], guide="victim") is None
    assert not [name for name in figures_of("tiny", found) if "reconstructed" in name]
    assert "foes residual victim-sign-0.2" in reproduce._missing([late], 2)[0]
    samples = figures_of("tiny", found)
    whole = {"figures": {}, "samples": samples, "command": "c", "date": "d", "machine": {"cores": 1, "torch": "2"}}
    page = render({**whole, "seeds": [0, 1], "quick": False, "notes": [], "data": {"tiny": found}})
    assert "Fused minus reconstructed: not measured in this run." in page


def test_a_kept_result_is_found_again_and_a_damaged_one_is_not(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "kept")
    cell = Cell("tiny", 0, "networks")
    key = cache.key(cell, TINY, "digest")
    assert cache.result(key) is None
    cache.keep(key, {"clean": 1}, {"a": torch.arange(3)})
    assert cache.result(key) == {"clean": 1}
    assert cache.tensors(key)["a"].tolist() == [0, 1, 2]
    others = [cache.key(cell, replace(TINY, epochs=3), "digest"), cache.key(cell, TINY, "other")]
    others.append(cache.key(replace(cell, seed=1), TINY, "digest"))
    assert len({key, *others}) == 4
    (tmp_path / "kept" / f"{key}.json").write_text('{"clean"')
    assert cache.result(key) is None
    assert len(code_version()) == 16


def test_without_a_folder_the_shipped_digits_take_its_place(tmp_path: Path) -> None:
    names, notes = reproduce._chosen(None)
    assert names == ["mnist_5k"]
    assert "mias_roi_64 was left out" in notes[0]
    (tmp_path / "mnist_10k.npz").write_bytes(b"")
    names, notes = reproduce._chosen(tmp_path)
    assert names == ["mnist_10k"]
    assert notes == ["mias_roi_64 was left out: mias_roi_64.npz is not in the data folder"]
    with pytest.raises(BatchError, match="--data-folder"):
        read("mias_roi_64", None)


def test_a_run_that_was_stopped_goes_on_from_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of the command: the second computes nothing, and writes the same page."""
    folder = tmp_path / "data"
    folder.mkdir()
    data = dataset(patients=False)
    save_dataset(folder / "mnist_10k.npz", data.train, data.test)
    monkeypatch.setattr(reproduce, "settings_of", lambda name, quick: TINY)
    monkeypatch.setattr(reproduce, "ProcessPoolExecutor", Here)
    argv = ["reproduce", "--data-folder", str(folder), "--seeds", "1", "--cache", str(tmp_path / "kept")]
    argv += ["--out", str(tmp_path / "page.md"), "--json", str(tmp_path / "page.json")]
    monkeypatch.setattr("sys.argv", argv)
    assert reproduce.main() == 0
    first = json.loads((tmp_path / "page.json").read_text())
    computed = Here.submitted
    assert computed == len(cells_of("mnist_10k", [0], TINY))
    assert reproduce.main() == 0
    assert Here.submitted == computed
    assert json.loads((tmp_path / "page.json").read_text()) == first
    page = (tmp_path / "page.md").read_text()
    assert page == render(first)
    assert "mias_roi_64 was left out" in page
    assert all(len(line) < 20_000 for line in page.splitlines())
    assert "naive foe" in page
    assert "adaptive foe" in page
    for path in (tmp_path / "kept").glob("*.safetensors"):
        path.unlink()
    foe = next(path for path in (tmp_path / "kept").glob("*.json") if "adaptive" in path.read_text())
    foe.unlink()
    assert reproduce.main() == 0
    assert computed < Here.submitted <= computed + 3  # the foe's cell and the networks that it needs
    (tmp_path / "page.md").unlink()
    monkeypatch.setattr("sys.argv", [*argv, "--render"])
    assert reproduce.main() == 0
    assert (tmp_path / "page.md").read_text() == render(json.loads((tmp_path / "page.json").read_text()))


class Here:
    """A pool that works at once, in this process."""

    submitted = 0

    def __init__(self, processes: int, **_: object) -> None:
        pass

    def submit(self, work, task):  # type: ignore[no-untyped-def]
        from concurrent.futures import Future

        Here.submitted += 1
        future: Future[dict[str, object]] = Future()
        future.set_result(work(task))
        return future

    def shutdown(self, **_: object) -> None:
        pass


def test_the_committed_page_is_what_the_committed_figures_render() -> None:
    found = json.loads((ROOT / "docs/figures/reproduce.json").read_text())
    assert (ROOT / "docs/reproduction.md").read_text() == render(found)
    assert not found["quick"]
