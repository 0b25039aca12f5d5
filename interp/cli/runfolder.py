"""The folder of a run: what it was asked, what is computed already, and the tables; every file whole or not at all."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.cli.folders import Kind, write_figures, write_settings
from interp.cli.prompts import prompts_sha256, write_prompts
from interp.cli.settings import METHODS, HeadsSettings
from interp.data import Prompt, read_prompts
from interp.files import read_json, write_json, write_parquet

if TYPE_CHECKING:
    import pandas as pd

    from interp.scores import HeadScores

KIND = Kind(
    "interp-heads-run",
    "interp heads",
    frozenset({"fingerprint", "methods"}),
    ("settings.yaml", "prompts.jsonl", "answers.parquet", "heads.parquet", "per_prompt.parquet", "report.html"),
    (*METHODS, "figures"),
)


def prompts_of(settings: HeadsSettings) -> list[Prompt]:
    """The prompts of a run; none where only repeated tokens are read.

    Raises:
        FileError, InputError: the prompt file cannot be used; the message gives its line.
    """
    return [] if settings.prompts is None else read_prompts(settings.prompts)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A run folder that fits what is asked. Made by `RunFolder.open` or `RunFolder.read`.

    Attributes:
        path: the folder.
        settings: of the run; its methods are all that are or will be in the folder.
        prompts: the prompts.
        record: the content of `run.json`.
    """

    path: Path
    settings: HeadsSettings
    prompts: list[Prompt]
    record: dict[str, Any]

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], settings: HeadsSettings, prompts: list[Prompt], *, overwrite: bool = False
    ) -> "RunFolder":
        """Begin a run in a new or empty folder, or take up the one that is there.

        Args:
            path: the folder.
            settings: what is asked.
            prompts: what the prompt file holds.
            overwrite: remove the run that is there (files of other names stay).

        Raises:
            FileError: the folder holds something else than a run, or its record is damaged.
            SettingsError: it holds a run with other settings or prompts; the first that differs is named.
        """
        path = Path(path)
        asked = settings.hashed() | {"prompts_sha256": prompts_sha256(prompts)}
        record = {"methods": {}, **KIND.open(path, asked, overwrite=overwrite)}
        settings = replace(
            settings, methods=tuple(m for m in METHODS if m in record["methods"] or m in settings.methods)
        )
        record["settings"] = {**asdict(settings), "methods": list(settings.methods)}
        folder = cls(path, settings, prompts, record)
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
        return cls(path, settings, read_prompts(stored) if stored.is_file() else [], record)

    def _begin(self) -> None:
        if self.prompts:
            write_prompts(self.path / "prompts.jsonl", self.prompts)
        kept = {**self.record["settings"], "prompts": "prompts.jsonl" if self.prompts else None}
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
    ) -> None:
        """Save one method's result and what is shown beside it; only then is it noted as complete."""
        scores.save(self.path / method)
        write_json(self.path / method / "examples.json", list(examples))
        if roles is not None:
            write_parquet(self.path / method / "roles.parquet", roles)
        self.record["methods"][method] = {"seconds": round(seconds, 2)}
        write_json(self.path / "run.json", self.record)

    def examples(self, method: str) -> list[dict[str, Any]]:
        """The attention patterns that were kept beside a result."""
        path = self.path / method / "examples.json"
        return read_json(path) if path.is_file() else []

    def roles(self, method: str) -> "pd.DataFrame | None":
        """What the strongest heads do (`interp.cli.roles`), where it was kept."""
        import pandas as pd

        path = self.path / method / "roles.parquet"
        return pd.read_parquet(path) if path.is_file() else None

    def note(self, **values: Any) -> None:
        """Add something to the record."""
        self.record.update(values)
        write_json(self.path / "run.json", self.record)

    def write_tables(self) -> None:
        """`heads.parquet` (a row for each method and head) and `per_prompt.parquet` (for each prompt as well)."""
        import pandas as pd

        heads, prompts = [], []
        for method, scores in self.scores().items():
            heads.append(with_interval(scores, self.settings.seed).assign(method=method))
            frame = scores.frame(per_prompt=True).assign(method=method)
            index = scores.settings.get("prompt_index")
            if index is not None:
                frame["prompt"] = [index[i] for i in frame["prompt"]]
            prompts.append(frame)
        for name, frames in (("heads.parquet", heads), ("per_prompt.parquet", prompts)):
            whole = pd.concat(frames, ignore_index=True)
            write_parquet(self.path / name, whole.reindex(columns=["method", *whole.columns.drop("method")]))

    def write_figures(self) -> None:
        """Heat map and bars of each method in `figures/`: one .html each, which draws with the script beside it."""
        found = {}
        for method, scores in self.scores().items():
            for kind in ("heatmap", "bars"):
                found[f"{method}-{kind}"] = scores.plot(kind=kind, k=self.settings.top)
        write_figures(self.path / "figures", found)


def with_interval(scores: "HeadScores", seed: int) -> Any:
    """The frame of a result with the ends of its 95% bootstrap interval over prompts, where there are two or more."""
    frame = scores.frame()
    if scores.per_prompt is not None and len(scores.per_prompt) > 1:
        low, high = scores.interval(seed=seed)
        at = frame["layer"].to_numpy(), frame["head"].to_numpy()
        frame.insert(3, "low", low.numpy()[at])
        frame.insert(4, "high", high.numpy()[at])
    return frame
