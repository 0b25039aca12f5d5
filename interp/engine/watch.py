"""Watch one forward pass: which operation and which module made each tensor, and from what.

The record is a graph of `Value`s. It is made once for each model, on a tiny input, to find the anatomy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from interp.engine.attention import AttentionCall, record_attention


@dataclass(eq=False, slots=True)
class Value:
    """One tensor at one moment: what made it and who took it."""

    tensor: Tensor
    op: str
    func: Callable | None = None
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    inputs: list[Value] = field(default_factory=list)
    made_by: list[tuple[Call, tuple]] = field(default_factory=list)
    read_by: list[tuple[Call, Any]] = field(default_factory=list)
    attention: AttentionCall | None = None
    overwritten: bool = False


@dataclass(eq=False, slots=True)
class Call:
    """One call of one module; `form` is the length of a tuple output, or None for anything else."""

    module: nn.Module
    name: str
    inputs: dict[Any, Value] = field(default_factory=dict)
    outputs: dict[tuple, Value] = field(default_factory=dict)
    parent: Call | None = None
    form: int | None = None


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors(item)
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from _tensors(item)


def outputs_of(out: Any) -> dict[tuple, Tensor]:
    """The tensors of a module's output by their path: `()` for a bare tensor, `(0,)`, `("name",)`."""
    if isinstance(out, Tensor):
        return {(): out}
    if isinstance(out, Mapping):
        return {(k,): v for k, v in out.items() if isinstance(v, Tensor)}
    if isinstance(out, (tuple, list)):
        return {(i,): v for i, v in enumerate(out) if isinstance(v, Tensor)}
    return {}


class Watch(TorchFunctionMode):
    """Context in which every torch function and every module call is recorded."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.attention: list[AttentionCall] = []
        self._current: dict[int, Value] = {}
        self._keep: list[Tensor] = []
        self._stack: list[Call] = []
        self._model = model
        self._names = {id(m): n for n, m in model.named_modules()}
        self.parameters = {id(p): n for n, p in [*model.named_parameters(), *model.named_buffers()]}
        self._offloads = any(p.is_meta for p in model.parameters())
        self._handles: list = []

    def value(self, tensor: Tensor) -> Value:
        """The present `Value` of a tensor; one that nobody made is a parameter or an outside input."""
        found = self._current.get(id(tensor))
        if found is None:
            brought_in = isinstance(tensor, nn.Parameter) and id(tensor) not in self.parameters
            op = "parameter" if brought_in or id(tensor) in self.parameters else "outside"
            if brought_in and tensor.ndim > 1:  # a matrix of a module that is offloaded: it is not kept from leaving
                return Value(tensor.detach().to("meta"), op)
            found = Value(tensor, op)
            self._remember(tensor, found)
        return found

    def _remember(self, tensor: Tensor, value: Value) -> None:
        self._current[id(tensor)] = value
        self._keep.append(tensor)  # an id stays ours only while the tensor lives

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the function and record what it made."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name == "__get__" or self._loads(args, kwargs):
            return func(*args, **kwargs)
        inputs = [self.value(t) for t in _tensors((args, kwargs))]
        linked, named = _link(args, self), _link(kwargs, self)
        in_place = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE
        if in_place and inputs:
            inputs[0].overwritten = True
            inputs[0].tensor = inputs[0].tensor.clone()
        out = func(*args, **kwargs)
        for t in _tensors(out):
            self._remember(t, Value(t, name, func, linked, named, inputs))
        if out is None and in_place and inputs:
            self._remember(args[0], Value(args[0], name, func, linked, named, inputs))
        return out

    def _loads(self, args: tuple, kwargs: dict) -> bool:
        """Whether an operation works on tensors alone that nothing here made: accelerate brings weights in."""
        if not self._offloads:
            return False
        given = list(_tensors((args, kwargs)))
        return bool(given) and not any(id(t) in self._current or id(t) in self.parameters for t in given)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        call = Call(module, self._names.get(id(module), "?"), parent=self._stack[-1] if self._stack else None)
        for key, item in [*enumerate(args), *kwargs.items()]:
            if isinstance(item, Tensor):
                value = self.value(item)
                call.inputs[key] = value
                value.read_by.append((call, key))
        self._stack.append(call)
        self.calls.append(call)

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        call = self._stack.pop()
        call.form = len(out) if isinstance(out, (tuple, list)) else None
        for path, tensor in outputs_of(out).items():
            value = self.value(tensor)
            call.outputs[path] = value
            value.made_by.append((call, path))

    def _attention(self, call: AttentionCall) -> None:
        call.values = {n: self.value(getattr(call, n)) for n in ("query", "key", "value", "out")}
        call.values["out"].attention = call
        call.caller = self._stack[-1] if self._stack else None
        self.attention.append(call)

    def __enter__(self) -> Watch:
        """Attach the recording hooks."""
        for module in self._model.modules():
            self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave, with_kwargs=True, always_call=False))
        self._taps = record_attention(self._model, self._attention)
        self._taps.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        """Take the recording hooks away."""
        super().__exit__(*exc)
        self._taps.__exit__(*exc)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


_IN_PLACE = {"__iadd__", "__imul__", "__isub__", "__itruediv__", "__setitem__"}


def _link(tree: Any, watch: Watch) -> Any:
    """The same arguments with tensors replaced by their `Value`s."""
    if isinstance(tree, Tensor):
        return watch.value(tree)
    if isinstance(tree, (list, tuple)) and type(tree) in (list, tuple):
        return type(tree)(_link(x, watch) for x in tree)
    if isinstance(tree, dict):
        return {k: _link(v, watch) for k, v in tree.items()}
    return tree


def reaches(value: Value, target: Value | set[int]) -> bool:
    """Whether `target` (a value, or ids of values) stands among the ancestors of `value`, or is it."""
    wanted = target if isinstance(target, set) else {id(target)}
    seen: set[int] = set()
    stack = [value]
    while stack:
        v = stack.pop()
        if id(v) in wanted:
            return True
        if id(v) not in seen:
            seen.add(id(v))
            stack.extend(v.inputs)
    return False


def watch_forward(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Watch, Any, dict[str, Value]]:
    """Run the model once on `inputs` and return the record, the output and the values of the inputs."""
    watch = Watch(model)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), watch:
            sources = {k: watch.value(v) for k, v in inputs.items() if isinstance(v, Tensor)}
            out = model(**inputs)
    finally:
        model.train(training)
    return watch, out, sources
