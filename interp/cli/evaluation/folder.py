"""The folder of an evaluation: what was asked, the texts so far, the scores; every file whole, or its lines whole."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.cli.evaluation.settings import FILES, EvaluateSettings
from interp.cli.folders import Kind, write_settings
from interp.errors import FileError
from interp.files import write_bytes, write_json

if TYPE_CHECKING:
    from interp.evaluation import ChairScores, PopeScores

TEXTS = {"chair": "captions.jsonl", "pope": "answers.jsonl"}
KIND = Kind(
    "interp-evaluate-run",
    "interp evaluate",
    frozenset({"fingerprint", "settings", "complete"}),
    (
        "settings.yaml",
        *TEXTS.values(),
        "questions.jsonl",
        "results.parquet",
        "numbers.parquet",
        "report.html",
        "comparison.parquet",
    ),
    ("scores", "examples", "runs"),
)


@dataclass(frozen=True, slots=True)
class EvaluationFolder:
    """A run folder that fits what is asked. Made by `EvaluationFolder.open` or `EvaluationFolder.read`.

    Attributes:
        path: the folder.
        settings: of the run.
        record: the content of `run.json`.
    """

    path: Path
    settings: EvaluateSettings
    record: dict[str, Any]

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        settings: EvaluateSettings,
        content: Mapping[str, str],
        *,
        overwrite: bool = False,
    ) -> "EvaluationFolder":
        """Begin a run in a new or empty folder, or take up the one that is there.

        Args:
            path: the folder.
            settings: what is asked.
            content: the sha256 of everything that the files hold, by name.
            overwrite: remove the run that is there (files of other names stay).

        Raises:
            FileError: the folder holds something else than such a run, or its record is damaged.
            SettingsError: it holds a run with other settings or files; the first that differs is named.
        """
        path = Path(path)
        asked = settings.hashed() | {f"{name}_sha256": value for name, value in content.items()}
        record = {"complete": False, **KIND.open(path, asked, overwrite=overwrite)}
        kept = {**asdict(settings), "negatives": list(settings.negatives)}
        kept |= {name: os.path.abspath(kept[name]) for name in FILES if kept[name] is not None}
        if os.path.isfile(settings.vocabulary):
            kept["vocabulary"] = os.path.abspath(settings.vocabulary)
        folder = cls(path, settings, {**record, "settings": kept})
        folder._begin()
        return folder

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "EvaluationFolder":
        """A run folder as it is.

        Raises:
            FileError: it is none, or damaged.
        """
        record = KIND.read(Path(path))
        return cls(Path(path), EvaluateSettings.of(record["settings"]), record)

    def _begin(self) -> None:
        write_settings(self.path, self.record["settings"], f"interp evaluate {self.settings.task}")
        write_json(self.path / "run.json", self.record)

    @property
    def texts(self) -> Path:
        """The file of captions or answers."""
        return self.path / TEXTS[self.settings.task]

    def done(self) -> list[dict[str, Any]]:
        """The rows that are there; a last line that was cut short is removed.

        Raises:
            FileError: a line in the middle is damaged.
        """
        if not self.texts.is_file():
            return []
        content = self.texts.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            write_bytes(self.texts, whole)
        try:
            return [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]
        except ValueError as error:
            raise FileError(f"{self.texts} is damaged ({error}); give another --out, or --overwrite.") from error

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows; they are on the disk when this returns.

        Raises:
            FileError: the file cannot be written.
        """
        lines = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        try:
            with self.texts.open("ab") as file:
                file.write(lines.encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise FileError(f"cannot write {self.texts}: {error.strerror or error}.") from error

    def scores(self) -> "ChairScores | PopeScores":
        """The result in the folder.

        Raises:
            FileError: it is missing or damaged.
        """
        from interp.evaluation import ChairScores, PopeScores

        return (ChairScores if self.settings.task == "chair" else PopeScores).load(self.path / "scores")

    def note(self, **values: Any) -> None:
        """Add something to the record."""
        self.record.update(values)
        write_json(self.path / "run.json", self.record)
