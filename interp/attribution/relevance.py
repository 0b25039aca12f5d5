"""Relevance by gradient-weighted attention, carried through all layers.

Source: Chefer, Gur, Wolf 2021, "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder
Transformers" (arXiv 2103.15679), equations 5 to 10, and the authors' code. With A_h the attention probabilities of a
module, y the answer's logit and G_h = dy / dA_h,

    A' = mean over heads h of max(A_h G_h, 0)

For a stream s, and another one q that it attends to, R_ss begins as I and R_sq as 0. In the order of the layers

    self-attention      R_ss <- R_ss + A' R_ss          R_sq <- R_sq + A' R_sq
    cross-attention     R_sq <- R_sq + N(R_ss)^T A' N(R_qq)     R_ss <- R_ss + A' R_qs
    N(R) = I + (R - I) / (row sums of R - I)

all from the old values. The result is the target's row: of R_ss in models with one stream; of R_sq, over the encoder's
tokens, in encoder-decoders, whose encoder attends to no decoder, so that R_qs stays zero.

Departures
- A (the paper's main method), not its relevance under LRP, which is the default of the code.
- R - I is returned in place of R: the identity says one of the target's own token whatever the model does. The code
  leaves the class token's column out.
- A row of R - I without positive gradient sums to zero: it is left at zero, so that N(R) has a row of I there. The code
  divides by zero. R - I is carried along itself, since 1 + 1e-9 - 1 is zero in float32.
- Only the rows of the targets are carried, from the top layer down, r <- r + r A', which is the same and costs O(T^2)
  for each layer. N(R_qq) is linear in a row once its row sums are known, and these are a column carried from the
  bottom up; so no encoder-sized R is made in encoder-decoders either. The decoder's R_ss is made whole.
- The transposed N(R_ss)^T is the paper's and the code's. In a causal decoder it hands the cross-attention of a later
  position to an earlier one, which no information can do; `transpose=False` has N(R_ss).

The rules are here as functions of matrices, for models with two streams that this package does not run (LXMERT).
What it does not see: values, MLPs, and all that speaks against the answer. Gradients differ in size between layers, so
only the order of scores within a row means something.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from interp.attribution.common import chosen_layers, settings_of, stream_of, token_scores
from interp.attribution.targets import Answers, Question, question, weighted_patterns
from interp.batch import Batch
from interp.errors import UnsupportedError
from interp.lens import Lens
from interp.reads import Positions
from interp.tokens import TokenScores


def relevance(
    lens: Lens,
    batch: Batch,
    *,
    target: Positions | None = None,
    answers: Answers | None = None,
    wrong: Answers | None = None,
    tower: str | None = None,
    transpose: bool = True,
    memory: int = 2**30,
) -> TokenScores:
    """Chefer's relevance of each source token for the answer at each target position.

    For each target (for all together where a classifier's logits are the whole input's) one forward and backward pass,
    or several where the patterns of all layers and heads do not fit into `memory`. In encoder-decoders the fused
    matrices [pos, pos] of all layers are held beside that.

    Args:
        lens: a model with logits whose patterns can be read: a decoder, an encoder, a vision transformer, an
            encoder-decoder, or an LVLM (through its language tower, in which image tokens are sources).
        batch: prompts.
        target: positions as in a read, whose logits are explained; None for the last one, or for the position that a
            classifier reads (its class token).
        answers: for each sample a text of one token or an id (a class for a classifier), or one for each target; None
            for the largest logit.
        wrong: the same; their logits are subtracted.
        tower: where the sources stand, for encoder-decoders: `encoder` (None) or `decoder`.
        transpose: for encoder-decoders, whether the cross rule has N(R_ss)^T as in the paper, or N(R_ss).
        memory: bytes of patterns and gradients held at a time for each sample; at least one layer's are.

    Returns:
        Scores [batch, target, source], not negative; a decoder's future tokens have exactly zero.

    Raises:
        UnknownNameError: a tower, position or class does not exist.
        SettingsError: a wrong answer without an answer.
        InputError: a position outside a sample, answers that do not fit, or class logits that are read from several
            positions when no target is named.
        UnsupportedError: no logits, a layer that moves information between positions without an attention pattern, or a
            tower that the targets do not attend to.
    """
    asked = question(lens, batch, target, answers, wrong, rows=True)
    main = lens.anatomy.main
    # Some multimodal models have an encoder of images under that name; only decoders of encoder-decoders are named so.
    double = main == "decoder" and "encoder" in lens.anatomy.towers
    name = lens.anatomy.tower(tower or ("encoder" if double else main))[0].name
    if name not in (("encoder", "decoder") if double else (main,)) or tower == "cross":
        allowed = "'encoder' and 'decoder'" if double else repr(main)
        raise UnsupportedError(f"relevance has its sources in {allowed} of {lens.name}, not in {tower!r}.")
    sources = asked.stream if name == main else stream_of(lens, batch, name)
    rows = [
        _rows_double(lens, batch, asked, some, name, transpose, memory)
        if double
        else _rows(lens, batch, asked, some, memory)
        for some in asked.passes()
    ]
    settings = settings_of(lens, batch, "relevance", tower=tower) | asked.settings(lens)
    settings |= {"transpose": transpose} if double else {}
    of = None if sources is asked.stream else asked.stream
    return token_scores("relevance", torch.cat(rows, 1), asked.chosen, sources, settings, of=of)


def _rows(lens: Lens, batch: Batch, asked: Question, some: slice, memory: int) -> Float[Tensor, "batch some pos"]:
    """Rows of R - I in a model with one stream, for targets that share a backward pass."""
    layers = [(None, i) for i in chosen_layers(lens, None, None)]
    start = _start(asked, some)
    rows = torch.zeros_like(start)
    for _, matrix in weighted_patterns(lens, batch, asked, some.start, layers, memory=memory):
        rows = carried(rows.to(matrix), start.to(matrix), matrix)
        del matrix
    return rows


def _rows_double(
    lens: Lens, batch: Batch, asked: Question, some: slice, name: str, transpose: bool, memory: int
) -> Float[Tensor, "batch some source"]:
    """Rows of R_sq, or of R_ss - I for `decoder`, in an encoder-decoder, for targets that share a backward pass."""
    lower = [("encoder", i) for i in chosen_layers(lens, None, "encoder")]
    own, cross = chosen_layers(lens, None, "decoder"), chosen_layers(lens, None, "cross")
    upper: list[tuple[str, int]] = []
    for i in sorted({*own, *cross}):
        upper += [("decoder", i)] if i in own else []
        upper += [("cross", i)] if i in cross else []
    if name == "decoder":
        lower, upper = [], [place for place in upper if place[0] == "decoder"]
    found = dict(weighted_patterns(lens, batch, asked, some.start, [*lower, *upper], memory=memory))
    first = found[upper[0]]
    there = torch.zeros_like(first)
    across = torch.zeros((), device=first.device)
    for place in upper:
        matrix = found.pop(place).to(first)
        if place[0] == "decoder":
            across = across + matrix @ across if across.ndim else across
            there = there + matrix + matrix @ there
        else:
            mixed = normalised(there)
            across = across + (mixed.mT if transpose else mixed) @ matrix
    at = asked.chosen.index[:, some, None].to(first.device)
    if name == "decoder":
        return there.gather(1, at.expand(-1, -1, there.shape[2]))
    start = across.gather(1, at.expand(-1, -1, across.shape[2]))
    total = torch.zeros_like(start[:, :1]).mT
    for place in lower:
        total = total + found[place].to(first) @ (1 + total)
    # Where the rest of a row sums to zero there is nothing to share out.
    share = (start / _safe(total.mT)).masked_fill(total.mT < torch.finfo(total.dtype).tiny, 0)
    row = torch.zeros_like(start)
    for place in reversed(lower):
        row = carried(row, share, found[place].to(first))
    return start + row


def _start(asked: Question, some: slice) -> Float[Tensor, "batch some pos"]:
    """One at each target's own column."""
    return torch.nn.functional.one_hot(asked.chosen.index[:, some], asked.stream.mask.shape[1]).float()


