"""What a read is made of in a model that runs elsewhere: which modules' inputs and outputs, and the trace for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from interp.engine.anatomy import Anatomy, Layer
from interp.engine.plan import middle_branches
from interp.engine.run import evaluating
from interp.engine.trail import Replay
from interp.errors import UnsupportedError

_BRANCH = {"attn_out": "attn", "mlp_out": "mlp", "mixer_out": "mixer"}


@dataclass(frozen=True, slots=True)
class Tap:
    """One tensor that a module is given or gives.

    Attributes:
        module: the module's path; empty for the model.
        end: `in` or `out`.
        path: where the tensor stands: in (arguments, named arguments), or in the output.
        factor: what it is multiplied with before it is added to the stream.
    """

    module: str
    end: str
    path: tuple
    factor: float | None = None


def taps_of(
    anatomy: Anatomy, site: str, index: int, names: Mapping[nn.Module, str], constants: Collection[float]
) -> list[Tap]:
    """The tensors that a site of a layer is the sum of.

    Args:
        anatomy: found on a model of the same structure.
        site: a site that the layer can give.
        index: the layer; -1 outside the layers.
        names: the path of each of that model's modules.
        constants: numbers of the configuration, by which a branch may be multiplied.

    Raises:
        UnsupportedError: no modules give it, or weights belong to it.
    """
    if site == "logits":
        return [Tap("", "out", ("logits",))]
    if site == "embed":
        assert anatomy.embed is not None
        return [Tap(anatomy.embed[1], "out", ())]
    layer = anatomy.towers[anatomy.main].layer(index)
    if site == "resid_pre":
        return [_given(layer.name, layer.in_key)]
    if site == "resid_post":
        return [Tap(layer.name, "out", layer.out_path)]
    if site in _BRANCH:
        return _branch(layer, _BRANCH[site], constants)
    if site == "resid_mid":
        if layer.mid is None:
            added = [tap for kind in middle_branches(layer) for tap in _branch(layer, kind, constants)]
            return [_given(layer.name, layer.in_key), *added]
        module, end, key = layer.mid
        return [_given(names[module], key) if end == "in" else Tap(names[module], "out", key)]
    if site == "mlp_act" and layer.down_proj is not None:
        return [_given(names[layer.down_proj], 0)]
    if site == "z":
        return [_given(anatomy.attention(None, index, "z").out_name, 0)]
    raise UnsupportedError(
        f"{site!r} is refused: the weights are not here, and no module is given it or gives it. Read the streams, the "
        "branches or 'z', or load the model."
    )


def _given(module: str, key: int | str) -> Tap:
    return Tap(module, "in", (0, key) if isinstance(key, int) else (1, key))


def _branch(layer: Layer, kind: str, constants: Collection[float]) -> list[Tap]:
    """The terms of a branch; a factor has to stand in the configuration, as others may be other ones in the model."""
    taps = []
    for part in layer.branches[kind]:
        factor = None
        for scale in part.scales:
            value = float(scale({})) if _plain(scale) else None
            if value is None or value not in constants:
                raise UnsupportedError(
                    f"what {part.name} adds to the stream is refused: it is multiplied by weights, or by a number "
                    "that is not in the configuration. Read resid_pre and resid_post."
                )
            factor = value if factor is None else factor * value
        taps.append(Tap(part.name, "out", part.path, factor))
    return taps


def _plain(tree: Any) -> bool:
    """Whether a factor is made of plain numbers alone."""
    if isinstance(tree, Replay):
        return all(_plain(x) for x in [*tree.args, *tree.kwargs.values()])
    return isinstance(tree, (int, float))


def reached(model: nn.Module, inputs: Mapping[str, Any]) -> dict[tuple[str, str], int]:
    """The place of every module's input and output in the order of one forward pass."""
    order: dict[tuple[str, str], int] = {}
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        for name, module in model.named_modules():

            def on(*_: Any, name: str = name, end: str) -> None:
                order.setdefault((name, end), len(order))

            stack.callback(module.register_forward_pre_hook(partial(on, end="in")).remove)
            stack.callback(module.register_forward_hook(partial(on, end="out")).remove)
        model(**inputs)
    return order


def fetch(
    model: Any, inputs: dict[str, Any], steps: list[tuple], jobs: list[tuple], stop: bool, remote: bool | str
) -> list[Tensor]:
    """One nnsight trace. Its block is sent as source: nothing but the arguments here may be named in it.

    Args:
        model: the nnsight model.
        inputs: what its forward takes.
        steps: (envoy, end, uses), in the order of the forward pass; a use is (job, path, factor).
        jobs: (axes, heads, columns, real columns, reduction) of each value.
        stop: whether to end the forward pass behind the last step.
        remote: as in `model.trace`.
    """
    found: list[Any] = [None] * len(jobs)
    left = [sum(use[0] == i for _, _, uses in steps for use in uses) for i in range(len(jobs))]
    with model.trace(**inputs, remote=remote) as tracer:
        for envoy, end, uses in steps:
            ends = envoy.inputs if end == "in" else envoy.output
            for job, path, factor in uses:
                axes, heads, index, keep, reduce = jobs[job]
                part = ends
                for key in path:
                    part = part[key]
                part = part.detach().reshape(axes)
                if heads is not None:
                    part = part[:, :, heads]
                ones = [1] * (part.ndim - 2)
                if index is None:
                    part = part.clone()
                else:
                    index = index.to(part.device).reshape(*index.shape, *ones)
                    part = part.gather(1, index.expand(-1, -1, *part.shape[2:]))
                if factor is not None:
                    part = part * factor
                if found[job] is not None:
                    part = found[job] + part
                left[job] = left[job] - 1
                if left[job] == 0:
                    if reduce is not None and part.element_size() < 4:
                        part = part.float()
                    if reduce == "norm":
                        part = part.norm(dim=-1)
                    elif reduce == "head_mean":
                        part = part.mean(2)
                    elif reduce == "head_max":
                        part = part.amax(2)
                    elif reduce == "head_min":
                        part = part.amin(2)
                    n = part.shape[1]
                    if keep is not None:
                        real = keep.to(part.device).reshape(*keep.shape, *[1] * (part.ndim - 2))
                        part = part.masked_fill(~real, float("-inf") if reduce == "max" else 0)
                        n = real.sum(1).clamp_min(1)
                    if reduce == "max":
                        part = part.amax(1)
                    elif reduce == "sum" or reduce == "mean":
                        part = part.sum(1)
                        if reduce == "mean":
                            part = part / n
                found[job] = part
        found.save()  # pyright: ignore[reportAttributeAccessIssue]
        if stop:
            tracer.stop()
    return found
