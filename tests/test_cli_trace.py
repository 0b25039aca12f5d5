"""`interp trace`: what it writes, that it is what the methods give, how it is taken up again, bad input."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image

import interp
from interp import tracing
from interp.cli.tracing import asking
from interp.cli.tracing.cost import cost_of
from interp.cli.tracing.folder import TraceFolder
from interp.cli.tracing.inputs import edges_of, objects_of, prompts_of
from interp.cli.tracing.settings import METHODS, OPTIONS, TraceSettings, read_config, template
from interp.cli.tracing.texts import QUESTIONS, TITLES
from interp.data import scenes
from interp.errors import InputError, SettingsError
from interp.evaluation import image_prompt
from tests.test_cli_attribute import call, saved, write

PAIRS = [
    {"text": "ab cd ab c", "corrupt": "ab cd xb c", "answer": "d", "wrong": "e", "subject": "cd"},
    {"text": "xyz ab", "corrupt": "xqz ab", "answer": "a", "wrong": "b", "subject": "z"},
    {"text": "hello ab hell", "corrupt": "hullo ab hell", "answer": "o", "wrong": "p", "subject": "hello"},
    {"text": "1 2 ab 1 2", "corrupt": "1 3 ab 1 2", "answer": "3", "wrong": "4", "subject": "ab"},
    {"text": "q ab", "corrupt": "r ab", "answer": "e", "wrong": "r", "subject": "q"},
]


def trace(model, prompts, out, *arguments, code=0):
    return call("trace", model, "-p", prompts, "--out", out, "--device", "cpu", *arguments, code=code)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Questions about objects of drawn scenes: pictures, counterfactual pictures and masks, with the truth."""
    folder, rows = tmp_path_factory.mktemp("pictures"), []
    for i, one in enumerate(scenes.scenes("test", 5)):
        name = one.names[i % len(one.names)]
        one.image.save(folder / f"{i}.png")
        one.without(name).image.save(folder / f"{i}-without.png")
        Image.fromarray(np.asarray(one.mask(name)).astype("uint8") * 255).save(folder / f"{i}-mask.png")
        row = {"text": scenes.exists(one, name).text, "image": f"{i}.png", "corrupt_image": f"{i}-without.png"}
        rows.append({**row, "mask": f"{i}-mask.png", "object": name, "answer": "yes", "wrong": "no"})
    write(folder / "p.jsonl", rows)
    return folder


def rows_of(pictures):
    return [json.loads(line) for line in (pictures / "p.jsonl").read_text().splitlines()]


def result(folder, method):
    return dict(TraceFolder.read(folder).results())[method]


def test_sweep_and_attribution_are_what_the_methods_give_in_one_batch(llama, tmp_path):
    prompts = write(tmp_path / "p.jsonl", PAIRS)
    said = trace(llama, prompts, tmp_path / "out", "-m", "sweep,attribution", "--batch-size", 2, "--top", 3)
    assert "sweep: prompts 1 to 2 of 5" in said
    assert re.search(r"sweep: [\d,]+ cells, as much work as", said)
    lens = interp.load(str(llama), device="cpu")
    given = {k: [row[k] for row in PAIRS] for k in ("text", "corrupt", "answer", "wrong")}
    runs = [lens.prepare(given[name], padding_side="left") for name in ("text", "corrupt")]
    options = {"answers": given["answer"], "wrong": given["wrong"]}
    one = tracing.patch_sweep(lens, *runs, sites=("resid_pre", "attn_out", "mlp_out"), **options)
    two = tracing.attribution_patching(lens, *runs, positions="all", steps=5, **options)
    for method, expected in (("sweep", one), ("attribution", two)):
        found = result(tmp_path / "out", method)
        assert found.groups == expected.groups
        assert torch.equal(found.cells, expected.cells)
        assert torch.equal(found.exists, expected.exists)
        torch.testing.assert_close(found.values, expected.values, atol=1e-5, rtol=0, equal_nan=True)
        torch.testing.assert_close(found.clean, expected.clean, atol=1e-5, rtol=0)
    cells = pd.read_parquet(tmp_path / "out" / "cells.parquet")
    assert set(cells["method"]) == {"sweep", "attribution"}
    assert len(cells) == len(one.cells) + len(two.cells)
    each = pd.read_parquet(tmp_path / "out" / "per_prompt.parquet")
    mine = each[
        (each["method"] == "sweep") & (each["site"] == "mlp_out") & (each["layer"] == 1) & (each["prompt"] == 2)
    ]
    row = (one.cells == torch.tensor([2, 1, -1, 3])).all(1).nonzero()[0, 0]
    assert mine[mine["position"] == 3]["value"].item() == pytest.approx(float(one.values[row, 1]), abs=1e-5)
    assert len(mine) == len("xyz ab")
    page = (tmp_path / "out" / "report.html").read_text()
    assert TITLES["sweep"] in page
    assert QUESTIONS["attribution"] in page
    assert sorted(p.name for p in (tmp_path / "out" / "figures").iterdir())[-1] == "sweep-1.html"


