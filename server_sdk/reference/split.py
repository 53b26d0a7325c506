"""Cut a network in two: the layers up to the cut run on the device, the rest on the server.

A ``torch.nn.Sequential`` is cut between its children, whatever these are inside. Any other module, and a layer inside a
child, is traced by ``torch.fx``, functional calls and additions included.
"""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx, nn

from server_sdk.errors import ModelError

__all__ = ["last_layer", "split"]

_SHOWN = 24
_DROPOUT: Mapping[Any, type[nn.Module]] = {
    nn.functional.dropout: nn.Dropout,
    nn.functional.dropout1d: nn.Dropout1d,
    nn.functional.dropout2d: nn.Dropout2d,
    nn.functional.dropout3d: nn.Dropout3d,
    nn.functional.alpha_dropout: nn.AlphaDropout,
}
_OUT_OF_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def split(model: nn.Module, cut: str) -> tuple[nn.Module, nn.Module]:
    """Split behind the layer named ``cut``.

    Both halves hold the model's own layers under their own names, not copies.

    Args:
        model: takes one tensor and gives one.
        cut: name of the layer or block whose result is sent, as ``named_modules`` has it: ``relu2``, ``features.2``,
            ``layer2``.

    Returns:
        (front, back).

    Raises:
        ModelError: there is no such layer, nothing is left behind it, the back needs more than its result (a cut inside
            a residual branch, for instance), both halves have a weight in common, or the model cannot be traced.
    """
    if isinstance(model, nn.Sequential):
        layers = list(zip(model._modules, model, strict=True))  # named_children would skip a layer that is used twice
        names = [name for name, _ in layers]
        if cut in names[:-1]:
            border = names.index(cut) + 1
            return nn.Sequential(OrderedDict(layers[:border])), nn.Sequential(OrderedDict(layers[border:]))
    trace = _Trace(model)
    node = trace.node_of(cut)
    crossing = trace.crossing(node)
    if crossing:
        raise ModelError(
            f"behind {cut!r} the network still needs {trace.told(crossing)}, and only the result of {cut!r} is sent: "
            f"{trace.choices()}"
        )
    front, back = trace.halves(node)
    shared = {id(tensor) for tensor in front.state_dict(keep_vars=True).values()}
    for name, tensor in back.state_dict(keep_vars=True).items():
        if id(tensor) in shared:
            raise ModelError(f"{name!r} is used before and behind the cut {cut!r}: give each half a layer of its own")
    return front, back


def last_layer(half: nn.Module) -> nn.Module:
    """The layer that gives the result of a half; the half itself where no layer does."""
    if isinstance(half, nn.Sequential) and len(half):
        return last_layer(half[-1])
    if isinstance(half, fx.GraphModule):
        result = next(iter(half.graph.output_node().all_input_nodes))
        if result.op == "call_module":
            return half.get_submodule(str(result.target))
    return half


