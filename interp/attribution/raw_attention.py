"""Raw attention: what a position attends to in one layer.

The baseline of Abnar and Zuidema 2020 (arXiv 2005.00928), section 2: with A_h the attention probabilities of layer l,

    score(i, j) = mean over heads h of A_h[i, j]        (or their maximum or minimum)

It says where one layer looks, not where information comes from: after the first layer every position holds a mixture
of all that it may see, and in their table 2 the agreement with blank-out falls from .69 in the first layer to nothing
in the third. For encoder-decoders the tower `cross` gives what the decoder's positions take from the encoder's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from interp.attribution.common import (
    Fusion,
    Stream,
    check_fusion,
    chosen_targets,
    settings_of,
    stream_of,
    token_scores,
)
from interp.batch import Batch
from interp.lens import Lens
from interp.reads import Positions, Read
from interp.tokens import TokenScores


def raw_attention(
    lens: Lens,
    batch: Batch,
    *,
    layer: int = -1,
    target: Positions = "last",
    heads: int | Sequence[int] | None = None,
    fusion: Fusion = "mean",
    tower: str | None = None,
) -> TokenScores:
    """The attention of the target positions in one layer.

    Args:
        lens: a model whose patterns can be read.
        batch: prompts.
        layer: which layer; negative ones count from the end.
        target: positions as in a read, in the tower that attends (for a vision tower 0 is the class token).
        heads: which heads; None for all.
        fusion: `mean`, `max` or `min` over those heads.
        tower: which tower; `cross` for the cross-attention of a decoder; None for the main one.

    Returns:
        Scores [batch, target, source] as probabilities; each row sums to one under `mean` (to less in families with an
        attention sink of their own, such as gpt-oss).

    Raises:
        UnknownNameError: a layer, head, tower, position or fusion does not exist.
        InputError: a position outside a sample.
        UnsupportedError: the layer's pattern cannot be read.
    """
    reduce = check_fusion(fusion)
    found, kind = lens.anatomy.tower(tower)
    index = found.layer(layer).index
    asking = stream_of(lens, batch, found.name)
    chosen = chosen_targets(lens, batch, asking, target)
    sources = asking
    if kind == "cross":
        sources = stream_of(lens, batch, "encoder" if "encoder" in lens.anatomy.towers else "vision")
    listed = (heads,) if isinstance(heads, int) else None if heads is None else tuple(heads)
    read = Read("pattern", layers=(index,), heads=listed, positions=target, tower=tower, reduce=reduce)
    rows = lens.run(batch, read).values[read, index]
    if rows.shape[-1] != sources.mask.shape[1]:  # keys that are no stream of their own, such as Mllama's padded tiles
        mask = torch.ones(len(rows), rows.shape[-1], dtype=torch.bool)
        sources = Stream(sources.tower, mask, [[str(i) for i in range(rows.shape[-1])]] * len(rows))
    settings = settings_of(lens, batch, "raw_attention", layer=index, fusion=fusion, tower=tower)
    settings["heads"] = None if listed is None else list(listed)
    of = None if sources is asking else asking
    return token_scores("raw_attention", rows, chosen, sources, settings, of=of, unit="probability")
