"""The contract that every wrapped model keeps, as checks that anyone can run on a model of their own.

Each check takes a lens and a batch and returns the number that it found, or raises `AssertionError` with it.
`contract` runs all of them; what a model refuses by name is reported as refused, not as passed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from interp import edits
from interp.batch import Batch
from interp.engine.anatomy import relative_error
from interp.engine.entry import Entry
from interp.engine.run import evaluating, run
from interp.errors import UnsupportedError
from interp.inputs import pad_id
from interp.lens import Lens
from interp.reads import Read
from interp.sites import SITES
from interp.trace import Trace


def plain_output(lens: Lens, batch: Batch) -> dict[str, Tensor]:
    """Every tensor of the unwrapped model's output on the inputs that a run would use."""
    with torch.no_grad(), evaluating(lens.model):
        return _tensors(lens.model(**lens._positioned(batch).inputs))


def _tensors(out: Any) -> dict[str, Tensor]:
    return {str(k): v for k, v in out.items() if isinstance(v, Tensor)} if hasattr(out, "items") else {"0": out[0]}


@contextmanager
def output_of(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Catch the model's output during a run."""
    found: dict[str, Tensor] = {}
    handle = model.register_forward_hook(lambda m, a, out: found.update(_tensors(out)))
    try:
        yield found
    finally:
        handle.remove()


def readable(lens: Lens, *, heads: bool = True) -> list[Read]:
    """One read of every site of every tower that the model can give."""
    out: list[Read] = []
    for name, tower in lens.anatomy.towers.items():
        kinds = [name] + (["cross"] if name == lens.anatomy.main and _has_cross(lens) else [])
        for site, row in SITES.items():
            if not row.per_layer or (site == "result" and not heads):
                continue
            for tower_name in kinds:
                read = Read(site, tower=tower_name)
                with suppress(UnsupportedError):
                    lens.layers_with(site, tower=tower_name)
                    out.append(read)
        del tower
    if lens.anatomy.embed is not None:
        out.append(Read("embed"))
    return out


def _has_cross(lens: Lens) -> bool:
    return any("cross" in x.attention for x in lens.anatomy.towers[lens.anatomy.main].layers)


def _same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> float:
    assert found, f"{what}: the model's output was not seen"
    for name, tensor in found.items():
        if name in wanted and not torch.equal(tensor, wanted[name]):
            gap = (
                float((tensor.double() - wanted[name].double()).abs().max())
                if tensor.shape == wanted[name].shape
                else -1
            )
            raise AssertionError(f"{what}: output {name!r} differs by {gap:.1e}; it has to be bit-identical.")
    return 0.0


def check_unchanged(lens: Lens, batch: Batch) -> float:
    """Reading everything changes no bit of the output."""
    wanted = plain_output(lens, batch)
    reads = readable(lens)
    with output_of(lens.model) as found:
        lens.run(batch, [*reads, *_logits(lens)], cache=False) if _logits(lens) else _run_through(lens, batch, reads)
    return _same_bits(found, wanted, "reading")


def _logits(lens: Lens) -> list[Read]:
    return [] if "logits" in lens.anatomy.refused else [Read("logits")]


def _run_through(lens: Lens, batch: Batch, reads: list[Read], changes: Any = ()) -> Trace:
    """A run that does not stop early though no logits are read."""
    return run(lens.model, lens.anatomy, lens._positioned(batch), reads, edits.flatten(changes), whole=True)


def check_no_op(lens: Lens, batch: Batch) -> float:
    """Edits that change nothing change no bit of the output."""
    wanted = plain_output(lens, batch)
    noop = []
    for read in readable(lens, heads=False):
        if SITES[read.site].editable and not _packed_attention(lens, read):
            noop += edits.splice(lambda x: x.clone(), site=read.site, tower=read.tower)
    with output_of(lens.model) as found:
        _run_through(lens, batch, [], noop)
    return _same_bits(found, wanted, "no-op edits")


def _packed_attention(lens: Lens, read: Read) -> bool:
    tower, _ = lens.anatomy.tower(read.tower)
    return tower.packed and read.site in ("q", "k", "v", "scores", "pattern")


def check_rows(lens: Lens, batch: Batch) -> float:
    """Rows of every pattern sum to one (to less where the family has sinks); padded rows to zero."""
    worst = 0.0
    for read in (r for r in readable(lens) if r.site == "pattern"):
        trace = lens.run(batch, [read])
        tower, _ = lens.anatomy.tower(read.tower)
        for layer, pattern in trace[read].items():
            part = lens.anatomy.attention(read.tower, layer)
            sums = pattern.sum(-1)
            real = trace.mask(tower.name)
            if real is not None and real.shape == (sums.shape[0], sums.shape[2]):
                sums = sums.transpose(1, 2)[real]
            gap = (
                float((sums - 1).clamp_min(0).max()) if hasattr(part.module, "sinks") else float((sums - 1).abs().max())
            )
            # A cross-attention row may have no image to look at.
            gap = min(gap, float(torch.minimum((sums - 1).abs(), sums.abs()).max())) if part.cross else gap
            worst = max(worst, gap)
    assert worst < 1e-5, f"pattern rows are off by {worst:.1e}"
    return worst


def check_proof(lens: Lens, batch: Batch) -> float:
    """The identities of the anatomy hold on this batch."""
    from interp.engine.proof import TOLERANCE, prove

    lens.run(batch, [readable(lens)[0]])
    proved = prove(lens.model, lens.anatomy, lens._positioned(batch))
    worst = max(
        (v for t in proved.towers.values() for k, v in t.proof.items() if v == v),
        default=0.0,
    )
    assert worst <= TOLERANCE.get(lens.dtype, 1e-4), f"an identity of the anatomy is off by {worst:.1e}"
    return worst


def check_batched(lens: Lens, batch: Batch, *, singles: list[Batch] | None = None) -> float:
    """Each sample alone gives what it gives in the batch (padding left out).

    Args:
        lens: the wrapped model.
        batch: the samples together.
        singles: the samples alone, where a batch cannot be split (packed images).
    """
    tower = lens.anatomy.towers[lens.anatomy.main]
    read = [Read("resid_post", layers=(len(tower.layers) - 1,))]
    together = lens.run(batch, read)[read[0], len(tower.layers) - 1]
    worst = 0.0
    for i, alone in enumerate(batch if singles is None else singles):
        one = lens.run(alone, read)[read[0], len(tower.layers) - 1]
        mine = together[i][batch.mask[i]] if together.shape[:2] == batch.mask.shape else together[i]
        worst = max(worst, relative_error(mine, one[0]))
    assert worst < 1e-5, f"batched and single differ by {worst:.1e} relative"
    return worst


def padded(lens: Lens, batch: Batch, side: str, extra: int = 3) -> Batch:
    """A batch of tokens with `extra` columns of padding more.

    Raises:
        UnsupportedError: the batch holds no plain token inputs.
    """
    ids = batch.inputs.get("input_ids")
    if ids is None or any(k.startswith(("pixel", "image")) for k in batch.inputs):
        raise UnsupportedError("only batches of tokens can be padded afterwards")

    def widen(x: Tensor, fill: int) -> Tensor:
        more = x.new_full((x.shape[0], extra), fill)
        return torch.cat([more, x] if side == "left" else [x, more], 1)

    mask = widen(torch.ones_like(ids), 0)
    inputs = {**batch.inputs, "input_ids": widen(ids, pad_id(lens.model.config)), "attention_mask": mask}
    if "token_type_ids" in inputs:
        inputs["token_type_ids"] = widen(inputs["token_type_ids"], 0)
    decoder = "decoder_input_ids" in inputs
    return replace(
        batch,
        inputs=inputs,
        mask=batch.mask if decoder else mask.bool(),
        source_mask=mask.bool() if decoder else None,
        offsets=None,
        tokens=None,
    )


def check_padding(lens: Lens, batch: Batch, *, sides: tuple[str, ...] = ("left", "right")) -> float:
    """Padded equals unpadded: streams, head outputs and patterns of the real tokens.

    Raises:
        UnsupportedError: the model cannot keep the promise on some side, and refuses it by name.
    """
    batch = batch if batch.padding is None else batch[0]
    tower = "encoder" if "decoder_input_ids" in batch.inputs else lens.anatomy.main
    reads = [r for r in readable(lens) if r.tower == tower and r.site in ("resid_post", "z", "pattern", "mlp_out")]
    alone = lens.run(batch, reads)
    worst, refusal = 0.0, None
    for side in sides:
        try:
            wide = lens.run(padded(lens, batch, side), reads)
        except UnsupportedError as error:
            refusal = error
            continue
        keep = slice(3, None) if side == "left" else slice(0, -3)
        for (read, layer), value in wide.values.items():
            part = value[:, :, keep, keep] if read.site == "pattern" else value[:, keep]
            worst = max(worst, relative_error(part, alone.values[read, layer]))
            if read.site == "pattern":
                lost = float(value[:, :, keep].sum()) - float(part.sum())
                assert abs(lost) < 1e-5, f"real tokens look at padding ({lost:.1e}) in {layer} of {tower!r}"
    assert worst < 1e-5, f"padded and unpadded differ by {worst:.1e} relative"
    if refusal is not None:
        raise refusal
    return worst


def check_ablation(lens: Lens, batch: Batch) -> float:
    """Ablating a head is zeroing its columns of the output projection."""
    worst = 0.0
    for name, tower in lens.anatomy.towers.items():
        for layer in tower.layers[:2]:
            part = layer.attention.get("attn")
            if part is None or "z" in part.refused or part.out_proj is None:
                continue
            head = part.n_heads - 1
            read = [Read("resid_post", layers=(layer.index,), tower=name)]
            found = lens.run(batch, read, edits.ablate(pairs=[(layer.index, head)], tower=name))
            weight: Any = part.out_proj.weight
            kept = weight.detach().clone()
            columns = slice(head * part.d_value, (head + 1) * part.d_value)
            with torch.no_grad():
                if type(part.out_proj).__name__ == "Conv1D":
                    weight[columns] = 0
                else:
                    weight[:, columns] = 0
            try:
                wanted = lens.run(batch, read)
            finally:
                with torch.no_grad():
                    weight.copy_(kept)
            before = lens.run(batch, read)
            key = (read[0], layer.index)
            assert not torch.equal(before[key], wanted[key]), f"head {head} of {layer.name} does nothing at all"
            worst = max(worst, relative_error(found[key], wanted[key]))
    assert worst < 1e-5, f"ablating a head and zeroing its columns differ by {worst:.1e} relative"
    return worst


def check_stop(lens: Lens, batch: Batch) -> float:
    """A run that stops early gives the bits of the full run, and later layers do not run."""
    for name, tower in lens.anatomy.towers.items():
        early = [Read("resid_post", layers=(0,), tower=name)]
        full = _run_through(lens, batch, [Read("resid_post", tower=name)])
        ran: list[Any] = []
        handles = [
            x.module.register_forward_pre_hook(lambda m, a, i=x.index, ran=ran: ran.append(i))
            for x in tower.layers
            if x.index
        ]
        try:
            found = lens.run(batch, early)
        finally:
            for h in handles:
                h.remove()
        assert not ran, f"layers {ran} of tower {name!r} ran though only layer 0 was read"
        assert torch.equal(found[early[0], 0], full[f"{name}:resid_post", 0]), f"stopping changed tower {name!r}"
    return 0.0


def check_entry(lens: Lens, batch: Batch) -> float:
    """Entering at a layer, and behind a prefix of positions, gives what the full run gives."""
    main = lens.anatomy.main
    tower = lens.anatomy.towers[main]
    last = len(tower.layers) - 1
    at = max(1, last)
    full = lens.run(batch, ["resid_pre", "resid_post", *(_logits(lens))], cache=_cacheable(lens))
    resid = full["resid_pre", at]
    found = lens.run(batch, [f"resid_post.{last}"], entry=Entry(at, resid, prefix=full.cache))
    worst = relative_error(found["resid_post", last], full["resid_post", last])
    if _cacheable(lens) and batch.padding is None:
        start = batch.mask.shape[1] // 2
        entry = Entry(at, resid[:, start:], start=start, prefix=full.cache)
        found = lens.run(batch, [f"resid_post.{last}"], entry=entry)
        worst = max(worst, relative_error(found["resid_post", last], full["resid_post", last][:, start:]))
    assert worst < 1e-5, f"entering at layer {at} differs by {worst:.1e} relative"
    return worst


def _cacheable(lens: Lens) -> bool:
    causal = lens.anatomy.unembed is not None and hasattr(lens.model, "generate")
    return causal and not any("mixer" in x.branches for x in lens.anatomy.towers[lens.anatomy.main].layers)


def hooks_of(model: nn.Module) -> int:
    """Hooks of any kind that hang on a model, replaced forwards, and replaced attention functions."""
    from transformers.modeling_utils import AttentionInterface

    from interp.engine.attention import _Dispatcher

    count = sum(isinstance(f, _Dispatcher) for f in AttentionInterface._global_mapping.values())
    for module in model.modules():
        count += len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        count += "forward" in module.__dict__
    return count


def check_removed(lens: Lens, batch: Batch) -> float:
    """Nothing is left on the model, after a run, after an error in an edit, and after an interrupt."""
    before, wanted = hooks_of(lens.model), plain_output(lens, batch)
    lens.run(batch, readable(lens))

    def fail(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    for bad in (fail, lambda x: x * float("nan"), lambda x: x[:, :1]):
        finished = False
        with suppress(KeyboardInterrupt, Exception):  # whatever it raises, the hooks have to be gone
            lens.run(batch, ["resid_post"], edits.splice(bad, site="resid_pre", layers=1))
            finished = True
        assert not finished, "a bad edit raised nothing"
    left = hooks_of(lens.model) - before
    assert left == 0, f"{left} hooks are left on the model"
    _same_bits(plain_output(lens, batch), wanted, "after errors")
    return 0.0


def check_memory(lens: Lens, batch: Batch, *, times: int = 50) -> float:
    """Repeated captures keep nothing: the bytes of living tensors are flat."""
    reads = readable(lens)
    lens.run(batch, reads)

    def living() -> int:
        gc.collect()
        return sum(t.nbytes for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter))

    before = living()
    for _ in range(times):
        lens.run(batch, reads)
    grown = living() - before
    assert grown <= 0, f"{grown} bytes more after {times} captures"
    return float(grown)


def check_gradient(
    lens: Lens, batch: Batch, *, sites: tuple[str, ...] = ("resid_pre", "z", "pattern", "attn_out")
) -> float:
    """Gradients of sites agree with central differences of edits at the same sites."""
    if not _logits(lens):
        raise UnsupportedError("the model has no logits, so there is no metric to differentiate")
    dtype = lens.dtype
    double = not any("Experts" in type(m).__name__ or "Moe" in type(m).__name__ for m in lens.model.modules())
    lens.model.to(torch.float64 if double else dtype)  # grouped expert kernels know no float64
    try:
        inputs = {
            k: v.to(lens.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in batch.inputs.items()
        }
        batch = replace(batch, inputs=inputs)
        worst = 0.0
        given = {r.site for r in readable(lens) if r.tower in (None, lens.anatomy.main)}
        for site in (s for s in sites if s in given):
            layer = lens.layers_with(site)[0]
            worst = max(worst, _gradient_error(lens, batch, site, layer))
    finally:
        lens.model.to(dtype)
    assert worst < 1e-2, f"gradients and finite differences differ by {worst:.1e} relative"
    return worst


def _metric(logits: Tensor) -> Tensor:
    return torch.logsumexp(logits.flatten(1).double(), dim=1)


def _gradient_error(lens: Lens, batch: Batch, site: str, layer: int) -> float:
    trace = lens.run(batch, gradients=[f"{site}.{layer}"], metric=_metric)
    gradient = trace.gradient(site, layer).double()
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        gradient
    )
    found = float((gradient * direction).sum())
    errors = []
    # Rounding asks for a large step (many models compute norms in float32), kinks for a small one.
    for step in (1e-2, 1e-3, 1e-4, 1e-6, 1e-8):
        values = []
        for sign in (1, -1):
            change = edits.splice(lambda x, s=sign, h=step: x + s * h * direction.to(x), site=site, layers=layer)
            values.append(_metric(lens.run(batch, ["logits"], change).logits).sum())
        wanted = float(values[0] - values[1]) / (2 * step)
        errors.append(abs(found - wanted) / max(abs(wanted), 1e-2))
    return min(errors)


CHECKS: dict[str, Callable[[Lens, Batch], float]] = {
    "unchanged": check_unchanged,
    "proof": check_proof,
    "rows": check_rows,
    "no_op": check_no_op,
    "batched": check_batched,
    "padding": check_padding,
    "ablation": check_ablation,
    "stop": check_stop,
    "entry": check_entry,
    "removed": check_removed,
    "memory": check_memory,
    "gradient": check_gradient,
}


def contract(lens: Lens, batch: Batch, *, only: tuple[str, ...] | None = None) -> dict[str, float | str]:
    """Run the checks; the number that each found, or why the model refuses it.

    Args:
        lens: the wrapped model.
        batch: at least two samples.
        only: names of checks; None for all.

    Raises:
        AssertionError: a check failed; the message holds the number.
    """
    out: dict[str, float | str] = {}
    for name in only or CHECKS:
        try:
            out[name] = CHECKS[name](lens, batch)
        except UnsupportedError as refusal:
            out[name] = f"refused: {refusal}"
    return out
