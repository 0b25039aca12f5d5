"""What each method's numbers mean, in plain words for the report: how to read them, and what they do not see."""

from collections.abc import Mapping
from typing import Any

TITLES = {
    "raw_attention": "Raw attention",
    "rollout": "Rollout",
    "flow": "Flow",
    "globenc": "GlobEnc",
    "attention_times_gradient": "Attention times gradient",
    "relevance": "Relevance",
    "input_gradient": "Input gradient",
    "gradient_x_input": "Gradient times input",
    "integrated_gradients": "Integrated gradients",
    "blank_out": "Blank-out",
    "token_activation_map": "Token activation map",
    "relative_attention": "Relative attention",
}

QUESTIONS = {
    "raw_attention": "Where does one layer look?",
    "rollout": "Where would information come from, if attention and the residual stream were all?",
    "flow": "How much could flow from each token, through the narrowest pipes on the way?",
    "globenc": "Where would information come from, by the size of what layers really move?",
    "attention_times_gradient": "Where does one layer look, as far as the answer depends on it?",
    "relevance": "Where do all layers look, as far as the answer depends on it?",
    "input_gradient": "How strongly does the answer react to a small change of a token?",
    "gradient_x_input": "What does a token add to the answer, to first order?",
    "integrated_gradients": "What does a token add to the answer, against an average token?",
    "blank_out": "What does the answer lose when a token is taken away?",
    "token_activation_map": "Where in the picture does the word stand, read as if it were spoken there?",
    "relative_attention": "Where does the model look for this question, and not for any?",
}

SIGNED = ("gradient_x_input", "integrated_gradients", "blank_out")
"""Methods whose scores have a sign."""

_ROWS = "Unit: share; the scores of a target sum to 1. "
_NO_ANSWER = "It knows nothing of the answer: it is the same for every word that might follow. "
_SIGN = "Above zero a token speaks for the answer, below zero against it. "


def explanation(method: str, settings: Mapping[str, Any]) -> str:
    """Paragraphs on one method's scores: what they are, how to read them, what they do not see.

    Args:
        method: the method.
        settings: those of one of its results.
    """
    return _TEXTS[method](settings)


def _answer(settings: Mapping[str, Any]) -> str:
    what = {"probability": "the probability", "logprob": "the log-probability"}.get(settings.get("measure", ""))
    less = " less that of the wrong answer" if settings.get("wrong") else ""
    return f"{what or 'the logit'} of the answer{less}"


def _raw_attention(settings: Mapping[str, Any]) -> str:
    return (
        f"Each number is the attention that the target's position pays to a token in layer {settings.get('layer')}, "
        f"the {settings.get('fusion')} over heads, as a probability.\n\n"
        f"What it does not see: {_NO_ANSWER}It is one layer only, and after the first layer each position holds a "
        "mixture of all that it may see: attention to a position is not attention to the token that stands there. "
        "Much attention rests on the first token without reading it."
    )


def _rollout(settings: Mapping[str, Any]) -> str:
    even = settings.get("entropy")
    told = "" if even is None else (
        f" How even the rows are: {even:.2f}, where 1 is equal shares and 0 is all on one token."
    )  # fmt: skip
    return (
        f"Attention of all layers multiplied together, heads fused by their {settings.get('fusion')}, the residual "
        f"stream counted with the weight {settings.get('residual')}. {_ROWS}\n\n"
        f"What it does not see: {_NO_ANSWER}Values, output projections, MLPs and signs are left out, and with depth it "
        "tends to the same row for every target; in decoders most of it stands on the first token, whatever is "
        f"asked.{told}"
    )


def _flow(settings: Mapping[str, Any]) -> str:
    share = settings.get("first_layer")
    told = "" if share is None else f" Here that is so of {share:.0%} of the pairs in the first batch."
    return (
        "The attention of all layers read as pipes: the largest flow from the target's position down to a token. "
        f"{_ROWS if settings.get('normalise', True) else ''}\n\n"
        f"What it does not see: {_NO_ANSWER}Values, output projections, MLPs and signs are left out. A flow can never "
        "exceed what the first layer attends to a token in all; where it equals that, it says nothing of the "
        f"target.{told}"
    )


def _globenc(settings: Mapping[str, Any]) -> str:
    return (
        "As rollout, but each layer's matrix holds the size of the vector that one position takes from another, with "
        f"values, output projection, residual stream and norms, in place of the attention. {_ROWS}\n\n"
        f"What it does not see: {_NO_ANSWER}MLPs are left out, in decoders the largest part of the change, and a size "
        "has no sign: contributions that cancel count twice. Where a few huge numbers stand in the stream (the first "
        "token of most decoders), a position seems to take from itself alone."
    )


def _attention_times_gradient(settings: Mapping[str, Any]) -> str:
    return (
        f"The attention of layer {settings.get('layer')}, each head's weighted by the gradient of {_answer(settings)}, "
        "positive parts only, mean over heads.\n\n"
        "What it does not see: all that speaks against the answer, all other layers, values and MLPs. Where the "
        "softmax is saturated the gradient is near zero and the map with it."
    )


