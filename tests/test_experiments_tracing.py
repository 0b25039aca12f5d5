"""The experiments on tracing: facts and questions as they should be, their tables those of the maps."""

import json
from pathlib import Path

import pytest

import interp
from experiments.tracing import facts, scenes
from interp import tracing
from interp.data import scenes as drawn

RESULTS = Path(__file__).parents[1] / "experiments" / "tracing" / "results"


def test_facts_hold_their_subjects_once():
    found = facts.facts()
    assert len({text for text, _, _ in found}) == len(found) > 80
    for text, subject, answer in found:
        assert text.count(subject) == 1, text
        assert answer.startswith(" ")
        assert answer.strip() not in text.split()


def test_questions_are_about_objects_that_are_there():
    for one, name in scenes.questions(12):
        assert name in one.names
        assert name not in one.without(name).names


def test_rows_are_those_of_the_map():
    lens = interp.load("scenes", device="cpu")
    asked = scenes.questions(4)
    texts = [interp.evaluation.image_prompt(lens, drawn.exists(one, name).text) for one, name in asked]
    clean = lens.prepare(texts, [one.image for one, _ in asked], padding_side="left")
    corrupt = lens.prepare(texts, [one.without(name).image for one, name in asked], padding_side="left")
    found = tracing.cross_modal_trace(
        lens,
        clean,
        corrupt,
        objects=[one.mask(name) for one, name in asked],
        names=[name for _, name in asked],
        answers=["yes"] * 4,
        wrong=["no"] * 4,
        components=["resid_pre", "mlp_out"],
    )
    for site in found.sites:
        grid = found.grid(site)
        for row in scenes.rows_of(found, site):
            for group in grid.columns:
                assert row[group]["value"] == pytest.approx(grid.loc[row["layer"], group])
                assert not row[group]["low"] > row[group]["value"] + 1e-6


def test_what_the_page_says_of_the_recorded_runs():
    content = json.loads((RESULTS / "facts.json").read_text())
    (count,) = content["tables"]["facts"]
    assert count["known"] >= 50
    early = {row["layer"]: row for row in content["tables"]["stream"]}
    assert early[9]["last subject"]["low"] > 0.5 > early[9]["last"]["high"]
    assert early[27]["last"]["low"] > 0.5 > early[27]["last subject"]["high"]
    content = json.loads((RESULTS / "cross_modal.json").read_text())["tables"]
    first, second = content["resid_pre"][:2]
    assert first["image, object"]["low"] > 0.5 > first["last"]["high"]
    assert second["last"]["low"] > 0.5 > second["image, object"]["high"]
