"""Attention flow.

Source: Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers" (arXiv 2005.00928), section 3, and the
authors' code (samiraabnar/attention_flow). The layers' matrices A_l = rownorm((1 - a) W_l + a I) of rollout are read as
pipes: an edge from position i above layer l to position j below it carries at most A_l[i, j]. With F(u, v) the largest
flow from position u at the top to input v,

    flow(u, v) = F(u, v) / sum over v' of F(u, v')

F is found for each pair on its own. The division is the code's, not the paper's; `normalise=False` leaves it out.
rollout(u, v) <= F(u, v) <= bound(u, v) always; rollout is one feasible flow, and `bound` a family of cuts.

Departures. Capacities are rounded to multiples of 2^-30 for scipy's integer solver (Dinic), which moves F by at most
2^-31 for each edge of a smallest cut: in practice below 1e-8. Pairs for which rollout and bound agree are not solved,
and nodes that a target cannot reach are left out. (To leave out tiny edges as well was measured to save no time.)
Padding is left out. For cross-attention the paper defines nothing, and nothing is offered here.

A caveat that the paper does not give. F(u, v) can never exceed min(1, sum over i of A_1[i, v]), the first layer's
column of v. Where attention is diffuse and goes both ways nearly every F equals that number, whatever u is: flow then
says which tokens the first layer attends to and nothing on the target. `settings["first_layer"]` is the share of pairs
for which that is so, and the result carries a caveat when it is above 90%.

Capacities of layers that are only passed through (`method="bound"`) give F from above in a fraction of the time: with
U_l[i] and D_l[i] the largest flows from u to i and from i to v that pairwise limits allow,

    U_L = e_u, U_(l-1)[j] = sum_i min(A_l[i, j], U_l[i])    D_l[i] = sum_j min(A_l[i, j], D_(l-1)[j])
    bound = min over l of sum_i min(U_l[i], D_l[i]), and at most 1

`settings["bound"]` is the share of pairs for which the exact F is that bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from interp.attribution.common import (
    Fusion,
    check_fusion,
    chosen_layers,
    chosen_targets,
    fused_patterns,
    residual_weight,
    settings_of,
    stream_of,
    token_scores,
)
from interp.batch import Batch
from interp.errors import UnsupportedError, unknown
from interp.lens import Lens
from interp.reads import Positions
from interp.tokens import TokenScores

SCALE = 2**30  # largest for which a capacity of one and the sum of a row stay within 32 bits
SAME, TIGHT = 1e-6, 1e-9
METHODS = ("exact", "bound")


def flow(
    lens: Lens,
    batch: Batch,
    *,
    target: Positions = "last",
    layers: int | Sequence[int] | None = None,
    residual: float | None = 0.5,
    fusion: Fusion = "mean",
    tower: str | None = None,
    normalise: bool = True,
    method: Literal["exact", "bound"] = "exact",
) -> TokenScores:
    """The largest flow from each target position to each source token through the layers' attention.

    Holds the fused matrices of all layers of one batch, so it is for prompts of some hundred tokens.

    Args:
        lens: a model whose patterns can be read.
        batch: prompts.
        target: positions as in a read, in the same tower (for a vision tower 0 is the class token).
        layers: None for all; an int for all up to that one; or a list of layers.
        residual: weight of the identity, from 0 to below 1; None is 0.
        fusion: `mean`, `max` or `min` over heads.
        tower: which tower of self-attention; None for the main one.
        normalise: divide each row by its sum, as the authors' code does.
        method: `exact`, or `bound` for the cheap bound from above in its place.

    Returns:
        Scores [batch, target, source]: shares of a row that sum to one, or flows from 0 to 1 without `normalise`. A
        decoder's future tokens have exactly zero.

    Raises:
        UnknownNameError: a layer, tower, position, fusion or method does not exist.
        SettingsError: `residual` is out of range.
        InputError: a position outside a sample.
        UnsupportedError: a layer moves information between positions without an attention pattern, or the tower is
            `cross`.
    """
    check_fusion(fusion)
    weight = residual_weight(residual)
    if method not in METHODS:
        raise unknown("method of flow", method, METHODS)
    if lens.anatomy.tower(tower)[1] == "cross":
        raise UnsupportedError("flow is not defined for cross-attention; use raw_attention(tower='cross').")
    wanted = chosen_layers(lens, layers, tower)
    stream = stream_of(lens, batch, tower)
    chosen = chosen_targets(lens, batch, stream, target)
    width = stream.mask.shape[1]
    found = dict(fused_patterns(lens, batch, wanted, fusion=fusion, tower=tower, memory=2**62, width=width))
    patterns = np.stack([found.pop(i).double().cpu().numpy() for i in wanted])
    scores = torch.zeros(*chosen.index.shape, width, dtype=torch.float64)
    pairs = first = tight = 0
    for b, mask in enumerate(stream.mask):
        real = mask.nonzero()[:, 0].numpy()
        pipes = capacities(patterns[:, b][:, real[:, None], real], weight)
        own = np.cumsum(mask.numpy()) - 1
        targets = own[chosen.index[b].numpy()]
        asked = np.unique(targets[chosen.valid[b].numpy()])
        if not len(asked):
            continue
        ceiling = bounds(pipes, asked)
        flows = ceiling if method == "bound" else largest_flows(pipes, asked, ceiling)
        there = ceiling > 0
        pairs += int(there.sum())
        tight += int((there & (ceiling - flows <= SAME)).sum())
        first += int((there & (np.abs(first_layer(pipes, asked) - flows) <= SAME)).sum())
        if normalise:
            flows = flows / flows.sum(1, keepdims=True)
        place = {int(u): n for n, u in enumerate(asked)}
        rows = [place.get(int(u), 0) for u in targets]
        scores[b, :, real] = torch.from_numpy(flows[rows])
    settings = settings_of(lens, batch, "flow", layers=wanted, residual=weight, fusion=fusion, tower=tower)
    settings |= {"normalise": normalise, "solver": method, "pairs": pairs}
    settings |= {"first_layer": first / max(pairs, 1), "bound": tight / max(pairs, 1)}
    caveat = ""
    if settings["first_layer"] > 0.9:
        caveat = (
            f"{settings['first_layer']:.0%} of the flows are only the first layer's column sums, min(1, sum_i A_1[i, "
            "j]): they say what layer 1 attends to, not what reaches the target."
        )
    name = "flow" if method == "exact" else "flow.bound"
    unit = "share" if normalise else "flow"
    return token_scores(name, scores, chosen, stream, settings, unit=unit, caveat=caveat)


def capacities(patterns: np.ndarray, weight: float) -> np.ndarray:
    """rownorm((1 - weight) W + weight I) of each layer [layer, pos, pos], the lowest layer first."""
    pipes = (1 - weight) * patterns + weight * np.eye(patterns.shape[-1])
    total = pipes.sum(-1, keepdims=True)
    return pipes / np.where(total == 0, 1, total)


def first_layer(pipes: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """min(1, column sums of the first layer) over the positions that each target reaches [target, pos]."""
    reach = np.eye(pipes.shape[1], dtype=bool)[targets]
    for layer in pipes[:0:-1]:
        reach = reach.astype(float) @ layer > 0
    return np.minimum(1, reach.astype(float) @ pipes[0])


def bounds(pipes: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The layered cut bound of the flow from each target to each input [target, pos]; see the head of this file."""
    depth, size, _ = pipes.shape
    up = [np.eye(size)[targets]]  # from the top down: [target, pos]
    for layer in pipes[::-1]:
        up.append(np.stack([np.minimum(layer, u[:, None]).sum(0) for u in up[-1]]))
    best = np.minimum(1, up[depth])
    down = np.where(np.eye(size, dtype=bool), np.inf, 0.0)  # [pos, input]
    for n, layer in enumerate(pipes):
        down = np.stack([np.minimum(row[:, None], down).sum(0) for row in layer])
        for t, u in enumerate(up[depth - 1 - n]):
            best[t] = np.minimum(best[t], np.minimum(u[:, None], down).sum(0))
    return best


