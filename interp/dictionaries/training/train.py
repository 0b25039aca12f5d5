"""Train dictionaries on a source of activations, all of them on the same batches: SAEs, transcoders, Lorsas.

After SAELens's recipe (Adam, sums over d_in, means over tokens, clipped gradients, a window for dead latents), with
what it lacks: a run that was killed at any moment goes on from its last checkpoint, and ends with the same bits as one
that was not (on one device, with the same number of threads); several processes have one threshold, one count of dead
latents, one gradient. Whole contexts (for a Lorsa) differ in their number of tokens to use; each process's means count
by its own.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from interp.dictionaries.activations import Contexts, Rows, Source, Statistics, statistics
from interp.dictionaries.base import Dictionary
from interp.dictionaries.files import save
from interp.dictionaries.folding import fold_activation_scale
from interp.dictionaries.lorsa import files as lorsa_files
from interp.dictionaries.lorsa.lorsa import Lorsa
from interp.dictionaries.training.checkpoint import Checkpoints
from interp.dictionaries.training.learner import Job, Learner
from interp.dictionaries.training.log import Log
from interp.dictionaries.training.settings import TrainSettings
from interp.errors import InputError, SettingsError
from interp.processes import Processes

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """What `train` returns.

    Attributes:
        dictionaries: by name, for activations as they are (scales folded in), in evaluation mode.
        metrics: a row for each dictionary and logged step.
        steps: how many steps were made, in all sittings together.
        tokens: how many tokens that were, in this process.
    """

    dictionaries: Mapping[str, Any]
    metrics: pd.DataFrame
    steps: int
    tokens: int


def train(
    dictionaries: Dictionary | Lorsa | Mapping[str, Dictionary | Lorsa | Job],
    source: Source[Rows] | Source[Contexts],
    settings: TrainSettings,
    *,
    read: str | None = None,
    target: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    metadata: Mapping[str, Any] | None = None,
    writers: Sequence[str] = (),
    on_log: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = False,
) -> Trained:
    """Train one dictionary, or several on the same batches.

    Args:
        dictionaries: what is trained, in place; by name where there are several.
        source: batches of activations, such as a `MixingBuffer`, or `ActivationStore.rows`; for a Lorsa contexts, such
            as `AttentionPairs`.
        settings: of the training.
        read: which activations of the source; None where it has one, and for a Lorsa on the pair of one layer (for
            dictionaries that are no `Job`).
        target: what is to be reconstructed; None for the activations themselves (for dictionaries that are no `Job`).
        folder: where checkpoints, the log and the trained dictionaries go; a run that is there is taken up, with the
            same settings, dictionaries and source. None keeps nothing.
        metadata: what is written beside the trained dictionaries (model, site, layer, ...).
        writers: `tensorboard`, `wandb`: where the log goes as well.
        on_log: called with each row of the log.
        progress: whether to show a progress bar.

    Returns:
        The trained dictionaries and the log.

    Raises:
        InputError: no dictionary, a read that the source does not have, or one of another width; rows for a Lorsa.
        SettingsError: the folder holds a run with other settings, or several dictionaries have no names.
        NonFiniteError: a loss or gradient is NaN or infinite; the last checkpoint stays as it was.
        FileError: a checkpoint is damaged or cannot be written; those before it stay.
    """
    jobs = _jobs(dictionaries, source.d_in, read, target)
    processes = Processes()
    learners = [Learner(name, job, settings, processes) for name, job in jobs.items()]
    about = {"training": settings.hashed(), "source": source.settings}
    for name, job in jobs.items():
        about[f"dictionary {name}"] = {**job.dictionary.cfg.to_dict(), "read": job.read, "target": job.target}
        frozen = sorted(key for key, p in job.dictionary.named_parameters() if not p.requires_grad)
        if frozen:
            about[f"dictionary {name}"]["frozen"] = frozen
    kept = None if folder is None else Checkpoints(folder, about, processes, settings.keep)
    held = None if kept is None else kept.load(list(jobs))
    done, tokens, rows = 0, 0, []
    if held is None:
        torch.manual_seed(settings.seed)
        _begin(learners, source, settings, processes)
    else:
        done, tensors, place, values = held
        source.restore(place)
        for learner in learners:
            learner.restore(tensors[learner.name], values["dictionaries"][learner.name])
        tokens, rows = values["tokens"], values["rows"]
    log = Log(folder if processes.first else None, writers if processes.first else (), about, step=done, rows=rows)

    def keep(step: int) -> None:
        if kept is None or step in kept.steps():
            return
        held = {learner.name: learner.values() for learner in learners}
        values = {"tokens": tokens, "rows": log.rows, "dictionaries": held}
        kept.save(step, {learner.name: learner.tensors() for learner in learners}, source.state(), values)
        log.flush()

    with _Bar(settings.steps, done, progress and processes.first) as bar:
        begin, since = time.perf_counter(), 0
        for step in range(done, settings.steps):
            batch, used = _next(source, processes, learners[0].since.device)
            if batch is None:
                warnings.warn(
                    f"the source ended after {step} of {settings.steps} steps: lr and penalties were planned for all; "
                    "give fewer steps, more text, or more epochs.",
                    stacklevel=2,
                )
                break
            logged = (step + 1) % settings.log_every == 0 or step + 1 == settings.steps
            found = [learner.step(batch, step, logged) for learner in learners]
            tokens, since, done = tokens + used, since + used * processes.world, step + 1
            if logged:
                seconds = time.perf_counter() - begin
                for row in found:
                    row |= {"tokens": tokens, "seconds": seconds, "tokens_per_second": since / seconds}
                    log.add(row)
                    if on_log is not None:
                        on_log(row)
                bar.show(found)
            bar.advance()
            if done % settings.checkpoint_every == 0:
                keep(done)
    keep(done)
    finished = {learner.name: _folded(learner) for learner in learners}
    everywhere = int(processes.reduce(torch.tensor(tokens, device=learners[0].since.device), "sum"))
    if folder is not None and processes.first and done:
        for name, dictionary in finished.items():
            job = jobs[name]
            own = {"read": job.read, "target": job.target, "steps": done, "tokens": everywhere}
            about = {**(metadata or {}), **own}
            if isinstance(dictionary, Lorsa):
                lorsa_files.save(dictionary, Path(folder) / name, metadata=about)
            else:
                save(dictionary, Path(folder) / name, metadata=about)
    processes.wait()
    return Trained(finished, log.frame(), done, tokens)


def _jobs(
    dictionaries: Dictionary | Lorsa | Mapping[str, Dictionary | Lorsa | Job],
    widths: Mapping[str, int],
    read: str | None,
    target: str | None,
) -> dict[str, Job]:
    one = isinstance(dictionaries, (Dictionary, Lorsa))
    named: dict[str, Any] = {"dictionary": dictionaries} if one else dict(dictionaries)  # type: ignore[arg-type]
    if not named:
        raise InputError("there is no dictionary to train.")
    jobs: dict[str, Job] = {}
    for name, one in named.items():
        if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
            raise SettingsError(f"a name is made of letters, digits, '-', '_' and '.', not {name!r}: it names files.")
        if not isinstance(one, Job):
            if read is None and one.sequences and len(widths) == 2:
                one = Job(one, *widths)
            elif read is None and len(widths) > 1:
                raise InputError(f"{name}: the source has {', '.join(widths)}; choose one by read=.")
            else:
                one = Job(one, read or next(iter(widths)), target)
        one.check(name, widths)
        jobs[name] = one
    if len({id(job.dictionary) for job in jobs.values()}) < len(jobs):
        raise InputError("a dictionary stands there under two names; train each once.")
    return jobs


def _next(source: Source[Any], processes: Processes, device: torch.device) -> tuple[Any, int]:
    """The next batch of which every process has tokens, and how many there are here; None where one has ended."""
    while True:
        batch = next(source, None)
        used = -1 if batch is None else batch.used
        least = used if processes.world == 1 else int(processes.reduce(torch.tensor(used, device=device), "min"))
        if least:
            return (batch, used) if least > 0 else (None, 0)


def _begin(learners: Sequence[Learner], source: Source[Any], settings: TrainSettings, processes: Processes) -> None:
    """First values that depend on the activations; the same weights in every process."""
    scaled = any(x.dictionary.cfg.normalize_activations == "expected_average_only_in" for x in learners)
    if scaled or settings.b_dec_init == "mean":
        sample = statistics(source, rows=-(-settings.scale_rows // processes.world))
        found = {name: _shared(one, processes) for name, one in sample.items()}
        for learner in learners:
            learner.begin(found)
    for learner in learners:
        processes.same(p.data for p in learner.dictionary.parameters())
        learner.ready()


def _shared(one: Statistics, processes: Processes) -> Statistics:
    """The statistics of all processes together."""
    if processes.world == 1:
        return one
    count = torch.tensor([float(one.count)], dtype=torch.float64)
    sums = torch.cat([count, one.mean * one.count, count * one.mean_norm, count * one.variance])
    sums = processes.reduce(sums, "sum")
    total = float(sums[0])
    return Statistics(int(total), sums[1:-2] / total, float(sums[-2]) / total, float(sums[-1]) / total)


def _folded(learner: Learner) -> Dictionary | Lorsa:
    dictionary = learner.finished()
    if dictionary.cfg.normalize_activations != "expected_average_only_in":
        return dictionary
    if isinstance(dictionary, Lorsa):
        return lorsa_files.fold_scales(dictionary, learner.scale, learner.target_scale).eval()
    out = learner.target_scale if dictionary.transcodes else None
    return fold_activation_scale(dictionary, learner.scale, out).eval()


class _Bar:
    """A progress bar with the newest numbers, or none."""

    def __init__(self, total: int, done: int, show: bool) -> None:
        self._total, self._done, self._show = total, done, show
        self._bar: Any = None

    def __enter__(self) -> _Bar:
        if self._show:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[now]}"))
            self._bar.start()
            self._task = self._bar.add_task("training", total=self._total, completed=self._done, now="")
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self) -> None:
        """One more step is made."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def show(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Show the newest row of each dictionary."""
        if self._bar is not None:
            said = [f"{r['dictionary']}: FVU {r['fvu']:.3f}, L0 {r['l0']:.1f}, {r['dead']} dead" for r in rows]
            rate = f"{rows[0]['tokens_per_second']:,.0f} tokens/s"
            self._bar.update(self._task, now=" | ".join([rate, *said[:3]]))