def test_paths_are_what_the_method_gives(llama, tmp_path):
    prompts = write(tmp_path / "p.jsonl", PAIRS)
    to = ("--receiver", "1.0,1.2", "--via", "q", "--mlps", "frozen", "--positions", "all")
    trace(llama, prompts, tmp_path / "out", "-m", "paths", "--batch-size", 2, *to)
    lens = interp.load(str(llama), device="cpu")
    given = {k: [row[k] for row in PAIRS] for k in ("text", "corrupt", "answer", "wrong")}
    runs = [lens.prepare(given[name], padding_side="left") for name in ("text", "corrupt")]
    options = {"answers": given["answer"], "wrong": given["wrong"], "positions": "all", "mlps": "frozen", "via": "q"}
    expected = tracing.path_patching(lens, *runs, receivers=[(1, 0), (1, 2)], direction="denoise", **options)
    found = result(tmp_path / "out", "paths")
    assert torch.equal(found.cells, expected.cells)
    torch.testing.assert_close(found.values, expected.values, atol=1e-5, rtol=0)
    assert "head 0" in (tmp_path / "out" / "report.html").read_text()
    trace(llama, prompts, tmp_path / "logits", "-m", "paths")
    assert result(tmp_path / "logits", "paths").settings["receivers"] == "logits"


def test_causal_has_all_sites_in_one_map(llama, tmp_path):
    rows = [{k: v for k, v in row.items() if k in ("text", "subject")} for row in PAIRS]
    trace(llama, write(tmp_path / "p.jsonl", rows), tmp_path / "out", "-m", "causal", "--samples", 2, "--layers", "0-1")
    found = result(tmp_path / "out", "causal")
    assert found.sites == ("resid_post", "attn_out", "mlp_out")
    lens = interp.load(str(llama), device="cpu")
    texts, subjects = ([row[k] for row in rows] for k in ("text", "subject"))
    for site in found.sites:
        one = tracing.causal_trace(lens, texts, subjects, site=site, layers=[0, 1], samples=2, seed=0)
        mine = found.cells[:, 0] == found.sites.index(site)
        torch.testing.assert_close(found.values[mine], one.values, equal_nan=True)
        assert found.settings["kept"] == one.settings["kept"]
    assert found.settings["window"] == {"resid_post": 1, "attn_out": 10, "mlp_out": 10}


def test_cross_modal_and_knockout_of_pictures(pictures, tmp_path):
    out = tmp_path / "out"
    trace("scenes", pictures / "p.jsonl", out, "-m", "cross-modal,knockout", "--window", 1, "--batch-size", 3)
    lens = interp.load("scenes", device="cpu")
    asked = [(one, one.names[i % len(one.names)]) for i, one in enumerate(scenes.scenes("test", 5))]
    texts = [image_prompt(lens, scenes.exists(one, name).text) for one, name in asked]
    clean = lens.prepare(texts, [one.image for one, _ in asked], padding_side="left")
    corrupt = lens.prepare(texts, [one.without(name).image for one, name in asked], padding_side="left")
    answers = {"answers": ["yes"] * 5, "wrong": ["no"] * 5}
    named = {"objects": [one.mask(name) for one, name in asked], "names": [name for _, name in asked]}
    sites = ("resid_pre", "attn_out", "mlp_out")
    one = tracing.cross_modal_trace(lens, clean, corrupt, **named, **answers, components=sites)
    found = result(out, "cross_modal")
    frames = [m.frame().set_index(["site", "layer", "group"]).sort_index() for m in (found, one)]
    pd.testing.assert_frame_equal(frames[0], frames[1], atol=1e-4)
    assert found.settings["corruption"] == "given"
    assert found.settings["tokens"] == pytest.approx(one.settings["tokens"])
    text = clean.span("text") & ~clean.span("last")
    two = tracing.attention_knockout(
        lens,
        clean,
        {"image to text": ("image", text), "text to last": (text, "last"), "image to last": ("image", "last")},
        window=1,
        **answers,
    )
    cut = result(out, "knockout")
    assert cut.groups == ("image to text", "text to last", "image to last")
    for name in two.groups:
        assert cut.grid()[name].to_numpy() == pytest.approx(two.grid()[name].to_numpy(), abs=1e-4)
    held = write(
        tmp_path / "q.jsonl", [{**json.loads(line)} for line in (pictures / "p.jsonl").read_text().splitlines()]
    )
    args = ("--images", pictures, "--corruption", "noise", "--layers", "0", "--site", "resid_pre")
    trace("scenes", held, tmp_path / "noisy", "-m", "cross_modal", *args)
    assert result(tmp_path / "noisy", "cross_modal").settings["corruption"] == "noise"


