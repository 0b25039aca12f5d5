"""What each method's scores mean, in plain words for the report: unit, how to read them, caveats."""

from collections.abc import Mapping
from typing import Any

TITLES = {
    "direct_effect": "Direct effect",
    "importance": "Importance",
    "ablation": "Ablation",
    "patterns": "Attention patterns",
}

QUESTIONS = {
    "direct_effect": "What does a head itself write towards the answer?",
    "importance": "How sensitive is the output to a head?",
    "ablation": "What changes when a head is removed?",
    "patterns": "Where does a head look?",
}

KIND_WORDS = {
    "induction": "the token that followed an earlier copy of the current one (the prefix-matching score)",
    "previous": "the token just before the current one",
    "duplicate": "earlier copies of the current token",
    "first": "the first token",
    "local": "the last few tokens, itself included",
}


def explanation(method: str, settings: Mapping[str, Any]) -> str:
    """Paragraphs on one method's scores: what they are, how to read them, what they do not say."""
    return {"direct_effect": _direct, "importance": _importance, "ablation": _ablation, "patterns": _patterns}[method](
        settings
    )


def _metric(settings: Mapping[str, Any], answers: str = "metric") -> str:
    if settings.get(answers) == "nats":
        return "the mean next-token loss of the prompt, in nats"
    return "the logit of the answer minus that of the wrong answer at the last position (of the answer alone where no "\
        "wrong one is given)"  # fmt: skip


def _direct(settings: Mapping[str, Any]) -> str:
    target = (
        "the logit of the right answer minus that of the wrong one"
        if settings.get("wrong") is not None
        else "the logit of the right answer"
    )
    unit = (
        "Unit: share of the prompt's whole logit difference (shares explode where that is near zero)."
        if settings.get("normalize")
        else "Unit: logits."
    )
    return (
        f"Each number is what the head itself adds to {target}, at the last position, averaged over prompts. {unit} "
        "Above zero the head pushes towards the answer, below zero against it.\n\n"
        "How it is computed: the head's contribution to the residual stream goes through the final norm, whose scale "
        "is held at its value in the full run, and onto the unembedding. That split is exact: heads, MLPs, biases and "
        "the embedding together give the logits.\n\n"
        "What it does not say: this is the direct path only. A head that works through later heads or MLPs (as "
        "induction or duplicate-token heads do for a name mover) can matter much and score near zero here. And a large "
        "score need not mean that removing the head changes the answer, since other heads may make up for it."
    )


def _importance(settings: Mapping[str, Any]) -> str:
    unit = {
        "none": "Unit: change of that quantity per unit of the mask",
        "layer": "Divided by the L2 norm of each layer, so that layers cannot be compared with each other; no unit",
        "global": "Divided by the L2 norm over all heads; no unit",
    }[settings.get("normalize", "none")]
    return (
        f"Each number is the size of the derivative of {_metric(settings)} with respect to a mask on the head's "
        f"output (1 = as it is, 0 = removed), taken for each {settings.get('absolute', 'example')} and averaged over "
        f"prompts. {unit}. Larger means more sensitive; by its construction the score has no sign. The column "
        "`signed` keeps the mean derivative: where it is positive, strengthening the head raises the quantity.\n\n"
        "What it does not say: it is a first-order estimate at the model as it is. It predicts the effect of a small "
        "change of the head; removing a head is a large one, and heads that saturate a softmax or back each other up "
        "are misjudged. All paths count here, not the direct one alone."
    )


def _ablation(settings: Mapping[str, Any]) -> str:
    how = (
        "replaced by zero"
        if settings.get("mode") == "zero"
        else "replaced by its mean over all tokens of all these prompts"
    )
    loss = settings.get("metric") == "nats"
    sign = (
        "Above zero the loss rises without the head, so the head was useful."
        if loss
        else "Below zero the answer loses ground without the head, so the head was useful for it."
    )
    off = (
        "A zero is a value that the layers above never saw in training (off-distribution), and it also takes away "
        "whatever constant the head always writes; heads of the first layers look strong partly for that reason. Mean "
        "ablation (--mode mean) is gentler."
        if settings.get("mode") == "zero"
        else "The mean keeps what the head always writes and removes what depends on the prompt."
    )
    return (
        f"Each number is the exact change of {_metric(settings)}, when the output of this one head is {how} at every "
        f"position and all else runs on. Unit: {'nats' if loss else 'logits'}. {sign}\n\n"
        f"What it does not say: {off} One head at a time is removed, so that two heads which do the same work can both "
        "look dispensable; and the rest of the model reacts (self-repair), so the number is the net effect, not the "
        "head's own contribution."
    )


def _patterns(settings: Mapping[str, Any]) -> str:
    kind = settings.get("score", "induction")
    chance = settings.get("uniform", {}).get(kind)
    level = (
        ""
        if chance is None
        else f" A head that spreads its attention evenly over what it can see would score {chance:.3f}."
    )
    return (
        f"Each number is the share of a head's attention, between 0 and 1, that goes to {KIND_WORDS[kind]}, averaged "
        f"over the positions where there is such a token, then over prompts.{level}\n\n"
        "The other columns of the table are the same for: "
        + "; ".join(f"{name}: {words}" for name, words in KIND_WORDS.items() if name != kind)
        + ".\n\nWhat it does not say: attention is where information may come from, not what is moved, nor whether it "
        "matters to the output. A high induction score means that the head looks in the right place for copying."
    )


ROLES = (
    "A head can widen the difference in two ways: on_answer is its direct effect on the answer's own logit, on_wrong "
    "on the wrong one's; score is on_answer minus on_wrong. The at_ columns say how much of its attention at the last "
    "position lies on the answer's token, the wrong answer's token and the first token (where idle heads rest). "
    "A head that looks at the answer and raises it is a name mover in the sense of Wang et al. 2023; one that looks at "
    "the wrong answer and lowers it suppresses that token."
)
