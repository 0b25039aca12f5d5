"""What each method's numbers mean, in plain words for the report."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp.tracing import CausalMap

TITLES = {
    "causal": "Causal trace",
    "cross_modal": "Cross-modal trace",
    "sweep": "Patching sweep",
    "attribution": "Attribution patching",
    "paths": "Path patching",
    "knockout": "Attention knock-out",
}

QUESTIONS = {
    "causal": "Which state brings the answer back when the subject is drowned in noise?",
    "cross_modal": "Which tokens bring the answer back when the picture is spoilt?",
    "sweep": "Which state, put from one run into the other, changes the answer?",
    "attribution": "What would the sweep find, to first order?",
    "paths": "What does a head give to the logits, or to other heads, directly?",
    "knockout": "What is lost when some tokens may not look at others?",
}

SITES = {
    "resid_pre": "the stream before a layer",
    "resid_mid": "the stream between attention and MLP",
    "resid_post": "the stream behind a layer",
    "attn_out": "what attention adds",
    "mlp_out": "what the MLP adds",
    "z": "the output of a head",
    "q": "queries",
    "k": "keys",
    "v": "values",
    "pattern": "attention probabilities",
    "scores": "attention",
}


def explanation(method: str, found: "CausalMap") -> str:
    """Paragraphs on one method's map: what a number is, how to read it, what it does not say."""
    known = {"causal": _causal, "cross_modal": _cross_modal, "attribution": _attribution, "paths": _paths}
    known["knockout"] = _knockout
    own = known.get(method, _sweep)(found, found.settings)
    return own if method == "knockout" else f"{own}\n\n{_ratio(found)}"


def _ratio(found: "CausalMap") -> str:
    base, source = ("corrupt", "clean") if found.direction == "denoise" else ("clean", "corrupt")
    left = f" {found.left_out} of {len(found)} prompts are left out of the mean of ratios: their gap is below "\
        f"{found.min_gap:g} of the mean gap." if found.left_out else ""  # fmt: skip
    return (
        f"An effect is the share of the gap between the runs that a patch closes: (patched - {base}) / ({source} - "
        f"{base}), a ratio of means over prompts of the {_metric(found)}. 0 changes nothing, 1 is the whole gap; more "
        f"than 1 and less than 0 can happen. Intervals are bootstraps over prompts.{left}"
    )


def _metric(found: "CausalMap") -> str:
    return found.metric.replace("_", " ") + (f", in {found.unit}" if found.unit else "")


def _window(settings: Any) -> str:
    window = settings.get("window", 1)
    several = window if isinstance(window, dict) else {"every site": window}
    named = ", ".join(f"{n} of {site}" for site, n in several.items() if n > 1)
    return f" Layers are patched together ({named}), which makes peaks wider and higher." if named else ""


def _causal(found: "CausalMap", settings: Any) -> str:
    left = settings["left_out"]
    others = f" {left} prompts are left out, since the model does not give their answer first." if left else ""
    return (
        f"The embeddings of the subject's tokens get normal noise of {settings['noise']:g} x {settings['sigma']:.3g} "
        f"({settings['samples']} samples, the same for every cell). In turn one state is put back to its clean value."
        f"{_window(settings)} Tokens are put together by their role.{others}\n\n"
        "Noise takes the model where it has never been; a corrupt prompt of its own (the method sweep) is the cleaner "
        "question. That a state suffices does not say that the fact is stored in it."
    )


def _cross_modal(found: "CausalMap", settings: Any) -> str:
    sizes = ", ".join(f"{name} {size:.1f}" for name, size in settings["tokens"].items())
    how = {
        "given": "another picture is given",
        "noise": "the pixels get noise",
        "mean": "the picture is its mean colour",
    }
    corruption = how.get(settings["corruption"], "the next prompt's picture is given")
    return (
        f"In the corrupt run {corruption}. In turn one component of one layer is put back at all tokens of a group. "
        f"Mean number of tokens: {sizes}.\n\n"
        "A group of many tokens brings back more than a group of one. Where an object's own image tokens do less than "
        "others, look for tokens that have taken it up in the layers below."
    )


def _sweep(found: "CausalMap", settings: Any) -> str:
    way = "clean values are put into the corrupt run" if found.direction == "denoise" else (
        "corrupt values are put into the clean run"
    )  # fmt: skip
    return (
        f"Cell by cell {way}.{_window(settings)} Effects of cells do not add up: what one layer brings back may be "
        "what another one would have, and a stream holds all that stands below it."
    )


def _attribution(found: "CausalMap", settings: Any) -> str:
    steps = settings.get("steps", 0)
    path = f"the mean of {steps} gradients on the way between the runs" if steps else "the gradient at the base run"
    return (
        f"An estimate of the sweep for all cells from {path}, times the difference between the runs. It is poor where "
        "a patch saturates: the stream and MLPs of the first layers, attention that is almost sure. Check the cells "
        "that matter with the method sweep."
    )


def _paths(found: "CausalMap", settings: Any) -> str:
    to = settings["receivers"]
    named = to if isinstance(to, str) else ", ".join(map(str, to))
    way = "computed anew" if settings["mlps"] == "recomputed" else "held"
    return (
        "The output of one head takes its value of the other run, all other heads are held; what that changes in the "
        f"receivers ({named}) is put in. MLPs in between are {way}. Paths through other heads are left out, and a "
        "backup head that would do the work is not seen."
    )


def _knockout(found: "CausalMap", settings: Any) -> str:
    window = settings.get("window", 1)
    return (
        f"The attention of some tokens to others is cut in {window} layer{'s' if window > 1 else ''} around the one "
        f"that is named, in all heads. An effect is the share of the {_metric(found)} that is lost; below 0 it "
        "grows.\n\n"
        "Information that moved to other tokens below the window is not seen, nor are detours inside it."
    )
