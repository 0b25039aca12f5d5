"""Rules of the house: what may import what, how fast the import is, that documentation is what the code says."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"errors"},
    {"sites", "reads", "headlist", "patches", "packed", "files", "palette", "bootstrap", "processes"},
    {"batch", "figures", "token_figures", "results", "models"},
    {"scores", "tokens", "trace", "edits", "data"},
    {"engine", "grids"},
    {"inputs", "backends", "footprint", "estimate"},
    {"lens", "without_image"},
    {"wrapping"},
    {"testing", "heads", "attribution", "tracing"},
    {"evaluation", "steering"},
    {"dictionaries"},
    {"report"},
    {"cli"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}


def modules():
    for path in sorted((ROOT / "interp").rglob("*.py")):
        parts = path.relative_to(ROOT / "interp").with_suffix("").parts
        yield path, parts


def imported(path):
    """Names below `interp` that a file imports when it runs (imports for type checkers do not count)."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(x)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for x in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "interp":
            rest = node.module.split(".")[1:]
            yield from [rest[0]] if rest else [a.name for a in node.names]
        elif isinstance(node, ast.Import):
            yield from [a.name.split(".")[1] for a in node.names if a.name.startswith("interp.")]


def test_imports_go_down_only():
    wrong = []
    for path, parts in modules():
        if parts in (("__init__",), ("__main__",)):
            continue
        assert parts[0] in FLOOR, f"{path} is on no floor"
        wrong += [f"{'.'.join(parts)} -> {n}" for n in imported(path) if FLOOR.get(n, 99) > FLOOR[parts[0]]]
    assert not wrong, wrong


METHODS = ("heads", "attribution", "tracing", "steering", "evaluation", "dictionaries", "report", "cli", "scores")


def test_methods_do_not_touch_modules_or_hooks():
    for path, parts in modules():
        if parts[0] in METHODS:
            text = path.read_text()
            assert "register_forward" not in text, path
            assert "engine.hooks" not in text, path
            assert "engine.recorder" not in text, path


def test_files_are_short_and_never_unpickle():
    for path, _ in modules():
        text = path.read_text()
        assert text.count("\n") < 560, f"{path} has {text.count(chr(10))} lines"
        assert "import pickle" not in text, path
        # torch's restricted reader makes tensors and nothing else; other projects' files are read with it.
        assert all("weights_only=True" in line for line in text.split("\n") if "torch.load(" in line), path


@pytest.mark.parametrize(
    ("before", "code", "absent"),
    [
        ("", "import interp", ["torch", "transformers", "pandas", "plotly"]),
        ("import torch", "import interp; interp.Read", ["transformers", "pandas", "plotly", "transformer_lens"]),
        (
            "import torch, transformers",
            "import interp; interp.wrap",
            ["plotly", "transformer_lens", "nnsight", "sae_lens"],
        ),
        ("", "import interp.cli", ["torch", "transformers", "pandas", "plotly"]),
    ],
)
def test_import_budget(before, code, absent):
    """Heavy packages load where they are used; beyond torch and transformers the import takes well under a second."""
    script = (
        f"{before}\nimport sys, time; t = time.process_time(); {code}; t = time.process_time() - t;"
        f"print(t, [m for m in {absent!r} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    seconds, loaded = out.stdout.split(" ", 1)
    assert loaded.strip() == "[]"
    assert float(seconds) < 2.0
