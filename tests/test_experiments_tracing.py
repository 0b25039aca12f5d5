"""The experiments on tracing: facts and questions as they should be, their tables those of the maps."""

import json
from pathlib import Path

import pytest
import torch

import interp
from experiments.tracing import facts, scenes, tasks, tracr
from interp import tracing
from interp.data import scenes as drawn
from tests.models_tracr_truth import TRUTH

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


@pytest.mark.parametrize(
    ("program", "run", "text", "answer"),
    [
        ("reverse", tracr.reverse, "c c a b a", "a b a c c"),
        ("sort", tracr.sort, "2 2 1 4 1", "1 1 2 2 4"),
    ],
)
def test_programs_in_plain_python_compute_what_was_compiled(program, run, text, answer):
    """Their variables are those that tracr itself put into the stream, recorded in `tests.models_tracr_truth`."""
    found = run(text.split())
    assert [set(a) for a in found["answer"]] == [{s} for s in answer.split()]
    steps = TRUTH[f"tracr-{program}"]["steps"]
    assert TRUTH[f"tracr-{program}"]["text"] == text
    filled = {("attn_out" if i % 2 == 0 else "mlp_out", i // 2) for i, step in enumerate(steps) if any(step)}
    assert filled == set(tracr.SUBLAYERS[program].values())
    for name, (site, layer) in tracr.SUBLAYERS[program].items():
        step = steps[2 * layer + (site == "mlp_out")]
        if name in ("length", "length - index", "source", "key", "target"):
            said = [float(one.split()[0].rpartition(":")[2]) for one in step[1:]]
            assert said == pytest.approx(found[name])


def test_a_patched_variable_changes_what_depends_on_it():
    clean, corrupt = "c a b".split(), tracr.reverse("c a b".split(), [1, 1, 1])
    found = tracr.reverse(clean, put=corrupt, at=("length", 2))
    assert found["width"] == [3, 3, 3]
    assert found["length"] == [3, 3, 1]
    assert found["source"] == [2, 1, -2]
    assert found["answer"] == [{"b": 1.0}, {"a": 1.0}, {}]
    assert tracr.mean_of(["a", "b", "b", "b"]) == {"a": 0.25, "b": 0.75}


def test_patching_finds_the_compiled_circuit_in_one_pair():
    lens = interp.load("tracr-sort", device="cpu")
    one = tracr.swept(lens, "sort", list("42131"), list("41131"), 2, False)
    assert {c["sublayer"] for c in one["cells"] if abs(c["true"]) > 1e-6} > {("attn_out", 2)}
    for cell in one["cells"]:
        assert cell["found"] == pytest.approx(cell["true"], abs=1e-3)


def test_tasks_are_pairs_that_differ():
    lens = interp.load("smollm2-135m", device="cpu")
    for task in tasks.TASKS:
        found, share = tasks.items(lens, task, 2)
        assert 0 < share <= 1
        clean, corrupt, answers = tasks.batches(lens, found)
        assert torch.equal(clean.lengths, corrupt.lengths)
        for item in found:
            assert item.clean != item.corrupt
            assert item.answer != item.wrong
        best = lens.run(clean, "logits@last").logits[:, -1]
        for i, (good, bad) in enumerate(zip(answers["answers"], answers["wrong"], strict=True)):
            ids = [lens.processor(text, add_special_tokens=False)["input_ids"][0] for text in (good, bad)]
            assert best[i, ids[0]] > best[i, ids[1]]
    item = next(tasks.objects())
    names = {n for n in tasks.NAMES if n in item.clean}
    assert item.answer.strip() in names
    assert not names & {n for n in tasks.NAMES if f" {n}" in item.corrupt}


def test_results_are_those_of_the_pages():
    for name in ("tracr", "ioi", "reuse"):
        assert json.loads((RESULTS / f"{name}.json").read_text())["page"] == "tracing"