def _safe(total: Tensor) -> Tensor:
    """Row sums to divide by, none of them zero."""
    return total.clamp_min(torch.finfo(total.dtype).tiny)


def carried(
    row: Float[Tensor, "... n pos"], start: Float[Tensor, "... n pos"], matrix: Float[Tensor, "... pos pos"]
) -> Float[Tensor, "... n pos"]:
    """One layer downwards: from start (R - I) of the layers above to that of this layer too."""
    return row + (start + row) @ matrix


def normalised(excess: Float[Tensor, "... pos pos"]) -> Float[Tensor, "... pos pos"]:
    """N(R) from R - I: its rows divided by their sums, plus I. A row of zeros gives a row of I.

    Args:
        excess: R - I, not negative.
    """
    eye = torch.eye(excess.shape[-1], dtype=excess.dtype, device=excess.device)
    return excess / _safe(excess.sum(-1, keepdim=True)) + eye


def self_rule(
    matrix: Float[Tensor, "... s s"], own: Float[Tensor, "... s s"], other: Float[Tensor, "... s q"]
) -> tuple[Float[Tensor, "... s s"], Float[Tensor, "... s q"]]:
    """R_ss and R_sq after a self-attention of s (equations 6 and 7).

    Args:
        matrix: A' of the module.
        own: R_ss before.
        other: R_sq before.
    """
    return own + matrix @ own, other + matrix @ other


def cross_rule(
    matrix: Float[Tensor, "... s q"],
    own: Float[Tensor, "... s s"],
    other: Float[Tensor, "... s q"],
    theirs: Float[Tensor, "... q q"],
    back: Float[Tensor, "... q s"],
) -> tuple[Float[Tensor, "... s s"], Float[Tensor, "... s q"]]:
    """R_ss and R_sq after an attention of s to q (equations 8 to 10).

    In a co-attention, where q attends to s at the same time, call it for both with the values from before.

    Args:
        matrix: A' of the module.
        own: R_ss before.
        other: R_sq before.
        theirs: R_qq before.
        back: R_qs before.
    """
    eye_s, eye_q = (torch.eye(r.shape[-1], dtype=r.dtype, device=r.device) for r in (own, theirs))
    added = normalised(own - eye_s).mT @ matrix @ normalised(theirs - eye_q)
    return own + matrix @ back, other + added