def _relevance(settings: Mapping[str, Any]) -> str:
    return (
        f"Gradient-weighted attention (for {_answer(settings)}), positive parts only, carried through all layers by "
        "Chefer's rules. No unit: compare within a target, not between.\n\n"
        "What it does not see: values, MLPs, and all that speaks against the answer. Gradients differ in size between "
        "layers, so only the order of tokens means something."
    )


def _input_gradient(settings: Mapping[str, Any]) -> str:
    return (
        f"The length of the gradient of {_answer(settings)} at each token's input vector: how much a small step of "
        "that vector could change it. No sign.\n\n"
        "What it does not see: direction, and whether such a step leads to anything that could be a token. It is of "
        "the model as it is; a token whose effect is saturated has a small gradient and may matter much."
    )


def _gradient_x_input(settings: Mapping[str, Any]) -> str:
    return (
        f"The gradient of {_answer(settings)} times each token's input vector: the first-order change if the vector "
        f"were put to zero. {_SIGN}\n\n"
        "What it does not see: anything but the first order. A zero vector is no token, and far from the model as it "
        "is; with norms at the input the numbers say little about so large a step."
    )


def _integrated_gradients(settings: Mapping[str, Any]) -> str:
    return (
        f"What each token adds to {_answer(settings)} against a baseline ({settings.get('baseline')}), by gradients at "
        f"{settings.get('steps')} points on the straight path between. {_SIGN}The scores of a target sum to the "
        "difference between the two ends, but for an error that is told where it is large.\n\n"
        "What it does not see: the path lies among vectors that are no tokens, and another baseline gives another map."
    )


def _blank_out(settings: Mapping[str, Any]) -> str:
    done = {"replace": "replaced by another token", "mask": "hidden from all attention", "drop": "left out"}
    seen = {"mask": "hidden from all attention", "mean": "the picture's mean colour", "blur": "blurred"}
    how = [
        *([f"tokens are {done[settings['text']]}"] if "text" in settings else []),
        *([f"patches are {seen[settings['image']]}"] if "image" in settings else []),
    ]
    return (
        f"Each number is what {_answer(settings)} loses when this one token is taken away ({', '.join(how)}), by "
        f"running the model again. {_SIGN}It is the only one of the methods that measures an effect: where the others "
        "disagree with it, doubt them first.\n\n"
        "What it does not see: one token at a time is taken away, so two that say the same both look dispensable. What "
        "is left is no natural text or picture, and each way of blanking is unnatural in another way: compare two."
    )


def _token_activation_map(settings: Mapping[str, Any]) -> str:
    return (
        "Each image token's last state is read by the model's own head, as if it were about to be spoken: the number "
        "is the logit of the explained token there, less what earlier words put there, and smoothed over neighbours. "
        "Unit: logits, not negative.\n\n"
        "What it does not see: how anything came to be. No one trained image tokens to be read like this; whether it "
        "means a thing has to be checked for each model. A large score is no effect on the answer."
    )


def _relative_attention(settings: Mapping[str, Any]) -> str:
    form = settings.get("form", "relative")
    what = {
        "relative": f"The attention of the target's position to each image token in layer {settings.get('layer')}, "
        "divided by the attention that a general instruction gives the same token. Above 1: looked at more for this "
        "question than for any. Unit: ratio.",
        "gradient": f"The attention to each image token in layer {settings.get('layer')}, weighted by the gradient of "
        "the answer's log-probability, positive parts only. Unit: nats.",
        "pixel_gradient": "The gradient of the answer's log-probability at the pixels, divided by that under a general "
        "instruction, where there is fine detail, averaged over each image token. Unit: ratio.",
    }[form]
    return (
        f"{what} Text tokens have zero.\n\n"
        "What it does not see: attention is not influence. What the general instruction looks at as much as the "
        "question is cancelled, also where it is the thing in question; and the layer was not chosen for this model."
    )


_TEXTS = {
    "raw_attention": _raw_attention,
    "rollout": _rollout,
    "flow": _flow,
    "globenc": _globenc,
    "attention_times_gradient": _attention_times_gradient,
    "relevance": _relevance,
    "input_gradient": _input_gradient,
    "gradient_x_input": _gradient_x_input,
    "integrated_gradients": _integrated_gradients,
    "blank_out": _blank_out,
    "token_activation_map": _token_activation_map,
    "relative_attention": _relative_attention,
}

TARGETS = {
    "last": "The last position of each prompt is explained: methods that explain an answer take the prompt's own where "
    "the file gives one, and otherwise the token that the model finds most likely.",
    "first": "The first position of each prompt is explained (in encoders its class token): methods that explain an "
    "answer take the prompt's own where the file gives one, and otherwise the largest logit.",
    "argmax": "The model went on by itself, always with its most likely token, and each of its tokens is explained, at "
    "the position that it was predicted from; the tokens that it said before are among the sources. Answers in "
    "the file were not used.",
}


def target_text(target: str, span: str | None) -> str:
    """What was explained, in words."""
    if span is None:
        return TARGETS[target]
    return (
        f"The tokens of {span!r} are explained, where it stands first in each prompt: what their positions gathered, "
        "and for methods that explain an answer what is predicted there (the prompt's own answer where the file gives "
        "one)."
    )
