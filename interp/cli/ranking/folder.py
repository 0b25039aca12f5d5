"""The folder of a run: what it was asked, what is computed already, and the tables; every file whole or not at all."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.cli.folders import Kind, write_figures, write_settings
from interp.cli.prompts import prompts_of_images, prompts_sha256, read_keywords, write_prompts
from interp.cli.ranking.settings import METHODS, HeadsSettings
from interp.data import Prompt, read_prompts
from interp.files import read_json, write_json, write_parquet, write_text

if TYPE_CHECKING:
    import pandas as pd

    from interp.heads import HeadEffects
    from interp.scores import HeadScores

KIND = Kind(
    "interp-heads-run",
    "interp heads",
    frozenset({"fingerprint", "methods"}),
    (
        *("settings.yaml", "prompts.jsonl", "keywords.txt", "answers.parquet", "heads.parquet", "per_prompt.parquet"),
        *("topics.parquet", "effects.parquet", "report.html", "report.md"),
    ),
    (*METHODS, "figures", "pictures"),
)


def prompts_of(settings: HeadsSettings) -> list[Prompt]:
    """The prompts of a run; none where only repeated tokens are read.

    Raises:
        FileError, InputError: the prompt file or the folder of images cannot be used; the message gives the line.
    """
    if settings.prompts is not None:
        return read_prompts(settings.prompts, images=settings.images)
    return [] if settings.images is None else prompts_of_images(settings.images, settings.ask)


def keywords_of(settings: HeadsSettings) -> list[str]:
    """The keywords of a run; none where no file is named.

    Raises:
        FileError, InputError: the file cannot be used.
    """
    return [] if settings.keywords is None else read_keywords(settings.keywords)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run folder that fits what is asked. Made by `RunFolder.open` or `RunFolder.read`.

    Attributes:
        path: the folder.
        settings: of the run; its methods are all that are or will be in the folder.
        prompts: the prompts.
        keywords: the words of the keyword file.
        record: the content of `run.json`.
    """

    path: Path
    settings: HeadsSettings
    prompts: list[Prompt]
    keywords: list[str]
    record: dict[str, Any]

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        settings: HeadsSettings,
        prompts: list[Prompt],
        keywords: list[str],
        *,
        overwrite: bool = False,
    ) -> "RunFolder":
        """Begin a run in a new or empty folder, or take up the one that is there.

        Args:
            path: the folder.
            settings: what is asked.
            prompts: what the prompt file holds.
            keywords: what the keyword file holds.
            overwrite: remove the run that is there (files of other names stay).

        Raises:
            FileError: the folder holds something else than a run, or its record is damaged.
            SettingsError: it holds a run with other settings or prompts; the first that differs is named.
        """
        path = Path(path)
        asked = settings.hashed() | {"prompts_sha256": prompts_sha256(prompts)}
        if keywords:
            asked["keywords_sha256"] = hashlib.sha256("\n".join(keywords).encode()).hexdigest()
        record = {"methods": {}, **KIND.open(path, asked, overwrite=overwrite)}
        words = path / "keywords.txt"
        settings = replace(
            settings,
            methods=tuple(m for m in METHODS if m in record["methods"] or m in settings.methods),
            keywords=settings.keywords or (str(words) if words.is_file() else None),
        )
        record["settings"] = {**asdict(settings), "methods": list(settings.methods)}
        folder = cls(path, settings, prompts, keywords or _kept_keywords(path), record)
        folder._begin()
        return folder

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "RunFolder":
        """A run folder as it is.

        Raises:
            FileError: it is none, or damaged.
        """
        path = Path(path)
        record = KIND.read(path)
        settings = HeadsSettings.of(record["settings"])
        stored = path / "prompts.jsonl"
        prompts = read_prompts(stored) if stored.is_file() else []
        return cls(path, settings, prompts, _kept_keywords(path), record)

    def _begin(self) -> None:
        if self.prompts:
            write_prompts(self.path / "prompts.jsonl", self.prompts)
        if self.keywords:
            write_text(self.path / "keywords.txt", "\n".join(self.keywords) + "\n")
        kept = {**self.record["settings"], "prompts": "prompts.jsonl" if self.prompts else None, "images": None}
        kept |= {"keywords": "keywords.txt" if self.keywords else None}
        write_settings(self.path, kept, "interp heads")
        write_json(self.path / "run.json", self.record)

    @property
    def complete(self) -> list[str]:
        """The methods that are computed."""
        return [m for m in METHODS if m in self.record["methods"]]

    def scores(self) -> dict[str, "HeadScores"]:
        """The results in the folder.

        Raises:
            FileError: a result is missing or damaged.
        """
        from interp.scores import HeadScores

        return {method: HeadScores.load(self.path / method) for method in self.complete}

    def keep(
        self,
        method: str,
        scores: "HeadScores",
        *,
        seconds: float,
        examples: Sequence[Mapping[str, Any]] = (),
        roles: "pd.DataFrame | None" = None,
        topics: "pd.DataFrame | None" = None,
        intervals: "pd.DataFrame | None" = None,
        effects: "HeadEffects | None" = None,
    ) -> None:
        """Save one method's result and what is shown beside it; only then is it noted as complete."""
        scores.save(self.path / method)
        write_json(self.path / method / "examples.json", list(examples))
        for name, frame in (("roles", roles), ("topics", topics), ("intervals", intervals)):
            if frame is not None:
                write_parquet(self.path / method / f"{name}.parquet", frame)
        if effects is not None:
            effects.save(self.path / method / "effects")
        self.record["methods"][method] = {"seconds": round(seconds, 2)}
        write_json(self.path / "run.json", self.record)

    def examples(self, method: str) -> list[dict[str, Any]]:
        """The attention patterns that were kept beside a result."""
        path = self.path / method / "examples.json"
        return read_json(path) if path.is_file() else []

    def roles(self, method: str) -> "pd.DataFrame | None":
        """What the strongest heads do (`interp.cli.ranking.roles`), where it was kept."""
        return self._frame(method, "roles")

    def topics(self, method: str) -> "pd.DataFrame | None":
        """Topics and strongest prompts of the top heads (`interp.cli.ranking.evidence`), where they were kept."""
        return self._frame(method, "topics")

    def intervals(self, method: str) -> "pd.DataFrame | None":
        """Bootstrap intervals that cannot be had from scores of single prompts, where they were kept."""
        return self._frame(method, "intervals")

    def effects(self, method: str) -> "HeadEffects | None":
        """What removing heads does, where it was kept."""
        from interp.heads import HeadEffects

        path = self.path / method / "effects"
        return HeadEffects.load(path) if path.is_dir() else None

    def _frame(self, method: str, name: str) -> "pd.DataFrame | None":
        import pandas as pd

        path = self.path / method / f"{name}.parquet"
        return pd.read_parquet(path) if path.is_file() else None

    def note(self, **values: Any) -> None:
        """Add something to the record."""
        self.record.update(values)
        write_json(self.path / "run.json", self.record)

    def write_tables(self) -> None:
        """One parquet file for all methods each: by head, by prompt, topics and effects."""
        import pandas as pd

        found: dict[str, list[pd.DataFrame]] = {"heads": [], "per_prompt": [], "topics": [], "effects": []}
        for method, scores in self.scores().items():
            found["heads"].append(with_interval(scores, self.settings.seed, self.intervals(method)))
            if scores.per_prompt is not None:
                frame = scores.frame(per_prompt=True)
                index = scores.settings.get("prompt_index")
                if index is not None:
                    frame["prompt"] = [index[i] for i in frame["prompt"]]
                found["per_prompt"].append(frame)
            if (topics := self.topics(method)) is not None and len(topics):
                found["topics"].append(topics)
            if (effects := self.effects(method)) is not None:
                found["effects"].append(effects.frame(seed=self.settings.seed))
            for frames in found.values():
                if frames and "method" not in frames[-1]:
                    frames[-1] = frames[-1].assign(method=method)
        for name, frames in found.items():
            if frames:
                whole = pd.concat(frames, ignore_index=True)
                write_parquet(
                    self.path / f"{name}.parquet", whole.reindex(columns=["method", *whole.columns.drop("method")])
                )

    def write_figures(self) -> None:
        """Heat map and bars of each method in `figures/`: one .html each, which draws with the script beside it."""
        found = {}
        for method, scores in self.scores().items():
            for kind in ("heatmap", "bars"):
                found[f"{method}-{kind}"] = scores.plot(kind=kind, k=self.settings.top)
        write_figures(self.path / "figures", found)


def _kept_keywords(path: Path) -> list[str]:
    """The keywords in a run folder; none where none were needed."""
    words = path / "keywords.txt"
    return read_keywords(words) if words.is_file() else []


def with_interval(scores: "HeadScores", seed: int, known: "pd.DataFrame | None" = None) -> "pd.DataFrame":
    """The frame of a result with the ends of its 95% bootstrap interval over prompts, where there are two or more.

    Args:
        scores: the result.
        seed: of the draws.
        known: intervals of some heads, for results that have no scores of single prompts.
    """
    frame = scores.frame()
    if known is not None:
        ends = frame[["layer", "head"]].merge(known[["layer", "head", "low", "high"]], how="left")
        low, high = ends["low"].to_numpy(), ends["high"].to_numpy()
    elif scores.per_prompt is not None and len(scores.per_prompt) > 1:
        at = frame["layer"].to_numpy(), frame["head"].to_numpy()
        low, high = (end.numpy()[at] for end in scores.interval(seed=seed))
    else:
        return frame
    frame.insert(3, "low", low)
    frame.insert(4, "high", high)
    return frame