class _Tracer(fx.Tracer):
    """Remembers the result of each module by its name, and where it was when something went wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.results: dict[str, list[fx.Node | None]] = {}
        self.inside: list[str] = []

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        name = self.path_of_module(m)
        self.inside.append(name)
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()
        self.results.setdefault(name, []).append(result.node if isinstance(result, fx.Proxy) else None)
        return result


class _Trace:
    """The graph of a model, the same in training and in evaluation."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kind = type(model).__name__
        self._twin = copy.deepcopy(model)
        self._own: dict[str, nn.Module] = {}
        self._tracer, graph = self._traced(training=True)
        _, settled = self._traced(training=False)
        self._name_dropout(graph, settled)
        if _shape(graph) != _shape(settled):
            raise ModelError(
                f"{self._kind} computes otherwise in training than in evaluation by more than its layers do: take "
                "what asks for self.training out of its forward, as a layer of torch.nn"
            )
        for node in graph.nodes:
            _make_out_of_place(node)
        inputs = [node for node in graph.nodes if node.op == "placeholder" and node.users]
        result = graph.output_node().args[0]
        if len(inputs) != 1 or not isinstance(result, fx.Node):
            raise ModelError(f"{self._kind} must take one tensor and give one: write a module around it that does")
        self._graph, self._input, self._result = graph, inputs[0], result

    def node_of(self, cut: str) -> fx.Node:
        results = self._tracer.results.get(cut)
        if not results:
            raise ModelError(f"no layer {cut!r} to cut behind: {self.choices()}")
        if len(results) > 1:
            raise ModelError(f"layer {cut!r} is used {len(results)} times: {self.choices()}")
        node = results[0]
        if node is None:
            raise ModelError(f"layer {cut!r} gives more than one tensor: {self.choices()}")
        if node is self._result:
            raise ModelError(f"no layer is left behind {cut!r}: {self.choices()}")
        return node

    def choices(self) -> str:
        """What one could cut at, in words."""
        found = [
            name
            for name, results in self._tracer.results.items()
            if len(results) == 1 and (node := results[0]) is not None
            if node is not self._result and not self.crossing(node)
        ]
        order = {node: number for number, node in enumerate(self._graph.nodes)}
        found.sort(key=lambda name: order[self._tracer.results[name][0]])
        if not found:
            return f"{self._kind} has no layer that it can be cut behind: give its parts as layers of their own"
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        return f"the layers are {', '.join(found[:_SHOWN])}{more}"

    def crossing(self, cut: fx.Node) -> list[fx.Node]:
        """What the back needs of the front beside the cut's own value."""
        front = self._needed(cut, stop=None)
        behind = self._needed(self._result, stop=cut) - front
        used = {node for each in behind for node in each.all_input_nodes} & front - {cut}
        return [node for node in self._graph.nodes if node in used and node.op != "get_attr"]

    def told(self, nodes: Collection[fx.Node]) -> str:
        """Values in words, as results of layers where they are."""
        told = []
        for node in nodes:
            layers = [name for name, results in self._tracer.results.items() if node in results]
            if node.op == "placeholder":
                told.append("its input")
            elif layers:
                told.append(f"the result of {min(layers, key=len)!r}")
            else:
                told.append(f"the value {node.name!r}")
        return ", ".join(told)

    def halves(self, cut: fx.Node) -> tuple[fx.GraphModule, fx.GraphModule]:
        front = self._half(self._needed(cut, stop=None), self._input, cut)
        back = self._half(self._needed(self._result, stop=cut), cut, self._result)
        return front, back

    def _needed(self, result: fx.Node, stop: fx.Node | None) -> set[fx.Node]:
        found: set[fx.Node] = set()
        waiting = [result]
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += [] if node is stop else node.all_input_nodes
        return found

    def _half(self, nodes: Collection[fx.Node], takes: fx.Node, gives: fx.Node) -> fx.GraphModule:
        graph = fx.Graph()
        copies = {takes: graph.placeholder("x")}
        parts: dict[str, Any] = {}
        for node in self._graph.nodes:
            if node in nodes and node is not takes:
                copies[node] = graph.node_copy(node, lambda other: copies[other])
                if node.op in ("call_module", "get_attr"):
                    parts[str(node.target)] = self._part(str(node.target))
        graph.output(copies[gives])
        half = fx.GraphModule(parts, graph, self._kind)
        half.training = self._model.training
        return half

    def _part(self, name: str) -> Any:
        if name in self._own:
            return self._own[name]
        for holder in (self._model, self._twin):  # the twin alone has the constants that tracing found
            try:
                return operator.attrgetter(name)(holder)
            except AttributeError:
                continue
        raise ModelError(f"{self._kind} has no {name!r} any more: build it again")

    def _traced(self, *, training: bool) -> tuple[_Tracer, fx.Graph]:
        tracer = _Tracer()
        try:
            return tracer, tracer.trace(self._twin.train(training))
        except Exception as exc:  # whatever a forward does with a value that is not there
            where = f"layer {tracer.inside[-1]!r} of {self._kind}" if tracer.inside else self._kind
            reason = " ".join(str(exc).split())[:200]
            raise ModelError(
                f"{where} cannot be traced ({type(exc).__name__}: {reason}): its forward must not ask for values or "
                "sizes of tensors; or put your layers into a torch.nn.Sequential, which is cut between them untraced"
            ) from exc

    def _name_dropout(self, *graphs: fx.Graph) -> None:
        """Functional dropout becomes a layer, which knows when it trains."""
        kept = [[node for node in graph.nodes if node.target in _DROPOUT] for graph in graphs]
        if len({len(nodes) for nodes in kept}) != 1:
            return
        for number, pair in enumerate(zip(*kept, strict=True)):
            options = [_dropout_options(node) for node in pair]
            trains = [option.pop("training", True) for option in options]
            if trains != [True, False] or options[0] != options[1]:
                continue
            name = f"dropout_{number}"
            while hasattr(self._twin, name):
                name += "_"
            self._own[name] = _DROPOUT[pair[0].target](options[0].get("p", 0.5)).train(self._model.training)
            for node, graph in zip(pair, graphs, strict=True):
                with graph.inserting_before(node):
                    layer = graph.create_node("call_module", name, (node.all_input_nodes[0],), {})
                node.replace_all_uses_with(layer)
                graph.erase_node(node)
                for results in self._tracer.results.values():
                    results[:] = [layer if result is node else result for result in results]


def _dropout_options(node: fx.Node) -> dict[str, Any]:
    options = dict(zip(("p", "training", "inplace"), node.args[1:], strict=False)) | dict(node.kwargs)
    options.pop("input", None)
    options.pop("inplace", None)
    return options


def _shape(graph: fx.Graph) -> list[str]:
    return [f"{node.op} {node.target} {node.args} {node.kwargs}" for node in graph.nodes]


def _make_out_of_place(node: fx.Node) -> None:
    """A half must not change what it was given: others have it too."""
    if node.op == "call_function" and node.target in _OUT_OF_PLACE:
        node.target = _OUT_OF_PLACE[node.target]
    if node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
    method = node.target
    in_place = node.op == "call_method" and isinstance(method, str) and method[-1] == "_" and method[-2:] != "__"
    if in_place and hasattr(torch.Tensor, str(method)[:-1]):
        node.target = str(method)[:-1]