def test_a_stopped_run_goes_on_where_it_was(llama, tmp_path, monkeypatch):
    prompts = write(tmp_path / "p.jsonl", PAIRS)
    arguments = ("-m", "sweep", "--batch-size", 2)
    trace(llama, prompts, tmp_path / "whole", *arguments)
    calls, real = [], asking._sweep

    def stops(*given):
        calls.append(given[3])
        if given[3] == 2 and len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(asking, "_sweep", stops)
    with pytest.raises(AssertionError):
        trace(llama, prompts, tmp_path / "out", *arguments)
    assert TraceFolder.read(tmp_path / "out").done("sweep") == 2
    said = trace(llama, prompts, tmp_path / "out", *arguments)
    assert "2 of 5 prompts are in" in said
    assert calls == [0, 2, 2, 4]
    one, two = (result(tmp_path / name, "sweep") for name in ("whole", "out"))
    assert torch.equal(one.values.nan_to_num(9), two.values.nan_to_num(9))
    assert "not computed again" in trace(llama, prompts, tmp_path / "out", *arguments)
    assert calls == [0, 2, 2, 4]
    assert not (tmp_path / "out" / "sweep" / "passes").exists()
    line = trace(llama, prompts, tmp_path / "out", "-m", "sweep", "--layers", "1", code=2)
    assert "layers" in line
    assert "--overwrite" in line


def test_a_sweep_that_stops_within_a_part_keeps_its_passes(llama, tmp_path, monkeypatch):
    from interp.tracing import carried

    prompts = write(tmp_path / "p.jsonl", PAIRS)
    real, count = carried.Carried._pass, []

    def counted(*given):
        count.append(1)
        if len(count) == stop:
            raise KeyboardInterrupt
        return real(*given)

    stop = -1
    monkeypatch.setattr(carried.Carried, "_pass", counted)
    trace(llama, prompts, tmp_path / "whole", "-m", "sweep")
    whole, stop = len(count), 2
    assert whole > 2
    count.clear()
    with pytest.raises(AssertionError):
        trace(llama, prompts, tmp_path / "out", "-m", "sweep")
    assert any((tmp_path / "out" / "sweep" / "passes").iterdir())
    stop = -1
    trace(llama, prompts, tmp_path / "out", "-m", "sweep")
    assert len(count) == 2 + whole - 1
    one, two = (result(tmp_path / name, "sweep") for name in ("whole", "out"))
    assert torch.equal(one.values.nan_to_num(9), two.values.nan_to_num(9))


def test_cost_counts_cells_and_work(llama, tmp_path):
    prompts = write(tmp_path / "p.jsonl", PAIRS)
    lens = interp.load(str(llama), device="cpu")
    depth = len(lens.anatomy.towers["text"].layers)
    base = {"model": str(llama), "prompts": str(prompts)}
    settings = TraceSettings(methods=("sweep",), sites=("mlp_out",), **base)
    read = prompts_of(settings)
    cost = cost_of(lens, "sweep", settings, read, 8, 2.0)
    first = [[a == b for a, b in zip(r["text"], r["corrupt"], strict=True)].index(False) for r in PAIRS]
    behind = [len(r["text"]) - at for r, at in zip(PAIRS, first, strict=True)]
    assert cost.cells == depth * sum(behind)  # one token is one letter
    shares = sum(sum(range(1, n + 1)) / len(r["text"]) for n, r in zip(behind, PAIRS, strict=True))
    assert cost.runs == pytest.approx(shares * sum(range(1, depth + 1)) / depth + 2 * 5)
    assert cost.seconds == pytest.approx(2 * cost.runs)
    said = call("trace", llama, "-m", "sweep,causal,attribution", "-p", prompts, "--estimate", "--device", "cpu")
    assert [line.split(":")[0] for line in said.splitlines()[1:]] == ["sweep", "causal", "attribution"]


