"""The text of the experiments on SmolLM2: King James Bible and the documentation of Python, as one .jsonl file each.

    bible -f gen1:1-rev22:21 > kjv.txt                          # Debian: bible-kjv, bible-kjv-text
    python -m experiments.dictionaries.texts kjv.txt /usr/share/doc/python3.11/html/_sources texts/

Debian's python3.11-doc has the sources. Both are mixed document by document (thirty verses make one); one in twenty is
kept for evaluation.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import typer

from interp.files import write_text

VERSES, HELD_OUT = 30, 20


def documents(verses: Path, sources: Path) -> list[dict[str, str]]:
    """All documents in a random order, always the same."""
    lines = verses.read_text(encoding="utf-8", errors="replace").splitlines()
    bible = [" ".join(lines[i : i + VERSES]) for i in range(0, len(lines), VERSES)]
    python = [path.read_text(encoding="utf-8") for path in sorted(sources.rglob("*.rst.txt"))]
    rows = [{"text": t, "source": "bible"} for t in bible] + [{"text": t, "source": "python"} for t in python]
    random.Random(0).shuffle(rows)
    return rows


def main(verses: Path, sources: Path, out: Path) -> None:
    rows = documents(verses, sources)
    parts = {"train": [r for i, r in enumerate(rows) if i % HELD_OUT], "test": rows[::HELD_OUT]}
    for name, some in parts.items():
        write_text(out / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some))
        print(f"{out / name}.jsonl: {len(some)} documents, {sum(len(r['text']) for r in some):,} letters")


if __name__ == "__main__":
    typer.run(main)
