"""Where a model's parameters are when it does not run: here, or put away by accelerate (CPU or disk offload).

A model that is loaded with a `device_map` keeps some parameters as empty tensors of the `meta` device. A hook of
accelerate brings them in for each call of their module and takes them away again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from interp.engine.shards import is_spread
from interp.errors import UnsupportedError


def parameter(module: nn.Module | None, name: str, where: str) -> Any:
    """A parameter of a module (what it has under the name, None for nothing), brought in where it is put away.

    One that lies in parts on several processes is put together.

    Args:
        module: the module.
        name: of its parameter.
        where: what the module is called in an error.

    Raises:
        UnsupportedError: it is put away, and nothing says where.
    """
    found = getattr(module, name, None)
    if found is not None and is_spread(found):
        return found.full_tensor()
    if not isinstance(found, Tensor) or not found.is_meta:
        return found
    assert module is not None
    with _brought_in(module):
        found = getattr(module, name)
    if found.is_meta:
        raise UnsupportedError(
            f"the {name} of {where} ({type(module).__name__}) is on the meta device, and no hook of accelerate on it "
            "says where its numbers are: load the model with from_pretrained(..., device_map=...)."
        )
    return found


@contextmanager
def _brought_in(module: nn.Module) -> Iterator[None]:
    """The module's parameters are on the device on which it runs, as they are in a call of it."""
    hooks = [hook for hook in _hooks_of(module) if getattr(hook, "offload", False)]
    try:
        for hook in hooks:
            hook.pre_forward(module)
        yield
    finally:
        for hook in reversed(hooks):
            hook.post_forward(module, None)


def _hooks_of(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", (hook,)))


def device_of(model: nn.Module) -> torch.device:
    """Where inputs have to be: the device of the first parameter that lies on a real device, or where hooks take it."""
    first = next((p.device for p in model.parameters() if not p.is_meta), None)
    if first is not None:
        return first
    for module in model.modules():
        for hook in _hooks_of(module):
            where = getattr(hook, "execution_device", None)
            if where is not None and torch.device(where).type != "meta":
                return torch.device(where)
    return torch.device("cpu")
