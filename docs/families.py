"""Write the table of docs/families.md: what the tiny model of each family of tests/zoo gives, and what it refuses.

python -m docs.families          # rewrites docs/families.md between its markers
python -m docs.families --check  # exits with 1 when the page is not up to date
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("families.md")
BEGIN, END = "<!-- table: begin (written by docs/families.py) -->", "<!-- table: end -->"
KINDS = {
    "decoder": "Decoders, hybrids included",
    "ssm": "State-space models",
    "encoder": "Text encoders",
    "encoder-decoder": "Encoder-decoders",
    "vision": "Vision encoders",
    "dual": "Dual encoders",
    "lvlm": "Vision-language models",
}


def main() -> int:
    """Rewrite or check the page."""
    text = PAGE.read_text(encoding="utf-8")
    new = page(text, table())
    if "--check" in sys.argv:
        print("up to date" if new == text else f"{PAGE} is out of date: python -m docs.families")
        return int(new != text)
    PAGE.write_text(new, encoding="utf-8")
    return 0


def page(text: str, rows: str) -> str:
    """The page with the table between its markers."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{rows}\n\n{END}{rest.partition(END)[2]}"


def table() -> str:
    """One Markdown table for each kind of model."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    from tests.zoo import ZOO

    transformers.logging.set_verbosity_error()
    parts = []
    for kind, title in KINDS.items():
        names = [n for n, entry in ZOO.items() if entry.kind == kind]
        parts.append(
            f"## {title}\n\n| family | class | towers | refused sites | refused otherwise |\n|---|---|---|---|---|"
        )
        parts[-1] += "".join("\n" + family(n) for n in names)
    return "\n\n".join(parts)


def family(name: str) -> str:
    """The row of one family."""
    import interp
    from interp.errors import AnatomyError
    from tests.zoo import build, inputs

    model, given = build(name), inputs(name)
    cls = f"`{type(model).__name__}`"
    try:
        lens = interp.wrap(model, sample=given)
    except AnatomyError as error:
        return f"| {name} | {cls} | - | - | the model: {_reason(str(error))} |"
    towers = lens.anatomy.towers
    described = ", ".join(f"`{n}`{' (packed)' if t.packed else ''}" for n, t in towers.items())
    if any("cross" in x.attention for x in towers[lens.anatomy.main].layers):
        described += ", `cross`"
    sites = "; ".join(_refusals(lens)) or "none"
    return f"| {name} | {cls} | {described} | {sites} | {'; '.join(_otherwise(lens, given)) or 'nothing'} |"


def _refusals(lens) -> list[str]:
    """Refused sites with their reason; sites of layers that do not exist in a family are no refusals."""
    from interp.sites import SITES

    found: dict[str, list[str]] = {}
    for name, tower in lens.anatomy.towers.items():
        mixed = any("mixer" in x.branches for x in tower.layers)
        for site, row in SITES.items():
            if not row.per_layer or (site == "mixer_out" and not mixed):
                continue
            reasons = [_refusal(lens, name, site, x.index) for x in tower.layers]
            refused = [r for r in reasons if r is not None]
            if refused:
                some = "" if len(refused) == len(reasons) else " (some layers)"
                where = "" if name == lens.anatomy.main else f" in `{name}`"
                found.setdefault(f"{refused[0]}{where}{some}", []).append(f"`{site}`")
    for site, reason in lens.anatomy.refused.items():
        found.setdefault(_reason(reason), []).append(f"`{site}`")
    return [f"{' '.join(sites)}: {reason}" for reason, sites in found.items()]


def _refusal(lens, tower: str, site: str, layer: int) -> str | None:
    import interp
    from interp.engine.plan import layers_of
    from interp.errors import UnsupportedError

    try:
        layers_of(lens.anatomy, interp.Read(site, layers=layer, tower=tower))
    except UnsupportedError as error:
        return _reason(str(error))
    return None


def _otherwise(lens, given) -> list[str]:
    """Padding sides and entries that the family refuses."""
    from interp import testing
    from interp.errors import UnsupportedError

    batch = lens.prepare(**given)
    found = []
    for what, check in (("padding", testing.check_padding), ("entry", testing.check_entry)):
        try:
            check(lens, batch)
        except UnsupportedError as error:
            if "only batches of tokens" not in str(error):
                found.append(f"{what}: {_reason(str(error))}")
    return found


def _reason(message: str) -> str:
    """A refusal without the names and numbers of the tiny model."""
    message = re.sub(r"^'\w+' (of layer \d+ in tower '\w+' )?is refused: ", "", message)
    message = re.sub(r"^layer \d+ of tower '\w+' \(\w+\) ", "the layer ", message)
    message = re.sub(r" \(it has [a-z, -]+\)", "", message)
    message = re.sub(r" \(relative error [^)]*\)|: .* gives other activations.*$", "", message)
    message = re.sub(r" Use lens\.prepare.*$", "", message)
    message = re.sub(
        r"^.*?(a run that enters) at column \d+ differs from the full run by \S+ ",
        r"\1 behind a prefix differs ",
        message,
    )
    message = re.sub(r"(enter tower '\w+' above) layer \d+", r"\1 its first layer", message)
    message = re.sub(
        r"^\w+: no stack of layers.*\((?:\S+): (one module is called several times \(shared layers\)).*$",
        r"\1",
        message,
    )
    return message.rstrip(".").replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
