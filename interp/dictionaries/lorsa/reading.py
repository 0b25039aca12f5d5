"""Reading the heads of a Lorsa: where a head that fired looked, what it does on repeated text, whose work it does.

    z-pattern     zp_i[t, s] = A^g(i)[t, s] v_i[s]; over s it sums to pre_i[t]. It is made for (t, i) that fired only.
    behaviour     of head i: mean, over the queries where it fired and that can show the behaviour, of the share of
                  |zp_i[t]| on the keys that `heads.patterns` names (induction, previous, duplicate, first, local)
    share         of layer head h in Lorsa head i: sum over t of z_i[t] <w_o,i, out_h[t]>, over its sum over all heads

Since a QK head is shared, A alone does not tell where one of its OV heads takes its activation from; zp does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.batch import Batch
from interp.dictionaries.lorsa.attend import positions_of, scores_of
from interp.dictionaries.lorsa.lorsa import Lorsa
from interp.dictionaries.lorsa.rule import AttentionRule
from interp.dictionaries.lorsa.select import select, written
from interp.dictionaries.sparse import Sparse
from interp.edits import Edit, Where
from interp.errors import EditError, InputError, SettingsError, UnsupportedError
from interp.heads.patterns import pattern_targets
from interp.reads import Read

_HELD = 2**22  # elements of z-patterns that are held at a time


@dataclass(frozen=True, slots=True, eq=False)
class Fired:
    """The heads that fired.

    Attributes:
        sample: which sequence [n].
        query: at which position [n].
        head: which OV head [n].
        value: its latent [n].
    """

    sample: Int[Tensor, " n"]
    query: Int[Tensor, " n"]
    head: Int[Tensor, " n"]
    value: Float[Tensor, " n"]

    def __len__(self) -> int:
        """How many."""
        return len(self.value)

    def at(self, rows: Tensor | slice) -> Fired:
        """Some of them, by index or mask."""
        return Fired(self.sample[rows], self.query[rows], self.head[rows], self.value[rows])

    def of(self, head: int) -> Fired:
        """Those of one head, strongest first."""
        mine = self.at(self.head == head)
        return mine.at(mine.value.argsort(descending=True))


@torch.no_grad()
def fired(
    lorsa: Lorsa,
    x: Float[Tensor, "batch pos d_in"],
    *,
    real: Bool[Tensor, "batch pos"] | None = None,
    segments: Int[Tensor, "batch pos"] | None = None,
) -> Fired:
    """Where each head fires. Arguments and errors as in `Lorsa.pre_activations`."""
    pre = lorsa.pre_activations(x, real=real, segments=segments)
    used = torch.ones(pre.shape[:2], dtype=torch.bool, device=pre.device) if real is None else real
    found = select(lorsa, pre[used])
    sample, query = used.nonzero(as_tuple=True)
    if isinstance(found, Sparse):
        on = found.values != 0
        token, head, value = found.pattern.tokens[on], found.pattern.latents[on], found.values[on]
    else:
        token, head = found.nonzero(as_tuple=True)
        value = found[token, head]
    return Fired(sample[token], query[token], head, value)


@torch.no_grad()
def z_patterns(
    lorsa: Lorsa,
    x: Float[Tensor, "batch pos d_in"],
    where: Fired,
    *,
    real: Bool[Tensor, "batch pos"] | None = None,
    segments: Int[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "n key"]:
    """What each source gave to heads that fired; the rows sum to their pre-activations.

    Args:
        lorsa: the Lorsa.
        x: what the attention reads.
        where: from `fired`, or a part of it.
        real: which positions are no padding; None for all.
        segments: see `Lorsa.pre_activations`.
    """
    parts = [part for _, part in _z_parts(lorsa, x, where, real, segments)]
    return torch.cat(parts) if parts else x.new_zeros(0, x.shape[1])


def _z_parts(
    lorsa: Lorsa, x: Tensor, where: Fired, real: Tensor | None, segments: Tensor | None
) -> Iterator[tuple[Fired, Tensor]]:
    """A few rows at a time, each pattern row made once for all heads that share it."""
    x, real = lorsa.checked(x, real, segments)
    q, k = lorsa.queries_keys(x, positions_of(real, segments, x.shape[:2]))
    v, seen = lorsa.values(x), lorsa.seen(x, real, segments)
    step = max(1, _HELD // (x.shape[1] * lorsa.cfg.d_qk))
    for start in range(0, len(where), step):
        part = where.at(slice(start, start + step))
        place = torch.stack([part.sample, part.query, part.head // lorsa.cfg.group], 1)
        rows, back = place.unique(dim=0, return_inverse=True)
        b, t, g = rows.unbind(1)
        scores = scores_of(q[b, t, g][:, None], k[b, :, g], lorsa.scale, lorsa.cfg.softcap)[:, 0]
        pattern = torch.softmax(scores.masked_fill(~seen[b, t], -torch.inf), -1)
        yield part, pattern[back] * v[part.sample, :, part.head]


@torch.no_grad()
def behaviours(
    lorsa: Lorsa, x: Float[Tensor, "batch pos d_in"], batch: Batch, *, window: int = 4
) -> dict[str, Float[Tensor, " n_ov"]]:
    """How much each OV head behaves like an induction, previous-token, duplicate-token, sink or local head.

    Args:
        lorsa: a causal Lorsa.
        x: what the attention reads on the batch.
        batch: the prompts, for `induction` and `duplicate` with repeated tokens.
        window: width of `local`.

    Returns:
        By kind (`induction previous duplicate first local`), a score between 0 and 1 for each head; NaN where it never
        fired at a position that can show the behaviour.
    """
    if window < 1:
        raise SettingsError(f"window must be at least 1, got {window}.")
    if "input_ids" not in batch.inputs or batch.mask.shape != x.shape[:2]:
        raise InputError("behaviours are read on the tokens that x comes from: give their batch.")
    targets = {kind: (k.to(x.device), q.to(x.device)) for kind, (k, q) in pattern_targets(batch, window).items()}
    real = batch.mask.to(x.device)
    sums = {kind: torch.zeros(2, lorsa.cfg.n_ov, device=x.device) for kind in targets}
    for part, zp in _z_parts(lorsa, x, fired(lorsa, x, real=real), real, None):
        size = zp.abs()
        size = size / size.sum(1, keepdim=True).clamp_min(1e-30)
        for kind, (keys, queries) in targets.items():
            able = queries[part.sample, part.query].to(size)
            mass = (size * keys[part.sample, part.query]).sum(1)
            sums[kind][0].index_add_(0, part.head, mass * able)
            sums[kind][1].index_add_(0, part.head, able)
    return {kind: s[0] / s[1] for kind, s in sums.items()}


@torch.no_grad()
def head_shares(
    lorsa: Lorsa,
    rule: AttentionRule,
    x: Float[Tensor, "batch pos d_in"],
    z: Float[Tensor, "batch pos head_value"],
    *,
    real: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "n_ov head"]:
    """Which of the layer's heads each Lorsa head does the work of.

    Args:
        lorsa: the Lorsa.
        rule: of the layer.
        x: what the attention reads.
        z: the layer's site `z` on the same text, heads side by side.
        real: which positions are no padding; None for all.

    Returns:
        Shares that sum to one for each head; NaN where it never fired or the layer writes nothing along its direction.
        A share is negative where the head writes against the latent.
    """
    latents = lorsa.encode(x, real=real)
    heads, d_value, _ = rule.W_O.shape
    used = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if real is None else real
    f, outs = latents[used], z[used].unflatten(-1, (heads, d_value)).to(latents)
    moments = torch.einsum("ti,thv->hiv", f, outs)
    along = torch.einsum("hiv,hvd,id->ih", moments, rule.W_O.to(latents), lorsa.W_O)
    return along / along.sum(1, keepdim=True)


def replace_attention(
    lorsa: Lorsa,
    rule: AttentionRule,
    mask: Bool[Tensor, "batch pos"],
    *,
    change: Callable[[Float[Tensor, "batch pos n_ov"]], Float[Tensor, "batch pos n_ov"]] | None = None,
    error: bool = False,
) -> list[Edit]:
    """Edits that put a Lorsa in the place of the attention that it was trained on.

    Args:
        lorsa: the Lorsa.
        rule: of the layer.
        mask: the batch's real positions.
        change: changes the latents (ablates or steers heads); None leaves them.
        error: add what the Lorsa misses of the layer's own output, so that only `change` makes a difference.

    Raises:
        UnsupportedError: something follows the layer's output projection before the stream.
    """
    if not rule.plain:
        raise UnsupportedError("a norm or factor follows the output projection: the Lorsa's output is not `attn_out`.")
    held: dict[int, Tensor] = {}
    layers = (rule.layer,)

    def look(value: Tensor, where: Where) -> Tensor:
        held[where.copy] = value
        return value

    def put(value: Tensor, where: Where) -> Tensor:
        x = held.pop(where.copy, None)
        if x is None or x.shape[:2] != value.shape[:2] or mask.shape != value.shape[:2]:
            raise EditError("replace_attention works on whole sequences of the batch whose mask was given.")
        real = mask.to(value.device)
        latents = lorsa.encode(rule.inputs(x), real=real)
        changed = latents if change is None else change(latents)
        out = written(lorsa, changed).to(value)
        if error:
            out = value + (out - written(lorsa, latents).to(value))
        return torch.where(real[..., None], out, value)

    return [
        Edit(Read("resid_pre", layers=layers, tower=rule.tower), look, "replace_attention"),
        Edit(Read("attn_out", layers=layers, tower=rule.tower), put, "replace_attention"),
    ]
