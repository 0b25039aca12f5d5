"""Head outputs of any number of prompts, in a stream: one vector for each prompt and head, or mean and covariance.

A prompt's vector is the mean over its chosen positions of the head's output before the output projection (site `z`),
so that it times `weight(layer)` is the mean of what the head adds to the stream. In families with a norm between the
output projection and the stream (Gemma 2, OLMo 2), and where the final norm's scale is to be taken in, each position
counts with the number that the norm multiplies it with in that very run; then all positions are read, not their mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.batch import Batch
from interp.edits import Heads
from interp.errors import InputError, SettingsError, UnsupportedError
from interp.heads.chosen import chosen_heads
from interp.heads.common import head_grid
from interp.heads.concepts import final_norms
from interp.lens import Lens
from interp.reads import Positions, Read, check_positions

Data = Batch | Iterable[Batch] | Iterable[str] | str


def batches_of(lens: Lens, data: Data, batch_size: int) -> Iterator[Batch]:
    """Prompts as batches of at most `batch_size`; ready batches as they are.

    Raises:
        InputError: there are none, or something is neither a prompt nor a batch.
        SettingsError: `batch_size` is less than 1.
    """
    if batch_size < 1:
        raise SettingsError(f"batch_size must be at least 1, got {batch_size}.")
    rows: list[str] = []
    none = True
    for item in [data] if isinstance(data, (Batch, str)) else data:
        none = False
        if isinstance(item, str):
            rows.append(item)
            if len(rows) < batch_size:
                continue
        elif not isinstance(item, Batch):
            raise InputError(f"prompts are strings or batches from lens.prepare, found a {type(item).__name__}.")
        if rows:
            yield lens.prepare(rows)
            rows = []
        if isinstance(item, Batch):
            yield item
    if rows:
        yield lens.prepare(rows)
    if none:
        raise InputError("no prompts were given.")


def heads_by_layer(lens: Lens, pairs: Heads | None) -> tuple[dict[int, tuple[int, ...]], Bool[Tensor, "layer head"]]:
    """The heads of every layer that are asked for (all that can be had for None), and a mask of them.

    Raises:
        EditError: no list of heads, or one from another model.
        UnknownNameError: a layer or head does not exist.
        UnsupportedError: a layer's heads cannot be had, or the heads are not in the main tower.
    """
    layers, counts, valid = head_grid(lens, site="result")
    if pairs is None:
        return {i: tuple(range(counts[i])) for i in layers}, valid
    named, tower = chosen_heads(lens, pairs, what="pursuit")
    if tower != lens.anatomy.main:
        raise UnsupportedError(f"heads of tower {tower!r} do not write to the stream that the unembedding reads.")
    found: dict[int, list[int]] = {}
    mask = torch.zeros_like(valid)
    for layer, head in sorted(named):
        lens.anatomy.attention(None, layer, "result")
        found.setdefault(layer, []).append(head)
        mask[layer, head] = True
    return {layer: tuple(heads) for layer, heads in found.items()}, mask


def head_weight(lens: Lens, layer: int) -> Float[Tensor, "head d_value d_model"]:
    """What each head's output is multiplied with to give what it adds to the stream.

    The output projection, with the constant factors and the gains of norms that lie behind it.

    Raises:
        UnsupportedError: the projection has no plain weight, or a factor depends on the position.
    """
    part = lens.anatomy.attention(None, layer, "result")
    plain = part.weight()
    found = lens.anatomy.towers[lens.anatomy.main].layer(layer)
    nothing = plain.new_zeros(1, 1, part.n_heads, part.d_value), plain.new_zeros(1, 1, plain.shape[-1])
    return found.linear(*nothing, {}, until="attn").weight


class HeadReader:
    """Reads head outputs, batch by batch.

    Attributes:
        heads: the heads of each layer that are read.
        frozen_scale: whether each position counts with the number that the final norm multiplies the last stream with
            there.
    """

    def __init__(
        self, lens: Lens, heads: Mapping[int, tuple[int, ...]], positions: Positions, frozen_scale: bool
    ) -> None:
        positions = check_positions(positions)
        if isinstance(positions, Tensor):
            raise SettingsError("positions of a stream of batches are a name, ints or a slice, not a tensor.")
        self.lens, self.heads, self.positions, self.frozen_scale = lens, heads, positions, frozen_scale
        if frozen_scale:
            final_norms(lens)
        counts = {i: lens.anatomy.attention(None, i, "result").n_heads for i in heads}
        # A norm between the projection and the stream scales each position by a number of its own.
        self.normed = {
            i for i in heads if any(hasattr(x, "gain") for x in lens.anatomy.attention(None, i, "result").chain)
        }
        plain = [i for i in heads if i not in self.normed]
        reduce = None if frozen_scale else "mean"
        self.reads: list[tuple[Read, list[int]]] = []
        whole = [i for i in plain if len(heads[i]) == counts[i]]
        if whole:
            self.reads.append((Read("z", layers=tuple(whole), positions=positions, reduce=reduce), whole))
        for i in plain:
            if i not in whole:
                self.reads.append((Read("z", layers=(i,), heads=heads[i], positions=positions, reduce=reduce), [i]))
        if self.normed:
            some = sorted(self.normed)
            self.reads.append((Read("z", layers=tuple(some), positions=positions), some))
        last = len(lens.anatomy.towers[lens.anatomy.main].layers) - 1
        self.last = Read("resid_post", layers=(last,), positions=positions)

    def __call__(self, batch: Batch) -> dict[int, Float[Tensor, "batch head d_value"]]:
        """Each layer's head outputs for a batch, in float64 on the CPU.

        Raises:
            InputError: a sample has none of the chosen positions.
        """
        if isinstance(self.positions, str) and self.positions in ("image", "text"):
            have = batch.span(self.positions).any(1)
            if not bool(have.all()):
                raise InputError(f"sample {int((~have).nonzero()[0])} of a batch has no {self.positions} tokens.")
        reads = [read for read, _ in self.reads] + ([self.last] if self.frozen_scale else [])
        with torch.no_grad():
            trace = self.lens.run(batch, reads)
            final = None
            if self.frozen_scale:
                final = self._final_scale(trace[self.last, self.last.layers[0]])  # pyright: ignore[reportOptionalSubscript]
            found = {}
            for read, layers in self.reads:
                for i in layers:
                    z = trace[read, i]
                    if read.reduce is None:
                        keep = batch.mask if read.positions == "all" else trace.valid.get(read)
                        z = self._weighted(i, z, final, keep)
                    found[i] = z.cpu().double()
        return found

    def _final_scale(self, stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos 1"]:
        """The number that the final norm multiplies the last stream with, before its gain."""
        full = stream.float()
        total = torch.ones_like(full[..., :1])
        for norm in final_norms(self.lens):
            scale = norm.scale(full)
            total, full = total * scale, norm.linear(full, scale) + norm.bias.to(full.device)
        return total

    def _weighted(self, layer: int, z: Tensor, final: Tensor | None, keep: Tensor | None) -> Tensor:
        """The mean over real positions, each counting with the scales of the norms that it goes through."""
        scale = torch.ones_like(z[..., 0, :1], dtype=torch.float32) if final is None else final
        if layer in self.normed:
            found = self.lens.anatomy.towers[self.lens.anatomy.main].layer(layer)
            stream = z.new_zeros(*z.shape[:2], self.lens.anatomy.towers[self.lens.anatomy.main].d_model)
            scale = scale * found.linear(z, stream, {}, until="attn").scale
            z = z[:, :, list(self.heads[layer])]
        keep = torch.ones(z.shape[:2], dtype=torch.bool) if keep is None else keep
        keep = keep.to(z.device)
        total = (z.float() * scale[..., None]).masked_fill(~keep[..., None, None], 0.0).sum(1)
        return total / keep.sum(1)[:, None, None]


@dataclass(frozen=True, slots=True, eq=False)
class HeadMoments:
    """Means and covariances of head outputs over prompts, from which any list of keywords can be scored.

    Attributes:
        count: how many prompts.
        mean: for each layer, the mean output of its heads [head, d_value] in float64.
        spread: for each layer, the sum over prompts of the outer products of (output - mean) [head, d_value, d_value].
        heads: which heads of each layer these are.
        valid: the same as a mask [layer, head].
        settings: what they were collected with.
    """

    count: int
    mean: Mapping[int, Float[Tensor, "_ _"]]
    spread: Mapping[int, Float[Tensor, "_ _ _"]]
    heads: Mapping[int, tuple[int, ...]]
    valid: Bool[Tensor, "layer head"]
    settings: Mapping[str, Any]

    def second(self, layer: int, center: bool) -> Float[Tensor, "head d_value d_value"]:
        """The covariance of a layer's heads (sum over n - 1), or the mean of outer products without centring."""
        if center:
            return self.spread[layer] / (self.count - 1)
        mean = self.mean[layer]
        return self.spread[layer] / self.count + mean[:, :, None] * mean[:, None, :]


