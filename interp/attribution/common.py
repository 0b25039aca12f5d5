"""What attribution methods share: the stream that sources stand in, targets, layers, fused patterns, results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.batch import Batch, Selection, select
from interp.errors import InputError, SettingsError, UnsupportedError, unknown
from interp.grids import tower_patches
from interp.inputs import tokenizer_of
from interp.lens import Entry, Lens
from interp.patches import Patches
from interp.reads import Positions, Read, Reduce, check_positions
from interp.tokens import TokenScores

Fusion = Literal["mean", "max", "min"]
FUSIONS: Mapping[str, Reduce] = {"mean": "head_mean", "max": "head_max", "min": "head_min"}


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """What is known of the positions of a tower, on the CPU.

    Attributes:
        tower: its name.
        mask: real positions [batch, pos].
        tokens: for each sample, the text of each column.
        spans: columns by name [batch, pos]: `image`, `text`, `special`.
        patches: which pixels a column stands for, where that is known.
    """

    tower: str
    mask: Bool[Tensor, "batch pos"]
    tokens: Sequence[Sequence[str]]
    spans: Mapping[str, Bool[Tensor, "batch pos"]] = field(default_factory=dict)
    patches: Patches | None = None


def stream_of(lens: Lens, batch: Batch, tower: str | None = None) -> Stream:
    """The positions of a tower's stream in a batch.

    For a vision tower each row is a picture as the tower takes it (a tile where the processor cuts tiles; all pictures
    one after the other in towers that pack them), its pixels are those of the processed picture, and its tokens are
    called by row and column.

    Raises:
        UnknownNameError: there is no such tower.
        HookError: the batch holds nothing for this tower.
    """
    found, _ = lens.anatomy.tower(tower)
    if found.name == lens.anatomy.main and found.name != "vision":
        return _main_stream(lens, batch, found.name)
    size, width = _stream_shape(lens, batch, found.name)
    mask = torch.ones(size, width, dtype=torch.bool)
    if found.name == "vision":
        return _vision_stream(lens, batch, mask)
    if found.name == "encoder" and batch.source_mask is not None and batch.source_mask.shape == mask.shape:
        mask = batch.source_mask.cpu()
    ids = batch.inputs.get("input_ids")
    if found.name == "encoder" and isinstance(ids, Tensor) and ids.shape == mask.shape:
        return _tokens_stream(lens, found.name, mask, ids, None, None)
    return Stream(found.name, mask, [[str(i) for i in range(width)]] * size, {"text": mask})


def _stream_shape(lens: Lens, batch: Batch, tower: str) -> tuple[int, int]:
    """Rows and columns of a tower's stream."""
    read = Read("resid_pre", layers=(0,), tower=tower)
    found = lens.run(batch, read).values[read, 0].shape
    return found[0], found[1]


def _main_stream(lens: Lens, batch: Batch, tower: str) -> Stream:
    mask = batch.mask.cpu()
    ids = batch.inputs.get("decoder_input_ids", batch.inputs.get("input_ids"))
    if not isinstance(ids, Tensor):
        return Stream(tower, mask, [[str(i) for i in range(mask.shape[1])]] * len(mask), {"text": mask})
    return _tokens_stream(lens, tower, mask, ids, batch.image_mask, batch.patches)


def _tokens_stream(
    lens: Lens, tower: str, mask: Tensor, ids: Tensor, image: Tensor | None, patches: Patches | None
) -> Stream:
    tokenizer = tokenizer_of(lens.processor)
    rows = ids.tolist()
    names = {i: token_text(tokenizer, i) for row in rows for i in row}
    spans: dict[str, Tensor] = {"text": mask}
    if image is not None and bool(image.any()):
        spans = {"image": image.cpu(), "text": mask & ~image.cpu()}
    if tokenizer is not None:
        special = torch.isin(ids.cpu(), torch.tensor(sorted(tokenizer.all_special_ids), dtype=torch.long))
        spans["special"] = special & spans["text"]
    return Stream(tower, mask, [[names[i] for i in row] for row in rows], spans, patches)


def token_text(tokenizer: Any, token_id: int) -> str:
    """A token as text, its own space kept; the id where there is no tokenizer."""
    if tokenizer is None:
        return str(token_id)
    token = str(tokenizer.convert_ids_to_tokens(token_id))
    if "▁" in token:
        return token.replace("▁", " ")
    return tokenizer.convert_tokens_to_string([token]) or token  # undoes byte-level spellings


