"""The folder of `interp attribute`: what was asked, the scores of each batch as they are made, and the tables."""

import html
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.cli.attribution.settings import METHODS, AttributeSettings
from interp.cli.folders import Kind, format_of, write_settings
from interp.cli.prompts import prompts_sha256, write_prompts
from interp.data import Prompt, read_prompts
from interp.figures import show_token
from interp.files import write_json, write_parquet

if TYPE_CHECKING:
    from interp.tokens import TokenScores

KIND = Kind(
    "interp-attribute-run",
    "interp attribute",
    frozenset({"fingerprint", "settings", "methods"}),
    ("settings.yaml", "prompts.jsonl", "tokens.parquet", "agreement.parquet", "report.html"),
    (*METHODS, "figures", "pictures"),
)
PER_SAMPLE = ("answers", "wrong", "value", "gap", "difference", "said", "prompt_index", "interference")
"""Settings of a result that have one entry for each of its samples."""


@dataclass(frozen=True, slots=True)
class AttributionFolder:
    """A run folder that fits what is asked. Made by `AttributionFolder.open` or `AttributionFolder.read`.

    Attributes:
        path: the folder.
        settings: of the run; its methods are all that are or will be in the folder.
        prompts: the prompts.
        record: the content of `run.json`; `methods` has for each method its seconds and its parts: the name of a folder
            and the indices of its prompts.
    """

    path: Path
    settings: AttributeSettings
    prompts: list[Prompt]
    record: dict[str, Any]

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        settings: AttributeSettings,
        prompts: list[Prompt],
        *,
        overwrite: bool = False,
    ) -> "AttributionFolder":
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
            overwrite = True  # a run that failed before its first result
        asked = settings.hashed() | {"prompts_sha256": prompts_sha256(prompts)}
        record = {"methods": {}, **KIND.open(path, asked, overwrite=overwrite)}
        settings = replace(
            settings, methods=tuple(m for m in METHODS if m in record["methods"] or m in settings.methods)
        )
        record["settings"] = {**asdict(settings), "methods": list(settings.methods)}
        folder = cls(path, settings, prompts, record)
        write_prompts(path / "prompts.jsonl", prompts)
        kept = {**record["settings"], "prompts": "prompts.jsonl", "images": None}
        write_settings(path, kept, "interp attribute")
        write_json(path / "run.json", record)
        return folder

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "AttributionFolder":
        """A run folder as it is.

        Raises:
            FileError: it is none, or damaged.
        """
        path = Path(path)
        record = KIND.read(path)
        return cls(path, AttributeSettings.of(record["settings"]), read_prompts(path / "prompts.jsonl"), record)

    def done(self, method: str) -> list[int]:
        """The prompts that a method is computed for."""
        parts = self.record["methods"].get(method, {"parts": {}})["parts"]
        return sorted(row for rows in parts.values() for row in rows)

    @property
    def complete(self) -> list[str]:
        """The methods that are computed for all prompts."""
        return [m for m in self.settings.methods if len(self.done(m)) == len(self.prompts)]

    def todo(self, methods: Sequence[str], size: int) -> list[tuple[list[int], list[str]]]:
        """What is missing, in batches of at most so many prompts, each with the methods that it is missing for."""
        batches: dict[tuple[int, ...], list[str]] = {}
        for method in methods:
            done = set(self.done(method))
            rows = [i for i in range(len(self.prompts)) if i not in done]
            for at in range(0, len(rows), size):
                batches.setdefault(tuple(rows[at : at + size]), []).append(method)
        return [(list(rows), named) for rows, named in sorted(batches.items())]

    def keep(self, method: str, scores: "TokenScores", rows: list[int], seconds: float) -> None:
        """Save one method's result on a batch; only then is it noted as done."""
        part = f"{rows[0]:05d}"
        scores.save(self.path / method / part)
        entry = self.record["methods"].setdefault(method, {"seconds": 0.0, "parts": {}})
        entry["seconds"] = round(entry["seconds"] + seconds, 2)
        entry["parts"][part] = rows
        write_json(self.path / "run.json", self.record)

    def note(self, **values: Any) -> None:
        """Add something to the record."""
        self.record.update(values)
        write_json(self.path / "run.json", self.record)

    def results(self) -> "Iterator[tuple[int, dict[str, TokenScores]]]":
        """Each prompt's index and its scores by each complete method; prompts without a target are left out.

        The scores are of the one prompt, without padding.

        Raises:
            FileError: a result is missing or damaged.
        """
        from interp.tokens import TokenScores

        methods = self.complete
        places: dict[tuple[str, int], tuple[str, int]] = {}
        for method in methods:
            for part, rows in self.record["methods"][method]["parts"].items():
                places |= {(method, row): (part, n) for n, row in enumerate(rows)}

        @lru_cache(maxsize=len(METHODS))
        def load(method: str, part: str) -> TokenScores:
            return TokenScores.load(self.path / method / part)

        for i in range(len(self.prompts)):
            found = {}
            for method in methods:
                part, n = places[method, i]
                scores = load(method, part)
                if bool((scores.targets[n] >= 0).any()):
                    found[method] = _alone(scores, n)
            if found:
                yield i, found

    def write_table(self) -> None:
        """`tokens.parquet`: a row for each method, prompt, target and source."""
        import pandas as pd

        from interp.tokens import TokenScores

        frames = []
        for method in self.complete:
            for part, rows in sorted(self.record["methods"][method]["parts"].items()):
                frame = TokenScores.load(self.path / method / part).frame()
                frame.insert(0, "method", method)
                frames.append(frame.assign(prompt=[rows[n] for n in frame["prompt"]]))
        write_parquet(self.path / "tokens.parquet", pd.concat(frames, ignore_index=True))


def _alone(scores: "TokenScores", n: int) -> "TokenScores":
    """One sample, with what its settings say of it."""
    kept = {k: [v[n]] if k in PER_SAMPLE and isinstance(v, list) else v for k, v in scores.settings.items()}
    return replace(scores.select(n), settings=kept)


def label(found: "dict[str, TokenScores]", target: int) -> str:
    """What is explained at a target of one prompt, in words: the token that is predicted, or else the position."""
    for scores in found.values():
        if (said := scores.settings.get("said")) is not None:
            return f"said {target + 1}: {shown(said[0][target])}"
        if (answers := scores.settings.get("answers")) is not None:
            wrong = scores.settings.get("wrong")
            rather = f" rather than {shown(wrong[0][target])}" if wrong is not None else ""
            return f"{shown(answers[0][target])}{rather}"
    return f"at {shown(next(iter(found.values())).target_tokens[0][target])}"


def shown(token: str) -> str:
    """A token with its spaces and line ends visible."""
    return html.unescape(show_token(token))


def targets_of(found: "dict[str, TokenScores]") -> int:
    """How many targets one prompt has, by all methods."""
    return min(scores.scores.shape[1] for scores in found.values())
