"""What head methods share: answers as token ids, the grid of heads, and results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.batch import Batch
from interp.errors import InputError, SettingsError, UnsupportedError
from interp.inputs import tokenizer_of
from interp.lens import Lens
from interp.scores import HeadScores

Answers = Sequence[str] | Sequence[int] | Int[Tensor, " batch"]


def token_ids(lens: Lens, answers: Answers, size: int, name: str = "answers") -> Int[Tensor, " batch"]:
    """One token id for each sample.

    Args:
        lens: the model, whose tokenizer reads strings.
        answers: ids, or strings that are one token each (with their space: " Mary").
        size: number of samples.
        name: what they are, for errors.

    Raises:
        InputError: another number of answers than samples, or a string that is not one token.
    """
    rows = answers.tolist() if isinstance(answers, Tensor) else list(answers)
    if len(rows) != size:
        raise InputError(f"{len(rows)} {name} were given for {size} prompts.")
    ids: list[int] = []
    for i, row in enumerate(rows):
        if isinstance(row, int):
            ids.append(row)
            continue
        tokenizer = tokenizer_of(lens.processor)
        if tokenizer is None:
            raise InputError(f"{name} are strings, but {lens.name} has no tokenizer: give token ids.")
        found = tokenizer(row, add_special_tokens=False)["input_ids"]
        if len(found) != 1:
            pieces = tokenizer.convert_ids_to_tokens(found)
            raise InputError(
                f"{name}[{i}] {row!r} is {len(found)} tokens ({pieces}); one is needed. Mind the space in front: "
                "' Mary'."
            )
        ids.append(found[0])
    return torch.tensor(ids, device=lens_device(lens))


def lens_device(lens: Lens) -> torch.device:
    """Where the model takes its inputs."""
    return lens.input_device


def logit_difference(answers: Tensor, wrong: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Metric [batch]: the last position's logit of the answer, minus that of the wrong answer where there is one.

    The batch has to end at its last column (left padding), so that the last logits are the prompt's.
    """

    def metric(logits: Tensor) -> Tensor:
        last = logits[:, -1].float()
        copies = last.shape[0] // len(answers)
        value = last.gather(1, answers.repeat(copies)[:, None])[:, 0]
        return value if wrong is None else value - last.gather(1, wrong.repeat(copies)[:, None])[:, 0]

    return metric


def predicted(batch: Batch) -> Bool[Tensor, "batch next"]:
    """Which columns from the second on hold a token that a next-token loss counts: neither padding nor image tokens.

    Raises:
        InputError: a sample has no such token, which leaves nothing to predict.
    """
    real = batch.mask[:, 1:] & batch.mask[:, :-1]
    if batch.image_mask is not None:
        real = real & ~batch.image_mask[:, 1:]
    if not bool(real.any(1).all()):
        raise InputError("the next-token loss needs at least two tokens in every prompt.")
    return real


def next_token_loss(batch: Batch) -> Callable[[Tensor], Tensor]:
    """Metric [batch]: mean negative log-likelihood (nats) of each sample's own next tokens; see `predicted`.

    Raises:
        InputError: a sample has a single token, which leaves nothing to predict.
    """
    ids, real = batch.inputs["input_ids"], predicted(batch)

    def metric(logits: Tensor) -> Tensor:
        copies = logits.shape[0] // ids.shape[0]
        target, keep = ids[:, 1:].repeat(copies, 1), real.repeat(copies, 1)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), target, reduction="none")
        return (loss * keep).sum(1) / keep.sum(1)

    return metric


def chosen_metric(lens: Lens, batch: Batch, answers: Answers | None, wrong: Answers | None) -> tuple[Any, str]:
    """The metric of a method: a logit difference if answers are given, the next-token loss otherwise; and its unit.

    Raises:
        SettingsError: a wrong answer without an answer.
        InputError: the batch is padded on the right, where a logit difference needs the last column.
    """
    if answers is None:
        if wrong is not None:
            raise SettingsError("wrong answers need answers to compare with.")
        if "input_ids" not in batch.inputs or "decoder_input_ids" in batch.inputs or lens.anatomy.unembed is None:
            raise UnsupportedError(f"{lens.name}: the next-token loss is for decoders; give answers.")
        return next_token_loss(batch), "nats"
    if batch.padding in ("right", "mixed"):
        raise InputError("answers are read at the last column: prepare the batch with padding_side='left'.")
    good = token_ids(lens, answers, len(batch))
    bad = None if wrong is None else token_ids(lens, wrong, len(batch), "wrong")
    return logit_difference(good, bad), "logits"


def head_grid(
    lens: Lens, tower: str | None = None, site: str = "z"
) -> tuple[list[int], list[int], Bool[Tensor, "layer head"]]:
    """Layers whose heads can give a site, the number of heads of every layer, and which (layer, head) exist.

    Raises:
        UnsupportedError: no layer can give it.
    """
    found, _ = lens.anatomy.tower(tower)
    layers = lens.layers_with(site, tower=tower)
    counts = [lens.anatomy.attention(tower, i).n_heads if i in layers else 0 for i in range(len(found.layers))]
    valid = torch.arange(max(counts))[None] < torch.tensor(counts)[:, None]
    return layers, counts, valid


def settings_of(lens: Lens, batch: Batch, **more: Any) -> dict[str, Any]:
    """What a result records: the model, the batch's size, and the method's own options."""
    dtype = str(lens.dtype).removeprefix("torch.")
    return {"model": lens.name, "dtype": dtype, "prompts": len(batch), "tokens": int(batch.mask.sum()), **more}


def head_scores(
    name: str,
    unit: str,
    per_prompt: Float[Tensor, "batch layer head"],
    valid: Bool[Tensor, "layer head"],
    settings: Mapping[str, Any],
    tower: str,
    *,
    scores: Float[Tensor, "layer head"] | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> HeadScores:
    """A result whose scores are the mean over prompts, unless others are given."""
    per_prompt = per_prompt.float().cpu().masked_fill(~valid, float("nan"))
    mean = per_prompt.mean(0) if scores is None else scores.float().cpu().masked_fill(~valid, float("nan"))
    return HeadScores(
        scores=mean,
        name=name,
        unit=unit,
        settings=dict(settings),
        per_prompt=per_prompt,
        extra={k: v.float().cpu().masked_fill(~valid, float("nan")) for k, v in (extra or {}).items()},
        tower=tower,
        valid=valid,
    )
