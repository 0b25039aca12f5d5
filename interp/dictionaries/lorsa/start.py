"""First weights of a Lorsa from the layer that it stands for: exact copies, the layer's heads, active subspaces.

    exact        n_qk = heads; OV heads are the columns of W_V and the rows of W_O of each head (signed), or these and
                 their negatives (ReLU kinds): the same function
    heads        queries and keys of the heads, each repeated n_qk / heads times, with biases and gains; b_D the bias
    subspace     besides, the OV heads of head h lie where it is active: with U the first d_value principal directions
                 of its lifted values v W_V^T (`values`) or of its outputs z W_O (`outputs`) on a batch, about the mean,
                     values     w_v = r U^T,  w_o = w_v W_V W_O           outputs    w_o = r U^T,  w_v = w_o (W_V W_O)^T
                 for random r; all w_o of length one, all w_v of the length that, with b_D, makes the error on the batch
                 least (by least squares; the reference tries a grid of lengths)

The reference leaves out the biases, assumes heads d_value = d_model, and leaves the last n_ov mod heads rows random;
here QK heads are shared out evenly among the layer's heads, and OV heads among QK heads, so that none is left over.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.batch import Batch
from interp.dictionaries.lorsa.attend import attend, pattern_of, positions_of
from interp.dictionaries.lorsa.lorsa import Lorsa
from interp.dictionaries.lorsa.rule import AttentionRule, attention_rule, random_tokens
from interp.dictionaries.lorsa.select import select, written
from interp.errors import InputError, SettingsError, UnsupportedError, unknown
from interp.lens import Lens
from interp.reads import Read


@torch.no_grad()
def exact_copy(
    lens: Lens,
    layer: int,
    batch: Batch | None = None,
    *,
    tower: str | None = None,
    architecture: str = "identity",
    context: int = 128,
    tolerance: float = 1e-5,
) -> Lorsa:
    """A Lorsa that does what an attention layer does, proved against the layer.

    Args:
        lens: a model in float32 or float64.
        layer: its index.
        batch: inputs to measure and prove on; None for random tokens of the main tower.
        tower: of the layer; None for the main one.
        architecture: `identity`, with one OV head for each coordinate of each head; or `relu`, with each and its
            negative.
        context: longest sequence (without a batch).
        tolerance: of the proof: patterns absolute, outputs relative to the largest.

    Returns:
        The copy; `metadata["proof"]` holds the two errors.

    Raises:
        UnsupportedError: the layer's rule is not one that a Lorsa has, or the copy is not the layer.
        UnknownNameError: an architecture has no exact copy.
        SettingsError, InputError: see `attention_rule`.
    """
    if architecture not in ("identity", "relu"):
        raise unknown("architecture", architecture, ("identity", "relu"), "exact copies")
    rule = attention_rule(lens, layer, batch, tower=tower, context=context)
    heads, _, d_value = rule.W_V.shape
    signs = 1 if architecture == "identity" else 2
    lorsa = shaped(rule, n_qk=heads, n_ov=signs * heads * d_value, architecture=architecture)
    _copy_qk(lorsa, rule)
    for sign in range(signs):
        factor = 1 - 2 * sign

        def put(parameter: Tensor, value: Tensor, at: int = sign, f: int = factor) -> None:
            parameter.view(heads, signs, d_value, *parameter.shape[1:])[:, at] = f * value

        put(lorsa.W_V, rule.W_V.transpose(1, 2))
        put(lorsa.b_V, rule.b_V)
        put(lorsa.W_O, rule.W_O)
    lorsa.b_D.copy_(rule.b_O)
    lorsa.metadata["proof"] = prove(lorsa, rule, lens, batch, tolerance=tolerance)
    return lorsa.eval()


def shaped(rule: AttentionRule, *, n_qk: int, n_ov: int, **settings: Any) -> Lorsa:
    """A Lorsa with random weights that has the layer's positions, masks and scale.

    Args:
        rule: of the layer.
        n_qk: QK heads.
        n_ov: OV heads.
        settings: further settings of `LorsaConfig`.
    """
    kind = str(rule.W_Q.dtype).removeprefix("torch.")
    lorsa = Lorsa(**{**rule.settings(), "n_qk": n_qk, "n_ov": n_ov, "dtype": kind, **settings})
    lorsa.metadata |= {"model_name": rule.model, "tower": rule.tower, "layer": rule.layer}
    if lorsa.cfg.rotary_dim == 2 * rule.cos.shape[1] and lorsa.cfg.context <= rule.context:
        lorsa.cos.copy_(rule.cos[: lorsa.cfg.context])
        lorsa.sin.copy_(rule.sin[: lorsa.cfg.context])
    else:
        raise SettingsError(
            f"the layer turns {2 * rule.cos.shape[1]} coordinates, with angles known for {rule.context} positions: "
            "rotary_dim and context cannot be others; measure the rule with a longer context."
        )
    return lorsa.to(rule.W_Q.device)


@torch.no_grad()
def prove(
    lorsa: Lorsa, rule: AttentionRule, lens: Lens, batch: Batch | None = None, *, tolerance: float = 1e-5
) -> dict[str, float]:
    """The largest errors of a copy: of its patterns, and of what it writes.

    Raises:
        UnsupportedError: an error is above the tolerance; the message holds it.
    """
    if batch is None:
        batch = lens.prepare(input_ids=random_tokens(lens, 2, rule.context, seed=7))
    sites = [Read(site, layers=(rule.layer,), tower=rule.tower) for site in ("resid_pre", "z", "pattern")]
    trace = lens.run(batch, sites)
    stream, z, pattern = (trace[read, rule.layer] for read in sites)
    mask = trace.mask(rule.tower)
    real = torch.ones(z.shape[:2], dtype=torch.bool) if mask is None or mask.shape != z.shape[:2] else mask
    real = real.to(z.device)
    x = rule.inputs(stream)
    rows = real[:, None].expand(pattern.shape[:-1])
    found = {
        "pattern": float((patterns(lorsa, x, real=real) - pattern)[rows].abs().max()),
        "output": _relative(lorsa(x, real=real)[real], rule.target(z.flatten(2))[real]),
    }
    if not max(found.values()) <= tolerance:
        raise UnsupportedError(
            f"the copy of layer {rule.layer} of {rule.tower!r} in {rule.model} is not the layer: patterns differ by "
            f"{found['pattern']:.1e}, outputs by {found['output']:.1e} (tolerance {tolerance:.0e}), so its rule is not "
            "one that a Lorsa has."
        )
    return found


@torch.no_grad()
def patterns(
    lorsa: Lorsa, x: Float[Tensor, "batch pos d_in"], *, real: Bool[Tensor, "batch pos"] | None = None
) -> Float[Tensor, "batch n_qk query key"]:
    """The patterns of all QK heads; for a few short sequences."""
    q, k = (t.transpose(1, 2) for t in lorsa.queries_keys(x, positions_of(real, None, x.shape[:2])))
    seen = lorsa.seen(x, real)
    return pattern_of(q, k, seen, lorsa.scale, lorsa.cfg.softcap)


def _relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def _copy_qk(lorsa: Lorsa, rule: AttentionRule) -> None:
    times = lorsa.cfg.n_qk // len(rule.W_Q)
    names = ["W_Q", "b_Q", "W_K", "b_K", *(["q_gain", "k_gain"] if lorsa.cfg.qk_norm else [])]
    for name in names:
        getattr(lorsa, name).copy_(getattr(rule, name).repeat_interleave(times, 0))


@torch.no_grad()
def from_heads(
    rule: AttentionRule,
    *,
    n_qk: int,
    n_ov: int,
    x: Float[Tensor, "batch pos d_in"] | None = None,
    real: Bool[Tensor, "batch pos"] | None = None,
    subspace: Literal["values", "outputs"] | None = None,
    **settings: Any,
) -> Lorsa:
    """A Lorsa to be trained that begins at the layer's heads.

    Args:
        rule: of the layer.
        n_qk: QK heads, a multiple of the layer's heads.
        n_ov: OV heads, a multiple of n_qk.
        x: what the attention reads, on some text; needed with `subspace`.
        real: which of its positions are no padding; None for all.
        subspace: draw OV heads from the subspace where each head's values or outputs vary, and choose their common
            length and the bias by least squares; None for random ones of length one.
        settings: further settings of `LorsaConfig` (architecture, k, seed, ...).

    Raises:
        SettingsError: n_qk is no multiple of the heads, or a width was changed.
        InputError: `subspace` without x.
        UnknownNameError: there is no such form of the subspace.
    """
    heads, _, d_value = rule.W_V.shape
    if n_qk % heads:
        raise SettingsError(
            f"n_qk={n_qk} is no multiple of the layer's {heads} heads, whose queries and keys are taken."
        )
    if subspace not in (None, "values", "outputs"):
        raise unknown("subspace", subspace, ("values", "outputs"))
    if subspace is not None and x is None:
        raise InputError("an active subspace is found on activations: give x.")
    lorsa = shaped(rule, n_qk=n_qk, n_ov=n_ov, **settings)
    if lorsa.cfg.d_qk != rule.W_Q.shape[-1]:
        raise SettingsError(f"d_qk={lorsa.cfg.d_qk}, but the heads whose queries are taken have {rule.W_Q.shape[-1]}.")
    _copy_qk(lorsa, rule)
    lorsa.b_D.copy_(rule.b_O)
    if subspace is not None and x is not None:
        x = x.to(lorsa.W_V)
        v, z = _values(lorsa, rule, x, real)
        own = n_ov // heads
        random = torch.Generator().manual_seed(lorsa.cfg.seed + 1)
        used = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if real is None else real
        for head in range(heads):
            rows = slice(head * own, (head + 1) * own)
            w_v, w_o = rule.W_V[head].to(lorsa.W_V), rule.W_O[head].to(lorsa.W_V)
            lifted = v[:, :, head][used] @ w_v.T if subspace == "values" else z[:, :, head][used] @ w_o
            directions = _principal(lifted, d_value)
            drawn = torch.randn(own, directions.shape[1], generator=random).to(directions) @ directions.T
            if subspace == "values":
                lorsa.W_V[rows] = drawn
                lorsa.W_O[rows] = drawn @ w_v @ w_o
            else:
                lorsa.W_O[rows] = drawn
                lorsa.W_V[rows] = drawn @ (w_v @ w_o).T
    for parameter in (lorsa.W_V, lorsa.W_O):
        parameter.div_(parameter.norm(dim=1, keepdim=True).clamp_min(1e-12))
    if subspace is not None and x is not None:
        _fit(lorsa, x, rule.target(z.flatten(2)), real)
    return lorsa


def _values(
    lorsa: Lorsa, rule: AttentionRule, x: Tensor, real: Tensor | None
) -> tuple[Float[Tensor, "batch pos head d_value"], Float[Tensor, "batch pos head d_value"]]:
    """The values of the layer's heads, and what their patterns make of them (`z`)."""
    times = lorsa.cfg.n_qk // len(rule.W_Q)
    v = torch.einsum("bsd,hde->bshe", x, rule.W_V.to(x)) + rule.b_V.to(x)
    q, k = (t[:, :, ::times] for t in lorsa.queries_keys(x, positions_of(real, None, x.shape[:2])))
    options: dict[str, Any] = {"causal": lorsa.cfg.causal, "scale": lorsa.scale, "softcap": lorsa.cfg.softcap}
    return v, attend(q, k, v, lorsa.seen(x, real), **options)


