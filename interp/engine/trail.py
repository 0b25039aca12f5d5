"""Walking a watched record backwards: which sums, scales and norms lie between two tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interp.engine.watch import Call, Value

_SAME = set(
    "dropout contiguous clone to type type_as float half bfloat16 double view reshape unsqueeze squeeze flatten "
    "unflatten detach alias view_as reshape_as".split()
)
_ADD = {"add", "radd", "iadd"}
_MUL = {"mul", "rmul", "imul", "multiply"}
_DIV = {"div", "truediv", "itruediv", "true_divide"}
LINEAR = {"linear", "addmm", "matmul", "mm", "bmm", "conv1d", "baddbmm"}


@dataclass(frozen=True, slots=True)
class Replay:
    """A number or tensor that depends on parameters and on the layer's arguments only, computed anew when asked."""

    func: Callable | None
    args: tuple
    kwargs: dict

    def __call__(self, arguments: Mapping[Any, Any]) -> Any:
        """The value, given the layer call's arguments by position or name."""
        args = _evaluate(self.args, arguments)
        if self.func is None:
            return args[0]
        return self.func(*args, **_evaluate(self.kwargs, arguments))


@dataclass(frozen=True, slots=True)
class Argument:
    """Stands in a `Replay` for one argument of the layer call."""

    key: Any


def _evaluate(tree: Any, arguments: Mapping[Any, Any]) -> Any:
    if isinstance(tree, Replay):
        return tree(arguments)
    if isinstance(tree, Argument):
        return arguments[tree.key]
    if isinstance(tree, (list, tuple)) and type(tree) in (list, tuple):
        return type(tree)(_evaluate(t, arguments) for t in tree)
    if isinstance(tree, dict):
        return {k: _evaluate(v, arguments) for k, v in tree.items()}
    return tree


STREAM_KEYS = (0, "hidden_states")
_LARGEST_CONSTANT = 12


def replay(value: Any, layer: Call | None) -> Replay | None:
    """A `Replay` of a value, or None when it depends on anything but parameters and the layer's other arguments."""
    if not isinstance(value, Value):
        return Replay(None, (value,), {})
    given = {} if layer is None else {id(v): k for k, v in layer.inputs.items() if k not in STREAM_KEYS}
    made: dict[int, Replay] = {}
    # The residual stream must never be mistaken for a constant: only small trees over parameters are replayed.
    stack, order, seen = [value], [], set()
    while stack:
        v = stack.pop()
        if id(v) in seen:
            continue
        seen.add(id(v))
        order.append(v)
        if len(order) > _LARGEST_CONSTANT:
            return None
        if v.op != "parameter" and id(v) not in given:
            if v.func is None or v.overwritten or not v.inputs:
                return None
            stack.extend(v.inputs)

    def build(v: Value) -> Replay:
        if id(v) not in made:
            if v.op == "parameter":
                made[id(v)] = Replay(None, (v.tensor,), {})
            elif id(v) in given:
                made[id(v)] = Replay(None, (Argument(given[id(v)]),), {})
            else:
                made[id(v)] = Replay(v.func, link(v.args), link(v.kwargs))
        return made[id(v)]

    def link(tree: Any) -> Any:
        if isinstance(tree, Value):
            return build(tree)
        if isinstance(tree, (list, tuple)) and type(tree) in (list, tuple):
            return type(tree)(link(t) for t in tree)
        if isinstance(tree, dict):
            return {k: link(v) for k, v in tree.items()}
        return tree

    return build(value)


@dataclass(frozen=True, slots=True)
class Add:
    """`stream + branch`."""

    branch: Value
    result: Value


@dataclass(frozen=True, slots=True)
class Scale:
    """`stream * factor`."""

    factor: Replay
    result: Value


@dataclass(frozen=True, slots=True)
class Norm:
    """`norm(stream)`, by a module without matrices."""

    call: Call
    result: Value


Step = Add | Scale | Norm


def normlike(module: nn.Module) -> bool:
    """Whether a module could be a norm: no matrix among its parameters, some parameter or a telling class name."""
    sizes = [p.ndim for p in module.parameters()]
    return all(n <= 1 for n in sizes) and (bool(sizes) or "norm" in type(module).__name__.lower())


