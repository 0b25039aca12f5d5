"""What a run will cost, before it starts: how many cells, how many whole runs of the model that is, how long."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from interp.cli.cost import duration
from interp.cli.prompts import prepared
from interp.cli.tracing.inputs import edges_of, pair_of
from interp.cli.tracing.settings import TraceSettings
from interp.data import Prompt

if TYPE_CHECKING:
    from jaxtyping import Bool
    from torch import Tensor

    from interp.batch import Batch
    from interp.lens import Lens


_WINDOWS = {("knockout", "scores"): 9, ("causal", "attn_out"): 10, ("causal", "mlp_out"): 10}


@dataclass(frozen=True, slots=True)
class Cost:
    """What one method costs.

    Attributes:
        cells: runs of the model that one cell after the other would take, over all prompts.
        runs: to how many runs of a whole prompt the work amounts that has to be done.
        seconds: how long that takes, as far as one batch of plain runs tells.
    """

    cells: int
    runs: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.cells:,} cells, as much work as {self.runs:,.0f} runs of a whole prompt; about "
            f"{duration(self.seconds)}"
        )


def seconds_each(lens: "Lens", prompts: Sequence[Prompt]) -> float:
    """How long a prompt takes in a plain run of some of them, the faster of two."""
    batch, times = prepared(lens, prompts, padding_side="left"), []
    for _ in range(2):
        start = time.perf_counter()
        lens.run(batch, "logits@last")
        times.append(time.perf_counter() - start)
    return min(times) / len(prompts)


def cost_of(
    lens: "Lens", method: str, settings: TraceSettings, prompts: Sequence[Prompt], sample: int, each: float
) -> Cost:
    """What a method costs, from the first prompts of a run.

    A cell needs the layers above the first that it changes, at the columns from the first that it changes on.

    Args:
        lens: the model.
        method: the method.
        settings: of the run.
        prompts: all prompts that are to be traced.
        sample: how many of them are looked at.
        each: seconds of a plain run of one prompt.
    """
    some = prompts[:sample]
    batch = prepared(lens, some, padding_side="left")
    scale = len(prompts) / len(some)
    layers = settings.layer_list()
    depth = len(lens.anatomy.towers[lens.anatomy.main].layers)
    listed = list(range(depth)) if layers is None else layers
    if method == "attribution":  # a gradient costs about three runs
        runs = len(prompts) * (2 + 3 * (1 + settings.steps))
        return Cost(runs, runs, runs * each)
    if method == "paths":  # frozen attention: each sender is a fraction of a run, above its layer
        senders = sum(len(_range(lens, layer)) * (depth - layer) / depth for layer in range(depth))
        heads = sum(len(_range(lens, layer)) for layer in range(depth))
        runs = len(prompts) * (3 + senders / float(batch.mask.sum(1).float().mean()))
        return Cost(len(prompts) * heads, runs, runs * each)
    groups = _groups(lens, method, settings, batch, some)
    columns = sum(_shares(batch, mask) for mask in groups)
    count = sum(float(mask.any(1).sum()) for mask in groups)
    sites = len(settings.sites_of(method)) if method != "knockout" else 1
    copies = settings.samples if method == "causal" else 1
    work = cells = 0.0
    for site in settings.sites_of(method) if method != "knockout" else ("scores",):
        window = settings.window or _WINDOWS.get((method, site), 1)
        heads = _heads(lens, site, settings) if method == "sweep" else 1
        above = sum(depth - max(0, layer - window // 2) for layer in listed) / depth
        work += above * columns * copies * heads
        cells += len(listed) * count * copies * heads
    runs = work * scale + 2 * len(prompts) * (sites if method == "causal" else 1) * copies
    return Cost(round(cells * scale), runs, runs * each)


def _range(lens: "Lens", layer: int) -> range:
    """The heads of a layer, none where it has none."""
    has = layer in lens.layers_with("z")
    return range(lens.anatomy.attention(None, layer, "z").n_heads if has else 0)


def _heads(lens: "Lens", site: str, settings: TraceSettings) -> int:
    from interp.reads import Read

    if settings.heads == "all" or Read(site).row.head_axis is None:
        return 1
    part = lens.anatomy.attention(None, lens.layers_with(site)[0], site)
    return part.n_kv_heads if site in ("k", "v") else part.n_heads


def _groups(
    lens: "Lens", method: str, settings: TraceSettings, batch: "Batch", prompts: Sequence[Prompt]
) -> "list[Bool[Tensor, 'batch pos']]":
    """The tokens that are patched together."""
    if method == "knockout":
        return [to for _, to in edges_of(settings, batch, prompts, 0).values()]
    if method == "cross_modal":
        # Image tokens in four groups, text behind them in three, the last; some may be empty.
        image, last = batch.span("image"), batch.span("last")
        return [image] * 4 + [batch.span("text") & (image.long().cumsum(1) > 0)] * 3 + [last]
    if method == "sweep" and settings.positions not in (None, "each"):
        return [batch.span(str(settings.positions))]
    ranks = batch.mask.long().cumsum(1) - 1
    import torch

    if method == "causal":
        begins = [int(batch[i].find(p.labels["subject"])[0].int().argmax()) for i, p in enumerate(prompts)]
        from_there = batch.mask & (ranks >= torch.tensor(begins, device=ranks.device)[:, None])
    else:  # in front of the first difference there is nothing to patch
        from_there = batch.mask & (_differ(*pair_of(lens, prompts)).long().cumsum(1) > 0)
    return [from_there & (ranks == place) for place in range(int(batch.lengths.max()))]


def _differ(clean: "Batch", corrupt: "Batch") -> "Bool[Tensor, 'batch pos']":
    """The columns whose tokens differ; all image tokens where the pictures do."""
    ids = [b.inputs["input_ids"] for b in (clean, corrupt)]
    found = ids[0] != ids[1]
    if clean.image_mask is not None:
        found = found | clean.image_mask
    return found


def _shares(batch: "Batch", mask: "Bool[Tensor, 'batch pos']") -> float:
    """The columns from the first of a group on, as shares of a prompt, summed over the prompts that have the group."""
    later = (mask.long().cumsum(1) > 0) & batch.mask
    return float((later.sum(1) / batch.mask.sum(1)).sum())
