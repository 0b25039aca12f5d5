"""Training of a Lorsa on whole sequences, with the settings, optimiser, log and checkpoints of other dictionaries."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.dictionaries.activations import Contexts, Source, State, statistics
from interp.dictionaries.base import Loss
from interp.dictionaries.lorsa.files import fold_scales, save
from interp.dictionaries.lorsa.lorsa import Lorsa
from interp.dictionaries.lorsa.rule import AttentionRule
from interp.dictionaries.training import Job, Trained, TrainSettings
from interp.dictionaries.training.checkpoint import Checkpoints
from interp.dictionaries.training.learner import Learner
from interp.dictionaries.training.log import Log
from interp.dictionaries.training.processes import Processes
from interp.dictionaries.training.train import _shared
from interp.errors import InputError

X, Y = "x", "y"


class AttentionPairs:
    """Contexts of what an attention layer reads (`x`) and what its heads write (`y`).

    Args:
        source: contexts with the two reads of `rule.reads` (an `ActivationStream`, or a store's contexts).
        rule: of the layer.

    Raises:
        InputError: the source lacks a read.
    """

    def __init__(self, source: Source[Contexts], rule: AttentionRule) -> None:
        self.source, self.rule = source, rule
        missing = [read for read in rule.reads if read not in source.d_in]
        if missing:
            raise InputError(f"the source reads {', '.join(source.d_in)}, but a Lorsa needs {' and '.join(missing)}.")

    @property
    def d_in(self) -> dict[str, int]:
        """Widths of both."""
        return {X: self.rule.W_Q.shape[1], Y: self.rule.W_O.shape[-1]}

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the source, and the layer."""
        return {**self.source.settings, "layer": self.rule.layer, "tower": self.rule.tower}

    def __iter__(self) -> AttentionPairs:
        """Itself."""
        return self

    def __next__(self) -> Contexts:
        """The next contexts."""
        found = next(self.source)
        stream, z = (found[read] for read in self.rule.reads)
        values = {X: self.rule.inputs(stream), Y: self.rule.target(z)}
        return Contexts(values, found.mask, found.real, found.ids, found.document, found.number)

    def state(self) -> State:
        """The source's place."""
        return self.source.state()

    def restore(self, state: State) -> None:
        """Go to a place."""
        self.source.restore(state)

    def close(self) -> None:
        """Close the source."""
        self.source.close()


class _Masked:
    """A Lorsa whose loss knows the masks of a batch; all else is the Lorsa's."""

    def __init__(self, lorsa: Lorsa, batch: Contexts) -> None:
        self._lorsa, self._batch = lorsa, batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lorsa, name)

    def loss(self, x: Tensor, target: Tensor, **options: Any) -> Loss:
        device = x.device
        masks = {"mask": self._batch.mask.to(device), "real": self._batch.real.to(device)}
        return self._lorsa.loss(x, target, **masks, **options)


class _SequenceLearner(Learner):
    """A learner whose batches are contexts."""

    def step(self, rows: Any, step: int, log: bool) -> dict[str, Any]:
        lorsa, self._used = self.dictionary, rows.mask & rows.real
        self.dictionary = _Masked(lorsa, rows)  # type: ignore[assignment,arg-type]
        try:
            return super().step(rows, step, log)
        finally:
            self.dictionary = lorsa

    def _row(self, loss: Loss, target: Tensor, step: int, lr: float) -> dict[str, Any]:
        return super()._row(loss, target[self._used.to(target.device)], step, lr)


def train_lorsa(
    lorsa: Lorsa,
    source: AttentionPairs,
    settings: TrainSettings,
    *,
    folder: str | os.PathLike[str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> Trained:
    """Train a Lorsa in place.

    Args:
        lorsa: what is trained.
        source: of what it reads and what it reconstructs.
        settings: of the training.
        folder: where checkpoints, the log and the trained Lorsa go; a run there is taken up. None keeps nothing.
        metadata: what is written beside the trained Lorsa.
        on_log: called with each row of the log.

    Returns:
        The trained Lorsa under the name `lorsa`, in evaluation mode and for activations as they are; and the log.

    Raises:
        InputError: widths differ from the source's.
        SettingsError: the folder holds a run with other settings.
        NonFiniteError: a loss or gradient is NaN or infinite; the last checkpoint stays as it was.
        FileError: a checkpoint is damaged or cannot be written.
    """
    job = Job(lorsa, X, Y)  # type: ignore[arg-type]
    job.check("lorsa", source.d_in)
    processes = Processes()
    learner = _SequenceLearner("lorsa", job, settings, processes)
    frozen = sorted(name for name, p in lorsa.named_parameters() if not p.requires_grad)
    about = {"training": settings.hashed(), "source": source.settings, "lorsa": lorsa.cfg.to_dict(), "frozen": frozen}
    kept = None if folder is None else Checkpoints(folder, about, processes, settings.keep)
    held = None if kept is None else kept.load(["lorsa"])
    done, tokens, rows = 0, 0, []
    if held is None:
        torch.manual_seed(settings.seed)
        _begin(learner, source, settings, processes)
    else:
        done, tensors, place, values = held
        source.restore(place)
        learner.restore(tensors["lorsa"], values["lorsa"])
        tokens, rows = values["tokens"], values["rows"]
    log = Log(folder if processes.first else None, (), about, step=done, rows=rows)

    def keep(step: int) -> None:
        if kept is not None and step not in kept.steps():
            values = {"tokens": tokens, "rows": log.rows, "lorsa": learner.values()}
            kept.save(step, {"lorsa": learner.tensors()}, source.state(), values)
            log.flush()

    for step in range(done, settings.steps):
        batch = next(source, None)
        there = torch.tensor(float(batch is not None and bool(batch.mask.any())), device=learner.since.device)
        if batch is None or not processes.reduce(there, "min"):
            warnings.warn(f"the source ended after {step} of {settings.steps} steps.", stacklevel=2)
            break
        logged = (step + 1) % settings.log_every == 0 or step + 1 == settings.steps
        row = learner.step(batch, step, logged)
        tokens, done = tokens + int(batch.mask.sum()), step + 1
        if logged:
            row |= {"tokens": tokens}
            log.add(row)
            if on_log is not None:
                on_log(row)
        if done % settings.checkpoint_every == 0:
            keep(done)
    keep(done)
    scaled = lorsa.cfg.normalize_activations == "expected_average_only_in"
    out = (fold_scales(lorsa, learner.scale, learner.target_scale) if scaled else lorsa).eval()
    if folder is not None and processes.first and done:
        save(
            out,
            Path(folder) / "lorsa",
            metadata={**(metadata or {}), "steps": done, "tokens": tokens * processes.world},
        )
    processes.wait()
    return Trained({"lorsa": out}, log.frame(), done, tokens)  # type: ignore[dict-item]


def _begin(learner: Learner, source: AttentionPairs, settings: TrainSettings, processes: Processes) -> None:
    lorsa = learner.dictionary
    if lorsa.cfg.normalize_activations == "expected_average_only_in" or settings.b_dec_init == "mean":
        sample = statistics(source, rows=-(-settings.scale_rows // processes.world))
        learner.begin({name: _shared(one, processes) for name, one in sample.items()})
    processes.same(p.data for p in lorsa.parameters())
