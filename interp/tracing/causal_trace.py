"""Causal tracing: which states bring a fact back when the subject's embeddings are drowned in noise.

Source: Meng, Bau, Andonian, Belinkov 2022, "Locating and Editing Factual Associations in GPT", NeurIPS, arXiv
2202.05262, and its code. The clean run reads the prompt; the corrupt runs read it with noise on the embeddings of the
subject's tokens t,

    embed[t] + noise sigma N(0, 1)          sigma: standard deviation of the numbers in the subjects' embeddings

and in turn one state (a site of one layer, or of a window of layers, at one token) is put back to its clean value. With
p the probability of the answer, a mean over noise samples, the published indirect effect is p - p corrupt; the effect
of a `CausalMap` is its share of what the noise took, (p - p corrupt) / (p clean - p corrupt).

As in the code: noise on the token embeddings alone, the same for every state (and here for every prompt), ten samples
of three sigmas, windows of ten layers for attention and MLPs, and prompts whose answer is not what the model says first
are left out. Departures: subjects are found by their characters, and answers may have several tokens (their joint
probability).

Severed traces (`severed`) hold one kind of module at its corrupt values in every layer, at the token of the state; the
modules of other tokens are computed, as in the code.

What it does not see: Gaussian noise takes the model where it has never been (compare with another subject in its place,
`patch_sweep`); windows inflate peaks; that a state suffices does not say that the fact is stored in it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.attribution.continued import continued
from interp.batch import Batch
from interp.edits import Edit, Where
from interp.errors import InputError, SettingsError, UnsupportedError, unknown
from interp.inputs import tokenizer_of
from interp.lens import Lens
from interp.reads import Read
from interp.tracing.causal_map import CausalMap
from interp.tracing.grid import EVERY
from interp.tracing.sweep import patch_sweep

ROLES = ("first subject", "middle subject", "last subject", "first after", "further", "last")
WINDOWS = {"attn_out": 10, "mlp_out": 10}
PROMPTS = 8  # traced together


@dataclass(frozen=True, slots=True)
class Fact:
    """A prompt that the model completes.

    Attributes:
        text: the prompt.
        subject: what is drowned in noise.
        answer: the ids of the continuation.
        index: its number in the list that was given.
    """

    text: str
    subject: str
    answer: tuple[int, ...]
    index: int


def causal_trace(
    lens: Lens,
    texts: Sequence[str],
    subjects: Sequence[str],
    *,
    answers: Sequence[str] | Sequence[Sequence[int]] | None = None,
    site: str = "resid_post",
    window: int | None = None,
    layers: int | Sequence[int] | None = None,
    positions: Literal["roles", "each"] = "roles",
    noise: float = 3.0,
    samples: int = 10,
    sigma: float | None = None,
    occurrence: int = 0,
    severed: Literal["attn_out", "mlp_out"] | None = None,
    min_gap: float = 0.1,
    seed: int = 1,
    memory: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> CausalMap:
    """How far each state brings the answer back when the subject is drowned in noise.

    Args:
        lens: a decoder with a tokenizer.
        texts: prompts that the model completes, such as "The Eiffel Tower is in the city of".
        subjects: the subject of each, as it stands in the text.
        answers: the continuation of each, with its leading space, or its token ids; None takes what the model says
            first.
        site: the state: `resid_post`, `attn_out`, `mlp_out`, or any other that `patch_sweep` takes; heads together.
        window: how many layers are put back together; None for the paper's: ten for `attn_out` and `mlp_out`, else one.
        layers: which; None for all.
        positions: put tokens together by their role (`ROLES`; the only token of a subject is `last subject`), each
            token patched by itself, or keep each position (counted from a prompt's own first token).
        noise: size of the noise in sigmas.
        samples: how many noise samples.
        sigma: standard deviation of the embeddings; None for that of all numbers in the subjects' embeddings.
        occurrence: which occurrence of the subject in its text; -1 for the last.
        severed: put the state back, and hold what attention or the MLP adds to that token in other layers at its value
            in the corrupt run (see `patch_sweep`): what the state brings back without these modules.
        min_gap: see `CausalMap`.
        seed: seed of the noise.
        memory: bytes that a pass may take.
        checkpoint: a folder in which finished passes are kept.
        progress: whether to show progress bars.

    Returns:
        A map of probabilities over the prompts whose answer the model gives: `settings["kept"]` lists their numbers
        in the order of the map (by the length of the answer),
        `settings["left_out"]` says how many others there were.

    Raises:
        InputError: lists of other lengths, a subject that its text does not hold, an answer without tokens, or no
            prompt whose answer the model gives.
        SettingsError: a number outside its range.
        UnknownNameError: another value for positions or severed, or a site or layer that does not exist.
        UnsupportedError: the model has no tokenizer or no logits.
    """
    if positions not in ("roles", "each"):
        raise unknown("way to show positions", positions, ("roles", "each"))
    if severed not in (None, "attn_out", "mlp_out"):
        raise unknown("module to sever", severed, ("attn_out", "mlp_out"))
    if samples < 1 or not 0 < noise < math.inf or not (sigma is None or 0 < sigma < math.inf):
        raise SettingsError(f"noise and sigma are above 0, samples at least 1; got {noise}, {sigma}, {samples}.")
    facts = _known(lens, texts, subjects, answers)
    marks = [_marked(lens, fact, occurrence) for fact in facts]
    size = _sigma(lens, facts, marks) if sigma is None else sigma
    random = torch.Generator().manual_seed(seed)
    width = lens.anatomy.towers[lens.anatomy.main].d_model
    draws = noise * size * torch.randn(samples, max(int(m.sum()) for m in marks), width, generator=random)
    options: dict[str, Any] = {"sites": site, "layers": layers, "heads": "all", "memory": memory, "progress": progress}
    options["severed"] = severed
    options["window"] = WINDOWS.get(site, 1) if window is None else window
    parts = []
    for start, stop in _chunks(facts):
        some = slice(start, stop)
        folder = None if checkpoint is None else Path(checkpoint) / f"{start:05d}"
        parts.append(_traced(lens, facts[some], marks[some], draws, {**options, "checkpoint": folder}))
    whole = _joined(parts, marks, roles=positions == "roles")
    settings = {**parts[0].settings, "method": "causal_trace", "noise": noise, "sigma": size, "samples": samples}
    settings |= {"seed": seed, "prompts": len(facts), "kept": [f.index for f in facts]}
    settings |= {"left_out": len(texts) - len(facts), "occurrence": occurrence}
    return replace(whole, settings=settings, min_gap=min_gap)


def _known(
    lens: Lens,
    texts: Sequence[str],
    subjects: Sequence[str],
    answers: Sequence[str] | Sequence[Sequence[int]] | None,
) -> list[Fact]:
    """The prompts whose answer begins with the token that the model finds most likely."""
    tokenizer = tokenizer_of(lens.processor)
    if tokenizer is None:
        raise UnsupportedError(f"{lens.name} has no tokenizer, with which subjects could be found.")
    counts = [len(texts), len(subjects), *([] if answers is None else [len(answers)])]
    if len(set(counts)) > 1 or not counts[0]:
        raise InputError(f"a subject (and an answer) for each text is needed, and at least one text; got {counts}.")
    facts = []
    for start in range(0, len(texts), PROMPTS):
        some = list(range(len(texts)))[start : start + PROMPTS]
        batch = lens.prepare([texts[i] for i in some], padding_side="left")
        best = lens.run(batch, "logits@last").logits[:, -1].argmax(-1).tolist()
        for i, first in zip(some, best, strict=True):
            told: Any = [first] if answers is None else answers[i]
            ids = tokenizer(told, add_special_tokens=False)["input_ids"] if isinstance(told, str) else told
            ids = tuple(int(token) for token in ids)
            if not ids:
                raise InputError(f"answer {i} {told!r} has no tokens.")
            if ids[0] == first:
                facts.append(Fact(texts[i], subjects[i], ids, i))
    facts.sort(key=lambda fact: len(fact.answer))
    if not facts:
        raise InputError(f"{lens.name} gives none of the {len(texts)} answers: there is nothing to trace.")
    return facts


def _chunks(facts: Sequence[Fact]) -> list[tuple[int, int]]:
    """Where the facts that are traced together begin and end: few enough, and with answers of equal length."""
    found, start = [], 0
    for i in range(1, len(facts) + 1):
        if i == len(facts) or i - start == PROMPTS or len(facts[i].answer) != len(facts[start].answer):
            found.append((start, i))
            start = i
    return found


def _marked(lens: Lens, fact: Fact, occurrence: int) -> Bool[Tensor, " pos"]:
    """The tokens of the subject."""
    try:
        return lens.prepare([fact.text]).find(fact.subject, occurrence=occurrence)[0].cpu()
    except InputError as error:
        raise InputError(f"prompt {fact.index}: {error}") from error


def _sigma(lens: Lens, facts: Sequence[Fact], marks: Sequence[Bool[Tensor, " pos"]]) -> float:
    """The standard deviation of all numbers in the embeddings of the subjects' tokens."""
    rows = []
    for fact, mark in zip(facts, marks, strict=True):
        rows.append(lens.run(lens.prepare([fact.text]), "embed")["embed"][0].cpu()[mark].double())
    return float(torch.cat(rows).std(correction=0))


def _traced(
    lens: Lens,
    facts: Sequence[Fact],
    marks: Sequence[Bool[Tensor, " pos"]],
    draws: Float[Tensor, "sample token d_model"],
    options: dict[str, Any],
) -> CausalMap:
    """Some prompts, every position from the first subject token on: probabilities, means over the noise samples."""
    prompts = lens.prepare([f.text for f in facts], padding_side="left")
    ids = torch.tensor([f.answer for f in facts])
    whole, predicts = continued(lens, prompts, ids) if ids.shape[1] > 1 else (prompts, _last(prompts))
    samples = len(draws)
    noisy = torch.zeros_like(whole.mask)
    for i, mark in enumerate(marks):
        noisy[i, prompts.mask[i].nonzero()[:, 0][mark.to(noisy.device)]] = True
    first = noisy.int().argmax(1).repeat(samples)
    wide, targets = whole.repeat(samples), ids.repeat(samples, 1)

    def drowned(value: Tensor, where: Where) -> Tensor:
        row = torch.arange(len(value), device=value.device) % len(first)  # a sweep may run several copies of the batch
        token = (where.columns - first.to(value.device)[row, None]).clamp(0, draws.shape[1] - 1)
        sample = row[:, None] // len(facts)
        added = draws.to(value)[sample.expand_as(token), token]
        return value + added * where.valid[..., None]

    def probability(logits: Float[Tensor, "row n d_vocab"]) -> Float[Tensor, " row"]:
        told = targets.repeat(len(logits) // len(targets), 1).to(logits.device)
        return logits.float().log_softmax(-1).gather(2, told[..., None])[..., 0].sum(1).exp()

    starts = [int(mark.int().argmax()) for mark in marks]
    edit = Edit(Read("embed", positions=noisy.repeat(samples, 1)), drowned, "causal_trace")
    found = patch_sweep(
        lens,
        wide,
        wide,
        positions=list(range(min(starts), max(len(mark) for mark in marks))),
        metric=probability,
        at=predicts.repeat(samples, 1),
        corrupt_edits=[edit],
        min_gap=0.0,
        **options,
    )
    apart = {name: getattr(found, name) for name in ("values", "clean", "corrupt")}
    means = {name: x.double().unflatten(-1, (samples, len(facts))).mean(-2).float() for name, x in apart.items()}
    return replace(found, **means, exists=found.exists[:, : len(facts)], metric="probability", unit="")


def _last(batch: Batch) -> Bool[Tensor, "batch pos"]:
    last = torch.zeros_like(batch.mask)
    last[:, -1] = True
    return last


def roles(mark: Bool[Tensor, " pos"]) -> list[str | None]:
    """The role of each position of a prompt; None in front of the subject."""
    inside = mark.nonzero()[:, 0].tolist()
    begin, end, last = inside[0], inside[-1], len(mark) - 1
    found: list[str | None] = []
    for i in range(len(mark)):
        role = None if i < begin else "first subject" if i == begin else "middle subject" if i < end else "further"
        role = "last subject" if i == end else "first after" if i == end + 1 else role
        found.append("last" if i == last else role)
    return found


def _joined(parts: Sequence[CausalMap], marks: Sequence[Bool[Tensor, " pos"]], *, roles: bool) -> CausalMap:
    """One map of all prompts, by position or by role; a role's value is the mean over its tokens."""
    named = [_roles_or_places(mark, roles) for mark in marks]
    order = ROLES if roles else [str(i) for i in range(max(map(len, marks)))]
    groups = [g for g in order if any(g in names for names in named)]
    layers = sorted({int(layer) for part in parts for layer in part.cells[:, 1]})
    total = torch.zeros(len(layers), len(groups), len(marks), dtype=torch.float64)
    count = torch.zeros_like(total)
    offset = 0
    for part in parts:
        for (_, layer, _, group), values in zip(part.cells.tolist(), part.values.double(), strict=True):
            place = int(part.groups[group])
            for n in range(len(part)):
                names = named[offset + n]
                name = names[place] if place < len(names) else None
                if name is not None:
                    at = layers.index(layer), groups.index(name), offset + n
                    total[at] += values[n]
                    count[at] += 1
        offset += len(part)
    exists = (count > 0).any(0)
    cells = [(0, layer, EVERY, g) for layer in layers for g in range(len(groups))]
    one = parts[0]
    return CausalMap(
        values=(total / count).masked_fill(count == 0, torch.nan).flatten(0, 1).float(),
        clean=torch.cat([p.clean for p in parts]),
        corrupt=torch.cat([p.corrupt for p in parts]),
        cells=torch.tensor(cells),
        exists=exists,
        sites=one.sites,
        groups=tuple(groups),
        direction=one.direction,
        metric=one.metric,
        single=not roles,
        settings=one.settings,
    )


def _roles_or_places(mark: Bool[Tensor, " pos"], by_role: bool) -> list[str | None]:
    named = roles(mark)
    return named if by_role else [None if role is None else str(i) for i, role in enumerate(named)]