def largest_flows(pipes: np.ndarray, targets: np.ndarray, ceiling: np.ndarray) -> np.ndarray:
    """The largest flow from each target at the top to each input [target, pos].

    Args:
        pipes: capacities [layer, pos, pos], the lowest layer first; rows sum to at most one.
        targets: positions at the top.
        ceiling: a bound from above; pairs for which rollout reaches it are not solved.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import maximum_flow

    depth, size, _ = pipes.shape
    whole = np.rint(pipes * SCALE).astype(np.int32)
    # Run against the arrows, from the input up and late positions first, the solver meets fewer dead ends.
    layer, above, below = np.nonzero(whole)
    room = whole[layer, above, below]
    tails, heads = (layer + 1) * size - 1 - below, (layer + 2) * size - 1 - above
    nodes = (depth + 1) * size
    flows = np.eye(size)[targets]
    for one in pipes[::-1]:
        flows = flows @ one
    for n, target in enumerate(targets):
        reach = np.zeros(nodes, dtype=bool)
        reach[nodes - 1 - target] = True
        for at in range(depth - 1, -1, -1):
            mine = (layer == at) & reach[heads]
            reach[tails[mine]] = True
        keep = reach[heads]
        graph = csr_array((room[keep], (tails[keep], heads[keep])), shape=(nodes, nodes))
        for source in np.flatnonzero(ceiling[n] - flows[n] > TIGHT):
            value = maximum_flow(graph, size - 1 - int(source), nodes - 1 - int(target)).flow_value
            flows[n, source] = value / SCALE
    return flows
