"""(a) Causal tracing of facts in SmolLM2: the early site and the late site, by the role of the token.

    python -m experiments.tracing.facts [--samples 3]

Capitals, languages and currencies of countries, countries of cities. Facts whose answer SmolLM2 does not say first are
left out. The state is the stream after a layer, or what the MLPs or attentions of ten layers around it add; every third
layer.
"""

from __future__ import annotations

import time
from typing import Annotated

import typer

import interp
from experiments.records import Row, record
from interp import tracing

CAPITALS = {
    **{"France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon"},
    **{"Austria": "Vienna", "Greece": "Athens", "Poland": "Warsaw", "Hungary": "Budapest", "Russia": "Moscow"},
    **{"Ireland": "Dublin", "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen"},
    **{"Japan": "Tokyo", "China": "Beijing", "South Korea": "Seoul", "Thailand": "Bangkok", "Vietnam": "Hanoi"},
    **{"Egypt": "Cairo", "Kenya": "Nairobi", "Turkey": "Ankara", "Iran": "Tehran", "Iraq": "Baghdad"},
    **{"Canada": "Ottawa", "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago", "Ukraine": "Kiev"},
    **{"India": "New Delhi", "Belgium": "Brussels", "Argentina": "Buenos Aires", "Australia": "Canberra"},
}
LANGUAGES = {
    **{"France": "French", "Germany": "German", "Italy": "Italian", "Spain": "Spanish", "Portugal": "Portuguese"},
    **{"Greece": "Greek", "Poland": "Polish", "Hungary": "Hungarian", "Russia": "Russian", "Brazil": "Portuguese"},
    **{"Sweden": "Swedish", "Denmark": "Danish", "Japan": "Japanese", "China": "Chinese", "Turkey": "Turkish"},
    **{"Mexico": "Spanish", "Argentina": "Spanish", "Egypt": "Arabic", "Iran": "Persian", "Thailand": "Thai"},
}
CURRENCIES = {
    **{"Japan": "yen", "India": "rup", "Russia": "rub", "Mexico": "peso", "Switzerland": "Swiss", "China": "yuan"},
    **{"the United Kingdom": "pound", "the United States": "dollar", "Sweden": "kr", "Canada": "Canadian"},
}
COUNTRIES = {
    **{"Paris": "France", "Berlin": "Germany", "Tokyo": "Japan", "Rome": "Italy", "Madrid": "Spain", "Cairo": "Egypt"},
    **{"Toronto": "Canada", "Mumbai": "India", "Sydney": "Australia", "Moscow": "Russia", "Beijing": "China"},
    **{"Athens": "Greece", "Lisbon": "Portugal", "Vienna": "Austria", "Oslo": "Norway", "Dublin": "Ireland"},
}
FORMS = (
    ("The capital city of {} is", CAPITALS),
    ("In {} most people speak", LANGUAGES),
    ("The official language of {} is", LANGUAGES),
    ("The currency used in {} is the", CURRENCIES),
    ("The city of {} is located in the country of", COUNTRIES),
)
SITES = {"resid_post": "stream", "mlp_out": "MLPs, window of 10", "attn_out": "attention, window of 10"}


def facts() -> list[tuple[str, str, str]]:
    """Prompt, subject and answer of every candidate."""
    return [(form.format(s), s, f" {answer}") for form, pairs in FORMS for s, answer in pairs.items()]


def rows_of(found: tracing.CausalMap) -> list[Row]:
    """A row for each layer: the effect of each role with half its interval."""
    frame = found.frame()
    rows: list[Row] = []
    for layer in sorted(frame["layer"].unique()):
        row: Row = {"layer": int(layer)}
        for one in frame[frame["layer"] == layer].to_dict("records"):
            row[one["group"]] = {"value": one["effect"], "low": one["low"], "high": one["high"]}
        rows.append(row)
    return rows


def main(samples: Annotated[int, typer.Option(min=1)] = 3, step: Annotated[int, typer.Option(min=1)] = 3) -> None:
    begin = time.process_time()
    lens = interp.load("smollm2-135m", device="cpu")
    texts, subjects, answers = zip(*facts(), strict=True)
    layers = sorted({*range(0, 30, step), 29})
    tables: dict[str, list[Row]] = {}
    settings: dict[str, object] = {}
    for site, name in SITES.items():
        found = tracing.causal_trace(
            lens, texts, subjects, answers=answers, site=site, layers=layers, samples=samples, progress=True
        )
        tables[name] = rows_of(found)
        settings = {k: found.settings[k] for k in ("model", "samples", "noise", "sigma", "seed", "prompts", "left_out")}
        settings |= {"clean": round(float(found.clean.mean()), 4), "corrupt": round(float(found.corrupt.mean()), 4)}
        peak = found.top(1)[["layer", "group", "effect"]].to_dict("records")[0]
        print(name, peak)
    tables["facts"] = [
        {
            "candidates": len(texts),
            "known": settings["prompts"],
            "probability of the answer": settings["clean"],
            "with noise on the subject": settings["corrupt"],
        }
    ]
    settings["minutes"] = round((time.process_time() - begin) / 60, 1)
    record("tracing", "facts", settings, tables, page="tracing")


if __name__ == "__main__":
    typer.run(main)
