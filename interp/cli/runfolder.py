"""The folder of a run: what it was asked, what is computed already, and the tables; every file whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.cli.settings import METHODS, HeadsSettings
from interp.data import Prompt, read_prompts
from interp.errors import FileError, SettingsError
from interp.files import read_json, replacing, sha256, write_json, write_parquet, write_text

if TYPE_CHECKING:
    import pandas as pd

    from interp.scores import HeadScores

FORMAT = "interp-heads-run"
_OURS = ("settings.yaml", "run.json", "prompts.jsonl", "answers.parquet", "heads.parquet", "per_prompt.parquet")


def prompts_of(settings: HeadsSettings) -> list[Prompt]:
    """The prompts of a run; none where only repeated tokens are read.

    Raises:
        FileError, InputError: the prompt file cannot be used; the message gives its line.
    """
    return [] if settings.prompts is None else read_prompts(settings.prompts)


def fingerprint(settings: HeadsSettings, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What decides what the numbers of a run mean: settings and the content of the prompts."""
    rows = [{**asdict(p), "image": None if p.image is None else sha256(p.image)} for p in prompts]
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    return settings.hashed() | {"prompts_sha256": digest}


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
        asked = fingerprint(settings, prompts)
        record: dict[str, Any] = {}
        if (path / "run.json").is_file():
            if overwrite:
                _remove(path)
            else:
                record = _record(path)
                _compare(path, record["fingerprint"], asked)
        elif path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise FileError(f"{path} is no run folder and not empty; give another --out.")
        before = list(record.get("methods", {}))
        settings = replace(settings, methods=tuple(m for m in METHODS if m in before or m in settings.methods))
        text = json.dumps(asked, sort_keys=True).encode()
        head = {"format": FORMAT, "version": 1, "hash": hashlib.sha256(text).hexdigest(), "fingerprint": asked}
        record = {"methods": {}, **record, **head, "settings": {**asdict(settings), "methods": list(settings.methods)}}
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
        record = _record(path)
        settings = HeadsSettings.of(record["settings"])
        stored = path / "prompts.jsonl"
        return cls(path, settings, read_prompts(stored) if stored.is_file() else [], record)

    def _begin(self) -> None:
        import yaml

        if self.prompts:
            rows = [_line(p) for p in self.prompts]
            write_text(self.path / "prompts.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
        kept = {**asdict(self.settings), "methods": list(self.settings.methods)}
        kept["prompts"] = "prompts.jsonl" if self.prompts else None
        head = "# What this run was asked. To repeat it: interp heads --config settings.yaml --out ANOTHER_FOLDER\n"
        write_text(self.path / "settings.yaml", head + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))
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
        from plotly.offline import get_plotlyjs

        folder = self.path / "figures"
        write_text(folder / "plotly.min.js", get_plotlyjs())
        for method, scores in self.scores().items():
            for kind in ("heatmap", "bars"):
                figure = scores.plot(kind=kind, k=self.settings.top)
                with replacing(folder / f"{method}-{kind}.html") as temporary:
                    figure.write_html(temporary, include_plotlyjs="directory", include_mathjax=False)


def with_interval(scores: "HeadScores", seed: int) -> Any:
    """The frame of a result with the ends of its 95% bootstrap interval over prompts, where there are two or more."""
    frame = scores.frame()
    if scores.per_prompt is not None and len(scores.per_prompt) > 1:
        low, high = scores.interval(seed=seed)
        at = frame["layer"].to_numpy(), frame["head"].to_numpy()
        frame.insert(3, "low", low.numpy()[at])
        frame.insert(4, "high", high.numpy()[at])
    return frame


def _record(path: Path) -> dict[str, Any]:
    if not (path / "run.json").is_file():
        raise FileError(f"{path} is no run folder: it holds no run.json. `interp heads --out {path}` makes one.")
    record = read_json(path / "run.json")
    if not isinstance(record, dict) or record.get("format") != FORMAT or not {"fingerprint", "methods"} <= set(record):
        raise FileError(f"{path / 'run.json'} is damaged, or no record of `interp heads`.")
    return record


def _compare(path: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    different = [key for key in asked if there.get(key) != asked[key]]
    if not different:
        return
    key = different[0]
    what = (
        "other prompts"
        if key == "prompts_sha256"
        else f"other settings: {key} is {there.get(key)!r} there, asked is {asked[key]!r}"
    )
    more = f" (and {', '.join(different[1:])})" if len(different) > 1 else ""
    raise SettingsError(f"{path} holds a run with {what}{more}. Give another --out, or --overwrite to replace it.")


def _remove(path: Path) -> None:
    # The record goes first: a folder without it is taken for nothing that could be resumed.
    for name in ("run.json", *_OURS, "report.html"):
        (path / name).unlink(missing_ok=True)
    for name in (*METHODS, "figures"):
        shutil.rmtree(path / name, ignore_errors=True)


def _line(prompt: Prompt) -> dict[str, Any]:
    known = {"text": prompt.text, "answer": prompt.answer, "wrong": prompt.wrong}
    image = None if prompt.image is None else str(prompt.image.resolve())
    return {k: v for k, v in {**known, "image": image}.items() if v is not None} | prompt.labels
