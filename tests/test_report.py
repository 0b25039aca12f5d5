import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser

import pandas as pd
import pytest
import torch

from interp.errors import FileError, InputError
from interp.figures import pattern_heatmap
from interp.report import (
    Figure,
    Folded,
    KeyValues,
    Prompts,
    Provenance,
    Section,
    Table,
    Text,
    head_sections,
    write_report,
)
from interp.scores import HeadScores

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """The elements of a page, and the text inside each kind of element."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open, self.texts = [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data

    def tags(self, name):
        return [attrs for tag, attrs in self.elements if tag == name]


def page_of(folder, *blocks, **options):
    sections = [Section("First <part>", list(blocks))]
    path = write_report(folder, **({"title": "A title", "sections": sections} | options))
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def full(folder):
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(4, 3, 5, generator=generator)
    scores = HeadScores(
        prompts.mean(0),
        name="direct_effect",
        unit=EVIL,
        settings={"model": EVIL, "nested": {"x": EVIL}},
        per_prompt=prompts,
        extra={EVIL: prompts[0]},
    )
    sections = head_sections(scores, prompts=[EVIL, " two  spaces"])
    pattern = pattern_heatmap(torch.eye(2), [EVIL, "b"], title=EVIL)
    blocks = [Figure(pattern, EVIL), Text(EVIL), KeyValues({EVIL: EVIL}), Table(pd.DataFrame({EVIL: [EVIL]}), EVIL)]
    sections.append(Section(EVIL, [*blocks, Folded(EVIL, blocks[1:])]))
    source = Provenance.here(scores.settings, seed=0, command=EVIL)
    return page_of(folder, sections=sections, title=EVIL, subtitle=EVIL, provenance=source)


def test_the_page_is_whole_in_itself_and_everything_is_escaped(tmp_path):
    _, page = full(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    for tag, attrs in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img", "video")
        assert not any(name.startswith("on") for name in attrs)
        assert "src" not in attrs
        assert attrs.get("href", "#").startswith("#")
    assert not re.search(r"@import|url\(", page.texts["style"][0])
    # Of scripts there are plotly, ours, and the data of four figures; nothing from the texts became one.
    kinds = [attrs.get("type", "code") for attrs in page.tags("script")]
    assert sorted(kinds) == ["application/json"] * 4 + ["code"] * 2
    assert EVIL in page.texts["h1"][0]
    assert any(EVIL in item for item in page.texts["li"])


def test_the_browser_is_told_to_run_nothing_else(tmp_path):
    _, page = full(tmp_path)
    policy = next(m["content"] for m in page.tags("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    code = [t for t, attrs in zip(page.texts["script"], page.tags("script"), strict=True) if "type" not in attrs]
    assert [base64.b64encode(hashlib.sha256(t.encode()).digest()).decode() for t in code] == allowed


def test_figures_are_readable_json(tmp_path):
    _, page = full(tmp_path)
    scripts = zip(page.texts["script"], page.tags("script"), strict=True)
    figures = [json.loads(t) for t, attrs in scripts if attrs.get("type") == "application/json"]
    assert len(figures) == 4
    assert all({"data", "layout"} <= figure.keys() for figure in figures)
    assert figures[0]["data"][0]["type"] == "heatmap"


def test_plotly_is_left_out_where_nothing_is_drawn(tmp_path):
    text, page = page_of(tmp_path, Text("one\n\ntwo\nlines"))
    assert len(text) < 30_000
    assert len(page.tags("script")) == 1
    assert page.texts["p"][-2:] == ["one", "two\nlines"]


def test_contents_link_to_sections(tmp_path):
    sections = [Section("Same", [Text("a")]), Section("Same", [Text("b")]), Section("日本", [Text("c")])]
    _, page = page_of(tmp_path, sections=sections, provenance=Provenance({"a": 1}))
    links = [a["href"][1:] for a in page.tags("a")]
    ids = [s["id"] for s in page.tags("section")]
    assert links == ids
    assert len(set(ids)) == 4


def test_tables_show_numbers_and_say_what_is_left_out(tmp_path):
    frame = pd.DataFrame({"head": ["a", "b", None], "n": [1, 2, 30], "score": [-0.123456, math.nan, 1e-9]})
    text, page = page_of(tmp_path, Table(frame, "Cap"))
    minus, missing = "\N{MINUS SIGN}", "\N{EN DASH}"
    shown = ["a", "1", f"{minus}0.1235", "b", "2", missing, missing, "30", f"1e{minus}09"]
    assert page.texts["td"] == shown
    cells = page.tags("td")
    assert [c.get("class") for c in cells[:3]] == [None, "number", "number"]
    assert [c.get("data-sort") for c in cells] == [None, None, "-0.123456", None, None, "", "", None, "1e-09"]
    assert "Showing the first" not in text
    text, page = page_of(tmp_path, Table(pd.DataFrame({"n": range(5000)}), max_rows=7), Prompts(["x"] * 9, max_texts=4))
    assert len(page.tags("td")) == 7
    assert "Showing the first 7 of 5,000 rows." in text
    assert "Showing the first 4 of 9 texts." in text


def test_provenance_names_versions_hardware_and_settings(tmp_path):
    source = Provenance.here({"layers": [0, 1], "none": None}, seed=5)
    assert source.versions["torch"] == torch.__version__
    assert "CPU cores" in source.hardware
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", source.date)
    assert "/" not in source.command.split()[0]
    text, page = page_of(tmp_path, Text("x"), provenance=source)
    pairs = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert pairs["layers"] == "[0, 1]"
    assert pairs["none"] == "none"
    assert pairs["Seed"] == "5"
    assert source.date in text


def test_bad_reports_are_refused(tmp_path):
    with pytest.raises(InputError, match="at least one section"):
        write_report(tmp_path, title="x", sections=[])
    with pytest.raises(InputError, match="a title"):
        write_report(tmp_path, title=" ", sections=[Section("a", [])])
    with pytest.raises(InputError, match="needs a title"):
        Section("", [])
    with pytest.raises(InputError, match="holds a str"):
        Section("a", ["text"])
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileError):
        write_report(tmp_path / "file", title="x", sections=[Section("a", [Text("x")])])
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_head_sections_without_prompts_and_with_missing_heads():
    scores = torch.tensor([[1.0, -2.0], [math.nan, math.nan], [0.5, math.nan]])
    sections = head_sections(HeadScores(scores, name="x", valid=~scores.isnan()))
    assert [s.title for s in sections] == ["Overview", "Strongest heads", "By layer", "All heads"]
    facts = sections[0].blocks[0].values
    assert facts["Heads"].startswith("3 in 3 layers")
    assert facts["Strongest head"].startswith("layer 0, head 1: -2")
    assert facts["Mean, standard deviation"] == "-0.1667, 1.312"
    lines = sections[2].blocks[0].figure.data
    assert list(lines[0].y) == [2.0, 0.0, 0.5]
    assert list(lines[1].y) == [1.5, 0.0, 0.5]


def test_json_cannot_end_its_script_element(tmp_path):
    import plotly.graph_objects as go

    from interp.report.page import _inline

    raw = json.dumps({"a": EVIL, "b": "<!--\u2028"}, ensure_ascii=False)
    assert "<" not in _inline(raw)
    assert "\u2028" not in _inline(raw)
    assert json.loads(_inline(raw)) == json.loads(raw)
    # A figure of the caller's own, whose texts nobody escaped.
    _, page = page_of(tmp_path, Figure(go.Figure(layout={"title": {"text": EVIL}}), "own"))
    assert len(page.tags("script")) == 3
    assert not page.tags("img")


def test_folded_blocks_are_in_the_page_and_hold_no_figures(tmp_path):
    text, page = page_of(tmp_path, Folded("All of it", [Table(pd.DataFrame({"a": [1.5]}), "rows"), Text("said")]))
    assert page.texts["summary"] == ["All of it"]
    (folded,) = page.texts["details"]
    assert "1.5" in folded
    assert "said" in folded
    assert "<details open" not in text
    with pytest.raises(InputError, match="folds a Figure"):
        Folded("x", [Figure(pattern_heatmap(torch.eye(2), ["a", "b"]))])
