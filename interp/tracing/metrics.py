"""What a sweep measures at the logits: by name, or any function of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.batch import Batch
from interp.errors import InputError, SettingsError, UnsupportedError, unknown
from interp.heads.common import predicted
from interp.lens import Lens
from interp.reads import Positions, check_positions

Function = Callable[[Tensor], Tensor]
Metric = str | Function

NAMES = ("logit_difference", "logit", "probability", "log_probability", "kl", "loss")
UNITS = {"logit_difference": "logits", "logit": "logits", "log_probability": "nats", "kl": "nats", "loss": "nats"}


@dataclass(frozen=True, slots=True, eq=False)
class Measure:
    """A metric for one batch.

    Attributes:
        name: its name, or that of the function.
        unit: what it is measured in; empty for a plain number.
        positions: where the logits are needed.
        function: maps logits [row, n, d_vocab] in float32 and the sample of each row [row] to values [row].
        ids: the only tokens whose logits the function is given, in this order; None for all.
        whole: whether the function has to see whole copies of the batch, one after the other.
        relative: whether it compares with the source run, whose logits `against` gives it.
    """

    name: str
    unit: str
    positions: Positions
    function: Callable[[Tensor, Tensor], Tensor]
    ids: Int[Tensor, " id"] | None = None
    whole: bool = False
    relative: bool = False

    def __call__(self, logits: Float[Tensor, "row n d_vocab"], samples: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
        """The value of each row.

        Raises:
            SettingsError: a function of the caller's did not return one number for each row.
        """
        with torch.no_grad():
            value = self.function(logits.float().to(samples.device), samples)
        if not isinstance(value, Tensor) or value.shape != samples.shape:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise SettingsError(
                f"metric {self.name} must return one number for each row [{len(samples)}], got {found}."
            )
        return value.float()


def metric_name(metric: Metric | None, answers: bool, wrong: bool) -> str:
    """The metric's name, with the default filled in: the logit difference, the logit, or the divergence.

    Raises:
        UnknownNameError: no such metric.
        SettingsError: answers are missing, or are of no use.
    """
    if wrong and not answers:
        raise SettingsError("wrong answers need answers to compare with.")
    if metric is None:
        return ("logit_difference" if wrong else "logit") if answers else "kl"
    if callable(metric):
        if answers:
            raise SettingsError("a metric of your own takes no answers: read them in the function.")
        return getattr(metric, "__name__", type(metric).__name__)
    if metric not in NAMES:
        raise unknown("metric", metric, [*NAMES, "or a function of logits"])
    if metric == "logit_difference" and not wrong:
        raise SettingsError("metric 'logit_difference' needs answers and wrong answers.")
    if metric in ("logit", "probability", "log_probability") and not answers:
        raise SettingsError(f"metric {metric!r} needs answers.")
    if metric == "kl" and answers:
        raise SettingsError("metric 'kl' compares whole distributions: it takes no answers.")
    if wrong and metric != "logit_difference":
        raise SettingsError(f"metric {metric!r} takes no wrong answers.")
    return metric


def build(
    lens: Lens,
    metric: Metric | None,
    clean: Batch,
    *,
    answers: Tensor | None,
    wrong: Tensor | None,
    at: Positions,
) -> Measure:
    """The metric for one pair of batches; that of `kl` is finished by `against`.

    Raises:
        SettingsError: as `metric_name`.
        UnsupportedError: a next-token loss of something that reads no tokens.
    """
    name = metric_name(metric, answers is not None, wrong is not None)
    if callable(metric):
        own = metric
        return Measure(name, "", check_positions(at), lambda logits, _: own(logits), whole=True)
    if name == "loss" and answers is None:
        return Measure(name, UNITS[name], "all", _next_token_loss(lens, clean))
    if name == "kl":
        return Measure(name, UNITS[name], check_positions(at), _missing, relative=True)
    assert answers is not None

    if name in ("logit", "logit_difference"):
        ids, place = torch.cat([answers, answers[:0] if wrong is None else wrong]).unique(return_inverse=True)

        def logit(logits: Tensor, samples: Tensor) -> Tensor:
            last = logits[:, -1]
            right = last.gather(1, place[samples][:, None])[:, 0]
            return right if wrong is None else right - last.gather(1, place[samples + len(answers)][:, None])[:, 0]

        return Measure(name, UNITS[name], "last", logit, ids)

    def value(logits: Tensor, samples: Tensor) -> Tensor:
        last = logits[:, -1]
        right = last.gather(1, answers[samples][:, None])[:, 0]
        log = right - last.logsumexp(1)
        return log.exp() if name == "probability" else -log if name == "loss" else log

    return Measure(name, UNITS.get(name, ""), "last", value)


def against(measure: Measure, source: Float[Tensor, "batch n d_vocab"]) -> Measure:
    """The divergence KL(source || run) in nats, the mean over the positions, from the logits of the source run."""
    wanted = source.float().log_softmax(-1)

    def value(logits: Tensor, samples: Tensor) -> Tensor:
        out = []
        for row, sample in zip(logits, samples.tolist(), strict=True):  # one at a time: the largest tensor of a sweep
            share = wanted[sample].exp() * (wanted[sample] - row.log_softmax(-1))
            out.append(share.sum(-1).mean())
        return torch.stack(out)

    return Measure(measure.name, measure.unit, measure.positions, value)


def _missing(logits: Tensor, samples: Tensor) -> Tensor:
    raise AssertionError("the divergence is known once the source run was made")


def _next_token_loss(lens: Lens, clean: Batch) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean negative log-likelihood of the clean prompt's own next tokens, in nats."""
    ids = clean.inputs.get("decoder_input_ids", clean.inputs.get("input_ids"))
    if ids is None or ids.shape != clean.mask.shape:
        raise UnsupportedError(f"{lens.name}: the next-token loss needs the tokens of the prompt; give answers.")
    keep, target = predicted(clean), ids[:, 1:]

    def value(logits: Tensor, samples: Tensor) -> Tensor:
        out = []
        for row, sample in zip(logits, samples.tolist(), strict=True):
            some = keep[sample]
            log = row[:-1][some].log_softmax(-1)
            out.append(-log.gather(1, target[sample, some][:, None]).mean())
        return torch.stack(out)

    return value


def columns_of(measure: Measure, batch: Batch) -> Int[Tensor, "batch n"]:
    """The columns at which the logits are needed.

    Raises:
        InputError: they differ in number between samples.
    """
    if isinstance(measure.positions, str) and measure.positions == "all":
        return torch.arange(batch.mask.shape[1], device=batch.mask.device).expand(batch.mask.shape)
    found = batch.select(measure.positions)
    if not found.uniform:
        raise InputError(f"at={measure.positions!r} means a different number of positions in different prompts.")
    return found.index
