"""(c) Patching on compiled programs: does it find the circuit that was compiled, and nothing else?

    python -m experiments.tracing.tracr [--pairs 40]

`reverse` and `sort` are programs in RASP (Weiss et al. 2021) that tracr compiled into transformers. Each is written
here once more as plain Python with its variables by name, so that what a patch does to the answer is known without the
model: a variable at one position gets the value it has for the corrupt input, and the program goes on. The sweep
patches what each sublayer adds at each position, in the clean run, for the answer at every position.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import numpy as np
import typer

import interp
from experiments.records import Row, record, show
from interp import tracing
from interp.edits import splice

# The sublayer that computes each variable: all others add nothing.
SUBLAYERS = {
    "reverse": {
        "width": ("attn_out", 0),
        "length": ("mlp_out", 0),
        "length - index": ("mlp_out", 1),
        "source": ("mlp_out", 2),
        "answer": ("attn_out", 3),
    },
    "sort": {
        "key": ("mlp_out", 0),
        "width": ("attn_out", 1),
        "target": ("mlp_out", 1),
        "answer": ("attn_out", 2),
    },
}
LETTERS = {"reverse": "abc", "sort": "1234"}
Values = dict[str, list]
Patch = tuple[str, int] | None


def reverse(tokens: Sequence[str], lengths: Sequence[int] | None = None, put: Values | None = None, at: Patch = None):
    """Every variable at every position; where `at` names one, it has its value in `put`."""
    n, found = len(tokens), {}

    def keep(name: str, values: list) -> list:
        found[name] = [put[name][i] if put is not None and at == (name, i) else v for i, v in enumerate(values)]
        return found[name]

    width = keep("width", list(lengths or [n] * n))
    length = keep("length", list(width))
    more = keep("length - index", [length[i] - i for i in range(n)])
    source = keep("source", [m - 1 for m in more])
    keep("answer", [mean_of([tokens[j] for j in range(n) if j == source[i]]) for i in range(n)])
    return found


def sort(tokens: Sequence[str], put: Values | None = None, at: Patch = None):
    """As `reverse`: keys that tell equal tokens apart, how many are below each, and who is to stand where."""
    n, found = len(tokens), {}

    def keep(name: str, values: list) -> list:
        found[name] = [put[name][i] if put is not None and at == (name, i) else v for i, v in enumerate(values)]
        return found[name]

    key = keep("key", [int(t) + 0.2 * i for i, t in enumerate(tokens)])
    width = keep("width", [sum(key[j] < key[i] for j in range(n)) for i in range(n)])
    target = keep("target", list(width))
    keep("answer", [mean_of([tokens[j] for j in range(n) if target[j] == i]) for i in range(n)])
    return found


def mean_of(symbols: Sequence[str]) -> dict[str, float]:
    """What an aggregation writes: the mean of what was selected, nothing where nothing was."""
    return {s: symbols.count(s) / len(symbols) for s in symbols}


def difference(answer: Mapping[str, float], right: str, wrong: str) -> float:
    return answer.get(right, 0.0) - answer.get(wrong, 0.0)


def pairs(letters: str, n: int, count: int, seed: int) -> list[tuple[list[str], list[str]]]:
    source = random.Random(seed)
    drawn = [
        ([source.choice(letters) for _ in range(n)], [source.choice(letters) for _ in range(n)])
        for _ in range(9 * count)
    ]
    return [(a, b) for a, b in drawn if a != b][:count]


def swept(lens: interp.Lens, program: str, clean: list[str], corrupt: list[str], place: int, shorter: bool) -> Row:
    """One answer of one pair: the predicted and the found value of each cell; empty if the answers are the same."""
    n = len(clean)
    if shorter:  # the last token becomes a second beginning, and half of the sequence is believed to be there
        right, wrong = reverse(clean), reverse(clean, [(n + 1) // 2 - 1] * n)
        rerun: Callable[[Patch], Values] = lambda at: reverse(clean, put=wrong, at=at)  # noqa: E731
    elif program == "reverse":
        right, wrong = reverse(clean), reverse(corrupt)
        rerun = lambda at: reverse(clean, put=wrong, at=at)  # noqa: E731
    else:
        right, wrong = sort(clean), sort(corrupt)
        rerun = lambda at: sort(clean, put=wrong, at=at)  # noqa: E731
    good, bad = right["answer"][place], wrong["answer"][place]
    if good == bad or len(good) != 1 or len(bad) != 1:
        return {}
    (yes,), (no,) = good, bad
    ids = [lens.processor.convert_tokens_to_ids(s) for s in (yes, no)]
    # The answer does not depend on what is said of tokens alone: tokens are read from the stream, not from a sublayer.
    runs = [lens.prepare(" ".join(x)) for x in (clean, clean if shorter else corrupt)]
    begin = lens.run(runs[0], "embed")["embed"][:, :1]
    edit = [splice(lambda value: begin.expand_as(value), site="embed", positions="last")] if shorter else []
    metric = lambda logits: logits[:, 0, ids[0]] - logits[:, 0, ids[1]]  # noqa: E731
    options = {"sites": ("attn_out", "mlp_out"), "metric": metric, "at": 1 + place, "direction": "noise"}
    found = tracing.patch_sweep(lens, *runs, **options, corrupt_edits=edit)
    guess = None if shorter else tracing.attribution_patching(lens, *runs, **options)
    clean_value = difference(good, yes, no)
    known = {where: name for name, where in SUBLAYERS[program].items()}
    rows = []
    for number, (site, layer, _, group) in enumerate(found.cells.tolist()):
        name, i = known.get((found.sites[site], layer)), int(found.groups[group]) - 1
        value = clean_value
        if name is not None and i >= 0:
            value = difference(rerun((name, i))["answer"][place], yes, no)
        rows.append(
            {
                "sublayer": (found.sites[site], layer),
                "true": value - clean_value,
                "found": float(found.values[number, 0] - found.clean[0]),
                "guess": np.nan if guess is None else float(guess.values[number, 0] - guess.clean[0]),
            }
        )
    return {"cells": rows, "gap": float(found.gaps[0])}


def main(count: Annotated[int, typer.Option("--pairs", min=1)] = 40) -> None:
    tables: dict[str, list[Row]] = {"circuits": [], "sublayers": []}
    for program, shorter in (("reverse", False), ("reverse", True), ("sort", False)):
        lens = interp.load(f"tracr-{program}", device="cpu")
        cells: list[Row] = []
        answers = 0
        for clean, corrupt in pairs(LETTERS[program], 5, count, seed=0):
            for place in range(5):
                one = swept(lens, program, clean, corrupt, place, shorter)
                answers += bool(one)
                cells += one.get("cells", [])
        true, found, guess = (np.array([c[k] for c in cells]) for k in ("true", "found", "guess"))
        inside, hit, guessed = abs(true) > 1e-6, abs(found) > 0.01, abs(guess) > 0.01
        what = f"{program}, {'length' if shorter else 'tokens'} changed"
        row: Row = {
            "program": what,
            "answers": answers,
            "cells": len(cells),
            "in the circuit": int(inside.sum()),
            "found": int((inside & hit).sum()),
            "found, but not in it": int((~inside & hit).sum()),
            "largest error of a value": f"{abs(true - found).max():.0e}",
        }
        row["found by attribution"] = "-" if shorter else int((inside & guessed).sum())
        row["by attribution, but not in it"] = "-" if shorter else int((~inside & guessed).sum())
        tables["circuits"].append(row)
        depth = len(lens.anatomy.towers["text"].layers)
        names = {where: name for name, where in SUBLAYERS[program].items()}
        for where in [(site, layer) for layer in range(depth) for site in ("attn_out", "mlp_out")]:
            mine = np.array([c["sublayer"] == where for c in cells])
            tables["sublayers"].append(
                {
                    "program": what,
                    "sublayer": f"{where[0]} {where[1]}",
                    "computes": names.get(where, "nothing"),
                    "in the circuit": int((inside & mine).sum()),
                    "found": int((hit & mine).sum()),
                    "largest effect": round(float(abs(found[mine]).max()), 3),
                }
            )
    for name, rows in tables.items():
        show(name, rows)
    record("tracing", "tracr", {"pairs": count, "seed": 0}, tables, page="tracing")


if __name__ == "__main__":
    typer.run(main)
