"""Reading the heads of a Lorsa: which fired, where these looked, and the model with the Lorsa in the layer's place.

    z-pattern     zp_i[t, s] = A^g(i)[t, s] v_i[s]; over s it sums to pre_i[t]. It is made for (t, i) that fired only.

Since a QK head is shared, A alone does not tell where one of its OV heads takes its activation from; zp does. Contexts
in which heads fire are in `contexts`, what heads do on repeated text in `behaviours`, whose work they do in `relation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.dictionaries.lorsa.attend import positions_of, scores_of
from interp.dictionaries.lorsa.lorsa import Lorsa
from interp.dictionaries.lorsa.rule import AttentionRule
from interp.dictionaries.lorsa.select import select, written
from interp.dictionaries.sparse import Sparse
from interp.edits import Edit, Where
from interp.errors import EditError, UnsupportedError
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
    parts = [part for _, part in z_parts(lorsa, x, where, real, segments)]
    return torch.cat(parts) if parts else x.new_zeros(0, x.shape[1])


def z_parts(
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
