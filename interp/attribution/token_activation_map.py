"""Token activation map (TAM): what each image token, read as a word, says of a generated token.

Source: Li, Wang, Ding, Wang, Li 2025, "Token Activation Map to Visually Explain Multimodal LLMs" (arXiv 2506.23270)
and the authors' code (xmed-lab/TAM). With c the token that follows position p, and logit_j[c] what the model's own head
reads of c at position j,

    a_j(c) = max(0, logit_j[c])  for every j up to p; over the image tokens it is the map m(c).

Estimated causal inference takes out what the words before c put there. With t the earlier words other than c,

    I = sum over t of a_(t-1)(c) m(t)        s = <m(c), I> / <I, I>        m = max(0, m(c) - s I)

where a_(t-1)(c), at the position that predicts t, says how near c was at hand there. The rank-Gaussian filter then
replaces each place of the grid by the sorted values of its 3 x 3 window weighted with exp(-r^2 / 2 sigma^2), r = -4..4
counted from the median and sigma the window's standard deviation over its mean: even windows give their median, uneven
ones nearly their mean. The picture is reflected at its edges.

Departures
- Scores stay logits. The code scales each map and its words to [0, 1] and rounds to 255 steps; the filter does not mind
  a factor (it would mind that the smallest score is taken off, but that one is zero as a rule).
- The code divides the weights of I by their sum, which s makes up for, and finds s by a numerical solver.
- A window without deviation gives its median (the code 0/0); one whose mean is not above zero gives zero, as there.
- The words are all earlier tokens of text that are no special tokens and follow a token of text. In the code they are
  the question and the answer, found by marks that differ between families; words of the question are weighted by a_t(c)
  in place of a_(t-1)(c), and the first of them has the map of the token that is predicted there.
- An image token behind a word has no part in the word's map: nothing that comes later is seen.
- Ids decide which words are the same; the code splits strings again. Tiles are filtered as one picture, a thumbnail
  beside them as another; tokens without a place (row breaks) are not filtered.

One forward pass of prompt and answer (`continued` makes one batch of them); of the unembedding, the columns of the
explained tokens and their words alone.

What it does not see: how anything came to be; a large score is no effect on the answer. An image token is read as if it
were about to be spoken, which no one trained it for: that its last state means a word is an assumption, to be checked
for each model against masks. For the packaged `scenes`, whose decoder learned from text behind pictures alone, it is
false: the best patch of a caption's object (133 objects, 40 scenes of the test split) has 0.3 % of its pixels in the
object's mask (1.1 % with both steps), a random one 2.4 %, the best one by attention in layer 4 44 %.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.attribution.common import Stream, chosen_targets, settings_of, stream_of, token_scores, token_text
from interp.attribution.image_grids import ImageGrid, needed_grids
from interp.attribution.targets import Answers, answer_ids
from interp.batch import Batch, Selection
from interp.errors import UnsupportedError
from interp.inputs import tokenizer_of
from interp.lens import Lens
from interp.patches import Patches
from interp.reads import Positions, Read
from interp.tokens import TokenScores


def token_activation_map(
    lens: Lens,
    batch: Batch,
    *,
    target: Positions = "last",
    answers: Answers | None = None,
    eci: bool = True,
    filter: bool = True,
) -> TokenScores:
    """What the image tokens, and the text before it, say of the token that follows each target position.

    To explain all of an answer: `whole, said = continued(lens, batch, lens.generate(batch).tokens)`, then
    `token_activation_map(lens, whole, target=said)`. A word of several tokens has several maps; their maximum is usual.

    Args:
        lens: an LVLM whose image tokens stand in its text.
        batch: prompts with images, with or without answers behind them.
        target: positions as in a read; each explains the token that it predicts, not the one that stands there.
        answers: for each sample a text of one token or an id, or one for each target; None for the token that follows
            in the text, and for the largest logit at a sample's end.
        eci: whether the interference of earlier words is taken out of the image tokens.
        filter: whether the image tokens pass the rank-Gaussian filter; needs a patch map.

    Returns:
        Scores [batch, target, source] in logits, not negative. Of text tokens, the target's own position included, they
        are the plain a_j(c). Later tokens have exactly zero. `target_tokens` names the explained tokens, and
        `settings["interference"]` holds the cosine of each target's image map with its interference I.

    Raises:
        UnknownNameError: a position does not exist.
        InputError: no image tokens in the batch, a position outside a sample, answers that do not fit, or no patch map
            to filter on.
        UnsupportedError: the model's head is not a norm and a projection, or the tokens of a picture fill no rectangle.
    """
    image = batch.span("image").cpu()
    if lens.anatomy.unembed is None:
        raise UnsupportedError(f"{lens.name}: the head is not a final norm and one projection.")
    stream = stream_of(lens, batch)
    chosen = chosen_targets(lens, batch, stream, target)
    grids = needed_grids(lens, batch.patches, "the filter (filter=True)") if filter else []
    top = len(lens.anatomy.towers[lens.anatomy.main].layers) - 1
    read = Read("resid_post", layers=(top,))
    hidden = lens.run(batch, read).values[read, top]
    ids = batch.inputs["input_ids"].cpu()
    explained = _explained(lens, hidden, ids, stream, chosen, answers)
    scores = torch.zeros(*chosen.index.shape, ids.shape[1])
    special = stream.spans.get("special", torch.zeros_like(image))
    cosines: list[list[float]] = []
    for i in range(len(batch)):
        own = stream.mask[i].nonzero()[:, 0]
        place = (stream.mask[i].long().cumsum(0) - 1)[chosen.index[i]]
        words = stream.mask[i] & ~image[i] & ~special[i]
        maps, cosine = _sample(
            lens, hidden[i, own.to(hidden.device)], ids[i, own], image[i, own], words[own], place, explained[i], eci
        )
        scores[i][:, own] = maps
        cosines.append(cosine[chosen.valid[i]].tolist())
    for grid in grids:
        _filtered(scores, grid, batch.patches)
    names = _names(lens, explained, chosen)
    settings = settings_of(lens, batch, "token_activation_map", answers=names, eci=eci, filter=filter)
    settings |= {"interference": cosines} if eci else {}
    result = token_scores("token_activation_map", scores, chosen, stream, settings, unit="logits")
    return replace(result, target_tokens=names)


def _explained(
    lens: Lens, hidden: Tensor, ids: Tensor, stream: Stream, chosen: Selection, answers: Answers | None
) -> Int[Tensor, "batch target"]:
    """Ids of the tokens that the targets predict."""
    size, count = chosen.index.shape
    if answers is not None:
        return answer_ids(lens, answers, (size, count), lens.vocabulary)
    found = torch.zeros_like(chosen.index)
    for i in range(size):
        own = stream.mask[i].nonzero()[:, 0].tolist()
        following = dict(pairwise(own))
        for t, (column, real) in enumerate(zip(chosen.index[i].tolist(), chosen.valid[i].tolist(), strict=True)):
            if column in following:
                found[i, t] = ids[i, following[column]]
            elif real:
                found[i, t] = lens.unembed(hidden[i, column]).argmax().cpu()
    return found


@torch.no_grad()
def _sample(
    lens: Lens,
    hidden: Float[Tensor, "pos d_model"],
    ids: Tensor,
    image: Tensor,
    words: Tensor,
    place: Int[Tensor, " target"],
    explained: Int[Tensor, " target"],
    eci: bool,
) -> tuple[Float[Tensor, "target pos"], Float[Tensor, " target"]]:
    """Unfiltered scores of one sample without its padding, and the cosine of each map with its interference.

    Args:
        lens: the model.
        hidden: what enters the head.
        ids: the tokens [pos].
        image: which are image tokens [pos].
        words: which are text and no special tokens [pos].
        place: positions of the targets.
        explained: ids that they predict.
        eci: whether interference is taken out.
    """
    words = words & torch.cat([words.new_zeros(1), ~image[:-1]])
    position = torch.arange(len(ids))
    before = words.nonzero()[:, 0] if eci else position[:0]
    classes, inverse = torch.cat([explained, ids[before]]).unique(return_inverse=True)
    head = lens.anatomy.unembed
    assert head is not None
    logits = head.columns(hidden, classes.to(hidden.device)).clamp_min(0).cpu()
    scores = logits[:, inverse[: len(explained)]].T.contiguous()
    scores = scores.masked_fill(position > place[:, None], 0)
    if not len(before):
        return scores, scores.new_zeros(len(place))
    seen = position[image] < before[:, None]
    maps = logits[image][:, inverse[len(explained) :]].T * seen
    counts = (before <= place[:, None]) & (ids[before] != explained[:, None])
    weights = logits[before - 1][:, inverse[: len(explained)]].T * counts
    interference = weights @ maps
    mine = scores[:, image]
    scores[:, image] = without_interference(mine, interference)
    return scores, torch.cosine_similarity(mine, interference, dim=-1)


def without_interference(maps: Float[Tensor, "... n"], interference: Float[Tensor, "... n"]) -> Float[Tensor, "... n"]:
    """max(0, m - s I) with the s that brings s I nearest to m; m itself where I is zero."""
    size = (interference**2).sum(-1, keepdim=True)
    share = (maps * interference).sum(-1, keepdim=True) / size.clamp_min(torch.finfo(size.dtype).tiny)
    return (maps - share * interference).clamp_min(0)


def _filtered(scores: Float[Tensor, "batch target source"], grid: ImageGrid, patches: Patches | None) -> None:
    """Filter one grid of one sample, for all targets, in place."""
    assert patches is not None
    mine, columns = scores[grid.sample], patches.column[grid.rows.flatten()]
    mine[:, columns] = rank_gaussian(mine[:, columns].unflatten(1, grid.rows.shape)).flatten(1)


def rank_gaussian(maps: Float[Tensor, "... height width"]) -> Float[Tensor, "... height width"]:
    """The rank-Gaussian filter of 3 x 3 windows, the maps reflected at their edges.

    Args:
        maps: not negative.
    """
    height, width = maps.shape[-2:]
    wide = maps[..., _reflected(height), :][..., _reflected(width)]
    window = wide.unfold(-2, 3, 1).unfold(-2, 3, 1).flatten(-2).sort(-1).values
    mean = window.mean(-1, keepdim=True)
    sigma = window.std(-1, correction=0, keepdim=True) / mean.masked_fill(mean <= 0, 1)
    rank = torch.arange(-4, 5, dtype=maps.dtype, device=maps.device)
    # Where sigma is zero all weight is the median's.
    weight = torch.softmax(-(rank**2) / (2 * sigma**2).clamp_min(torch.finfo(maps.dtype).tiny), -1)
    return ((window * weight).sum(-1, keepdim=True) * (mean > 0)).squeeze(-1)


def _reflected(size: int) -> list[int]:
    """Indices with one more at each end, reflected there; a single row is repeated."""
    return [min(1, size - 1), *range(size), max(size - 2, 0)]


def _names(lens: Lens, explained: Tensor, chosen: Selection) -> list[list[str]]:
    tokenizer = tokenizer_of(lens.processor)
    rows = zip(explained.tolist(), chosen.valid.tolist(), strict=True)
    return [[token_text(tokenizer, x) if real else "" for x, real in zip(*row, strict=True)] for row in rows]
