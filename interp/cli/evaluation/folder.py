"""The folder of an evaluation: what was asked, the texts so far, the scores; every file whole, or its lines whole."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.cli.evaluation.settings import FILES, EvaluateSettings
from interp.errors import FileError, SettingsError
from interp.files import read_json, write_bytes, write_json, write_text

if TYPE_CHECKING:
    from interp.evaluation import ChairScores, PopeScores

FORMAT = "interp-evaluate-run"
TEXTS = {"chair": "captions.jsonl", "pope": "answers.jsonl"}
_OURS = ("settings.yaml", *TEXTS.values(), "questions.jsonl", "results.parquet", "numbers.parquet", "report.html")


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
        asked = json.loads(json.dumps(settings.hashed() | {f"{name}_sha256": value for name, value in content.items()}))
        record: dict[str, Any] = {}
        if (path / "run.json").is_file():
            record = read_record(path)
            if overwrite:
                _remove(path)
                record = {}
            else:
                _compare(path, record["fingerprint"], asked)
        elif path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise FileError(f"{path} is no run folder and not empty; give another --out.")
        kept = {**asdict(settings), "negatives": list(settings.negatives)}
        kept |= {name: os.path.abspath(kept[name]) for name in FILES if kept[name] is not None}
        if os.path.isfile(settings.vocabulary):
            kept["vocabulary"] = os.path.abspath(settings.vocabulary)
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        head = {"format": FORMAT, "version": 1, "hash": digest, "fingerprint": asked, "settings": kept}
        folder = cls(path, settings, {"complete": False, **record, **head})
        folder._begin()
        return folder

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "EvaluationFolder":
        """A run folder as it is.

        Raises:
            FileError: it is none, or damaged.
        """
        record = read_record(Path(path))
        return cls(Path(path), EvaluateSettings.of(record["settings"]), record)

    def _begin(self) -> None:
        import yaml

        task = self.settings.task
        head = f"# What this run was asked. To repeat it: interp evaluate {task} --config settings.yaml --out FOLDER\n"
        text = yaml.safe_dump(self.record["settings"], sort_keys=False, allow_unicode=True)
        write_text(self.path / "settings.yaml", head + text)
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


def read_record(path: Path) -> dict[str, Any]:
    """The record of an evaluation's folder.

    Raises:
        FileError: there is none, or it is another command's or damaged.
    """
    if not (path / "run.json").is_file():
        raise FileError(f"{path} is no run folder: it holds no run.json. `interp evaluate --out {path}` makes one.")
    record = read_json(path / "run.json")
    needed = {"fingerprint", "settings", "complete"}
    if not isinstance(record, dict) or record.get("format") != FORMAT or not needed <= set(record):
        raise FileError(f"{path / 'run.json'} is damaged, or no record of `interp evaluate`.")
    return record


def _compare(path: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    different = [key for key in asked if there.get(key) != asked[key]]
    if not different:
        return
    key = different[0]
    what = (
        f"other {key.removesuffix('_sha256')}"
        if key.endswith("_sha256")
        else f"other settings: {key} is {there.get(key)!r} there, asked is {asked[key]!r}"
    )
    more = f" (and {', '.join(different[1:])})" if len(different) > 1 else ""
    raise SettingsError(f"{path} holds a run with {what}{more}. Give another --out, or --overwrite to replace it.")


def _remove(path: Path) -> None:
    # The record goes first: a folder without it is taken for nothing that could be resumed.
    for name in ("run.json", *_OURS):
        (path / name).unlink(missing_ok=True)
    for name in ("scores", "examples"):
        shutil.rmtree(path / name, ignore_errors=True)
