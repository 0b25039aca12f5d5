"""What can be done to a site during a run. Every function here returns edits for `lens.run` and `lens.generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import EditError, SettingsError, UnsupportedError, unknown
from interp.headlist import HeadList, Heads
from interp.reads import Positions, Read, check_positions

if TYPE_CHECKING:
    from interp.trace import Trace


@dataclass(frozen=True, slots=True, eq=False)
class Where:
    """Where an edit is being applied, for the function that makes the change.

    Attributes:
        layer: index of the layer; -1 for a site outside the layers.
        columns: columns of the stream that the value holds [batch, n].
        valid: which of them are real choices [batch, n].
        heads: head indices that the value holds, or None where the site has no head axis.
        keys: for `scores` and `pattern`, the chosen key columns [batch, key]; None for all.
        copy: which row of each sample the value holds, in beam search: a change is called once for each, and what it
            keeps from one site to the next has to be kept for each.
    """

    layer: int
    columns: Int[Tensor, "batch n"]
    valid: Bool[Tensor, "batch n"]
    heads: tuple[int, ...] | None
    keys: Bool[Tensor, "batch key"] | None
    copy: int = 0


Change = Callable[[Tensor, Where], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Edit:
    """One change of one site.

    Attributes:
        read: the site, layers, heads, positions and tower.
        change: gets the selected part of the value and returns its replacement, of the same shape.
        name: what it is, for error messages and settings.
        keys: for `scores` and `pattern`, which key columns the change concerns.
        model: the model whose ranking named the heads, if that is known: no other model takes the edit.
    """

    read: Read
    change: Change
    name: str
    keys: Positions | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        """Refuse sites that cannot be edited."""
        if not self.read.row.editable:
            raise UnsupportedError(f"{self.name}: {self.read.site!r} can be read but not edited.")
        if self.read.reduce is not None:
            raise SettingsError(f"{self.name}: an edit takes no reduction, got {self.read.reduce!r}.")
        if self.keys is not None:
            object.__setattr__(self, "keys", check_positions(self.keys))

    def __repr__(self) -> str:
        """Name and place."""
        return f"{self.name}({self.read})"


def flatten(edits: Iterable[Edit | Iterable[Edit]]) -> list[Edit]:
    """Edits and lists of edits as one list.

    Raises:
        EditError: something in it is no edit.
    """
    out: list[Edit] = []
    for item in edits:
        if isinstance(item, Edit):
            out.append(item)
        elif isinstance(item, (list, tuple)):
            out.extend(flatten(item))
        else:
            raise EditError(f"edits must be made by interp.edits, got {type(item).__name__}.")
    return out


def _finite(name: str, value: Tensor | float) -> Tensor:
    tensor = torch.as_tensor(value)
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        where = (~tensor.isfinite()).nonzero()[0].tolist() if tensor.ndim else []
        raise EditError(f"{name}: the given values hold NaN or infinity, first at index {where}.")
    return tensor


Factor = float | Float[Tensor, " batch"] | Float[Tensor, "batch head"]


@overload
def scale_heads(
    heads: Heads, factor: Factor, /, *, positions: Positions = "all", tower: str | None = None
) -> list[Edit]: ...
@overload
def scale_heads(
    factor: Factor,
    /,
    *,
    pairs: Heads | None = None,
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    positions: Positions = "all",
    tower: str | None = None,
) -> list[Edit]: ...
def scale_heads(
    first: Any,
    second: Factor | None = None,
    /,
    *,
    pairs: Heads | None = None,
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    positions: Positions = "all",
    tower: str | None = None,
) -> list[Edit]:
    """Multiply head outputs (`z`) before the output projection: `scale_heads(scores.top(16), -1.0)`.

    Args:
        first: the heads, as (layer, head) pairs or a frame with columns `layer` and `head`, with the factor behind
            them; or the factor alone, the heads then being those that `pairs`, or `layers` and `heads`, name.
        second: the factor: one number, one for each sample [batch], or one for each sample and chosen head
            [batch, head] (so that each sample can have its own set of heads).
        pairs: heads, as in `first`; instead of `layers` and `heads`.
        layers: which layers; None for all.
        heads: which heads; None for all.
        positions: where.
        tower: which tower; None for that of the ranking, or the main one.

    Raises:
        SettingsError: `pairs` given together with `layers` or `heads`, or heads named twice.
        EditError: the factor holds NaN or infinity, or the heads are no such list. In a run, when the ranking that
            named the heads is of another model.
    """
    factor = first
    if second is not None:
        if pairs is not None:
            raise SettingsError("scale_heads: the heads are given twice, in front and as pairs.")
        pairs, factor = first, second
    elif isinstance(first, (list, tuple)) or hasattr(first, "columns"):
        raise SettingsError("scale_heads: give the factor behind the heads: scale_heads(heads, -1.0).")
    value = _finite("scale_heads", factor)
    if value.ndim > 2:
        raise EditError(f"scale_heads: factor must be a number, [batch] or [batch, head], got {tuple(value.shape)}.")

    def change(z: Tensor, where: Where) -> Tensor:
        f = value.to(z)
        if f.ndim == 1:
            f = f[:, None]
        if f.ndim == 2:
            if f.shape[0] != z.shape[0] or f.shape[1] not in (1, z.shape[2]):
                raise EditError(
                    f"scale_heads: factor {tuple(value.shape)} does not fit {z.shape[0]} samples, {z.shape[2]} heads."
                )
            f = f[:, None, :, None]
        return z * f

    return _at("scale_heads", "z", change, pairs, layers, heads, positions, tower)


def _at(
    name: str,
    site: str,
    change: Change,
    pairs: Heads | None,
    layers: int | Sequence[int] | None,
    heads: int | Sequence[int] | None,
    positions: Positions,
    tower: str | None,
    keys: Positions | None = None,
) -> list[Edit]:
    if pairs is None:
        read = Read(site, layers=layers, heads=heads, positions=positions, tower=tower)  # type: ignore[arg-type]
        return [Edit(read, change, name, keys)]
    if layers is not None or heads is not None:
        raise SettingsError(f"{name}: give either pairs, or layers and heads, not both.")
    listed = HeadList.of(pairs)
    tower = listed.within(tower, name)
    return [
        Edit(Read(site, layers=(layer,), heads=hs, positions=positions, tower=tower), change, name, keys, listed.model)
        for layer, hs in listed.by_layer.items()
    ]


def ablate(
    *,
    site: str = "z",
    mode: Literal["zero", "mean", "resample"] = "zero",
    reference: Trace | None = None,
    pairs: Heads | None = None,
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    positions: Positions = "all",
    tower: str | None = None,
    seed: int = 0,
) -> list[Edit]:
    """Take a component away.

    Args:
        site: what to ablate; `z` ablates attention heads.
        mode: `zero`; `mean` over the samples and positions of a reference run; or `resample`, the same positions of
            another sample of the reference run.
        reference: a trace of the same site and layers (all positions, all heads), for `mean` and `resample`.
        pairs: (layer, head) pairs, or a frame with these columns; instead of `layers` and `heads`.
        layers: which layers; None for all.
        heads: which heads; None for all.
        positions: where.
        tower: which tower.
        seed: which samples are drawn for `resample`.

    Raises:
        SettingsError: `mean` or `resample` without a reference.
        UnknownNameError: an unknown mode.
    """
    if mode not in ("zero", "mean", "resample"):
        raise unknown("ablation mode", mode, ("zero", "mean", "resample"))
    if (reference is None) != (mode == "zero"):
        raise SettingsError(f"ablate: mode {mode!r} {'takes no' if mode == 'zero' else 'needs a'} reference trace.")

    tower = tower if pairs is None else HeadList.of(pairs).within(tower, "ablate")

    def change(value: Tensor, where: Where) -> Tensor:
        if reference is None:
            return torch.zeros_like(value)
        source = reference[f"{tower}:{site}" if tower else site, where.layer].to(value)
        picked = source if where.heads is None or source.ndim < 4 else source[:, :, list(where.heads)]
        if mode == "mean":
            real = reference.mask(tower)
            weight = torch.ones_like(picked[..., :1]) if real is None else _like(real, picked)
            total = (picked * weight).sum((0, 1)) / weight.sum((0, 1)).clamp_min(1)
            return total.expand_as(value).to(value)
        order = torch.randperm(picked.shape[0], generator=torch.Generator().manual_seed(seed))
        if picked.shape[0] == value.shape[0] and picked.shape[0] > 1:
            # Nobody is replaced by itself: shift along a random order.
            chosen = torch.empty_like(order)
            chosen[order] = order.roll(1)
        else:
            chosen = order.repeat(-(-value.shape[0] // len(order)))[: value.shape[0]]
        if int(where.columns.max()) >= picked.shape[1]:
            raise EditError(
                f"ablate: the reference has {picked.shape[1]} positions, but position {int(where.columns.max())} is "
                "edited; use a reference of the same length."
            )
        rows = chosen.to(value.device)[:, None]
        return picked[rows, where.columns]

    return _at(f"ablate[{mode}]", site, change, pairs, layers, heads, positions, tower)


def _like(mask: Tensor, value: Tensor) -> Tensor:
    return mask.to(value).reshape(*mask.shape, *([1] * (value.ndim - 2)))


def patch(
    site: str,
    value: Tensor,
    *,
    layer: int | None = None,
    heads: int | Sequence[int] | None = None,
    positions: Positions = "all",
    tower: str | None = None,
) -> list[Edit]:
    """Put given activations in the place of the model's own.

    Args:
        site: where.
        value: the replacement, of the shape that a read of the same site, heads and positions returns (a batch of
            one is used for every sample).
        layer: which layer; None only for sites outside the layers.
        heads: which heads; None for all.
        positions: where.
        tower: which tower.

    Raises:
        EditError: the value has another shape, or holds NaN or infinity.
    """
    given = value if site == "scores" else _finite("patch", value)

    def change(old: Tensor, where: Where) -> Tensor:
        if given.shape != old.shape and (given.ndim != old.ndim or (1, *old.shape[1:]) != tuple(given.shape)):
            raise EditError(
                f"patch: the value has shape {tuple(given.shape)}, but {site!r} at layer {where.layer} is "
                f"{tuple(old.shape)} there."
            )
        # A copy: some models add to what they get in place, and the value is the caller's.
        return given.to(old).expand_as(old).clone()

    read = Read(site, layers=layer, heads=heads, positions=positions, tower=tower)  # type: ignore[arg-type]
    if read.row.per_layer and (read.layers is None or len(read.layers) != 1):
        raise EditError(f"patch: say which layer of {site!r} is replaced; got layers {read.layers}.")
    return [Edit(read, change, "patch")]


def steer(
    vector: Float[Tensor, " d"] | Float[Tensor, "batch d"],
    *,
    scale: float = 1.0,
    site: str = "resid_post",
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    positions: Positions = "all",
    tower: str | None = None,
    relative: bool = False,
) -> list[Edit]:
    """Add a vector.

    Args:
        vector: [d], or one for each sample [batch, d].
        scale: factor.
        site: where.
        layers: which layers; None for all.
        heads: which heads; None for all.
        positions: where.
        tower: which tower.
        relative: whether `scale` counts in norms of the value that is there (the vector is then normalised).

    Raises:
        EditError: the vector holds NaN or infinity, or does not fit.
    """
    given = _finite("steer", vector)
    if given.ndim not in (1, 2):
        raise EditError(f"steer: the vector must be [d] or [batch, d], got {tuple(given.shape)}.")

    def change(value: Tensor, where: Where) -> Tensor:
        if given.shape[-1] != value.shape[-1] or (given.ndim == 2 and given.shape[0] != value.shape[0]):
            raise EditError(f"steer: vector {tuple(given.shape)} does not fit {site!r}, which is {tuple(value.shape)}.")
        v = given.to(value)
        v = v.reshape(v.shape[0], *([1] * (value.ndim - 2)), v.shape[-1]) if v.ndim == 2 else v
        if relative:
            v = v / v.norm(dim=-1, keepdim=True) * value.norm(dim=-1, keepdim=True)
        return value + scale * v

    return _at("steer", site, change, None, layers, heads, positions, tower)


def mask_attention(
    *,
    queries: Positions = "all",
    keys: Positions = "all",
    pairs: Heads | None = None,
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    tower: str | None = None,
) -> list[Edit]:
    """Forbid queries to look at keys (attention knock-out): their scores become minus infinity.

    Args:
        queries: which query positions.
        keys: which key positions.
        pairs: (layer, head) pairs, or a frame with these columns; instead of `layers` and `heads`.
        layers: which layers; None for all.
        heads: which heads; None for all.
        tower: which tower.

    Raises:
        EditError: a query would be left with nothing to look at.
    """

    def change(scores: Tensor, where: Where) -> Tensor:
        assert where.keys is not None
        new = scores.masked_fill(where.keys[:, None, None, :], -torch.inf)
        blind = (new == -torch.inf).all(-1) & ~(scores == -torch.inf).all(-1) & where.valid[:, None, :]
        if bool(blind.any()):
            b, _, n = blind.nonzero()[0].tolist()
            raise EditError(
                f"mask_attention: in layer {where.layer} the query at column {int(where.columns[b, n])} of sample {b} "
                "would be left with no key at all; leave it one (itself, or the first token)."
            )
        return new

    return _at("mask_attention", "scores", change, pairs, layers, heads, queries, tower, keys)


def reweight_attention(
    factor: float,
    *,
    queries: Positions = "all",
    keys: Positions = "all",
    pairs: Heads | None = None,
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    tower: str | None = None,
    renormalize: bool = True,
) -> list[Edit]:
    """Multiply the attention probabilities on some keys.

    Args:
        factor: what they are multiplied with; not negative.
        queries: which query positions.
        keys: which key positions.
        pairs: (layer, head) pairs, or a frame with these columns; instead of `layers` and `heads`.
        layers: which layers; None for all.
        heads: which heads; None for all.
        tower: which tower.
        renormalize: whether each row is brought back to its former sum.

    Raises:
        EditError: the factor is negative or not finite.
    """
    if not 0 <= factor < float("inf"):
        raise EditError(f"reweight_attention: factor must be finite and not negative, got {factor}.")

    def change(pattern: Tensor, where: Where) -> Tensor:
        assert where.keys is not None
        new = torch.where(where.keys[:, None, None, :], pattern * factor, pattern)
        if renormalize:
            total = new.sum(-1, keepdim=True)
            new = torch.where(total > 0, new * (pattern.sum(-1, keepdim=True) / total.clamp_min(1e-30)), pattern)
        return new

    return _at("reweight_attention", "pattern", change, pairs, layers, heads, queries, tower, keys)


def splice(
    function: Callable[[Tensor], Tensor] | Mapping[int, Callable[[Tensor], Tensor]],
    *,
    site: str,
    layers: int | Sequence[int] | None = None,
    heads: int | Sequence[int] | None = None,
    positions: Positions = "all",
    tower: str | None = None,
) -> list[Edit]:
    """Replace a site by a function of itself (an SAE's reconstruction, a projection, a rotation).

    Args:
        function: maps the selected values to values of the same shape; or one function for each layer.
        site: where.
        layers: which layers; None for all (with a mapping: its keys).
        heads: which heads; None for all.
        positions: where.
        tower: which tower.
    """
    if isinstance(function, Mapping) and layers is None:
        layers = tuple(function)

    def change(value: Tensor, where: Where) -> Tensor:
        f = function[where.layer] if isinstance(function, Mapping) else function
        out = f(value)
        # A copy: it may be the caller's own tensor, and some models add to what they get in place.
        return out.clone() if isinstance(out, Tensor) else out

    return _at("splice", site, change, None, layers, heads, positions, tower)