def _vision_stream(lens: Lens, batch: Batch, mask: Tensor) -> Stream:
    size, width = mask.shape
    tokens = [[str(i) for i in range(width)] for _ in range(size)]
    try:
        grid = tower_patches(lens.model.config, batch.inputs)
    except UnsupportedError:
        return Stream("vision", mask, tokens, {"image": mask})
    if len(grid) != mask.numel():
        return Stream("vision", mask, tokens, {"image": mask})
    special = torch.zeros_like(mask)
    places = zip(grid.sequence.tolist(), grid.position.tolist(), grid.kind, strict=True)
    for n, (row, column, kind) in enumerate(places):
        special[row, column] = kind != "patch"
        tokens[row][column] = f"[{kind}]" if kind != "patch" else f"{int(grid.row[n])},{int(grid.col[n])}"
    keep = torch.tensor([k == "patch" for k in grid.kind])
    first = torch.stack([grid.image[grid.sequence == i].min() for i in range(size)])
    image = grid.image - first[grid.sequence]
    sizes = []
    for i in range(size):
        mine = grid.sequence == i
        ends = [grid.box[mine & (image == k), 2:].amax(0) for k in range(int(image[mine].max()) + 1)]
        sizes.append(tuple((int(x), int(y)) for x, y in ends))
    rows = {"sample": grid.sequence, "column": grid.position, "image": image, "box": grid.box}
    rows |= {"row": grid.row, "col": grid.col}
    patches = Patches(**rows, kind=grid.kind, sizes=tuple(sizes)).where(keep)
    return Stream("vision", mask, tokens, {"image": mask & ~special, "special": special}, patches)


def chosen_targets(lens: Lens, batch: Batch, stream: Stream, target: Positions) -> Selection:
    """The columns of the targets in their stream, on the CPU.

    Args:
        lens: the model.
        batch: the batch.
        stream: the stream that the targets stand in.
        target: positions as in a read; text is found with `batch.find`.

    Raises:
        UnknownNameError: an unknown name of positions.
        InputError: a position outside a sample, or an empty selection.
    """
    positions = check_positions(target)
    if isinstance(positions, str) and positions == "generated":
        raise InputError("'generated' means something in lens.generate only; give the whole text and its positions.")
    if isinstance(positions, Tensor):
        positions = positions.cpu()
    main = stream.tower == lens.anatomy.main != "vision"
    found = select(positions, stream.mask, batch.to("cpu") if main else None)
    # "all" marks padding too: a target is a real token.
    return Selection(found.index, found.valid & stream.mask.gather(1, found.index))


def chosen_layers(lens: Lens, layers: int | Sequence[int] | None, tower: str | None) -> list[int]:
    """The layers that a method goes through, lowest first.

    Args:
        lens: the model.
        layers: None for all; an int for all up to that one (negative from the end); or those that are listed.
        tower: the tower.

    Raises:
        UnknownNameError: a layer does not exist.
        SettingsError: an empty list, or one that names a layer twice.
        UnsupportedError: a layer moves information between positions without an attention pattern.
    """
    found, kind = lens.anatomy.tower(tower)
    if layers is None or isinstance(layers, int):
        wanted = list(range(found.layer(-1 if layers is None else layers).index + 1))
    else:
        wanted = sorted(found.layer(i).index for i in layers)
        if not wanted or len(set(wanted)) != len(wanted):
            raise SettingsError(f"layers={list(layers)} is empty or names a layer twice.")
    able = lens.layers_with("pattern", tower=tower)
    # A layer that holds cross-attention alone moves nothing within its own stream.
    still = [i for i in wanted if i not in able and [*found.layers[i].attention] == ["cross"] and kind == "attn"]
    for i in wanted:
        if i not in able and i not in still:
            lens.anatomy.attention(tower, i, "pattern")  # says why
            raise UnsupportedError(f"layer {i} of tower {found.name!r} has no attention pattern.")
    mixed = [i for i in wanted if "mixer" in found.layers[i].branches]
    if mixed:
        raise UnsupportedError(
            f"layer {mixed[0]} of tower {found.name!r} also moves information between positions by a recurrent mixer, "
            "which no attention pattern shows; choose layers without one."
        )
    kept = [i for i in wanted if i in able]
    if not kept:
        raise UnsupportedError(f"none of the layers {wanted} of tower {found.name!r} has an attention pattern.")
    return kept


def check_fusion(fusion: str) -> Reduce:
    """The reduction over heads of a way of fusing them.

    Raises:
        UnknownNameError: there is no such way.
    """
    if fusion not in FUSIONS:
        raise unknown("fusion of heads", fusion, FUSIONS)
    return FUSIONS[fusion]


def residual_weight(residual: float | None) -> float:
    """The weight of the identity; None is zero.

    Raises:
        SettingsError: it is not from 0 to below 1.
    """
    weight = 0.0 if residual is None else float(residual)
    if not 0 <= weight < 1:
        raise SettingsError(f"residual is a weight from 0 to below 1 (None for 0), found {residual!r}.")
    return weight


