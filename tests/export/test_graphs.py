"""The three graphs of a bundle against plain torch, never against the functions that were traced."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from export.errors import ExportError
from export.graphs import GraphSet, Optimizer, build_graphs
from server_sdk.reference.guide import Guide
from server_sdk.reference.networks import reference_network, step_network
from server_sdk.reference.perturbation import Perturbation
from server_sdk.reference.split import split

CLASSES = 5
BATCHES = (1, 3, 8)


@dataclass(frozen=True)
class Setting:
    front: nn.Module
    guide: nn.Module | None
    shape: tuple[int, ...]
    perturbation: Perturbation | None
    downsample: int
    optimizer: Optimizer

    def build(self) -> GraphSet:
        return build_graphs(
            self.front,
            self.guide,
            input_shape=self.shape,
            perturbation=self.perturbation,
            downsample=self.downsample,
            optimizer=self.optimizer,
        )


def _front(channels: int, grid: tuple[int, ...]) -> nn.Module:
    front, _ = split(reference_network(channels, grid, CLASSES), "relu2")
    for layer in front.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
            nn.init.uniform_(layer.running_mean, -0.3, 0.3)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return front


def _settings() -> dict[str, Setting]:
    torch.manual_seed(3)
    sgd, adam = Optimizer("sgd", 0.05, momentum=0.9), Optimizer("adam", 0.01, betas=(0.8, 0.99))
    image, signal = (2, 12, 12), (1, 36)
    step_front, _ = split(step_network(10), "pool2")
    return {
        "image_sign_momentum": Setting(
            _front(9, (6, 6)), Guide(image, CLASSES), image, Perturbation("sign", 0.2), 2, sgd
        ),
        "image_max_adam": Setting(_front(3, (12, 12)), Guide(image, CLASSES), image, Perturbation("max", 0.3), 1, adam),
        "signal_sign_adam": Setting(
            _front(3, (18,)), Guide(signal, CLASSES), signal, Perturbation("sign", 0.2), 2, adam
        ),
        "vanilla_sgd": Setting(step_front, None, (1, 26, 28), None, 1, Optimizer("sgd", 0.1)),
        "vanilla_downsampled": Setting(_front(4, (4, 5)), None, (1, 8, 10), None, 2, sgd),
    }


SETTINGS = _settings()
PERTURBED = [name for name, setting in SETTINGS.items() if setting.perturbation is not None]
# a first step of sgd at rate 1 shows the gradient; adam's does not
STEPPED = [name for name, setting in SETTINGS.items() if setting.optimizer.kind == "sgd"]


@pytest.fixture(scope="session")
def built() -> dict[str, GraphSet]:
    return {name: setting.build() for name, setting in SETTINGS.items()}


def _to_depth(x: Tensor) -> Tensor:
    """Space-to-depth by slices: channel c's blocks, row offset before column offset."""
    planes = []
    for channel in range(x.shape[1]):
        if x.dim() == 3:
            planes += [x[:, channel, offset::2] for offset in range(2)]
        else:
            planes += [x[:, channel, row::2, column::2] for row in range(2) for column in range(2)]
    return torch.stack(planes, dim=1)


def _seen(perturbed: Tensor, scaled: Tensor | None, downsample: int) -> Tensor:
    image = perturbed.dim() == 4
    seen = _to_depth(perturbed) if downsample == 2 else perturbed
    if scaled is None:
        return seen
    average = scaled.mean(dim=1, keepdim=True)
    if downsample == 2:
        pool = nn.functional.avg_pool2d if image else nn.functional.avg_pool1d
        average = pool(average, 2)
    return torch.cat([seen, average], dim=1)


def _shown(setting: Setting, feeds: Mapping[str, np.ndarray]) -> Tensor:
    """What the front saw of a batch, from what the train graph said of its perturbation (tested by itself above)."""
    if setting.perturbation is None:
        return _seen(torch.from_numpy(feeds["x"]).double(), None, setting.downsample)
    perturbed, scaled = (torch.from_numpy(feeds[name]).double() for name in ("perturbed", "map"))
    return _seen(perturbed, scaled, setting.downsample)


