"""The transformers model inside a TransformerBridge (TransformerLens), on the same parameters.

A bridge puts its own components into the model's module tree, each around the module that stood there, and writes the
attention out. Here the tree is built a second time, without the components: shallow copies of the modules, which hold
the very dictionaries of parameters and buffers of those in the bridge. Where a component has split one projection into
queries, keys and values, it is these that the bridge runs, and here they are joined again. The bridge stays as it is.

The bridge's hook points are not run: hooks that change what it computes make the comparison of logits fail.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.backends.same import check_same
from interp.engine.probe import probe_inputs
from interp.engine.run import device_of, evaluating
from interp.errors import UnsupportedError


def unbridged(bridge: Any) -> Any:
    """The transformers model that a bridge is made of, on the bridge's parameters.

    Args:
        bridge: a `transformer_lens.model_bridge.TransformerBridge`.

    Raises:
        UnsupportedError: weights are offloaded or spread by accelerate, or the bridge's own logits are others.
    """
    model = bridge.original_model
    hooked = [name for name, module in model.named_modules() if hasattr(module, "_hf_hook")]
    if hooked:
        raise UnsupportedError(
            f"a TransformerBridge whose modules are placed by accelerate ({hooked[0] or 'the model'}) is refused: wrap "
            "a transformers model with that device_map."
        )
    found = _without(model, {})
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs = probe_inputs(found, device_of(found), dtype)
    hooks = sum(len(h.fwd_hooks) for h in set(bridge.hook_dict.values()))  # some stand there under two names
    with evaluating(model):
        check_same(lambda: model(**inputs), found, inputs, what="TransformerBridge", hooks=hooks)
    return found


def _without(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """A copy of a module tree in which the module inside stands for each component of the bridge."""
    if id(module) not in made:
        inner = module._modules.get("_original_component") if _is_component(module) else None
        made[id(module)] = _copy(module, made) if inner is None else _opened(module, inner, made)
    return made[id(module)]


def _is_component(module: nn.Module) -> bool:
    return any(cls.__name__ == "GeneralizedComponent" for cls in type(module).__mro__)


def _copy(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """A shallow copy: parameters and buffers are the same dictionaries, hooks and children are its own."""
    new = copy.copy(module)
    state: dict[str, Any] = new.__dict__
    state.pop("forward", None)  # a forward set on the object is bound to the module that was copied
    for name in [n for n in state if n.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))]:
        state[name] = OrderedDict()
    state["_modules"] = {n: m if m is None else _without(m, made) for n, m in module._modules.items()}
    return new


def _opened(component: Any, inner: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """The module inside a component; a projection that the component has split is joined from its parts."""
    new = _without(inner, made)
    if not (hasattr(type(component), "_default_split_qkv_matrix") and "qkv" in component.submodules):
        return new
    name = component.submodules["qkv"].name
    if name not in new._modules:
        raise UnsupportedError(
            f"this TransformerBridge is refused: its {type(component).__name__} splits a projection {name!r}, which "
            f"{type(inner).__name__} does not hold."
        )
    parts = [_without(component._modules[n], made) for n in ("q", "k", "v")]
    new._modules[name] = Joined(parts, _order(component, inner, name, new._modules[name]))
    return new


class Joined(nn.Module):
    """Queries, keys and values from three projections, in the order of the one that they were split from."""

    def __init__(self, parts: list[nn.Module], order: Int[Tensor, " n"]) -> None:
        super().__init__()
        self.q, self.k, self.v = parts
        self.order = order

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos n"]:
        """What the one projection would give."""
        found = torch.cat([self.q(x), self.k(x), self.v(x)], -1)
        return found[..., self.order.to(found.device)]


def _order(component: Any, inner: nn.Module, name: str, fused: Any) -> Int[Tensor, " n"]:
    """Where each output of a fused projection stands in q, k and v, told by splitting its numbered rows."""
    turned = type(fused).__name__ == "Conv1D"
    n_out, n_in = fused.weight.shape[::-1] if turned else fused.weight.shape
    numbers = torch.arange(n_out, dtype=torch.float64)
    rows = numbers[:, None].expand(-1, n_in)
    probe = nn.Linear(1, 1)
    probe.weight = nn.Parameter(rows.T.contiguous() if turned else rows.contiguous(), requires_grad=False)
    bias = None if fused.bias is None else nn.Parameter(numbers, requires_grad=False)
    probe.register_parameter("bias", bias)
    held = copy.copy(inner)
    held.__dict__["_modules"] = {**inner._modules, name: probe}
    found = torch.cat([part.weight[:, 0] for part in component.split_qkv_matrix(held)]).round().long()
    if not torch.equal(found.sort().values, torch.arange(n_out)):
        raise UnsupportedError(
            f"this TransformerBridge is refused: how {type(component).__name__} splits {name!r} was not found out."
        )
    return found.argsort()
