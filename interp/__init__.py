"""interp: mechanistic interpretability for language and vision-language models."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp import (
        attribution,
        data,
        dictionaries,
        edits,
        errors,
        evaluation,
        figures,
        heads,
        models,
        reads,
        report,
        scores,
        sites,
        steering,
        testing,
        tracing,
    )
    from interp.batch import Batch
    from interp.engine.entry import Entry
    from interp.lens import Generation, Lens
    from interp.patches import Patches
    from interp.reads import Read
    from interp.scores import HeadScores, TokenScores
    from interp.trace import Trace
    from interp.tracing import CausalMap
    from interp.wrapping import load, wrap

try:
    __version__ = version("interp")
except PackageNotFoundError:  # pragma: no cover - a checkout that is not installed
    __version__ = "0"

# Loaded when first used, so that `import interp` stays fast.
_HOME = {
    "Lens": "interp.lens",
    "Generation": "interp.lens",
    "load": "interp.wrapping",
    "wrap": "interp.wrapping",
    "Batch": "interp.batch",
    "Entry": "interp.engine.entry",
    "Patches": "interp.patches",
    "Read": "interp.reads",
    "Trace": "interp.trace",
    "HeadScores": "interp.scores",
    "TokenScores": "interp.tokens",
    "CausalMap": "interp.tracing",
}
_MODULES = (
    "attribution",
    "data",
    "dictionaries",
    "edits",
    "errors",
    "evaluation",
    "figures",
    "heads",
    "models",
    "reads",
    "report",
    "scores",
    "sites",
    "steering",
    "testing",
    "tracing",
)

__all__ = [
    "Batch",
    "CausalMap",
    "Entry",
    "Generation",
    "HeadScores",
    "Lens",
    "Patches",
    "Read",
    "TokenScores",
    "Trace",
    "__version__",
    "attribution",
    "data",
    "dictionaries",
    "edits",
    "errors",
    "evaluation",
    "figures",
    "heads",
    "load",
    "models",
    "reads",
    "report",
    "scores",
    "sites",
    "steering",
    "testing",
    "tracing",
    "wrap",
]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _MODULES:
        return import_module(f"interp.{name}")
    raise AttributeError(f"module 'interp' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