def _saliency(guide: nn.Module, x: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """One gradient per class, summed: the definition, not the two products."""
    with torch.no_grad():
        logits = guide(x)
    chosen = torch.where(label < 0, logits.argmax(1), label)
    slopes = []
    for k in range(logits.shape[1]):
        leaf = x.clone().requires_grad_()
        slopes.append(torch.autograd.grad(guide(leaf)[:, k].sum(), leaf)[0])
    slope = torch.stack(slopes, 1)
    rows = torch.arange(len(x))
    inside = chosen < logits.shape[1]
    alpha = slope[rows, chosen.clamp(max=logits.shape[1] - 1)] * inside.view(-1, *[1] * (x.dim() - 1))
    beta = slope.sum(1) - alpha
    return logits, torch.where((alpha < 0) & (beta > 0), -alpha * beta, torch.zeros_like(alpha))


def _scaled(saliency: Tensor, how: str, epsilon: float) -> Tensor:
    if how == "sign":
        return epsilon * (saliency > 0).double()
    rows = [epsilon * row / row.max() if row.max() > 0 else row for row in saliency]
    return torch.stack(rows)


def _draw(setting: Setting, batch: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).random((batch, *setting.shape), dtype=np.float32)
    x[..., :3] = 0.0
    return x


def _forward_feeds(
    setting: Setting, graphs: GraphSet, x: np.ndarray, label: np.ndarray, epsilon: float
) -> dict[str, np.ndarray]:
    feeds = {"x": x} | {name: t for name, t in graphs.tensors.items() if name[0] in "pb"}
    if setting.perturbation is not None:
        feeds |= {"label": label.astype(np.int64), "epsilon": np.array(epsilon, np.float32)}
    return feeds


def _labels(batch: int) -> np.ndarray:
    return np.arange(batch) % (CLASSES + 1) - 1


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", PERTURBED)
def test_perturbation(built, run, close, name: str, batch: int) -> None:
    setting = SETTINGS[name]
    x, label = _draw(setting, batch), _labels(batch)
    guide = copy.deepcopy(setting.guide).double()
    logits, saliency = _saliency(guide, torch.from_numpy(x).double(), torch.from_numpy(label))
    wanted = _scaled(saliency, setting.perturbation.normalisation, 0.15)
    for graph in (built[name].step.train, built[name].infer):
        got = run(graph, _forward_feeds(setting, built[name], x, label, 0.15))
        close(got["guide"], logits, "guide")
        # float32 cannot tell the sign of a slope that is a rounding error
        sure = ((saliency == 0) | (saliency > 1e-9 * saliency.max())).numpy()
        assert sure.mean() > 0.9 and (saliency > 0).any()
        close(np.where(sure, got["map"], wanted), wanted, "map")
        close(got["perturbed"], (torch.from_numpy(x + got["map"])).clamp(0, 1), "perturbed")
        assert got["perturbed"].min() >= 0.0 and got["perturbed"].max() <= 1.0


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", SETTINGS)
def test_activations(built, run, close, name: str, batch: int) -> None:
    setting = SETTINGS[name]
    x, label = _draw(setting, batch, seed=1), _labels(batch)
    for graph, training in ((built[name].step.train, True), (built[name].infer, False)):
        got = run(graph, _forward_feeds(setting, built[name], x, label, 0.2))
        seen = _seen(
            torch.from_numpy(got.get("perturbed", x)).double(),
            torch.from_numpy(got["map"]).double() if "map" in got else None,
            setting.downsample,
        )
        front = copy.deepcopy(setting.front).double().train(training)
        close(got["activations"], front(seen), f"activations, training={training}")


@pytest.mark.parametrize("name", PERTURBED)
def test_the_guide_predicts_where_no_label_is_given(built, run_fast, name: str) -> None:
    setting, x = SETTINGS[name], _draw(SETTINGS[name], 8)
    blind = run_fast(built[name].step.train, _forward_feeds(setting, built[name], x, np.full(8, -1), 0.2))
    predicted = blind["guide"].argmax(1)
    told = run_fast(built[name].step.train, _forward_feeds(setting, built[name], x, predicted, 0.2))
    other = run_fast(built[name].step.train, _forward_feeds(setting, built[name], x, (predicted + 1) % CLASSES, 0.2))
    np.testing.assert_array_equal(blind["map"], told["map"])
    assert (blind["map"] != other["map"]).any()


@pytest.mark.parametrize("name", PERTURBED)
def test_epsilon_zero_changes_nothing(built, run, name: str) -> None:
    setting, x = SETTINGS[name], _draw(SETTINGS[name], 3)
    got = run(built[name].step.train, _forward_feeds(setting, built[name], x, _labels(3), 0.0))
    np.testing.assert_array_equal(got["perturbed"], x)
    np.testing.assert_array_equal(got["map"], np.zeros_like(x))


@pytest.mark.parametrize("name", PERTURBED)
def test_an_all_zero_map_stays_zero(built, run, name: str) -> None:
    setting, x = SETTINGS[name], _draw(SETTINGS[name], 3)
    label = np.array([0, CLASSES + 7, 1])  # no such class: alpha is zero, and with it the map
    got = run(built[name].step.train, _forward_feeds(setting, built[name], x, label, 0.2))
    np.testing.assert_array_equal(got["map"][1], np.zeros_like(x[1]))
    np.testing.assert_array_equal(got["perturbed"][1], x[1])
    assert np.isfinite(got["map"]).all() and got["map"][0].any() and got["map"][2].any()


def _torch_optimizer(setting: Setting, front: nn.Module) -> torch.optim.Optimizer:
    rule = setting.optimizer
    if rule.kind == "adam":
        return torch.optim.Adam(front.parameters(), lr=1.0, betas=rule.betas, eps=rule.epsilon)
    return torch.optim.SGD(front.parameters(), lr=1.0, momentum=rule.momentum)


def _torch_state(front: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """As the graphs carry it: momentum by parameter, Adam's moments of all parameters in a row."""
    kept = {name: optimizer.state[parameter] for name, parameter in front.named_parameters()}
    if isinstance(optimizer, torch.optim.Adam):
        rows = {
            short: torch.cat([state[long].flatten() for state in kept.values()])
            for short, long in (("m", "exp_avg"), ("v", "exp_avg_sq"))
        }
        return {**rows, "t": next(iter(kept.values()))["step"]}
    return {f"{n}.momentum": s["momentum_buffer"] for n, s in kept.items() if s.get("momentum_buffer") is not None}


@pytest.mark.parametrize("name", SETTINGS)
def test_training_steps(built, run, step, close, name: str) -> None:
    """Weights, statistics and optimizer state over several steps of changing batch size and rate."""
    setting = SETTINGS[name]
    front = copy.deepcopy(setting.front).double().train()
    optimizer = _torch_optimizer(setting, front)
    carried: Mapping[str, np.ndarray] = built[name].tensors
    generator = np.random.default_rng(8)
    for number, batch in enumerate((3, 1, 8, 3, 3)):
        x = _draw(setting, batch, seed=number)
        feeds = {**carried, "x": x, "label": _labels(batch), "epsilon": np.array(0.2, np.float32)}
        feeds |= run(built[name].step.train, feeds)
        out = front(_shown(setting, feeds))
        close(feeds["activations"], out, f"activations of step {number}", relative=1e-4)
        gradient = generator.standard_normal(out.shape).astype(np.float32)
        rate = 0.01 / (number + 1)
        got = step(run, built[name], feeds | {"gradient": gradient, "rate": np.array(rate, np.float32)})
        optimizer.zero_grad()
        (out * torch.from_numpy(gradient).double()).sum().backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        wanted = {f"next.p.{key}": value for key, value in front.named_parameters()}
        buffers = [(key, b) for key, b in front.named_buffers() if "num_batches" not in key]
        wanted |= {f"next.b.{key}": value for key, value in buffers}
        wanted |= {f"next.s.{key}": value for key, value in _torch_state(front, optimizer).items()}
        assert list(got) == [f"next.{key}" for key in carried]
        assert got.keys() == wanted.keys()
        sizes = [parameter.numel() for parameter in front.parameters()]
        for key, value in wanted.items():
            # a row by its parameters: beside large gradients small ones would count for nothing
            parts = sizes if key in ("next.s.m", "next.s.v") else [value.numel()]
            for mine, theirs in zip(
                torch.from_numpy(got[key]).flatten().split(parts), value.flatten().split(parts), strict=True
            ):
                close(mine.numpy(), theirs, f"{key} after step {number}", relative=1e-4)
        carried = {key.removeprefix("next."): value for key, value in got.items()}


@pytest.mark.parametrize("name", STEPPED)
def test_front_gradient_matches_finite_differences(built, run_fast, step, name: str) -> None:
    setting, graphs = SETTINGS[name], built[name]
    x, generator = _draw(setting, 3, seed=4), np.random.default_rng(2)
    feeds = {**graphs.tensors, "x": x, "label": _labels(3), "epsilon": np.array(0.2, np.float32)}
    feeds |= run_fast(graphs.step.train, feeds)
    seen = _shown(setting, feeds)
    front = copy.deepcopy(setting.front).double().train()
    gradient = generator.standard_normal(front(seen).shape).astype(np.float32)
    got = step(run_fast, graphs, feeds | {"gradient": gradient, "rate": np.array(1.0, np.float32)})
    for name_, parameter in front.named_parameters():
        along = generator.standard_normal(parameter.shape)
        losses = []
        for side in (1e-6, -1e-6):
            moved = copy.deepcopy(front)
            moved.get_parameter(name_).data += side * torch.from_numpy(along)
            losses.append(float((moved(seen).detach().numpy() * gradient).sum()))
        found = (graphs.tensors[f"p.{name_}"].astype(np.float64) - got[f"next.p.{name_}"]) * along
        slope = (losses[0] - losses[1]) / 2e-6
        assert abs(slope - found.sum()) < 1e-4 * np.abs(found).sum() + 1e-4, name_


@pytest.mark.parametrize("name", SETTINGS)
def test_names_shapes_and_operators(built, name: str) -> None:
    setting, graphs = SETTINGS[name], built[name]
    mapped = setting.perturbation is not None
    parameters = [f"p.{key}" for key, _ in setting.front.named_parameters()]
    statistics = [f"b.{key}" for key, _ in setting.front.named_buffers() if "num_batches" not in key]
    moments = [f"s.{key}.momentum" for key, _ in setting.front.named_parameters()]
    state = ["s.m", "s.v", "s.t"] if setting.optimizer.kind == "adam" else moments
    state = [] if setting.optimizer == Optimizer("sgd", 0.1) else state
    carried = [*parameters, *statistics, *state]
    entry = ["x", "label", "epsilon"] if mapped else ["x"]
    results = ["activations", "perturbed", "map", "guide"] if mapped else ["activations"]
    wanted = {
        "train": ([*entry, *parameters, *statistics], [*results, *(f"next.{key}" for key in statistics)]),
        "infer": ([*entry, *parameters, *statistics], results),
        "prepare": ([], []),
        "backward": (["gradient", "rate", *parameters, *state], [f"next.{key}" for key in (*parameters, *state)]),
    }
    assert list(graphs.tensors) == carried
    assert all(tensor.dtype == np.float32 for tensor in graphs.tensors.values())
    batched = {"x", "label", "perturbed", "map", "gradient", "activations", "guide"}
    for kind, (inputs, outputs) in wanted.items():
        model = onnx.load_from_string(graphs.by_name[kind])
        public = [v for v in (*model.graph.input, *model.graph.output) if v.name[:2] not in ("f.", "r.")]
        taken = [value.name for value in model.graph.input if value in public]
        given = [value.name for value in model.graph.output if value in public]
        if kind == "backward" and setting.optimizer.kind == "adam":
            # what it needs of the parameters, all in a row, comes from prepare
            inputs = [key for key in inputs if key not in parameters or key in taken]
        # prepare may also read what train shows; nobody else reads or gives more than its own
        assert taken == inputs or (kind == "prepare" and set(taken) <= {*entry, *results, *parameters}), kind
        assert given == outputs, kind
        for value in public:
            tensor = value.type.tensor_type
            dims = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
            if value.name in batched:
                assert dims[0] == "N" and all(isinstance(dim, int) for dim in dims[1:])
            else:
                assert tuple(dims) == graphs.tensors.get(value.name.removeprefix("next."), np.zeros(())).shape
            kind_ = onnx.TensorProto.INT64 if value.name == "label" else onnx.TensorProto.FLOAT
            assert tensor.elem_type == kind_
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
        assert {node.domain for node in model.graph.node} <= {""}
        assert not model.metadata_props and not model.graph.value_info and not model.functions
        assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_initial_tensors_are_the_front_and_zeros(built) -> None:
    setting, graphs = SETTINGS["image_max_adam"], built["image_max_adam"]
    for key, parameter in setting.front.named_parameters():
        np.testing.assert_array_equal(graphs.tensors[f"p.{key}"], parameter.detach().numpy())
    assert not any(tensor.any() for key, tensor in graphs.tensors.items() if key.startswith("s."))


def test_the_same_front_gives_the_same_bytes_and_is_left_alone(built) -> None:
    setting = SETTINGS["vanilla_downsampled"]
    before = copy.deepcopy(setting.front.state_dict())
    again = setting.build()
    assert again.step == built["vanilla_downsampled"].step and again.infer == built["vanilla_downsampled"].infer
    for key, value in setting.front.state_dict().items():
        assert torch.equal(value, before[key])


@given(
    channels=st.integers(1, 3),
    grid=st.lists(st.integers(4, 7), min_size=1, max_size=2),
    batch=st.integers(1, 6),
    hidden=st.integers(1, 4),
)
@settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # a shrink would export hundreds of graphs
    suppress_health_check=list(HealthCheck),
)
def test_drawn_shapes(run_fast, step, close, channels: int, grid: list[int], batch: int, hidden: int) -> None:
    shape = (channels, *[2 * extent for extent in grid])
    convolution, norm = (nn.Conv2d, nn.BatchNorm2d) if len(grid) == 2 else (nn.Conv1d, nn.BatchNorm1d)
    pool = nn.MaxPool2d if len(grid) == 2 else nn.MaxPool1d
    torch.manual_seed(channels)
    front = nn.Sequential(
        convolution(channels * 2 ** len(grid) + 1, hidden, 3, padding=1, bias=False),
        norm(hidden),
        nn.ReLU(inplace=True),
        pool(2),
    )
    guide = Guide(shape, CLASSES)
    setting = Setting(front, guide, shape, Perturbation("sign", 0.2), 2, Optimizer("sgd", 0.1))
    graphs = setting.build()
    x = _draw(setting, batch, seed=batch)
    got = run_fast(graphs.step.train, _forward_feeds(setting, graphs, x, _labels(batch), 0.2))
    _, saliency = _saliency(
        copy.deepcopy(guide).double(), torch.from_numpy(x).double(), torch.from_numpy(_labels(batch))
    )
    wanted = _scaled(saliency, "sign", 0.2)
    sure = ((saliency == 0) | (saliency > 1e-9 * saliency.max())).numpy()
    close(np.where(sure, got["map"], wanted), wanted, "map")
    exact = copy.deepcopy(front).double().train()
    mapped = torch.from_numpy(got["map"]).double()
    out = exact(_seen(torch.from_numpy(got["perturbed"]).double(), mapped, 2))
    close(got["activations"], out, "activations")
    out.sum().backward()
    feeds = {**graphs.tensors, **got, "rate": np.array(1.0, np.float32)}
    stepped = step(run_fast, graphs, feeds | {"gradient": np.ones_like(got["activations"])})
    for key, parameter in exact.named_parameters():
        change = graphs.tensors[f"p.{key}"] - stepped[f"next.p.{key}"]
        close(change, parameter.grad, key, relative=1e-4)


def test_a_perturbation_needs_a_guide() -> None:
    with pytest.raises(ExportError, match="needs a guide"):
        build_graphs(
            nn.ReLU(),
            None,
            input_shape=(1, 8, 8),
            perturbation=Perturbation(),
            downsample=1,
            optimizer=Optimizer(),
        )


@pytest.mark.parametrize(
    ("front", "downsample", "message"),
    [
        (nn.ReLU(), 3, "downsample is 3"),
        (nn.Sequential(nn.Conv2d(2, 3, 3)), 1, r"does not take the input \(1, 8, 8\)"),
        (nn.Sequential(nn.Conv2d(1, 3, 3), nn.Dropout(0.1)), 1, r"layer '1' \(Dropout\)"),
        (nn.Sequential(nn.MaxPool2d(2), nn.ReLU()), 1, "the front has no weights to train: place the cut behind"),
    ],
)
def test_what_cannot_be_built_is_named(front: nn.Module, downsample: int, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        build_graphs(
            front,
            None,
            input_shape=(1, 8, 8),
            perturbation=None,
            downsample=downsample,
            optimizer=Optimizer(),
        )