def test_maps_are_joined_by_prompts_and_by_sites(llama):
    lens = interp.load(str(llama), device="cpu")
    runs = [lens.prepare([row[k] for row in PAIRS[:3]], padding_side="left") for k in ("text", "corrupt")]
    whole = tracing.patch_sweep(lens, *runs, sites=("attn_out", "mlp_out"), metric="kl")
    halves = [tracing.patch_sweep(lens, *runs, sites=site, metric="kl") for site in ("attn_out", "mlp_out")]
    both = tracing.join_sites(halves)
    assert both.sites == whole.sites
    torch.testing.assert_close(both.values, whole.values, atol=1e-5, rtol=0, equal_nan=True)
    with pytest.raises(InputError, match="stands in two"):
        tracing.join_sites([halves[0], halves[0]])
    with pytest.raises(InputError, match="no map"):
        tracing.join_prompts([])
    short = [lens.prepare([row[k] for row in PAIRS[1:2]], padding_side="left") for k in ("text", "corrupt")]
    other = tracing.patch_sweep(lens, *short, sites="attn_out", metric="kl")
    with pytest.raises(InputError, match="other cells"):
        tracing.join_prompts([whole, other])
    loss = tracing.patch_sweep(lens, *short, sites="attn_out", metric="loss")
    with pytest.raises(InputError, match="metric 'kl' and 'loss'"):
        tracing.join_prompts([other, loss])
    joined = tracing.join_prompts([halves[0], other])
    assert joined.groups[-1] == "12"
    assert not joined.exists[6:, 3].any()
    assert joined.settings["prompts"] == 4


def test_boxes_masks_and_edges(pictures):
    rows = rows_of(pictures)
    for i, row in enumerate(rows):
        mask = np.asarray(Image.open(pictures / row.pop("mask"))) > 0
        ys, xs = mask.nonzero()
        row["box"] = f"{xs.min()} {ys.min()}, {xs.max() + 1} {ys.max() + 1}"
        rows[i] = row
    path = write(pictures / "boxes.jsonl", rows)
    base = {"model": "scenes", "prompts": str(path), "methods": ("cross_modal",)}
    boxed = objects_of(prompts_of(TraceSettings(**base)), 0)
    masked = objects_of(prompts_of(TraceSettings(**{**base, "prompts": str(pictures / "p.jsonl")})), 0)
    for one, two in zip(boxed, masked, strict=True):
        assert not (two & ~one).any()
        assert one.sum() == (np.ptp(two.nonzero()[0]) + 1) * (np.ptp(two.nonzero()[1]) + 1)
    lens = interp.load("scenes", device="cpu")
    settings = TraceSettings(**{**base, "methods": ("knockout",), "edges": ("object>last", "all>last")})
    prompts = prompts_of(settings)
    from interp.cli.prompts import prepared

    batch = prepared(lens, prompts, padding_side="left")
    edges = edges_of(settings, batch, prompts, 0)
    come, to = edges["object to last"]
    for i, row in enumerate(rows):
        ids = batch.inputs["input_ids"][i][come[i]].tolist()
        assert lens.processor.tokenizer.decode(ids).strip() == row["object"]
    assert torch.equal(to, batch.span("last"))
    assert torch.equal(edges["all to last"][0], batch.mask & ~batch.span("last"))
    with pytest.raises(SettingsError, match="no token of last is left"):
        edges_of(TraceSettings(**{**base, "methods": ("knockout",), "edges": ("last>last",)}), batch, prompts, 0)


