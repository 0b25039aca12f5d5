"""The loss and the accuracy of a model under many settings of its heads, several settings in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.batch import Batch
from interp.edits import Edit, splice
from interp.errors import InputError, SettingsError
from interp.heads.common import Answers, chosen_metric, predicted, token_ids
from interp.lens import Entry, Lens
from interp.reads import Read

HIGH_IS_GOOD = ("accuracy", "logit", "logit difference")
UNITS = {"loss": "nats", "accuracy": "share right", "logit": "logits", "logit difference": "logits"}


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A batch and what is measured on it.

    With answers: `loss` is the negative log-likelihood of the answer (nats), `accuracy` whether it is the most likely
    token, or where a wrong answer is given, more likely than that; `logit` or `logit difference` the answer's logit
    (less the wrong one's); all at the last position. Without: `loss` is the mean next-token loss of each sample,
    `accuracy` the share of its next tokens that were the most likely ones.

    Attributes:
        batch: the prompts.
        answers: the right next token of each, or None.
        wrong: a wrong one of each, or None.
    """

    batch: Batch
    answers: Int[Tensor, " batch"] | None = None
    wrong: Int[Tensor, " batch"] | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is measured."""
        if self.answers is None:
            return "loss", "accuracy"
        return "loss", "accuracy", "logit" if self.wrong is None else "logit difference"

    @property
    def read(self) -> Read:
        """The logits that are needed."""
        return Read("logits", positions="all" if self.answers is None else "last")

    def measured(self, logits: Float[Tensor, "rows pos d_vocab"]) -> Float[Tensor, "metric rows"]:
        """The numbers of each row; rows are copies of the batch, one after the other."""
        copies = len(logits) // len(self.batch)
        if self.answers is not None:
            last, answers = logits[:, -1].float(), self.answers.repeat(copies)
            right = last.gather(1, answers[:, None])[:, 0]
            loss, most = last.logsumexp(1) - right, last.argmax(1)
            if self.wrong is None:
                return torch.stack([loss, (most == answers).float(), right])
            apart = right - last.gather(1, self.wrong.repeat(copies)[:, None])[:, 0]
            return torch.stack([loss, (apart > 0).float(), apart])
        keep = predicted(self.batch).repeat(copies, 1)
        target = self.batch.inputs["input_ids"][:, 1:].repeat(copies, 1)
        loss, hits = torch.empty(target.shape, device=target.device), torch.empty(target.shape, device=target.device)
        for i, row in enumerate(logits):  # one at a time: in float32 they are the largest tensor of the run
            row = row[:-1].float()
            loss[i] = row.logsumexp(1) - row.gather(1, target[i, :, None])[:, 0]
            hits[i] = (row.argmax(1) == target[i]).float()
        return torch.stack([(x * keep).sum(1) / keep.sum(1) for x in (loss, hits)])


def tasks_of(
    lens: Lens, data: Batch | Sequence[Batch], answers: Answers | None = None, wrong: Answers | None = None
) -> list[Task]:
    """Batches with their answers, checked.

    Args:
        lens: the model.
        data: a batch or several.
        answers: right next tokens of the prompts of all batches, in order; without them the next-token loss counts.
        wrong: wrong ones.

    Raises:
        InputError: no batch, or answers that are not one token each, or not as many as prompts.
        SettingsError: wrong answers without answers.
        UnsupportedError: neither answers nor a model with a next-token loss.
    """
    batches = [data] if isinstance(data, Batch) else list(data)
    if not batches:
        raise InputError("nothing to measure on: no batch was given.")
    if wrong is not None and answers is None:
        raise SettingsError("wrong answers need answers to compare with.")
    total = sum(map(len, batches))
    good = None if answers is None else token_ids(lens, answers, total)
    bad = None if wrong is None else token_ids(lens, wrong, total, "wrong")
    tasks, first = [], 0
    for batch in batches:
        rows = slice(first, first := first + len(batch))
        task = Task(batch, None if good is None else good[rows], None if bad is None else bad[rows])
        chosen_metric(lens, batch, task.answers, task.wrong)  # says what does not do
        tasks.append(task)
    return tasks


def measure(
    lens: Lens,
    tasks: Sequence[Task],
    factors: Float[Tensor, "setting layer head"],
    *,
    tower: str | None = None,
    fill: Mapping[int, Tensor] | None = None,
    max_tokens: int = 512,
) -> Float[Tensor, "metric setting prompt"]:
    """The numbers of every prompt under every setting of the heads.

    A setting that leaves the lower layers alone enters above them, and as many settings as fit share one run, each in a
    copy of the batch.

    Args:
        lens: the model.
        tasks: batches with their answers.
        factors: what each head's output is multiplied with; what stands at heads that do not exist does not matter.
        tower: the tower of the heads.
        fill: for each layer what takes the place of the share 1 - factor of each head's output [head, d_head]; None
            for nothing.
        max_tokens: positions in one run, copies counted; a batch that is larger is run once for each setting.
    """
    out = [_measured(lens, task, factors, tower, fill, max_tokens) for task in tasks]
    return torch.cat(out, 2)


def _measured(
    lens: Lens,
    task: Task,
    factors: Tensor,
    tower: str | None,
    fill: Mapping[int, Tensor] | None,
    max_tokens: int,
) -> Tensor:
    batch, (found, kind) = task.batch, lens.anatomy.tower(tower)
    main = found.name == lens.anatomy.main and kind == "attn"
    copies = max(1, max_tokens // batch.mask.numel()) if main and batch.repeatable else 1
    changed = (factors != 1).any(2)
    depth = changed.shape[1]
    lowest = [int(row.long().argmax()) if bool(row.any()) else depth for row in changed]
    order = sorted(range(len(factors)), key=lowest.__getitem__)
    groups = [order[i : i + copies] for i in range(0, len(order), copies)]
    enters = main and batch.image_mask is None and all(x.skippable for x in found.layers)
    starts = sorted({lowest[g[0]] for g in groups} - {0, depth}) if enters else []
    streams = [Read("resid_pre", layers=tuple(starts), tower=tower)] if starts else []
    base = lens.run(batch, [*streams, task.read])
    plain = task.measured(base.logits).cpu()
    out = plain[:, None].repeat(1, len(factors), 1)
    for group in groups:
        if (first := lowest[group[0]]) == depth:
            continue
        wide = batch.repeat(len(group)) if len(group) > 1 else batch
        entry = None
        if first in starts:
            entry = Entry(first, base[streams[0], first].repeat(len(group), 1, 1), tower=tower)
        edits = scaling(factors[group], len(batch), tower, fill)
        values = task.measured(lens.run(wide, task.read, edits, entry=entry).logits)
        out[:, group] = values.cpu().reshape(len(out), len(group), len(batch))
    return out


def scaling(
    factors: Float[Tensor, "setting layer head"],
    size: int,
    tower: str | None = None,
    fill: Mapping[int, Tensor] | None = None,
) -> list[Edit]:
    """Multiply head outputs, each copy of a batch of `size` samples by its own factors; see `measure`."""

    def at(layer: int) -> Callable[[Tensor], Tensor]:
        def change(z: Tensor) -> Tensor:
            weight = factors[:, layer, : z.shape[2]].to(z)
            weight = weight if len(weight) == 1 else weight.repeat_interleave(size, 0)
            weight = weight[:, None, :, None]
            return z * weight if fill is None else z * weight + fill[layer].to(z) * (1 - weight)

        return change

    layers = (factors != 1).any(2).any(0).nonzero()[:, 0].tolist()
    return splice({layer: at(layer) for layer in layers}, site="z", tower=tower) if layers else []


def mean_outputs(
    lens: Lens, tasks: Sequence[Task], layers: Sequence[int], tower: str | None = None
) -> dict[int, Tensor]:
    """The mean output (`z`) of every head over all real tokens of all batches [head, d_head], by layer."""
    read, total = Read("z", layers=tuple(layers), tower=tower, reduce="mean"), 0.0
    sums: dict[int, Tensor] = {}
    for task in tasks:
        trace = lens.run(task.batch, read)
        mask = trace.mask(tower)
        for layer in layers:
            mean = trace[read, layer]
            # Where rows are pictures and not prompts, all have the same number of tokens.
            count = mean.new_ones(len(mean)) if mask is None else mask.sum(1).to(mean)
            sums[layer] = sums.get(layer, 0.0) + torch.einsum("b,bhd->hd", count, mean)
        total += float(count.sum())
    return {layer: value / total for layer, value in sums.items()}
