"""The documentation: every example runs, the site builds without a warning, and generated tables are up to date."""

import functools
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from interp import errors, wrapping
from interp.models import catalogue
from interp.models import row as catalogue_row
from interp.models.install import installed_version
from interp.sites import markdown_table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # docs/ holds two scripts that are no part of the package

from docs import families, tables  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<code>.*?)^```", re.M | re.S)


def fences(page: Path) -> list[tuple[int, str, str]]:
    """(line, info string, code) of every fence of a page."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start()) + 2, m["info"].strip(), m["code"]) for m in FENCE.finditer(text)]


def python_of(page: Path) -> list[tuple[int, str]]:
    return [(line, code) for line, info, code in fences(page) if info == "python"]


def pages_with_examples():
    for page in PAGES:
        found = python_of(page)
        if found:
            needs = {n.name for n in catalogue() if not n.bundled and any(f'load("{n.name}")' in c for _, c in found)}
            marks = [pytest.mark.slow] if needs else []
            yield pytest.param(page, needs, id=str(page.relative_to(ROOT)), marks=marks)


@pytest.fixture(scope="module")
def load_once():
    """`interp.load`, but a packaged model is loaded once for all pages."""
    return functools.cache(wrapping.load)


@pytest.mark.parametrize(("page", "needs"), pages_with_examples())
def test_examples_run(page, needs, tmp_path, monkeypatch, load_once):
    """All examples of a page in order, in one namespace, in an empty folder."""
    for name in needs:
        if installed_version(catalogue_row(name).package) is None:
            pytest.skip(f"the package of {name} is not installed (a publisher may withdraw it)")
    for package in ("transformer_lens", "nnsight", "sae_lens"):
        if any(f"import {package}" in code or f"from {package}" in code for _, code in python_of(page)):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wrapping, "load", load_once)
    namespace = {"__name__": "__docs__"}
    # A file of the examples alone, on the lines of the page: nnsight, once imported, reads and parses the
    # file that calls `backward`.
    lines: list[str] = []
    for line, code in python_of(page):
        lines += [""] * (line - 1 - len(lines)) + code.splitlines()
    script = tmp_path / f"{page.stem}_examples.py"
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for line, code in python_of(page):
        exec(compile("\n" * (line - 1) + code, str(script), "exec"), namespace)


def test_fences_are_of_known_kinds():
    """A misspelt info string would take an example out of the tests without anybody noticing."""
    kinds = {info for page in PAGES for _, info, _ in fences(page)}
    assert kinds <= {"", "python", "python no-run", "yaml", "json"}, kinds
    assert sum(info == "python no-run" for page in PAGES for _, info, _ in fences(page)) <= 3
    for page in PAGES:
        assert page.read_text(encoding="utf-8").count("```") % 2 == 0, page


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    pages = sorted(p.relative_to(site).with_suffix(".md").as_posix() for p in site.rglob("*.html"))
    wanted = sorted(p.relative_to(ROOT / "docs").as_posix() for p in PAGES[1:])
    assert set(wanted) <= set(pages)
    assert "interp.lens.Lens.run" in (site / "api" / "lens.html").read_text(encoding="utf-8")
    for page in site.rglob("*.html"):
        fetched = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?://[^\"> ]+)", page.read_text("utf-8"))
        assert not fetched, f"{page.name} fetches {fetched}"


def test_the_table_of_sites_is_the_code_s():
    assert tables.between((ROOT / "docs/sites.md").read_text(encoding="utf-8"), "sites") == markdown_table()


@pytest.mark.parametrize("name", tables.TABLES)
def test_generated_tables_are_up_to_date(name):
    for package in ("transformer_lens", "nnsight") if name.startswith("backends") else ():
        pytest.importorskip(package)
    page, make = tables.TABLES[name]
    found = tables.between((ROOT / "docs" / page).read_text(encoding="utf-8"), name)
    assert found == make(), f"docs/{page} is out of date: run python -m docs.tables"


@pytest.mark.slow
def test_the_table_of_families_is_up_to_date():
    text = families.PAGE.read_text(encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = families.page(text, families.table())
    assert text == wanted, "docs/families.md is out of date: run python -m docs.families"


def error_classes():
    return [c.__name__ for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.InterpError)]


def test_every_error_has_its_section():
    text = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (\w+Error)$", text, re.M)
    assert sorted(titles) == sorted(error_classes())
    for name in titles:
        body = text.partition(f"## {name}\n")[2].partition("\n## ")[0]
        base = getattr(errors, name).__mro__[2].__name__
        if name != "InterpError":
            assert f"`{base}`" in body, f"{name} is also a {base}"
            assert "*What to do*" in body, name


def test_every_refused_name_of_transformer_lens_is_listed():
    from interp.sites import _OTHER_TENSOR

    text = (ROOT / "docs/gotchas.md").read_text(encoding="utf-8")
    assert [n for n in _OTHER_TENSOR if f"`{n}`" not in text] == []


def test_every_public_name_has_a_place_in_the_reference():
    """What `interp` and its public modules export is documented by some `:::` of the pages."""
    import interp

    text = "\n".join(p.read_text(encoding="utf-8") for p in PAGES[1:])
    documented = set(re.findall(r"^::: ([\w.]+)", text, re.M))
    members = re.findall(r"^::: ([\w.]+)\n(?:    .*\n)*?      members: \[(.+)\]", text, re.M)
    listed = {f"{module}.{n.strip()}" for module, names in members for n in names.split(",")}
    missing = []
    for name in interp.__all__:
        thing = getattr(interp, name)
        home = getattr(thing, "__module__", None)
        path = f"{home}.{name}" if home else f"interp.{name}"
        inside = any(d == path or d.startswith(f"{path}.") for d in documented | listed)
        if name != "__version__" and not inside:
            missing.append(path)
    assert not missing, missing


def test_readme_names_what_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    from interp import heads
    from interp.sites import SITES

    for name in [*SITES, *heads.__all__, *(m.name for m in catalogue() if not m.bundled)]:
        assert f"`{name}`" in text, name
    assert "make demo" in text
    assert "make test" in text


def test_nothing_names_a_machine():
    """No page or notebook holds a path of the machine on which it was written."""
    files = [*PAGES, *(ROOT / "notebooks").glob("*.ipynb")]
    for path in files:
        found = re.findall(r"(?:/home/|/root/|/tmp/|/work/|/Users/|C:\\\\)[\w./-]*", path.read_text(encoding="utf-8"))
        assert not found, f"{path.name}: {found[:3]}"


def test_the_licence_is_the_one_that_is_declared():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