def test_bad_input_of_pictures(pictures, tmp_path):
    rows = rows_of(pictures)

    def refused(**changes):
        held = {k: v for k, v in {**rows[0], **changes}.items() if v is not None}
        given = ("-m", "cross_modal", "--images", pictures, "--overwrite", "--layers", "0")
        return trace("scenes", write(tmp_path / "p.jsonl", [held, rows[1]]), tmp_path / "out", *given, code=2)

    assert "there is no file" in refused(corrupt_image="none.png")
    assert "prompt 1 of 2" in refused(object=None)
    assert "give box, as 'x0 y0 x1 y1', or mask" in refused(mask=None)
    assert "box is 'x0 y0 x1 y1' in pixels, found 'big'" in refused(mask=None, box="big")
    assert "is not inside the picture" in refused(mask=None, box="0 0 900 3")
    assert "'answer'" in refused(answer=None, wrong=None)
    assert "'zebra crossing'" in refused(object="zebra crossing")
    small = tmp_path / "small.png"
    Image.new("L", (3, 3), 255).save(small)
    assert "the mask has 3 x 3 pixels" in refused(mask=str(small))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-m", "magic"), "method 'magic'"),
        ((), "no method is named"),
        (("-m", "sweep", "--site", "z9"), "'z9'"),
        (("-m", "sweep", "--layers", "3-1"), "layers are written such as 0-5,8"),
        (("-m", "sweep", "--layers", "77"), "layer 77"),
        (("-m", "sweep", "--noise", "2"), "noise is an option of causal, cross_modal, not of sweep"),
        (("-m", "causal", "--noise", "-1"), "noise is a number above 0"),
        (("-m", "sweep", "--metric", "joy"), "metric 'joy'"),
        (("-m", "knockout"), "name others by --edge"),
        (("-m", "knockout", "--edge", "image-last"), "from>to"),
        (("-m", "knockout", "--edge", "foo>last"), "'foo' is no group of tokens"),
        (("-m", "sweep", "--positions", "middle"), "positions 'middle'"),
        (("-m", "cross_modal"), "'object'"),
        (("-m", "causal", "--severed", "z"), "severed 'z'"),
        (("-m", "paths", "--receiver", "99.0"), "99"),
        (("-m", "sweep", "--via", "k"), "via is an option of paths"),
    ],
)
def test_bad_options_are_one_line(llama, tmp_path, arguments, said):
    assert said in trace(llama, write(tmp_path / "p.jsonl", PAIRS), tmp_path / "out", *arguments, code=2)


def test_bad_prompts_are_named(llama, tmp_path):
    def refused(row, *arguments):
        rows = [PAIRS[0], {**PAIRS[1], **row}]
        return trace(llama, write(tmp_path / "p.jsonl", rows), tmp_path / "out", *arguments, "--overwrite", code=2)

    assert "prompt 2 has 6 tokens and its corrupt text 7" in refused({"corrupt": "xyz abc"}, "-m", "sweep")
    assert "prompt 2: the corrupt text is the text itself" in refused({"corrupt": "xyz ab"}, "-m", "attribution")
    assert "'none' does not stand in the text of prompt 2 of 2" in refused({"subject": "none"}, "-m", "causal")
    missing = write(tmp_path / "p.jsonl", [{"text": "ab"}])
    assert "subject" in trace(llama, missing, tmp_path / "out", "-m", "causal", code=2)
    assert "'corrupt' or 'corrupt_image'" in trace(llama, missing, tmp_path / "out", "-m", "sweep", code=2)
    assert "give --out DIR" in call("trace", llama, "-m", "sweep", "-p", missing, code=2)


def test_config_init_check_and_report(llama, tmp_path):
    prompts = write(tmp_path / "p.jsonl", PAIRS)
    call("init", "trace", "--out", tmp_path / "run.yaml")
    made = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert TraceSettings.of(made | {"prompts": "x"})
    assert template() == (tmp_path / "run.yaml").read_text()
    made |= {"model": str(llama), "methods": ["attribution"], "prompts": "p.jsonl", "steps": 0, "device": "cpu"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(made))
    assert read_config(tmp_path / "run.yaml")["prompts"] == str(prompts)
    assert "attribution; 5 prompts" in call("check", tmp_path / "run.yaml")
    call("trace", "--config", tmp_path / "run.yaml", "--out", tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    (tmp_path / "out" / "report.html").unlink()
    call("report", tmp_path / "out")
    assert (tmp_path / "out" / "report.html").read_text() == page
    again = yaml.safe_load((tmp_path / "out" / "settings.yaml").read_text())
    assert again["steps"] == 0
    call("trace", "--config", tmp_path / "out" / "settings.yaml", "--out", tmp_path / "again")
    one, two = (result(tmp_path / name, "attribution") for name in ("out", "again"))
    assert torch.equal(one.values, two.values)
    assert "holds no complete method" in call("report", _begun(tmp_path, llama, prompts), code=2)


def _begun(tmp_path, llama, prompts):
    settings = TraceSettings(model=str(llama), methods=("sweep",), prompts=str(prompts))
    return TraceFolder.open(tmp_path / "begun", settings, prompts_of(settings)).path


def test_every_method_is_described():
    assert tuple(TITLES) == tuple(QUESTIONS) == METHODS == tuple(OPTIONS)
