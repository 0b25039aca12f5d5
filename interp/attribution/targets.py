"""What is explained: the logit of an answer at each target position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.attribution.common import Stream, chosen_targets, stream_of, token_text
from interp.batch import Batch, Selection
from interp.errors import InputError, SettingsError, UnsupportedError, unknown
from interp.inputs import tokenizer_of
from interp.lens import Lens
from interp.reads import Positions, Read

Answer = str | int
Answers = Sequence[Answer] | Sequence[Sequence[Answer]] | Int[Tensor, "batch ..."]
Measure = Literal["logit", "probability", "logprob"]
MEASURES = {"logit": "logits", "probability": "probability", "logprob": "nats"}


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """An answer's number at each target position of a batch.

    Attributes:
        stream: where the targets stand: the main tower's stream, on the CPU.
        chosen: the columns of the targets [batch, target], on the CPU.
        answers: ids of the answers [batch, target].
        wrong: ids of the wrong answers [batch, target], whose number is subtracted.
        pooled: whether the logits [batch, class] belong to the whole input and not to a position.
        measure: `logit`, `probability` or `logprob`.
        value: the number in the model as it is [batch, target].
    """

    stream: Stream
    chosen: Selection
    answers: Int[Tensor, "batch target"]
    wrong: Int[Tensor, "batch target"] | None
    pooled: bool
    measure: str
    value: Float[Tensor, "batch target"]

    def __len__(self) -> int:
        """Number of targets of a sample."""
        return self.answers.shape[1]

    def values(
        self, logits: Tensor, *, copies: int = 1, columns: Int[Tensor, "rows target"] | None = None
    ) -> Float[Tensor, "rows target"]:
        """The number in each row of some logits; the arguments are those of `at_targets`."""
        wide = self.at_targets(logits, copies=copies, columns=columns)
        return number(wide, self.answers.repeat(copies, 1), self.wrong, self.measure)

    def at_targets(
        self, logits: Tensor, *, copies: int = 1, columns: Int[Tensor, "rows target"] | None = None
    ) -> Float[Tensor, "rows target n"]:
        """The logits at the targets (one row for all targets if they are pooled).

        Args:
            logits: [rows, pos, d_vocab]; [rows, 1, d_vocab] at the targets alone; or pooled ones [rows, class].
            copies: how often the batch is repeated in the rows.
            columns: the columns of the targets, where they are others than in the batch.
        """
        if self.pooled:
            return logits.unsqueeze(1)
        at = self.chosen.index.repeat(copies, 1) if columns is None else columns
        at = at.to(logits.device)
        at = at if logits.shape[1] > 1 else torch.zeros_like(at)
        return logits.gather(1, at[:, :, None].expand(-1, -1, logits.shape[-1]))

    def metric(self, target: int) -> Callable[[Tensor], Tensor]:
        """The metric [batch] of one target for a run with gradients."""
        return lambda logits: self.values(logits)[:, target]

    def passes(self) -> list[slice]:
        """Targets that share one backward pass: all those of pooled logits with the same answers, else each alone."""
        count = len(self)
        ids = [x for x in (self.answers, self.wrong) if x is not None]
        if self.pooled and all(bool((x == x[:, :1]).all()) for x in ids):
            return [slice(0, count)]
        return [slice(t, t + 1) for t in range(count)]

    def settings(self, lens: Lens) -> dict[str, Any]:
        """What a result records."""
        tokenizer = None if self.pooled else tokenizer_of(lens.processor)
        names = getattr(lens.model.config, "id2label", None) or {} if self.pooled else {}

        def texts(ids: Tensor | None) -> list[list[str]] | None:
            if ids is None:
                return None
            return [[str(names.get(i, token_text(tokenizer, i))) for i in row] for row in ids.tolist()]

        found = {"measure": self.measure, "answers": texts(self.answers), "wrong": texts(self.wrong)}
        return found | {"value": [[float(x) for x in row] for row in self.value.tolist()]}


def number(wide: Tensor, answers: Tensor, wrong: Tensor | None, measure: str) -> Float[Tensor, "rows target"]:
    """The number of the answers, minus that of the wrong ones.

    Args:
        wide: logits [rows, target or 1, n].
        answers: ids [rows, target].
        wrong: ids [rows or batch, target], or None.
        measure: `logit`, `probability` or `logprob`.
    """
    wide = wide.float()
    if measure == "probability":
        wide = wide.softmax(-1)
    elif measure == "logprob":
        wide = wide.log_softmax(-1)
    wide = wide.expand(-1, answers.shape[1], -1)
    value = wide.gather(2, answers.to(wide.device)[:, :, None])[..., 0]
    if wrong is None:
        return value
    wrong = wrong.repeat(len(answers) // len(wrong), 1).to(wide.device)
    return value - wide.gather(2, wrong[:, :, None])[..., 0]


def question(
    lens: Lens,
    batch: Batch,
    target: Positions | None,
    answers: Answers | None,
    wrong: Answers | None,
    *,
    measure: str = "logit",
    rows: bool = False,
) -> Question:
    """What a method was asked, checked; takes one run.

    Args:
        lens: a model with logits.
        batch: the batch.
        target: positions as in a read. None is `last` where every position has logits. Where the logits are of the
            whole input it is the position that they are read from (the class token), or 0 if `rows` is False.
        answers: for each sample an id or a text of one token (a class or its name for a classifier), or one for each
            target; None for the largest logit.
        wrong: the same, to subtract.
        measure: `logit`, `probability` or `logprob`.
        rows: whether the position that class logits are read from matters.

    Raises:
        UnknownNameError: no such measure, position or class.
        SettingsError: a wrong answer without an answer.
        InputError: answers that do not fit the batch, are no single tokens or not in the vocabulary; class logits that
            are read from several positions.
        UnsupportedError: the model has no logits, or not one set for each position of its stream.
    """
    if measure not in MEASURES:
        raise unknown("measure", measure, MEASURES)
    if wrong is not None and answers is None:
        raise SettingsError("wrong answers need answers to compare with.")
    logits = lens.run(batch, Read("logits")).logits
    pooled = logits.ndim == 2
    stream = stream_of(lens, batch)
    if len(logits) != len(stream.mask) or not (pooled or logits.shape[1] == stream.mask.shape[1]):
        raise UnsupportedError(
            f"{lens.name}: logits {tuple(logits.shape)} are not those of the positions {tuple(stream.mask.shape)} of "
            f"tower {stream.tower!r}."
        )
    if target is None:
        target = (_read_from(lens, batch) if rows else 0) if pooled else "last"
    chosen = chosen_targets(lens, batch, stream, target)
    at = chosen.index.to(logits.device)
    wide = logits[:, None] if pooled else logits.gather(1, at[:, :, None].expand(-1, -1, logits.shape[-1]))
    shape, top = (len(at), at.shape[1]), logits.shape[-1]
    found = wide.argmax(-1).expand(shape)
    if answers is not None:
        found = answer_ids(lens, answers, shape, top, pooled=pooled).to(logits.device)
    against = None
    if wrong is not None:
        against = answer_ids(lens, wrong, shape, top, pooled=pooled, name="wrong").to(logits.device)
    value = number(wide, found, against, measure).cpu()
    return Question(stream, chosen, found, against, pooled, measure, value)


def _read_from(lens: Lens, batch: Batch) -> Int[Tensor, "batch 1"]:
    """The position that class logits are read from: where the top of the stream has a gradient."""
    tower = lens.anatomy.towers[lens.anatomy.main]
    top = len(tower.layers) - 1
    read = Read("resid_post", layers=(top,))
    trace = lens.run(batch, gradients=[read], metric=lambda logits: logits.amax(-1))
    felt = (trace.gradients[read, top] != 0).any(-1).cpu()
    counts = felt.sum(1)
    if bool((counts != 1).any()):
        raise InputError(
            f"the logits of {lens.name} are read from {int(counts.max())} positions at the top, not from one: say "
            "whose row is wanted with target=, such as target=0 for a class token."
        )
    mask = batch.mask.cpu()
    rank = mask.long().cumsum(1) - 1 if mask.shape == felt.shape else torch.arange(felt.shape[1]).expand(felt.shape)
    return rank.gather(1, felt.long().argmax(1, keepdim=True))


def answer_ids(
    lens: Lens, answers: Answers, shape: tuple[int, int], top: int, *, pooled: bool = False, name: str = "answers"
) -> Int[Tensor, "batch target"]:
    """One id for each target of each sample.

    Args:
        lens: the model, whose tokenizer (or table of classes) reads texts.
        answers: for each sample one answer for all targets, or one for each.
        shape: numbers of samples and targets.
        top: size of the vocabulary.
        pooled: whether they are classes.
        name: what they are, for errors.

    Raises:
        InputError: another number of answers than samples or targets, a text that is not one token, an id that is not
            in the vocabulary.
        UnknownNameError: there is no such class.
    """
    size, count = shape
    if isinstance(answers, (str, int)):
        raise InputError(f"{name}={answers!r}: give a list with one for each of the {size} samples.")
    rows: list[Any] = answers.tolist() if isinstance(answers, Tensor) else list(answers)
    if len(rows) != size:
        raise InputError(f"{len(rows)} {name} were given for {size} samples.")
    found: list[list[int]] = []
    for i, row in enumerate(rows):
        many = [row] * count if isinstance(row, (str, int)) else list(row)
        if len(many) != count:
            raise InputError(f"{name}[{i}] holds {len(many)} for {count} targets.")
        found.append([_answer_id(lens, a, f"{name}[{i}]", top, pooled) for a in many])
    return torch.tensor(found)


def _answer_id(lens: Lens, answer: Any, name: str, top: int, pooled: bool) -> int:
    if isinstance(answer, str) and pooled:
        names = {str(v): int(k) for k, v in (getattr(lens.model.config, "id2label", None) or {}).items()}
        if answer not in names:
            raise unknown("class", answer, names)
        return names[answer]
    if isinstance(answer, str):
        return one_token(lens, answer, name)
    if isinstance(answer, bool) or not isinstance(answer, int):
        raise InputError(f"{name} is {answer!r}; answers are ids or texts.")
    if not 0 <= answer < top:
        raise InputError(
            f"{name} is {answer}; the model has {top} {'classes' if pooled else 'tokens'} (0 to {top - 1})."
        )
    return answer


def one_token(lens: Lens, text: str, name: str) -> int:
    """The id of a text that is one token.

    Raises:
        InputError: it is not, or there is no tokenizer.
    """
    tokenizer = tokenizer_of(lens.processor)
    if tokenizer is None:
        raise InputError(f"{name} is a text, but {lens.name} has no tokenizer: give the token's id.")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = tokenizer.convert_ids_to_tokens(ids)
        raise InputError(
            f"{name} {text!r} is {len(ids)} tokens ({pieces}); one is needed. Mind the space in front: ' Mary'."
        )
    return ids[0]


def weighted(
    pattern: Float[Tensor, "batch head query key"], gradient: Float[Tensor, "batch head query key"]
) -> Float[Tensor, "batch query key"]:
    """Mean over heads of the positive part of pattern times gradient, in float32 or wider."""
    wide = torch.promote_types(pattern.dtype, torch.float32)
    return (pattern.to(wide) * gradient.to(wide)).clamp_min_(0).mean(1)


Layers = Sequence[tuple[str | None, int]]


def weighted_patterns(
    lens: Lens, batch: Batch, asked: Question, target: int, layers: Layers, *, memory: int
) -> Iterator[tuple[tuple[str | None, int], Float[Tensor, "batch query key"]]]:
    """`weighted` of each (tower, layer), from the last to the first.

    As many layers are done in one forward and backward pass as fit into `memory`; the patterns of a layer, of all
    heads, exist five times while it lasts (in the graph, as read, with and without the probe, and their gradient).

    Args:
        lens: the model.
        batch: the batch.
        asked: what is explained.
        target: which of its targets.
        layers: (tower, layer), ascending.
        memory: bytes for each sample; at least one layer is done at a time.
    """
    group: list[tuple[str | None, int]] = []
    room = 0
    for tower, index in reversed(layers):
        part = lens.anatomy.attention(tower, index, "pattern")
        need = 20 * part.n_heads * _cells(lens, batch, asked, tower)
        if group and room + need > memory:
            yield from _one_pass(lens, batch, asked, target, group)
            group, room = [], 0
        group.append((tower, index))
        room += need
    yield from _one_pass(lens, batch, asked, target, group)


def _cells(lens: Lens, batch: Batch, asked: Question, tower: str | None) -> int:
    """Numbers in one head's pattern."""
    wide = asked.stream.mask.shape[1]
    if tower not in ("encoder", "cross"):
        return wide**2
    ids = batch.inputs.get("input_ids")
    # An encoder of sounds: its stream is as long as its features, or shorter.
    features = batch.inputs.get("input_features")
    source = ids if isinstance(ids, Tensor) else features
    length = source.shape[-1] if isinstance(source, Tensor) else wide
    return length * (wide if tower == "cross" else length)


def _one_pass(
    lens: Lens, batch: Batch, asked: Question, target: int, group: Layers
) -> Iterator[tuple[tuple[str | None, int], Tensor]]:
    reads = [Read("pattern", layers=(i,), tower=tower) for tower, i in group]
    trace = lens.run(batch, reads, gradients=reads, metric=asked.metric(target))
    values, gradients = dict(trace.values), dict(trace.gradients)
    del trace
    for place, read in zip(group, reads, strict=True):
        key = read, place[1]
        value = weighted(values.pop(key), gradients.pop(key))
        if value.shape[0] != len(batch):
            raise UnsupportedError(
                f"layer {place[1]} of {lens.name} has {value.shape[0]} patterns for {len(batch)} samples (its "
                "attention runs window by window)."
            )
        yield place, value