def fused_patterns(
    lens: Lens,
    batch: Batch,
    layers: Sequence[int],
    *,
    fusion: str = "mean",
    tower: str | None = None,
    memory: int = 2**22,
    width: int | None = None,
) -> Iterator[tuple[int, Float[Tensor, "batch query key"]]]:
    """The attention pattern of each layer with its heads fused, from the highest layer to the lowest.

    Layers are taken in groups that fit into `memory`. Where there are several, one run keeps the streams that enter the
    groups, and each group is then run once more from its stream: two forward passes in all, at most the matrices of one
    group held at a time. Delete the one in hand before asking for the next. Towers that cannot be entered at a layer
    (T5, whose layers hand their position bias on) are run from the input for every group.

    Args:
        lens: the model.
        batch: the batch.
        layers: ascending.
        fusion: `mean`, `max` or `min` over heads.
        tower: the tower.
        memory: bytes of fused matrices held at a time for each sample; at least one layer's is.
        width: columns of the tower's stream, where they are known already.
    """
    reduce = check_fusion(fusion)
    found, _ = lens.anatomy.tower(tower)
    width = _stream_shape(lens, batch, found.name)[1] if width is None else width
    count = max(1, memory // (4 * width**2))
    groups = [list(layers[i : i + count]) for i in range(0, len(layers), count)]
    entries = entries_of(lens, batch, [g[0] for g in groups], found.name) if len(groups) > 1 else {}
    for group in reversed(groups):
        read = Read("pattern", layers=tuple(group), tower=tower, reduce=reduce)
        trace = lens.run(batch, read, entry=entries.pop(group[0], None))
        values = dict(trace.values)
        del trace
        for layer in reversed(group):
            if values[read, layer].shape[-2:] != (width, width):
                found_shape = list(values[read, layer].shape)
                raise UnsupportedError(
                    f"the pattern of layer {layer} in tower {found.name!r} is {found_shape}, not [batch, {width}, "
                    f"{width}]: it is of windows, or of another length than the layers below."
                )
            yield layer, values.pop((read, layer))


def entries_of(lens: Lens, batch: Batch, starts: Sequence[int], tower: str) -> dict[int, Entry]:
    """Where the run of each group begins; none where the tower cannot be entered."""
    found = lens.anatomy.towers[tower]
    if not all(layer.skippable for layer in found.layers[: starts[-1]]):
        return {}
    main = tower == lens.anatomy.main
    # Runs that skip the images, or the encoder, need to be told what these gave.
    needs = main and (batch.image_mask is not None or "encoder" in lens.anatomy.towers)
    read = Read("resid_pre", layers=tuple(starts), tower=tower)
    trace = lens.run(batch, read, cache=needs)
    prefix = replace(trace.cache, key_values=None) if needs else None
    return {
        i: Entry(i, trace.values[read, i][0] if found.packed else trace.values[read, i], prefix=prefix, tower=tower)
        for i in starts[1:]
    }


def settings_of(lens: Lens, batch: Batch, method: str, **more: Any) -> dict[str, Any]:
    """What a result records: the model, the batch's size, and the method's own options."""
    dtype = str(lens.dtype).removeprefix("torch.")
    base = {"method": method, "model": lens.name, "dtype": dtype}
    return base | {"prompts": len(batch), "tokens": int(batch.mask.sum()), **more}


def token_scores(
    name: str,
    scores: Float[Tensor, "batch target source"],
    targets: Selection,
    sources: Stream,
    settings: Mapping[str, Any],
    *,
    of: Stream | None = None,
    unit: str = "",
    caveat: str = "",
) -> TokenScores:
    """A result; numbers on padding and fillers are dropped.

    Args:
        name: the method.
        scores: the scores.
        targets: the columns of the targets, in the stream `of`.
        sources: the stream of the sources.
        settings: what they were computed with.
        of: the stream of the targets, where it is another one.
        unit: what they are measured in.
        caveat: what a reader has to know before believing them.
    """
    there = sources if of is None else of
    columns = targets.index.cpu().masked_fill(~targets.valid.cpu(), -1)
    texts: list[list[str]] = [
        ["" if c < 0 else str(row[c]) for c in cs] for row, cs in zip(there.tokens, columns.tolist(), strict=True)
    ]
    return TokenScores(
        scores=scores,
        targets=columns,
        source_mask=sources.mask,
        tokens=sources.tokens,
        target_tokens=texts,
        name=name,
        unit=unit,
        settings=settings,
        spans=sources.spans,
        patches=sources.patches,
        tower=sources.tower,
        target_tower=None if of is None else of.tower,
        target_mask=None if of is None else of.mask,
        caveat=caveat,
    )
