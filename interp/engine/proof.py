"""The proof of an anatomy: what was found is put together again and compared with what the model made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from interp.batch import Batch
from interp.engine.anatomy import Anatomy, AttentionPart, Layer, Tower, Unembedding, relative_error
from interp.engine.attention import AttentionCall, attention_pattern, attention_scores, mix_values
from interp.engine.norms import through_chain
from interp.engine.run import run
from interp.errors import AnatomyError, UnsupportedError
from interp.reads import Read
from interp.trace import Trace

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def pattern_error(call: AttentionCall) -> float:
    """Relative error of the kernel's output against recomputed probabilities times values.

    Raises:
        UnsupportedError: the call holds an option or mask that the recomputed attention does not know.
    """
    assert call.out is not None, "only calls that ran are proved"
    pattern = attention_pattern(attention_scores(call), call)
    return relative_error(mix_values(pattern, call).reshape(call.out.shape), call.out)


def prove(model: nn.Module, anatomy: Anatomy, batch: Batch) -> Anatomy:
    """Run the model with the engine's own hooks on `batch` and check every identity; returns the anatomy with numbers.

    - residual: resid_post is resid_pre plus every branch, through the family's own norms and scales.
    - middle: resid_mid is resid_pre plus what is added before the MLP.
    - heads: attn_out is the sum over heads of z_h W_O^h plus the bias, through post-norms and factors.
    - pattern: recomputed probabilities times values are the kernel's output (checked while watching).
    - logits: the unembedding of the last resid_post gives the logits.

    Raises:
        AnatomyError: an identity does not hold; the message holds the numbers.
    """
    reads: list[Read] = []
    for tower in anatomy.towers.values():
        for layer in tower.layers:
            sites = [s for s in ("resid_pre", "resid_post", "resid_mid") if s not in layer.refused]
            sites += [f"{k}_out" for k in ("attn", "mlp", "mixer") if f"{k}_out" not in layer.refused]
            reads += [Read(s, layers=(layer.index,), tower=tower.name) for s in sites]
            if "cross" in layer.branches and tower.name == anatomy.main:
                reads.append(Read("attn_out", layers=(layer.index,), tower="cross"))
    if anatomy.unembed is not None:
        reads.append(Read("logits"))
    with projections_seen(anatomy) as seen, torch.no_grad():
        trace = run(model, anatomy, batch, reads)
    towers = {}
    for name, tower in anatomy.towers.items():
        rows = [_prove_layer(tower, layer, trace, anatomy, seen) for layer in tower.layers]
        worst = dict(tower.proof)
        for row in rows:
            for what, error in row.items():
                worst[what] = max(error, worst.get(what, 0.0))
        towers[name] = replace(tower, proof=worst)
    if anatomy.unembed is not None:
        main = towers[anatomy.main]
        last = trace[f"{anatomy.main}:resid_post", len(main.layers) - 1]
        error = prove_logits(anatomy.unembed, last, trace.logits)
        towers[anatomy.main] = replace(main, proof={**main.proof, "logits": error})
    return replace(anatomy, towers=towers)


@contextmanager
def projections_seen(anatomy: Anatomy) -> Iterator[dict[int, tuple[Tensor, Tensor, dict]]]:
    """Note the input and output of every output projection, and the arguments of its layer."""
    seen: dict[int, tuple[Tensor, Tensor, dict]] = {}
    arguments: dict[int, dict] = {}
    handles = []
    for tower in anatomy.towers.values():
        for layer in tower.layers:

            def begin(module: nn.Module, args: tuple, kwargs: dict, layer: Layer = layer) -> None:
                arguments[id(layer)] = {**dict(enumerate(args)), **kwargs}

            handles.append(layer.module.register_forward_pre_hook(begin, with_kwargs=True))
            for part in layer.attention.values():
                if part.out_proj is not None:

                    def end(
                        module: nn.Module, args: tuple, out: Tensor, part: AttentionPart = part, layer: Layer = layer
                    ) -> None:
                        seen[id(part)] = (args[0], out, arguments[id(layer)])

                    handles.append(part.out_proj.register_forward_hook(end))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _prove_layer(
    tower: Tower, layer: Layer, trace: Trace, anatomy: Anatomy, seen: dict[int, tuple[Tensor, Tensor, dict]]
) -> dict[str, float]:
    def value(site: str) -> Tensor:
        return trace[f"{tower.name}:{site}", layer.index]

    numbers: dict[str, float] = {}
    branches: dict[str, Tensor] = {}
    for kind in layer.branches:
        if kind == "cross":
            branches[kind] = trace["cross:attn_out", layer.index]
        elif f"{kind}_out" not in layer.refused:
            branches[kind] = value(f"{kind}_out")
    arguments = next((seen[id(p)][2] for p in layer.attention.values() if id(p) in seen), {})
    total = value("resid_pre")
    whole = True
    middle: Tensor | None = None
    for _n, (what, step) in enumerate(layer.recipe):
        if what == "add":
            missing = [k for k in step if k not in branches]
            whole = whole and not missing
            if "mlp" in step and middle is None:
                middle = total
            for kind in step:
                total = total + branches.get(kind, 0.0)
        elif what == "norm":
            total = step(total.to(_dtype(step, total)))
        else:
            try:
                total = total * step(arguments)
            except KeyError:
                whole = False
    if whole:
        numbers["residual"] = relative_error(total, value("resid_post"))
    if "resid_mid" not in layer.refused and middle is not None and whole:
        numbers["middle"] = relative_error(middle, value("resid_mid"))
    for kind, part in layer.attention.items():
        if id(part) in seen and "result" not in part.refused and kind in branches:
            z, full, given = seen[id(part)]
            try:
                numbers["heads"] = max(
                    numbers.get("heads", 0.0),
                    prove_heads(part, part.heads(z, branches[kind].shape[:-1]), full, branches[kind], given),
                )
            except UnsupportedError:
                continue
    # A stream in float32 may be fed by branches in half precision.
    dtypes = {value("resid_post").dtype, *(b.dtype for b in branches.values()), _dtype(layer.module, total)}
    tolerance = max(TOLERANCE.get(d, 1e-4) for d in dtypes)
    for what, error in numbers.items():
        if not error <= tolerance:
            raise AnatomyError(
                f"the proof of {layer.name} failed: {what} is off by {error:.1e} relative (allowed {tolerance:.0e}). "
                f"All: { ({k: f'{v:.1e}' for k, v in numbers.items()}) }"
            )
    return numbers


def _dtype(module: nn.Module, x: Tensor) -> torch.dtype:
    return next((p.dtype for p in module.parameters()), x.dtype)


def prove_heads(part: AttentionPart, heads: Tensor, full: Tensor, out: Tensor, arguments: Mapping[Any, Any]) -> float:
    """Relative error of `attn_out = chain(sum over heads of z_h W_O^h + b_O)`."""
    total = torch.einsum("...hd,hdm->...m", heads.float(), part.weight().float())
    bias = part.bias()
    total = total if bias is None else total + bias.float()
    full = full.float().reshape(total.shape)
    return relative_error(through_chain(total, full, part.chain, arguments, bias=True), out)


def prove_logits(unembed: Unembedding, stream: Tensor, logits: Tensor) -> float:
    """Relative error of `logits = unembed(final_norm(resid_post))`.

    Raises:
        AnatomyError: it does not hold.
    """
    with torch.no_grad():
        error = relative_error(unembed(stream), logits)
    if not error <= TOLERANCE.get(logits.dtype, 1e-4):
        raise AnatomyError(
            f"the proof of the unembedding {unembed.name} failed: logits are off by {error:.1e} relative."
        )
    return error
