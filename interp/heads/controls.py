"""Controls that make a ranking of heads believable: random heads of the same layers, scaling without a change of norm.

Heads of one layer are alike in where they stand and in how much a model suffers without them. Random heads from all
layers would measure that, so the control takes as many heads of each layer as were chosen there.

Scaling heads also changes how much attention adds to the stream. With o = sum over heads of z_h W_O^h + bias (and the
norms and factors behind it) as the layer would have it without the change, and o' with it,

    o'' = o' |o| / |o'|        at every position

keeps the change of direction and takes the change of size away. What it does not see: later layers, whose norms and
scores answer to the direction in ways of their own.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.edits import Edit, Where
from interp.errors import EditError, InputError, SettingsError, UnsupportedError, unknown
from interp.headlist import HeadList, Heads, check_model
from interp.heads.chosen import Pairs, chosen_heads, head_mask
from interp.heads.common import head_grid
from interp.lens import Lens
from interp.reads import Positions, Read
from interp.scores import HeadScores

Matched = Literal["layer", "nearest", "none"]
MATCHED: tuple[str, ...] = get_args(Matched)
Grid = Bool[Tensor, "layer head"]


def random_heads(
    heads: Heads,
    of: HeadScores | Lens,
    *,
    matched: Matched = "layer",
    exclude: Heads | None = None,
    disjoint: bool = True,
    draws: int = 10,
    seed: int = 0,
) -> list[Pairs]:
    """Random heads to compare chosen ones with, as many of them.

    Args:
        heads: the chosen heads: (layer, head) pairs, or a frame with these columns.
        of: the heads to draw from: all that these scores rank, or all of the model (in the tower of the list).
        matched: `layer` for the same number in every layer; `nearest` for the same where a layer has enough of them,
            what is missing coming from the nearest layers; `none` for heads of any layer.
        exclude: heads that are not to be drawn, such as those of another ranking.
        disjoint: whether the chosen heads themselves are left out. False where they are more than half of a layer: the
            drawn heads then overlap with them, and the control is conservative.
        draws: how many lists. Each is drawn anew, so that small layers give some heads several times.
        seed: seed of the draws.

    Returns:
        `draws` lists of (layer, head) pairs, each sorted.

    Raises:
        EditError: no list of heads, or one from another model or tower.
        UnknownNameError: a head does not exist, or an unknown option value.
        InputError: too few heads are left to draw from.
        SettingsError: `draws` is less than 1.
    """
    if matched not in MATCHED:
        raise unknown("matched", matched, MATCHED)
    if draws < 1:
        raise SettingsError(f"draws must be at least 1, got {draws}.")
    apart = [] if exclude is None else exclude
    if isinstance(of, HeadScores):
        valid = of.scores.isfinite()
        named = [_ranked(heads, of), _ranked(apart, of) if len(apart) else []]
    else:
        pairs, tower = chosen_heads(of, heads, what="random_heads")
        others = chosen_heads(of, apart, tower=tower, what="random_heads")[0] if len(apart) else []
        named, valid = [pairs, others], head_grid(of, tower)[2]
    chosen, barred = (head_mask(pairs, valid) for pairs in named)
    return drawn(chosen, valid & ~barred & ~(chosen & disjoint), matched, draws, seed)


def _ranked(heads: Heads, scores: HeadScores) -> Pairs:
    """The heads of a list in the grid of scores."""
    listed = HeadList.of(heads)
    listed.within(scores.tower, "random_heads")
    model = scores.settings.get("model")
    if model is not None:
        check_model(listed.model, model, "random_heads")
    depth = len(scores.scores)
    return [(layer + depth if layer < 0 else layer, head) for layer, head in listed.pairs]


def drawn(chosen: Grid, free: Grid, matched: Matched, draws: int, seed: int) -> list[Pairs]:
    """Lists of free heads, as many as are chosen, in each layer or in all; see `random_heads`."""
    counts, able = chosen.sum(1), free.sum(1)
    short = (counts > able) if matched == "layer" else (counts.sum() > able.sum())[None]
    if draws and bool(short.any()):
        layer = int(short.nonzero()[0])
        found = f"layer {layer} has {int(counts[layer])}" if matched == "layer" else f"there are {int(counts.sum())}"
        others = able[layer] if matched == "layer" else able.sum()
        more = "choose fewer, or draw with matched='nearest' or disjoint=False"
        raise InputError(f"{found} chosen heads, and only {int(others)} others to draw from; {more}.")
    generator = torch.Generator().manual_seed(seed)
    return [_draw(counts.tolist(), free, matched, generator) for _ in range(draws)]


def _draw(counts: list[int], free: Grid, matched: Matched, generator: torch.Generator) -> Pairs:
    order = torch.rand(free.shape, generator=generator).masked_fill(~free, torch.inf)
    if matched == "none":
        taken = order.flatten().argsort(stable=True)[: sum(counts)].tolist()
        return sorted(divmod(place, free.shape[1]) for place in taken)
    out, missing = [], []
    for layer, count in enumerate(counts):
        able = min(count, int(free[layer].sum()))
        out += [(layer, head) for head in order[layer].argsort(stable=True)[:able].tolist()]
        missing += [layer] * (count - able)
    for layer in missing:
        left = {(x, h) for x, h in free.nonzero().tolist()} - set(out)
        out.append(min(left, key=lambda p, layer=layer: (abs(p[0] - layer), float(order[p]))))
    return sorted(out)


def norm_matched(
    lens: Lens,
    heads: Heads | Bool[Tensor, "batch layer head"],
    scale: float,
    *,
    positions: Positions = "all",
    tower: str | None = None,
) -> list[Edit]:
    """Scale heads, and bring what each layer's attention adds back to the size that it would have had.

    The size is reckoned from the run itself, for the stream that really enters the layer, so the edits serve runs and
    generation alike. Where nothing is left to scale (all heads removed, no bias) it stays zero. A sample without chosen
    heads in a layer is left as it is there, bit for bit.

    Args:
        lens: a model whose output projections are ordinary matrices.
        heads: (layer, head) pairs, or a frame with these columns; or each sample's own heads [batch, layer, head], as
            in `VisionHeads.chosen`: the edits are then for that batch.
        scale: what their outputs are multiplied with.
        positions: where.
        tower: None for that of the list, or the main one.

    Returns:
        Two edits for each layer, to be used in this order.

    Raises:
        EditError: no list of heads, one from another model or tower, or a scale that is not finite. In a run, when the
            heads are of a batch of another size.
        UnknownNameError: a head does not exist.
        InputError: heads of samples that are no bools for every layer and head.
        UnsupportedError: a layer's projection is quantised or was not found, or what lies behind it is not linear.
    """
    if not math.isfinite(scale):
        raise EditError(f"norm_matched: the scale must be finite, got {scale}.")
    if isinstance(heads, Tensor):
        _, counts, valid = head_grid(lens, tower)
        name, grid = tower, heads
        if grid.dtype != torch.bool or grid.ndim != 3 or grid.shape[1:] != valid.shape:
            raise InputError(
                f"norm_matched: heads of samples are bools [batch, {valid.shape[0]}, {valid.shape[1]}], found "
                f"{str(grid.dtype).removeprefix('torch.')} {list(grid.shape)}."
            )
    else:
        pairs, name = chosen_heads(lens, heads, tower=tower, what="norm_matched")
        _, counts, valid = head_grid(lens, name)
        grid = head_mask(pairs, valid)[None]
    if scale == 1:
        return []
    found, kind = lens.anatomy.tower(name)
    if kind == "cross":
        raise UnsupportedError("norm_matched is not defined for cross-attention.")
    out: list[Edit] = []
    for layer in grid.any(2).any(0).nonzero()[:, 0].tolist():
        lens.anatomy.attention(name, layer, "result").weight()  # says why there is none
        change = _SizeKept(found.layers[layer], found.d_model, grid[:, layer, : counts[layer]], scale)
        for site, function in (("z", change.scaled), ("attn_out", change.restored)):
            out.append(Edit(Read(site, layers=(layer,), positions=positions, tower=name), function, "norm_matched"))
    return out


class _SizeKept:
    """The two changes of one layer: heads are scaled, then the size of what attention adds is put back."""

    def __init__(self, block: Any, width: int, chosen: Bool[Tensor, "batch head"], scale: float) -> None:
        self.block, self.width, self.chosen, self.scale = block, width, chosen, scale
        self.sizes: dict[int, Float[Tensor, "batch pos 1"]] = {}

    def scaled(self, z: Float[Tensor, "batch pos head d_head"], where: Where) -> Tensor:
        chosen = self.chosen.to(z.device)
        if len(chosen) not in (1, len(z)):
            raise EditError(f"norm_matched: heads of {len(chosen)} samples do not fit {len(z)}.")
        # Without a stream to be added to, what attention adds is all there is.
        nothing = z.new_zeros(*z.shape[:2], self.width)
        added = self.block.linear(z, nothing, {}, until="attn").attention
        self.sizes[where.copy] = added.float().norm(dim=-1, keepdim=True)
        return torch.where(chosen[:, None, :, None], z * self.scale, z)

    def restored(self, added: Float[Tensor, "batch pos d_model"], where: Where) -> Tensor:
        wide = added.float()
        size = wide.norm(dim=-1, keepdim=True)
        factor = self.sizes.pop(where.copy) / size.clamp_min(torch.finfo(size.dtype).tiny)
        new = (wide * torch.where(size > 0, factor, 1.0)).to(added)
        return torch.where(self.chosen.to(added.device).any(1)[:, None, None], new, added)
