"""Run a head method over many prompts in batches; the merged result is that of one batch of them all."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from interp.cli.prompts import prepared
from interp.cli.ranking.settings import CONCEPTUAL, HeadsSettings
from interp.heads import (
    Keywords,
    ablation,
    direct_effect,
    importance,
    logit_lens_ranking,
    patterns,
    pursuit,
    vision_divergence,
    visual_concentration,
)
from interp.heads.patterns import pattern_targets
from interp.scores import HeadScores

if TYPE_CHECKING:
    from interp.batch import Batch
    from interp.data import Prompt
    from interp.lens import Lens

Share = Callable[[int, Callable[[int], HeadScores]], Sequence[HeadScores]]


def alone(count: int, piece: Callable[[int], HeadScores]) -> list[HeadScores]:
    """All pieces, one after the other."""
    return [piece(number) for number in range(count)]


ABLATION_ROWS = 4  # rows of an ablation run for each prompt of a batch


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """A batch and what is asked of it.

    Attributes:
        batch: prompts as the model takes them.
        answers: right next tokens, or None.
        wrong: wrong ones, or None.
        first: index of the first prompt.
    """

    batch: "Batch"
    answers: list[str] | None
    wrong: list[str] | None
    first: int


def prompt_chunks(lens: "Lens", prompts: Sequence["Prompt"], size: int) -> list[Chunk]:
    """The prompts in batches; with answers they are padded on the left, so that the last column is each one's last.

    Raises:
        InputError: a prompt or its image cannot be used.
    """
    found = []
    for first in range(0, len(prompts), size):
        rows = prompts[first : first + size]
        answers, wrong = ([getattr(p, name) for p in rows] for name in ("answer", "wrong"))
        asked = None if answers[0] is None else answers
        batch = prepared(lens, rows, padding_side="left" if asked else None)
        found.append(Chunk(batch, asked, None if wrong[0] is None else wrong, first))
    return found


def repeated_chunks(lens: "Lens", settings: HeadsSettings) -> list[Chunk]:
    """Rows of random tokens repeated once, behind the token that the tokenizer itself puts in front (if any)."""
    from interp.data import repeated_tokens
    from interp.inputs import tokenizer_of
    from interp.patches import picture_ids

    tokenizer = tokenizer_of(lens.processor)
    size = lens.vocabulary
    special: set[int] = set()
    begin = None
    if tokenizer is not None:
        size = min(size, len(tokenizer))
        special = set(tokenizer.all_special_ids)
        front = tokenizer("a")["input_ids"][0]
        begin = front if front == tokenizer.bos_token_id else None
    special.update(picture_ids(lens.model.config))
    allowed = [i for i in range(size) if i not in special]
    ids = repeated_tokens(
        settings.repeat_rows, settings.repeat_length, allowed_ids=allowed, bos_id=begin, seed=settings.seed
    )
    steps = range(0, len(ids), settings.batch_size)
    return [Chunk(lens.prepare(input_ids=ids[at : at + settings.batch_size]), None, None, at) for at in steps]


def compute(
    lens: "Lens",
    method: str,
    chunks: Sequence[Chunk],
    settings: HeadsSettings,
    *,
    keywords: Keywords | None = None,
    done: Callable[[], None] = lambda: None,
    show: bool = False,
    share: Share = alone,
) -> HeadScores:
    """One method over all chunks.

    Args:
        lens: the model.
        method: its name.
        chunks: from `prompt_chunks` or `repeated_chunks`. For mean ablation one: the mean is the batch's.
        settings: the methods' options.
        keywords: for the methods that need them.
        done: called after each chunk.
        show: whether ablation, the slow one, shows a bar of its own.
        share: computes numbered pieces and gives all of them, where processes divide them among themselves.
    """
    if method == "patterns":
        return _patterns(lens, chunks, settings, done, share)
    if method in CONCEPTUAL:
        assert keywords is not None
        return _concepts(lens, method, chunks, settings, keywords, done)

    def piece(number: int) -> HeadScores:
        found = _piece(lens, method, chunks[number], settings, show)
        done()
        return found

    pieces = share(len(chunks), piece)
    if method == "visual_concentration":
        return _unweighted(merge([_weighted(piece) for piece in pieces]))
    merged = merge(pieces)
    return normalized(merged, settings.normalize) if method == "importance" else merged


def _piece(lens: "Lens", method: str, chunk: Chunk, settings: HeadsSettings, show: bool) -> HeadScores:
    """A method whose scores are means over prompts, on one chunk."""
    batch = chunk.batch
    asked: dict[str, Any] = {"answers": chunk.answers, "wrong": chunk.wrong}
    if method == "direct_effect":
        return direct_effect(lens, batch, **asked, normalize=settings.share)
    if method == "importance":
        return importance(lens, batch, **asked, absolute=settings.absolute)  # pyright: ignore[reportArgumentType]
    if method == "ablation":
        copies = max(1, min(16, ABLATION_ROWS * settings.batch_size // len(batch)))
        return ablation(lens, batch, **asked, mode=settings.mode, max_copies=copies, progress=show)  # pyright: ignore[reportArgumentType]
    if method == "vision_divergence":
        options: dict[str, Any] = {name: getattr(settings, name) for name in ("without", "form", "outliers", "seed")}
        return vision_divergence(lens, batch, **options)
    return visual_concentration(lens, batch, sink=settings.sink)


def _concepts(
    lens: "Lens",
    method: str,
    chunks: Sequence[Chunk],
    settings: HeadsSettings,
    keywords: Keywords,
    done: Callable[[], None],
) -> HeadScores:
    """A method that takes all prompts in one stream."""

    def stream() -> Iterator["Batch"]:
        for chunk in chunks:
            yield chunk.batch
            done()

    options: dict[str, Any] = {name: getattr(settings, name) for name in ("positions", "apply_final_norm")}
    if method == "logit_lens":
        return logit_lens_ranking(lens, stream(), keywords, **options)
    options |= {name: getattr(settings, name) for name in ("center", "random_lists", "seed")}
    return pursuit(lens, stream(), keywords, **options)


def _weighted(scores: HeadScores) -> HeadScores:
    """With the sum of its columns over prompts instead of a mean that is weighted by another column."""
    extra = {**scores.extra, "concentration": scores.extra["concentration"] * scores.extra["weight"]}
    return replace(scores, extra=extra)


def _unweighted(scores: HeadScores) -> HeadScores:
    mean = scores.extra["concentration"] / scores.extra["weight"].clamp_min(1e-30)
    return replace(scores, extra={**scores.extra, "concentration": mean})


def merge(pieces: Sequence[HeadScores]) -> HeadScores:
    """The result over all prompts from results over parts of them: scores and columns are means over prompts."""
    first = pieces[0]
    assert all(p.per_prompt is not None for p in pieces)
    counts = [len(p.per_prompt) for p in pieces]  # pyright: ignore[reportArgumentType]
    per_prompt = torch.cat([p.per_prompt for p in pieces])  # pyright: ignore[reportArgumentType]
    weights = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    extra = {
        key: torch.einsum("n,nlh->lh", weights, torch.stack([p.extra[key].double() for p in pieces])).float()
        for key in first.extra
    }
    return replace(first, scores=per_prompt.mean(0), per_prompt=per_prompt, extra=extra, settings=_settings([*pieces]))


def _settings(pieces: Sequence[HeadScores]) -> dict[str, Any]:
    """Settings of the whole: counts are added up, lists by prompt joined."""
    whole: dict[str, Any] = dict(pieces[0].settings)
    for key, value in pieces[0].settings.items():
        if key in ("prompts", "tokens", "used", "sinks", "image_tokens"):
            whole[key] = sum(p.settings[key] for p in pieces)
        elif isinstance(value, list):
            whole[key] = [x for p in pieces for x in p.settings[key]]
    return whole | {"batches": len(pieces)}


def normalized(scores: HeadScores, how: str) -> HeadScores:
    """Importance divided by the L2 norm of each layer or of all heads, as `heads.importance` does it for one batch."""
    settings: Mapping[str, Any] = {**scores.settings, "normalize": how}
    if how == "none":
        return replace(scores, settings=settings)
    values = scores.scores.nan_to_num(0)
    size = values.norm(dim=1, keepdim=True) if how == "layer" else values.norm()
    size = size.clamp_min(1e-20)
    assert scores.per_prompt is not None
    return replace(
        scores, scores=scores.scores / size, per_prompt=scores.per_prompt / size, unit="normalised", settings=settings
    )


def _patterns(
    lens: "Lens", chunks: Sequence[Chunk], settings: HeadsSettings, done: Callable[[], None], share: Share
) -> HeadScores:
    """Pattern scores; each kind is a mean over the prompts that can show it, which may lie in some batches only."""
    kept: list[HeadScores] = []
    used: list[int] = []
    sums: dict[str, torch.Tensor] = {}
    uniform: dict[str, float] = {}
    counts: dict[str, int] = {}
    shown: list[tuple[Chunk, dict[str, Any], dict[str, torch.Tensor], list[str], str]] = []
    for chunk in chunks:
        targets = pattern_targets(chunk.batch, settings.window)
        able = {kind: queries.any(1).cpu() for kind, (_, queries) in targets.items()}
        kinds = [kind for kind, rows in able.items() if bool(rows.any())]
        if kinds:
            wanted = settings.score if settings.score in kinds else kinds[0]
            shown.append((chunk, targets, able, kinds, wanted))
        else:
            done()

    def piece_of(number: int) -> HeadScores:
        chunk, *_, wanted = shown[number]
        found = patterns(lens, chunk.batch, score=wanted, window=settings.window)
        done()
        return found

    if shown:
        for (chunk, targets, able, kinds, wanted), piece in zip(shown, share(len(shown), piece_of), strict=True):
            for kind in kinds:
                n = int(able[kind].sum())
                sums[kind] = sums.get(kind, torch.zeros(())) + piece.extra[kind].double() * n
                counts[kind] = counts.get(kind, 0) + n
                uniform[kind] = uniform.get(kind, 0.0) + _uniform(chunk.batch, targets[kind])
            if wanted == settings.score:
                kept.append(piece)
                used += [chunk.first + int(i) for i in able[wanted].nonzero()[:, 0]]
    if not kept:
        return patterns(lens, chunks[0].batch, score=settings.score, window=settings.window)  # says what is missing
    extra = {kind: (total / counts[kind]).float() for kind, total in sums.items()}
    whole = merge([replace(piece, extra={}) for piece in kept])
    chance = {kind: total / counts[kind] for kind, total in uniform.items()}
    return replace(whole, extra=extra, settings={**whole.settings, "uniform": chance, "prompt_index": used})


def _uniform(batch: "Batch", target: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Sum over the prompts of the score of a head that spreads its attention evenly over what it can see."""
    keys, queries = target
    seen = batch.mask.long().cumsum(1).clamp_min(1)
    mass = keys.sum(-1) / seen
    each = (mass * queries).sum(1) / queries.sum(1).clamp_min(1)
    return float(each.sum())
