"""The folder of `interp trace`: what was asked, the maps as they are made, and the tables."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.cli.folders import Kind, format_of, write_figures, write_settings
from interp.cli.prompts import write_prompts
from interp.cli.tracing.inputs import digest_of
from interp.cli.tracing.settings import METHODS, TraceSettings
from interp.data import Prompt, read_prompts
from interp.files import write_json, write_parquet

if TYPE_CHECKING:
    import pandas as pd

    from interp.tracing import CausalMap

KIND = Kind(
    "interp-trace-run",
    "interp trace",
    frozenset({"fingerprint", "settings", "methods"}),
    ("settings.yaml", "prompts.jsonl", "cells.parquet", "per_prompt.parquet", "prompts.parquet", "report.html"),
    (*METHODS, "figures"),
)


@dataclass(frozen=True, slots=True)
class TraceFolder:
    """A run folder that fits what is asked. Made by `TraceFolder.open` or `TraceFolder.read`.

    Attributes:
        path: the folder.
        settings: of the run; its methods are all that are or will be in the folder.
        prompts: the prompts.
        record: the content of `run.json`; `methods` has for each method its seconds and its parts: the name of a folder
            and how many prompts it is of.
    """

    path: Path
    settings: TraceSettings
    prompts: list[Prompt]
    record: dict[str, Any]

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], settings: TraceSettings, prompts: list[Prompt], *, overwrite: bool = False
    ) -> "TraceFolder":
        """Begin a run in a new or empty folder, or take up the one that is there.

        Args:
            path: the folder.
            settings: what is asked.
            prompts: what the prompt file holds.
            overwrite: remove the run that is there (files of other names stay).

        Raises:
            FileError: the folder holds something else than such a run, or its record is damaged.
            SettingsError: it holds results with other settings or prompts; the first that differs is named.
        """
        path = Path(path)
        if format_of(path) == KIND.format and not KIND.read(path)["methods"]:
            overwrite = True  # a run that failed before anything was begun
        asked = settings.hashed() | {"prompts_sha256": digest_of(prompts)}
        record = {"methods": {}, **KIND.open(path, asked, overwrite=overwrite)}
        settings = replace(
            settings,
            methods=tuple(m for m in METHODS if m in record["methods"] or m in settings.methods),
            batch_size=record.get("settings", asdict(settings))["batch_size"],  # parts are of as many prompts
        )
        kept = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(settings).items()}
        record["settings"] = kept
        folder = cls(path, settings, prompts, record)
        write_prompts(path / "prompts.jsonl", prompts)
        write_settings(path, {**kept, "prompts": "prompts.jsonl", "images": None}, "interp trace")
        write_json(path / "run.json", record)
        return folder

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "TraceFolder":
        """A run folder as it is.

        Raises:
            FileError: it is none, or damaged.
        """
        path = Path(path)
        record = KIND.read(path)
        return cls(path, TraceSettings.of(record["settings"]), read_prompts(path / "prompts.jsonl"), record)

    def done(self, method: str) -> int:
        """How many prompts a method is computed for: the first so many."""
        return sum(self.record["methods"].get(method, {"parts": {}})["parts"].values())

    @property
    def complete(self) -> list[str]:
        """The methods that are computed for all prompts."""
        return [m for m in self.settings.methods if self.done(m) == len(self.prompts)]

    def passes(self, method: str) -> Path:
        """Where finished passes of the part that is being computed are kept."""
        return self.path / method / "passes"

    def begin(self, method: str) -> None:
        """Note that a method is under way, so that its passes are not taken for a run that failed."""
        self.record["methods"].setdefault(method, {"seconds": 0.0, "parts": {}})
        write_json(self.path / "run.json", self.record)

    def keep(self, method: str, found: "CausalMap", prompts: int, seconds: float) -> None:
        """Save the map of the next prompts; only then it is noted as done, and its passes are removed."""
        entry = self.record["methods"][method]
        part = f"{len(entry['parts']):05d}"
        found.save(self.path / method / part)
        entry["seconds"] = round(entry["seconds"] + seconds, 2)
        entry["parts"][part] = prompts
        write_json(self.path / "run.json", self.record)
        shutil.rmtree(self.passes(method), ignore_errors=True)

    def note(self, **values: Any) -> None:
        """Add something to the record."""
        self.record.update(values)
        write_json(self.path / "run.json", self.record)

    def results(self) -> "Iterator[tuple[str, CausalMap]]":
        """Each complete method and its map of all prompts.

        Raises:
            FileError: a result is missing or damaged.
        """
        from interp.tracing import CausalMap, join_prompts

        for method in self.complete:
            parts = sorted(self.record["methods"][method]["parts"])
            yield method, join_prompts([CausalMap.load(self.path / method / part) for part in parts])

    def write_tables(self) -> None:
        """By method: `cells.parquet`, the effect of each cell; `per_prompt.parquet`, its value in each prompt;
        `prompts.parquet`, the metric of both runs in each prompt."""
        import pandas as pd

        made: dict[str, list[pd.DataFrame]] = {"cells": [], "per_prompt": [], "prompts": []}
        for method, found in self.results():
            cells = found.frame(seed=self.settings.seed)
            for name, frame in (
                ("cells", cells),
                ("per_prompt", values_frame(found, cells)),
                ("prompts", runs_frame(found)),
            ):
                made[name].append(frame.assign(method=method))
        for name, frames in made.items():
            whole = pd.concat(frames, ignore_index=True)
            write_parquet(
                self.path / f"{name}.parquet", whole.reindex(columns=["method", *whole.columns.drop("method")])
            )

    def write_figures(self) -> None:
        """The heat maps of each method in `figures/`: one .html each, which draws with the script beside it."""
        from interp.cli.tracing.page import pictures

        found = {}
        for method, one in self.results():
            for number, figure in enumerate(pictures(method, one)):
                found[f"{method}-{number + 1}"] = figure
        write_figures(self.path / "figures", found)


def runs_frame(found: "CausalMap") -> "pd.DataFrame":
    """A row for each prompt: its number, the metric in both runs, the gap, and whether it has a ratio of its own."""
    import pandas as pd

    runs = {"clean": found.clean.tolist(), "corrupt": found.corrupt.tolist(), "gap": found.gaps.tolist()}
    return pd.DataFrame({"prompt": numbers_of(found), **runs, "kept": found.kept.tolist()})


def values_frame(found: "CausalMap", cells: "pd.DataFrame") -> "pd.DataFrame":
    """A row for each cell and prompt that has its positions: the metric there."""
    import numpy as np

    where = [c for c in ("site", "layer", "position", "token", "group", "head") if c in cells]
    cell, prompt = np.nonzero(found.exists[found.cells[:, 3]].numpy())
    frame = cells.loc[cell, where].reset_index(drop=True)
    frame.insert(0, "prompt", np.array(numbers_of(found))[prompt])
    return frame.assign(value=found.values.numpy()[cell, prompt])


def numbers_of(found: "CausalMap") -> list[int]:
    """The numbers, from 1, of the prompts of a map in its order; a method may leave some out."""
    return [int(n) + 1 for n in found.settings.get("kept", range(len(found)))]