def head_moments(
    lens: Lens,
    data: Data,
    *,
    positions: Positions = "all",
    pairs: Heads | None = None,
    frozen_scale: bool = False,
    batch_size: int = 32,
) -> HeadMoments:
    """Collect the moments of head outputs over prompts, one batch at a time.

    Memory does not grow with the number of prompts: it is layers x heads x d_head x d_head in float64.

    Args:
        lens: a model whose heads' contributions to the stream can be had.
        data: prompts, or batches (with images, or of your own padding), in any iterable; or one batch.
        positions: whose mean stands for a prompt: `all` (without padding), `image`, `text`, `last`, or a slice or ints
            as in a read; `slice(1, None)` leaves out the first token, on which most attention rests.
        pairs: (layer, head) pairs, or a frame such as `scores.top(16)`; None for all heads.
        frozen_scale: whether each position counts with the scale of the final norm at the full last stream, which
            `apply_final_norm="scale_only"` and `"full"` need. Reads all positions, and runs the whole model.
        batch_size: how many prompts make a batch.

    Raises:
        InputError: no prompts, or a sample without image tokens where these were asked for.
        UnknownNameError: a layer, head or position does not exist.
        UnsupportedError: the model's heads, or its final norm, cannot be had.
    """
    heads, valid = heads_by_layer(lens, pairs)
    reader = HeadReader(lens, heads, positions, frozen_scale)
    mean: dict[int, Tensor] = {}
    spread: dict[int, Tensor] = {}
    count = tokens = 0
    for batch in batches_of(lens, data, batch_size):
        new = len(batch)
        for layer, rows in reader(batch).items():
            center = rows.mean(0)
            off = (rows - center).permute(1, 2, 0)
            within = off @ off.mT
            if layer not in mean:
                mean[layer], spread[layer] = center, within
                continue
            gap = center - mean[layer]
            between = gap[:, :, None] * gap[:, None, :] * (count * new / (count + new))
            mean[layer] = mean[layer] + gap * (new / (count + new))
            spread[layer] = spread[layer] + within + between
        count += new
        tokens += int(batch.mask.sum())
    return HeadMoments(count, mean, spread, heads, valid, reader_settings(reader, count, tokens))


def reader_settings(reader: HeadReader, prompts: int, tokens: int) -> dict[str, Any]:
    """What a result records of the prompts that were read."""
    place = str(Read("z", positions=reader.positions)).partition("@")[2] or "all"
    dtype = str(reader.lens.dtype).removeprefix("torch.")
    return {
        **{"model": reader.lens.name, "dtype": dtype, "prompts": prompts, "tokens": tokens},
        **{"positions": place, "frozen_scale": reader.frozen_scale},
    }