def _fit(lorsa: Lorsa, x: Tensor, y: Tensor, real: Tensor | None) -> None:
    """Give the values the length, and the decoder the bias, with which the error on a sample is least."""
    sums: dict[str, Any] = dict.fromkeys(("n", "r", "y", "ry", "rr"), 0)
    for i in range(len(x)):
        row = slice(i, i + 1)
        mine = None if real is None else real[row]
        used = torch.ones(1, x.shape[1], dtype=torch.bool, device=x.device) if mine is None else mine
        r = (written(lorsa, select(lorsa, lorsa.pre_activations(x[row], real=mine)[used])) - lorsa.b_D).double()
        aim = y[row][used].double()
        found = {"n": len(r), "r": r.sum(0), "y": aim.sum(0), "ry": (r * aim).sum(), "rr": r.square().sum()}
        sums = {name: sums[name] + value for name, value in found.items()}
    mean_r, mean_y = sums["r"] / sums["n"], sums["y"] / sums["n"]
    spread = sums["rr"] - sums["n"] * mean_r.square().sum()
    factor = (sums["ry"] - sums["n"] * (mean_r @ mean_y)) / spread
    if not (spread > 0 and factor > 0):
        return
    # In the values, not in the directions: training is faster so (FVU 0.30, not 0.44, after 60 steps on SmolLM2).
    lorsa.W_V.mul_(factor.to(lorsa.W_V))
    lorsa.b_V.mul_(factor.to(lorsa.b_V))
    lorsa.b_D.copy_(mean_y - factor * mean_r)


def _principal(rows: Float[Tensor, "token d"], count: int) -> Float[Tensor, "d count"]:
    """The directions in which rows vary most about their mean."""
    centred = (rows - rows.mean(0)).double()
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    return vectors[:, -count:].flip(1).to(rows.dtype)
