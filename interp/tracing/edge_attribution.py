"""Edge attribution patching: what each edge between two components carries, all edges from one gradient.

Sources: Syed, Rager, Conmy 2023, "Attribution Patching Outperforms Automated Circuit Discovery", arXiv 2310.10348
(EAP); Hanna, Pezzelle, Belinkov 2024, "Have Faith in Faithfulness: Going Beyond Circuit Overlap When Finding Model
Mechanisms", arXiv 2403.17806 (EAP-IG: the gradient averaged over inputs on the way from base to source).

    score(u -> v) = sum over positions of (u_source - u_base) . d metric / d (input of v)

An edge goes from what a component u adds to the stream (the embeddings, a head, an MLP) to the stream as a later
component v reads it (a head's queries, keys or values, an MLP, the final norm in front of the logits). To be patched is
only what v reads: the score estimates the metric's change when u's part of v's input, and nothing else, is the other
run's. For a target, the scores of all its sources sum to (stream_source - stream_base) . gradient.

Keys and values that several query heads share are one target. The gradient goes through the norm in front of v. What
u adds includes norms behind attention or the MLP, with their scale in each run.

What it does not see: the estimate is linear in the edge; it is poor for edges from the embeddings and the first MLP,
and where attention is almost sure (`path_patching` patches heads' edges exactly).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.batch import Batch
from interp.edits import Edit, Where, splice
from interp.errors import InputError, SettingsError, UnsupportedError
from interp.heads.common import Answers
from interp.lens import Lens
from interp.reads import Positions, Read
from interp.tracing.attribution_patching import metric_of
from interp.tracing.edge_scores import INPUTS, EdgeScores
from interp.tracing.grid_run import Direction, GridRun
from interp.tracing.metrics import UNITS, Metric, against
from interp.tracing.pair import Pair


def edge_attribution(
    lens: Lens,
    clean: Batch | Sequence[Batch],
    corrupt: Batch | Sequence[Batch],
    *,
    steps: int = 0,
    metric: Metric | None = None,
    answers: Answers | None = None,
    wrong: Answers | None = None,
    at: Positions = "last",
    direction: Direction = "denoise",
) -> EdgeScores:
    """Estimate what patching each edge alone would do to the metric.

    Of a batch, what every component adds in both runs is held: [source, batch, pos, d_model]. Give several batches
    where that is much.

    Args:
        lens: a decoder, with or without images.
        clean: the prompts on which the model does what is studied, in one batch or several.
        corrupt: the same prompts changed, prepared alike: as many columns, the same padding.
        steps: 0 takes the gradient at the base run; m from 1 the mean over m inputs on the way to the source run (m = 5
            is usual), which costs a gradient for each.
        metric: as in `patch_sweep`; a function has to be differentiable.
        answers: right next tokens of all prompts in order.
        wrong: wrong ones.
        at: where a function or the divergence gets its logits.
        direction: `denoise` puts the clean run's values into the corrupt run, `noise` the other way round.

    Returns:
        The score of every edge, the mean over prompts, in the metric's unit.

    Raises:
        InputError: prompts that do not match, equal prompts, a metric that is the same in both runs, answers that do
            not fit.
        UnknownNameError: no such metric or direction.
        SettingsError: `steps` is negative, or options contradict each other.
        UnsupportedError: the model has no logits, recurrent mixers, cross-attention or a norm of the stream itself (its
            components do not add up to what later ones read), or it cannot give a component.
        NonFiniteError: a run or the metric gives NaN.
    """
    if type(steps) is not int or steps < 0:
        raise SettingsError(f"steps is a whole number from 0, got {steps!r}.")
    run = GridRun.of(
        lens,
        clean,
        corrupt,
        sites="resid_pre",
        layers=0,
        positions="all",
        heads="all",
        window=1,
        metric=metric,
        answers=answers,
        wrong=wrong,
        at=at,
        direction=direction,
    )
    graph = Graph.of(lens)
    found = [_scored(pair, graph, steps) for pair in run.pairs()]
    each, source, base = (torch.cat([f[i] for f in found], -1) for i in range(3))
    if bool((source == base).all()):
        raise InputError(f"metric {run.name} is the same in the clean and the corrupt run: there is nothing to carry.")
    error = each.std(-1) / each.shape[-1] ** 0.5 if each.shape[-1] > 1 else torch.full_like(each[..., 0], torch.nan)
    return EdgeScores(
        scores=each.mean(-1).float(),
        errors=error.float(),
        sources=graph.sources,
        targets=graph.targets,
        valid=graph.valid,
        clean=source if direction == "denoise" else base,
        corrupt=base if direction == "denoise" else source,
        direction=direction,
        metric=run.name,
        unit=UNITS.get(run.name, ""),
        settings=run.settings(method="edge_attribution", steps=steps),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """The components of a model and the edges between them.

    Attributes:
        sources: layer and head, in the order in which they are added to the stream (see `EdgeScores`).
        targets: layer, head and input.
        valid: which edges there are.
        before: for each layer the number of sources that its attention reads, and its MLP; at the end that of all.
        parallel: whether attention and MLP of each layer read the same stream.
    """

    sources: Int[Tensor, "source 2"]
    targets: Int[Tensor, "target 3"]
    valid: Bool[Tensor, "source target"]
    before: tuple[tuple[int, int], ...]
    parallel: tuple[bool, ...]

    @staticmethod
    def of(lens: Lens) -> Graph:
        """The graph of a decoder.

        Raises:
            UnsupportedError: its components do not add up to what later ones read.
        """
        layers = lens.anatomy.towers[lens.anatomy.main].layers
        sources, targets, before, reached = [(-1, -1)], [], [], []
        for layer in layers:
            i, known = layer.index, len(sources)
            strange = [kind for kind in layer.branches if kind not in ("attn", "mlp")]
            if strange or "attn" not in layer.branches or "mlp" not in layer.branches:
                raise UnsupportedError(f"{lens.name}: {layer.name} adds {', '.join(layer.branches)}, not attn and mlp.")
            if layer.adjusted or any(what != "add" for what, _ in layer.recipe):
                raise UnsupportedError(
                    f"{lens.name}: components do not add up to the stream: {layer.name} norms, scales or is given "
                    "something else."
                )
            for site in ("q", "k", "v", "result", "mlp_out", *(() if layer.parallel else ("resid_mid",))):
                reason = lens.refusal(site, i)
                if reason is not None:
                    raise UnsupportedError(reason)
            part = lens.anatomy.attention(None, i)
            for number, count in enumerate((part.n_heads, part.n_kv_heads, part.n_kv_heads)):
                targets += [(i, h, number) for h in range(count)]
                reached += [known] * count
            sources += [(i, h) for h in range(part.n_heads)]
            targets.append((i, -1, INPUTS.index("mlp")))
            reached.append(known if layer.parallel else len(sources))
            before.append((known, reached[-1]))
            sources.append((i, -1))
        targets.append((len(layers), -1, INPUTS.index("logits")))
        reached.append(len(sources))
        before.append((len(sources), len(sources)))
        valid = torch.arange(len(sources))[:, None] < torch.tensor(reached)
        parallel = tuple(layer.parallel for layer in layers)
        return Graph(torch.tensor(sources), torch.tensor(targets), valid, tuple(before), parallel)


def _scored(
    pair: Pair, graph: Graph, steps: int
) -> tuple[Float[Tensor, "source target batch"], Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """The scores of one pair of batches, and the metric of its source and base run."""
    lens, output = pair.lens, Read("logits", positions=pair.measure.positions)
    first, every = Read("resid_pre", layers=(0,)), torch.arange(len(pair.base), device=pair.base.mask.device)
    reads = [first, Read("result"), Read("mlp_out")]
    source = lens.run(pair.source, [*reads, output])
    base = lens.run(pair.base, reads)
    moved = [source.values[first, 0].float() - base.values[first, 0].float()]
    for i in range(pair.depth):
        moved += (source.values[reads[1], i].float() - base.values[reads[1], i].float()).unbind(2)
        moved.append(source.values[reads[2], i].float() - base.values[reads[2], i].float())
    # A column of padding means nothing, whatever stands there.
    gaps = torch.stack([x.masked_fill(~pair.base.mask[..., None], 0.0) for x in moved])
    logits = source.logits
    measure = against(pair.measure, logits) if pair.measure.relative else pair.measure
    start, way = base.values[first, 0], source.values[first, 0] - base.values[first, 0]
    del source, base, moved
    slopes = Slopes(graph, gaps, metric_of(pair.base, measure))
    value = slopes.run(pair, ())
    scores = slopes.scores
    for step in range(1, steps + 1):
        there = splice(lambda _, a=step / steps: start + a * way, site="resid_pre", layers=0)
        slopes.run(pair, there)
        scores = slopes.scores / steps if step == 1 else scores + slopes.scores / steps
    reached = measure(logits if measure.ids is None else logits[..., measure.ids], every)
    return scores.cpu(), reached.cpu(), value.cpu()


class Slopes:
    """Gradients at what each target reads, times what each source moves, from one run with its graph.

    A zero is added at every place whose gradient is wanted. With the metric's gradient at a head's queries, a second
    step back goes from these to the stream that enters the layer, past nothing but a norm and a projection.
    """

    def __init__(
        self, graph: Graph, gaps: Float[Tensor, "source batch pos d_model"], metric: Callable[[Tensor], Tensor]
    ) -> None:
        self.graph, self.gaps, self.metric = graph, gaps, metric
        self.zeros: dict[tuple[str, int], Tensor] = {}
        self.outputs: dict[tuple[str, int], Tensor] = {}
        self.scores = gaps.new_zeros(*graph.valid.shape, gaps.shape[1])

    def run(self, pair: Pair, edits: Sequence[Edit]) -> Float[Tensor, " batch"]:
        """Find the scores of a run; returns its metric."""
        self.zeros, self.outputs = {}, {}
        self.scores = torch.zeros_like(self.scores)
        last = pair.depth - 1
        middle = tuple(i for i in range(pair.depth) if not self.graph.parallel[i])
        reads = [Read(site) for site in ("resid_pre", "q", "k", "v", "mlp_out")]
        reads += [Read("resid_mid", layers=middle)] if middle else []
        probes = [Edit(read, self._probing(read.site), "edge_attribution") for read in reads]
        end = Read("resid_post", layers=(last,))
        probes.append(Edit(end, self._probing("resid_post"), "edge_attribution"))
        found = pair.lens.run(pair.base, (), [*edits, *probes], gradients=[end], metric=self._metric)
        assert found.metric is not None
        return found.metric.float()

    def _probing(self, site: str) -> Callable[[Tensor, Where], Tensor]:
        def change(value: Tensor, where: Where) -> Tensor:
            zero = torch.zeros_like(value, requires_grad=True)
            self.outputs[site, where.layer], self.zeros[site, where.layer] = value, zero
            return value + zero

        return change

    def _metric(self, logits: Tensor) -> Tensor:
        value = self.metric(logits)
        keys = [key for key in self.zeros if key[0] not in ("resid_pre", "resid_mid")]
        slopes = torch.autograd.grad(
            value.sum(), [self.zeros[key] for key in keys], retain_graph=True, allow_unused=True
        )
        at = dict(zip(keys, slopes, strict=True))
        depth, place = len(self.graph.parallel), 0
        for i in range(depth):
            streams = [
                self._back(site, i, at[site, i], head) for site in ("q", "k", "v") for head in self._heads(site, i)
            ]
            place = self._put(place, self.graph.before[i][0], streams)
            place = self._put(place, self.graph.before[i][1], [self._back("mlp_out", i, at["mlp_out", i])])
        self._put(place, self.graph.before[depth][0], [at["resid_post", depth - 1]])
        return value

    def _heads(self, site: str, layer: int) -> range:
        return range(self.outputs[site, layer].shape[2])

    def _back(self, site: str, layer: int, slope: Tensor | None, head: int | None = None) -> Tensor | None:
        """The gradient at the stream that makes an output, from the gradient at that output (or one head of it)."""
        if slope is None:
            return None
        if head is not None:
            slope = torch.zeros_like(slope).index_copy(2, slope.new_tensor([head]).long(), slope[:, :, head : head + 1])
        stream = "resid_pre" if site != "mlp_out" or self.graph.parallel[layer] else "resid_mid"
        (found,) = torch.autograd.grad(
            self.outputs[site, layer], self.zeros[stream, layer], slope, retain_graph=True, allow_unused=True
        )
        return found

    def _put(self, place: int, count: int, streams: Sequence[Tensor | None]) -> int:
        """Scores of the next targets, which read the first `count` sources; returns the number of the target behind."""
        there = [n for n, x in enumerate(streams) if x is not None]
        if there:
            slopes = torch.stack([x for x in streams if x is not None]).float()
            some = torch.einsum("sbpd,tbpd->stb", self.gaps[:count], slopes)
            self.scores[:count, [place + n for n in there]] = some
        return place + len(streams)
