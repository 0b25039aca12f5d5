"""Head Pursuit: which tokens explain what a head writes, and how much of it a list of keywords explains.

Source: Basile, Maiorca, Doimo, Locatello, Cazzaniga 2025, "Head Pursuit: Probing Attention Specialization in Multimodal
Transformers", arXiv 2510.21518, sections 3 and 4. With H [n, d] what a head adds to the stream for n prompts (the mean
over their tokens) and D the rows of the unembedding, a simultaneous orthogonal matching pursuit lists the tokens that
explain H (`topics`); restricted to the rows of a list of keywords, the share of H's variance that it explains is the
head's score for the concept (`pursuit`). A baseline of the paper ranks heads by the mean logit of the same tokens
(`logit_lens_ranking`).

With more steps than the keywords have rank the order of the pursuit does not matter, and the score is a projection:

    score(h) = tr(Q^T W^T C W Q) / tr(W^T C W)

with Q an orthonormal basis of the keywords' rows, W the head's part of the output projection and C [d_head, d_head] the
covariance of its outputs, which is collected in a stream; H itself is never made. A random direction has score rank / d
on the average; real rows share much with each other, so every score has beside it the mean score of random lists of the
same make-up (`floor`) and its p-value, (1 + number of lists that score at least as much) / (1 + number of lists).

Departures. The paper does not say whether it centres H, normalises the rows or applies the final norm. Here H is
centred (`center`), and a pursuit's rows get length one (`normalize_atoms`; concept scores do not depend on it), as in
the same group's earlier code (Flegyas/ResiDual); the paper's formula has the rows as they are. `apply_final_norm`:

    none        H as it is added to the stream, the unembedding's own rows
    gain        the rows times the final norm's gain (for LayerNorm also without their mean)
    scale_only  each position of H times the number that the final norm multiplies the whole last stream with there
    full        both: D_j . H_s is then head h's direct contribution to the logit of token j, averaged over positions

What it does not see: what later layers make of a head's output; magnitude (`variance`, the head's total variance, and
`explained`, score times variance, stand beside the score); the head's mean output, which centring takes away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.edits import Heads
from interp.errors import InputError, SettingsError
from interp.heads.chosen import chosen_heads
from interp.heads.concepts import (
    FinalNorm,
    Keywords,
    Pieces,
    atoms_of,
    keyword_tokens,
    span_basis,
    token_texts,
)
from interp.heads.matching_pursuit import Dictionary, matching_pursuit
from interp.heads.moments import (
    Data,
    HeadMoments,
    HeadReader,
    batches_of,
    head_moments,
    head_weight,
    heads_by_layer,
    reader_settings,
)
from interp.heads.random_lists import random_lists as draw_lists
from interp.heads.topic import HeadTopic
from interp.lens import Lens
from interp.reads import Positions
from interp.scores import HeadScores

_LISTS = 50  # random lists that are scored at a time
_ROUNDING = 1e-12  # a variance of this share of the squared mean is what rounding makes of a constant


def pursuit(
    lens: Lens,
    data: Data | HeadMoments,
    keywords: Sequence[str] | Sequence[int] | Keywords,
    *,
    positions: Positions | None = None,
    pairs: Heads | None = None,
    center: bool = True,
    apply_final_norm: FinalNorm = "none",
    variants: bool = True,
    pieces: Pieces = "drop",
    random_lists: int = 200,
    matched: bool = True,
    seed: int = 0,
    batch_size: int | None = None,
) -> HeadScores:
    """The share of each head's variance that lies in the span of a list of keywords.

    Args:
        lens: a model with an unembedding.
        data: prompts, batches, one batch, or moments from `head_moments` (one pass for many lists).
        keywords: words, token ids, or what `keyword_tokens` made of them.
        positions: whose mean stands for a prompt: `all` (the default), `image`, `last`, ...; see `head_moments`.
        pairs: (layer, head) pairs, or a frame such as `scores.top(16)`; None for all heads.
        center: whether the mean over prompts is taken away, so that the score is of variance, not of the mean square.
        apply_final_norm: see above.
        variants: for words, whether forms with a space in front or a capital are added; see `keyword_tokens`.
        pieces: what to do with words of several tokens: `drop`, `first` or `all`.
        random_lists: how many random lists make the floor; 0 for none.
        matched: whether random lists are of words of the same forms and atoms of similar length, or of any tokens.
        seed: seed of the random lists.
        batch_size: how many prompts make a batch (32 by default).

    Returns:
        Scores [layer, head] from 0 to 1, with the columns `floor` (mean score of random lists), `above_floor`, `p`,
        `variance` and `explained` (score times variance). Heads that always write the same have score 0. There are no
        scores by prompt: the score is of the prompts together. The settings say which keywords were kept, their rank,
        and their condition number (large where some are nearly combinations of others).

    Raises:
        InputError: no usable keyword, keywords that span the whole stream, no prompts, or one alone with `center`.
        UnknownNameError: a layer, head or position does not exist, or an option's value.
        UnsupportedError: the model has no unembedding, or its heads cannot be had.
        SettingsError: moments that were collected with other options.
    """
    if random_lists < 0:
        raise SettingsError(f"random_lists must be 0 or more, got {random_lists}.")
    atoms = atoms_of(lens, apply_final_norm)
    words = keyword_tokens(lens, keywords, variants=variants, pieces=pieces)
    rows = atoms[list(words.ids)]
    basis, rank, condition = span_basis(rows)
    if int(rank) >= atoms.shape[1]:
        raise InputError(f"{len(words.ids)} keyword tokens span the whole stream ({atoms.shape[1]}): give fewer.")
    lists = how = None
    if random_lists:
        lengths = torch.linalg.vector_norm(atoms, dim=1).cpu()
        ids, how = draw_lists(lens, words, lengths, count=random_lists, matched=matched, seed=seed)
        some = [span_basis(atoms[part])[0].float() for part in ids.to(atoms.device).split(_LISTS)]
        lists = torch.cat(some).to(atoms.device)
    moments = _moments(lens, data, positions, pairs, apply_final_norm, batch_size)
    if center and moments.count < 2:
        raise InputError("one prompt has no variance: give at least two prompts, or center=False.")
    columns = {name: torch.zeros(moments.valid.shape) for name in ("score", "variance", "floor", "p")}
    for layer, heads in moments.heads.items():
        at = (layer, list(heads))
        weight, second = head_weight(lens, layer)[at[1]], moments.second(layer, center)
        wide = weight.cpu().double()
        square = wide @ wide.mT
        total, inside = (second * square).sum((1, 2)), wide @ basis
        part = (inside * (second @ inside)).sum((1, 2))
        alive = total > _ROUNDING * torch.einsum("hi,hij,hj->h", moments.mean[layer], square, moments.mean[layer])
        score = torch.where(alive, part / total.where(alive, 1.0), 0.0).clamp(0.0, 1.0)
        columns["score"][at], columns["variance"][at] = score.float(), total.float()
        if lists is not None:
            random = _random_scores(second, weight, lists) * alive[:, None]
            columns["floor"][at] = random.mean(1).float()
            more = (random >= score[:, None] * (1 - 1e-5)).sum(1)  # random scores are in float32
            columns["p"][at] = (1 + more.float()) / (1 + random_lists)
    score = columns.pop("score")
    extra = {"variance": columns["variance"], "explained": score * columns["variance"]}
    if lists is not None:
        extra = {"floor": columns["floor"], "above_floor": score - columns["floor"], "p": columns["p"], **extra}
    settings: dict[str, Any] = {
        **moments.settings,
        **{"method": "pursuit", "center": center, "apply_final_norm": apply_final_norm},
        **{"keywords": words.report(), "ids": list(words.ids), "rank": int(rank), "condition": float(condition)},
        **{"isotropic_floor": int(rank) / atoms.shape[1]},
        "random_lists": {"count": random_lists, "drawn": how, "seed": seed},
    }
    unit = "share of variance" if center else "share of the mean square"
    return HeadScores(score, "pursuit", unit, settings, extra=extra, tower=lens.anatomy.main, valid=moments.valid)


def logit_lens_ranking(
    lens: Lens,
    data: Data | HeadMoments,
    keywords: Sequence[str] | Sequence[int] | Keywords,
    *,
    positions: Positions | None = None,
    pairs: Heads | None = None,
    apply_final_norm: FinalNorm = "none",
    variants: bool = True,
    pieces: Pieces = "drop",
    batch_size: int | None = None,
) -> HeadScores:
    """The mean logit of a list of keywords read from each head's output alone: the paper's baseline.

    Args:
        lens: a model with an unembedding.
        data: as for `pursuit`.
        keywords: as for `pursuit`.
        positions: as for `pursuit`.
        pairs: as for `pursuit`.
        apply_final_norm: as for `pursuit`; with `full` the score is the mean direct effect on the keywords' logits.
        variants: as for `pursuit`.
        pieces: as for `pursuit`.
        batch_size: as for `pursuit`.

    Returns:
        Scores [layer, head] in logits, the mean over prompts and keywords, with the standard deviation over prompts of
        the mean over keywords as the column `sd` (from two prompts on).

    Raises:
        InputError: no usable keyword, or no prompts.
        UnknownNameError: a layer, head or position does not exist, or an option's value.
        UnsupportedError: the model has no unembedding, or its heads cannot be had.
        SettingsError: moments that were collected with other options.
    """
    atoms = atoms_of(lens, apply_final_norm)
    words = keyword_tokens(lens, keywords, variants=variants, pieces=pieces)
    mean = atoms[list(words.ids)].double().mean(0).cpu()
    moments = _moments(lens, data, positions, pairs, apply_final_norm, batch_size)
    scores = torch.zeros(moments.valid.shape)
    extra = {"sd": torch.zeros_like(scores)} if moments.count > 1 else {}
    for layer, heads in moments.heads.items():
        towards = head_weight(lens, layer)[list(heads)].cpu().double() @ mean
        at = (layer, list(heads))
        scores[at] = (moments.mean[layer] * towards).sum(1).float()
        if extra:
            spread = torch.einsum("hi,hij,hj->h", towards, moments.second(layer, True), towards)
            extra["sd"][at] = spread.clamp_min(0).sqrt().float()
    settings: dict[str, Any] = {
        **moments.settings,
        **{"method": "logit_lens_ranking", "apply_final_norm": apply_final_norm},
        **{"keywords": words.report(), "ids": list(words.ids)},
    }
    return HeadScores(
        scores, "logit_lens", "logits", settings, extra=extra, tower=lens.anatomy.main, valid=moments.valid
    )


def topics(
    lens: Lens,
    data: Data,
    heads: Heads,
    *,
    k: int = 50,
    among: Sequence[int] | None = None,
    positions: Positions = "all",
    center: bool = True,
    normalize_atoms: bool = True,
    apply_final_norm: FinalNorm = "none",
    batch_size: int = 32,
) -> list[HeadTopic]:
    """The tokens that explain what each of some heads writes, by simultaneous orthogonal matching pursuit.

    One pass over the prompts serves all heads; of each head one vector of d_head numbers is kept for each prompt.

    Args:
        lens: a model with an unembedding.
        data: prompts, batches or one batch.
        heads: (layer, head) pairs, or a frame such as `scores.top(8)`.
        k: how many tokens (the paper's number of steps).
        among: token ids to choose from; None for the whole vocabulary.
        positions: whose mean stands for a prompt; see `head_moments`.
        center: whether the mean over prompts is taken away.
        normalize_atoms: whether all tokens' rows get length one. Without it tokens with long rows are favoured: rare
            ones, which explain less.
        apply_final_norm: see above.
        batch_size: how many prompts make a batch.

    Returns:
        One result for each head, in their order; with fewer than `k` tokens where nothing is left to explain.

    Raises:
        InputError: no prompts, one alone with `center`, a head that always writes the same, or an id outside the
            vocabulary.
        UnknownNameError: a layer, head or position does not exist, or an option's value.
        UnsupportedError: the model has no unembedding, or its heads cannot be had.
        SettingsError: `k` is less than 1, or more than there are tokens.
    """
    atoms = atoms_of(lens, apply_final_norm)
    chosen = None if among is None else torch.tensor(keyword_tokens(lens, [int(i) for i in among]).ids)
    rows = atoms if chosen is None else atoms[chosen.to(atoms.device)]
    if not 1 <= k <= len(rows):
        raise SettingsError(f"k must lie between 1 and the number of tokens to choose from, {len(rows)}; got {k}.")
    by_layer, _ = heads_by_layer(lens, heads)
    reader = HeadReader(lens, by_layer, positions, apply_final_norm in ("scale_only", "full"))
    kept: dict[int, list[Tensor]] = {layer: [] for layer in by_layer}
    tokens = 0
    for batch in batches_of(lens, data, batch_size):
        tokens += int(batch.mask.sum())
        for layer, part in reader(batch).items():
            kept[layer].append(part)
    outputs = {layer: torch.cat(parts) for layer, parts in kept.items()}
    count = len(next(iter(outputs.values())))
    if center and count < 2:
        raise InputError("one prompt has no variance: give at least two prompts, or center=False.")
    dictionary = Dictionary.of(rows, normalize=normalize_atoms)
    settings: dict[str, Any] = {
        **reader_settings(reader, count, tokens),
        **{"method": "topics", "center": center, "normalize_atoms": normalize_atoms, "k": k},
        **{"apply_final_norm": apply_final_norm, "dictionary": len(rows)},
    }
    found = []
    for layer, head in chosen_heads(lens, heads)[0]:
        own = outputs[layer][:, by_layer[layer].index(head)]
        mean = own.mean(0)
        own = own - mean if center else own
        if float(own.square().sum()) <= (_ROUNDING * count * float(mean.square().sum()) if center else 0.0):
            raise InputError(
                f"layer {layer}, head {head} writes the same for every prompt: there is nothing to explain."
            )
        got = matching_pursuit(own, head_weight(lens, layer)[head], dictionary, k)
        ids = got.atoms if chosen is None else chosen[got.atoms]
        found.append(
            HeadTopic(
                *(layer, head, ids, token_texts(lens, ids.tolist()), got.explained, got.coefficients.float()),
                variance=got.total / (count - 1 if center else count),
                settings={**settings, "scored": got.scored},
                tower=lens.anatomy.main,
            )
        )
    return found


def _moments(
    lens: Lens,
    data: Data | HeadMoments,
    positions: Positions | None,
    pairs: Heads | None,
    apply_final_norm: FinalNorm,
    batch_size: int | None,
) -> HeadMoments:
    """Moments as they were given, or collected from the prompts."""
    frozen = apply_final_norm in ("scale_only", "full")
    if not isinstance(data, HeadMoments):
        return head_moments(
            lens, data, positions="all" if positions is None else positions, pairs=pairs, frozen_scale=frozen,
            batch_size=32 if batch_size is None else batch_size,
        )  # fmt: skip
    if positions is not None or pairs is not None or batch_size is not None:
        raise SettingsError(
            "positions, pairs and batch_size were settled when the moments were collected: leave them out."
        )
    if data.settings["model"] != lens.name:
        raise InputError(f"these moments are of {data.settings['model']}, not of {lens.name}.")
    if data.settings["frozen_scale"] != frozen:
        raise SettingsError(
            f"apply_final_norm={apply_final_norm!r} needs moments collected with frozen_scale={frozen}."
        )
    return data


def _random_scores(
    second: Float[Tensor, "head d_value d_value"],
    weight: Float[Tensor, "head d_value d_model"],
    lists: Float[Tensor, "count d_model r"],
) -> Float[Tensor, "head count"]:
    """The scores of heads for lists of tokens given by their bases, in float32 on the weight's device."""
    values, vectors = torch.linalg.eigh(second)
    root = (vectors * values.clamp_min(0).sqrt()[:, None, :]).mT
    written = root.float().to(weight.device) @ weight.float()
    total = written.square().sum((1, 2))
    found = []
    for some in lists.split(_LISTS):
        wide = written.flatten(0, 1) @ some.to(written).permute(1, 0, 2).flatten(1)
        parts = wide.unflatten(1, (len(some), -1)).unflatten(0, written.shape[:2])
        found.append(parts.square().sum((1, 3)))
    share = torch.cat(found, 1) / total.where(total > 0, 1.0)[:, None]
    return share.cpu().double()
