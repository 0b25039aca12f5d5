"""One method on some prompts: what `interp trace` passes on to `interp.tracing`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.cli.prompts import prepared
from interp.cli.tracing.inputs import answers_of, edges_of, objects_of, pair_of
from interp.cli.tracing.settings import TraceSettings
from interp.data import Prompt

if TYPE_CHECKING:
    from interp.lens import Lens
    from interp.tracing import CausalMap

WHOLE = ("causal",)
"""Methods that take all prompts at once: what they draw or choose depends on all of them."""


def trace(
    lens: "Lens", method: str, settings: TraceSettings, prompts: Sequence[Prompt], first: int, passes: Path
) -> "CausalMap":
    """The map of one method on some prompts.

    Args:
        lens: the model.
        method: one of the methods.
        settings: of the run.
        prompts: the prompts, of which the first has the number `first`.
        first: its number, from 0.
        passes: a folder in which finished passes are kept.
    """
    known: dict[str, Callable[..., CausalMap]] = {
        **{"causal": _causal, "cross_modal": _cross_modal, "sweep": _sweep},
        **{"attribution": _attribution, "paths": _paths, "knockout": _knockout},
    }
    return known[method](lens, settings, prompts, first, passes)


def _causal(lens: "Lens", settings: TraceSettings, prompts: Sequence[Prompt], first: int, passes: Path) -> "CausalMap":
    from interp.tracing import causal_trace, join_sites

    maps = [
        causal_trace(
            lens,
            [p.text for p in prompts],
            [p.labels["subject"] for p in prompts],
            answers=answers_of(prompts).get("answers"),
            site=site,
            window=settings.window,
            layers=settings.layer_list(),
            noise=settings.noise or 3.0,
            samples=settings.samples,
            severed=settings.severed,  # pyright: ignore[reportArgumentType]
            min_gap=settings.min_gap,
            seed=settings.seed,
            checkpoint=passes / site,
            progress=_shown(),
        )
        for site in settings.sites_of("causal")
    ]
    return join_sites(maps)


def _cross_modal(
    lens: "Lens", settings: TraceSettings, prompts: Sequence[Prompt], first: int, passes: Path
) -> "CausalMap":
    from interp.tracing import cross_modal_trace

    how: Any = settings.corruption
    if how == "auto":
        how = "image" if all("corrupt_image" in p.labels for p in prompts) else "noise"
    clean, corrupt = pair_of(lens, prompts)
    return cross_modal_trace(
        lens,
        clean,
        corrupt if how == "image" else how,
        objects=objects_of(prompts, first),
        names=[p.labels["object"] for p in prompts],
        **answers_of(prompts),  # pyright: ignore[reportArgumentType]
        components=settings.sites_of("cross_modal"),
        layers=settings.layer_list(),
        metric=settings.metric,  # pyright: ignore[reportArgumentType]
        direction=settings.direction,  # pyright: ignore[reportArgumentType]
        noise=settings.noise or 1.0,
        min_gap=settings.min_gap,
        seed=settings.seed,
        checkpoint=passes,
        progress=_shown(),
    )


def _sweep(lens: "Lens", settings: TraceSettings, prompts: Sequence[Prompt], first: int, passes: Path) -> "CausalMap":
    from interp.tracing import patch_sweep

    options = {"window": settings.window or 1, "checkpoint": passes, "progress": _shown()}
    return patch_sweep(lens, *pair_of(lens, prompts), **_grid(settings, "sweep", prompts), **options)


def _attribution(
    lens: "Lens", settings: TraceSettings, prompts: Sequence[Prompt], first: int, passes: Path
) -> "CausalMap":
    from interp.tracing import attribution_patching

    options = _grid(settings, "attribution", prompts)
    options |= {"steps": settings.steps, "softmax": settings.softmax}
    return attribution_patching(lens, *pair_of(lens, prompts), **options)


def _paths(lens: "Lens", settings: TraceSettings, prompts: Sequence[Prompt], first: int, passes: Path) -> "CausalMap":
    from interp.tracing import path_patching

    return path_patching(
        lens,
        *pair_of(lens, prompts),
        receivers=list(settings.receivers) or "logits",
        via=settings.via,  # pyright: ignore[reportArgumentType]
        positions=settings.positions or "last",  # pyright: ignore[reportArgumentType]
        mlps=settings.mlps,  # pyright: ignore[reportArgumentType]
        metric=settings.metric,  # pyright: ignore[reportArgumentType]
        direction=settings.direction,  # pyright: ignore[reportArgumentType]
        min_gap=settings.min_gap,
        progress=_shown(),
        **answers_of(prompts),  # pyright: ignore[reportArgumentType]
    )


def _grid(settings: TraceSettings, method: str, prompts: Sequence[Prompt]) -> dict[str, Any]:
    options = {name: getattr(settings, name) for name in ("heads", "metric", "direction", "min_gap")}
    options["positions"] = settings.positions or ("each" if method == "sweep" else "all")
    layers = settings.layer_list()
    return {**options, **answers_of(prompts), "sites": settings.sites_of(method), "layers": layers}


def _knockout(
    lens: "Lens", settings: TraceSettings, prompts: Sequence[Prompt], first: int, passes: Path
) -> "CausalMap":
    from interp.tracing import attention_knockout

    batch = prepared(lens, prompts, padding_side="left")
    return attention_knockout(
        lens,
        batch,
        edges_of(settings, batch, prompts, first),
        layers=settings.layer_list(),
        window=settings.window or 9,
        metric=settings.metric,  # pyright: ignore[reportArgumentType]
        **answers_of(prompts),  # pyright: ignore[reportArgumentType]
        progress=_shown(),
    )


def _shown() -> bool:
    import sys

    return sys.stderr.isatty()