def trail(
    value: Value,
    goal: Callable[[Value], bool],
    *,
    layer: Call | None,
    adds: bool = True,
    dead: set[int] | None = None,
) -> list[Step] | None:
    """The steps from the first ancestor that meets `goal` up to `value`, or None if there is no such path.

    Args:
        value: where the path ends.
        goal: what its beginning is.
        layer: the layer call, whose arguments may enter scales.
        adds: whether sums may be crossed.
        dead: ids of values that are known to lead nowhere.
    """
    dead = set() if dead is None else dead
    if goal(value):
        return []
    if id(value) in dead:
        return None
    name = value.op.strip("_")
    found: list[Step] | None = None
    if value.inputs and (name in _SAME or (name == "getitem" and value.tensor.shape == value.inputs[0].tensor.shape)):
        found = trail(value.inputs[0], goal, layer=layer, adds=adds, dead=dead)
    elif name in _ADD and adds and not value.kwargs.get("alpha"):
        operands = [a for a in value.args[:2] if isinstance(a, Value)]
        for i, operand in enumerate(operands):
            other = operands[1 - i] if len(operands) == 2 else None
            before = None if other is None else trail(operand, goal, layer=layer, adds=adds, dead=dead)
            if before is not None and other is not None:
                found = [*before, Add(other, value)]
                break
    elif name in _MUL or name in _DIV:
        found = _through_scale(value, name in _DIV, goal, layer, adds, dead)
    if found is None:
        for call, _path in value.made_by:
            given = [v for k, v in call.inputs.items() if k == 0 or k == "hidden_states"]
            if len(given) == 1 and normlike(call.module) and given[0] is not value:
                before = trail(given[0], goal, layer=layer, adds=adds, dead=dead)
                if before is not None:
                    return [*before, Norm(call, value)]
        dead.add(id(value))
    return found


def _through_scale(
    value: Value, division: bool, goal: Callable[[Value], bool], layer: Call | None, adds: bool, dead: set[int]
) -> list[Step] | None:
    if len(value.args) < 2:
        return None
    for i in (0, 1) if not division else (0,):
        stream, factor = value.args[i], value.args[1 - i]
        if not isinstance(stream, Value) or stream.op == "parameter":
            continue
        again = replay(factor, layer)
        if again is None:
            continue
        before = trail(stream, goal, layer=layer, adds=adds, dead=dead)
        if before is not None:
            if division:
                again = Replay(torch.reciprocal, (Replay(torch.as_tensor, (again,), {}),), {})
            return [*before, Scale(again, value)]
    return None


def split_sum(value: Value, inside: Callable[[Call], bool], layer: Call) -> list[tuple[Value, list[Scale]]]:
    """The terms of a branch: sums are taken apart until a module's own output (or something opaque) is met.

    Args:
        value: the branch.
        inside: which calls count as modules of the layer.
        layer: the layer call.

    Returns:
        Each term's source value and the scales applied to it afterwards, innermost first.
    """
    if any(inside(call) for call, _ in value.made_by):
        return [(value, [])]
    name = value.op.strip("_")
    if name in _SAME and value.inputs:
        return split_sum(value.inputs[0], inside, layer)
    if name in _ADD and not value.kwargs.get("alpha"):
        operands = [a for a in value.args[:2] if isinstance(a, Value)]
        if len(operands) == 2:
            return [t for o in operands for t in split_sum(o, inside, layer)]
    if name in _MUL and len(value.args) >= 2:
        for i in (0, 1):
            inner, factor = value.args[i], value.args[1 - i]
            again = replay(factor, layer)
            if isinstance(inner, Value) and inner.op != "parameter" and again is not None:
                return [(v, [*s, Scale(again, value)]) for v, s in split_sum(inner, inside, layer)]
    return [(value, [])]


def apply_scales(x: Tensor, scales: list[Scale] | tuple[Scale, ...], arguments: Mapping[Any, Any]) -> Tensor:
    """`x` times every factor, in order."""
    for scale in scales:
        x = x * scale.factor(arguments)
    return x
