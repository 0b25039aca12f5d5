"""What each method's scores mean, in plain words for the report: unit, how to read them, caveats."""

from collections.abc import Mapping
from typing import Any

TITLES = {
    "direct_effect": "Direct effect",
    "importance": "Importance",
    "ablation": "Ablation",
    "patterns": "Attention patterns",
    "vision_divergence": "Vision divergence (VHD)",
    "visual_concentration": "Visual concentration",
    "pursuit": "Head pursuit",
    "logit_lens": "Logit lens",
}

QUESTIONS = {
    "direct_effect": "What does a head itself write towards the answer?",
    "importance": "How sensitive is the output to a head?",
    "ablation": "What changes when a head is removed?",
    "patterns": "Where does a head look?",
    "vision_divergence": "How much does a head's output depend on the image?",
    "visual_concentration": "How much, and how narrowly, does a head look at the image?",
    "pursuit": "How much of what a head writes do the keywords explain?",
    "logit_lens": "How far does a head's output point towards the keywords?",
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
    known = {
        **{"direct_effect": _direct, "importance": _importance, "ablation": _ablation, "patterns": _patterns},
        **{"vision_divergence": _divergence, "visual_concentration": _concentration},
        **{"pursuit": _pursuit, "logit_lens": _logit_lens},
    }
    return known[method](settings)


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


WITHOUT = {
    "drop": "cut out of the text, which closes up; a part of the difference then comes from the moved positions alone",
    "drop_keep_positions": "cut out, while every other token keeps its position",
    "mask": "hidden from every token outside it, in all layers",
    "zero": "replaced by the mean colour of the normalisation",
    "mean": "replaced by its own mean colour",
    "noise": "replaced by noise",
}

FORMS = {
    "absolute": "the norm of the difference of the two outputs (the paper's form; heads that write much come first)",
    "relative": "the norm of the difference as a share of the mean norm of the two outputs",
    "cosine": "one minus the cosine of the two outputs",
    "projected": "the norm of the difference of what the head adds to the residual stream",
}


def _divergence(settings: Mapping[str, Any]) -> str:
    rule = {
        "keep": "No head was left out as an outlier; the column `outlier` is the share of prompts in which the paper's "
        "rule would have done so.",
        "biased": "Heads that the paper's rule calls outliers count as zero in that prompt.",
        "unbiased": "Heads that the paper's rule calls outliers count as zero in that prompt.",
    }[settings.get("outliers", "keep")]
    return (
        "Each prompt is run twice, with its image and without it, and the number is how far a head's output at the "
        f"last position moves: {FORMS[settings.get('form', 'absolute')]}. Averaged over prompts. The image is "
        f"{WITHOUT[settings['without']]}. {rule} The columns `seen` and `unseen` are the mean norms with and without "
        "the image. Source: He et al. 2025 (VHD).\n\n"
        "What it does not say: that the head's output changes does not mean that the change is used, or that it is the "
        "right thing about the image. And a head of a late layer moves because those below it moved."
    )


def _concentration(settings: Mapping[str, Any]) -> str:
    return (
        "Each number is w times C at the last position, averaged over prompts: w is the share of the head's attention "
        "on image tokens, C how concentrated it is there (0: even, 1: all on one token). The columns keep both apart. "
        "`without_sinks` is the same score over image tokens that are no sinks, that is, whose norm is at most "
        f"{settings.get('sink', 5):g} times the median: where it falls far below the score, the head rests on tokens "
        "that draw attention without being read. Source: after Bi et al. 2025; the formula is ours.\n\n"
        "What it does not say: attention is where information may come from, not what is moved."
    )


def _keywords(settings: Mapping[str, Any]) -> str:
    report = settings["keywords"]
    kept, dropped = report["kept"], report["dropped"]
    text = f"Keywords: {', '.join(kept)} ({len(settings['ids'])} tokens with their variants)."
    if dropped:
        text += f" Left out: {'; '.join(f'{word}: {why}' for word, why in dropped.items())}."
    return text


def _pursuit(settings: Mapping[str, Any]) -> str:
    lists = settings["random_lists"]["count"]
    floor = (
        f"`floor` is the mean score of {lists} random lists of the same make-up, `above_floor` the score less that, "
        "and `p` the share of random lists that score at least as much (the keywords counted as one). With many heads, "
        "some have a small p by chance. "
        if lists
        else ""
    )
    what = "variance over prompts" if settings["center"] else "mean square"
    return (
        f"Each number is the share of the {what} of what a head adds to the residual stream that lies in the span of "
        f"the keywords' rows of the unembedding (positions: {settings['positions']}; final norm: "
        f"{settings['apply_final_norm']}). {floor}`variance` is what the head writes in all, `explained` the score "
        f"times it: a high score of a head that writes little matters little. {_keywords(settings)} Source: Basile et "
        "al. 2025 (Head Pursuit).\n\n"
        "What it does not say: how often the concept is named, or that the head makes the model name it; what later "
        "layers make of its output; and what it always writes, whatever the prompt, which centring takes away."
    )


def _logit_lens(settings: Mapping[str, Any]) -> str:
    return (
        "Each number is the mean over prompts and keywords of the logit that the head's output gives when it alone is "
        f"put on the unembedding (final norm: {settings['apply_final_norm']}); `sd` is its standard deviation over "
        f"prompts. The baseline that Head Pursuit is compared with. {_keywords(settings)}\n\n"
        "What it does not say: logits without the final norm have no fixed scale, and a head can point towards a "
        "hundred other words as much; nothing here says by how much the keywords stand out."
    )


ROLES = (
    "A head can widen the difference in two ways: on_answer is its direct effect on the answer's own logit, on_wrong "
    "on the wrong one's; score is on_answer minus on_wrong. The at_ columns say how much of its attention at the last "
    "position lies on the answer's token, the wrong answer's token and the first token (where idle heads rest). "
    "A head that looks at the answer and raises it is a name mover in the sense of Wang et al. 2023; one that looks at "
    "the wrong answer and lowers it suppresses that token."
)


TOPICS = (
    "Topics show what the top heads of a ranking write, as the tokens that explain the most of it (simultaneous "
    "orthogonal matching pursuit over the unembedding, the mean over prompts taken away), in the order in which they "
    "explain it; `explained` is the share of the head's variance over these prompts that the tokens explain together. "
    "Where it is small, the list says little."
)

EFFECTS = (
    "A ranking means something where its top does more to the model than random heads do. Here the heads at both ends "
    "of each ranking are {what}, all of a set at once, beside random sets with as many heads in each layer (in the "
    "nearest layers where one has too few), of which none is in the set. `change` is the mean change over prompts with "
    "its 95% bootstrap interval; `random` the mean of the random sets, and in brackets the smallest and the largest. "
    "`p` is the share of random sets that change the number by as much in either direction, the set itself counted "
    "as one: with {controls} random sets it cannot be below {least:.2f}. For rankings with a sign, top and bottom are "
    "its two ends; for the others the bottom is what matters least."
)
