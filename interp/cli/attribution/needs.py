"""What each method of `interp attribute` asks of the model: the reads of its largest run, and how many runs."""

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from interp.cli.attribution.asking import MEMORY, UP_TO
from interp.cli.cost import Cost, Need, costs_of
from interp.errors import UnsupportedError
from interp.footprint import stream_of
from interp.reads import Read, Reduce

if TYPE_CHECKING:
    from interp.batch import Batch
    from interp.cli.attribution.asking import Asker

GROUP = 2**22  # bytes of fused patterns of a sample that rollout holds at once


def costs(asker: "Asker", methods: Sequence[str], lengths: dict[int, int]) -> dict[str, Cost]:
    """What the methods take; one that the model cannot do is left out, it says itself why.

    What tokens are said (target argmax) and the methods' own arithmetic beside the model (the flows of `flow`) are not
    counted.

    Args:
        asker: the model and the prompts.
        methods: what is to be computed.
        lengths: the prompts for which it is, each with its tokens.
    """
    widest = sorted(sorted(lengths, key=lambda i: -lengths[i])[: asker.settings.batch_size])
    batch = asker.batch(widest)
    needs = []
    for method in methods:
        with suppress(UnsupportedError):
            needs.append(_need(asker, method, batch))
    share = sum(lengths.values()) / len(lengths) / max(lengths.values())
    return costs_of(asker.lens, batch, needs, len(lengths), share=share)


def _need(asker: "Asker", method: str, batch: "Batch") -> Need:
    settings, lens = asker.settings, asker.lens
    main, tower = lens.anatomy.main, settings.tower
    targets, width = _targets(asker, batch), stream_of(lens, batch, main).columns
    alone = settings.target in ("last", "first")
    if method in ("input_gradient", "gradient_x_input", "integrated_gradients"):
        runs = targets * settings.steps + 2 if method == "integrated_gradients" else targets
        return Need(method, (Read("resid_pre", layers=(0,), tower=tower),), True, runs)
    if method == "blank_out":
        return Need(method, (Read("logits", positions="last" if alone and not asker.pooled else "all"),), runs=width)
    if method == "token_activation_map":
        return Need(method, (Read("resid_post", layers=(-1,)),))
    if method == "relative_attention" and settings.form == "pixel_gradient":
        return Need(method, (Read("resid_pre", layers=(0,), tower="vision"),), True, targets + 1)
    able = lens.layers_with("pattern", tower=tower)
    layer = able[-1] if settings.layer is None else lens.anatomy.tower(tower)[0].layer(settings.layer).index
    under = [i for i in able if i <= layer]
    if method == "attention_times_gradient" or (method == "relative_attention" and settings.form == "gradient"):
        return Need(method, (Read("pattern", layers=(layer,), tower=tower),), True, targets)
    if method == "relevance":
        heads = lens.anatomy.attention(tower, layer, "pattern").n_heads
        count = max(1, MEMORY // len(batch) // (20 * heads * width**2))
        some = Read("pattern", layers=tuple(able[-count:]), tower=tower)
        return Need(method, (some,), True, targets * -(-len(able) // count))
    if method == "globenc":
        read = tuple(Read(site, layers=(layer,), tower=tower) for site in ("v", "attn_out"))
        return Need(method, (*read, Read("resid_pre", tower=tower)), runs=3)
    fused: Reduce = "head_mean"
    if method in UP_TO:  # rollout, flow
        count = len(under) if method == "flow" else max(1, GROUP // (4 * width**2))
        read = Read("pattern", layers=tuple(under[-count:]), tower=tower, reduce=fused)
        return Need(method, (read,), runs=1 if count >= len(under) else 2)
    where = "last" if alone else "all"
    read = Read("pattern", layers=(layer,), positions=where, tower=tower, reduce=fused)
    return Need(method, (read,), runs=2 if method == "relative_attention" else 1)


def _targets(asker: "Asker", batch: "Batch") -> int:
    """How many targets a prompt has at most."""
    settings = asker.settings
    if settings.span is not None:
        return int(batch.find(settings.span).sum(1).max())
    return settings.max_new_tokens if settings.target == "argmax" else 1
