"""From prompts to what the methods are asked: batches, the positions to explain, and the answers."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from interp.attribution.attention_times_gradient import attention_times_gradient
from interp.attribution.blank_out import blank_out
from interp.attribution.common import token_text
from interp.attribution.continued import continued
from interp.attribution.flow import flow
from interp.attribution.globenc import globenc
from interp.attribution.input_gradient import gradient_x_input, input_gradient
from interp.attribution.integrated_gradients import integrated_gradients
from interp.attribution.raw_attention import raw_attention
from interp.attribution.relative_attention import relative_attention
from interp.attribution.relevance import relevance
from interp.attribution.rollout import rollout
from interp.attribution.targets import answer_ids, question
from interp.attribution.token_activation_map import token_activation_map
from interp.batch import Batch
from interp.cli.attribution.settings import CONTRASTING, AttributeSettings
from interp.cli.prompts import images_of, prepared
from interp.errors import InputError, InterpError, UnsupportedError
from interp.evaluation import image_prompt
from interp.inputs import tokenizer_of
from interp.reads import Positions, Read
from interp.tokens import TokenScores

if TYPE_CHECKING:
    from interp.data import Prompt
    from interp.lens import Lens

FUNCTIONS: dict[str, Callable[..., TokenScores]] = {
    "raw_attention": raw_attention,
    "rollout": rollout,
    "flow": flow,
    "globenc": globenc,
    "attention_times_gradient": attention_times_gradient,
    "relevance": relevance,
    "input_gradient": input_gradient,
    "gradient_x_input": gradient_x_input,
    "integrated_gradients": integrated_gradients,
    "blank_out": blank_out,
    "token_activation_map": token_activation_map,
    "relative_attention": relative_attention,
}

UP_TO = ("rollout", "flow", "globenc")
"""Methods that go through all layers up to one."""

BLANKED_ROWS = 4  # rows of a run of blank_out for each prompt of a batch
MEMORY = 2**30  # bytes of patterns and gradients of a batch


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """A batch and what is asked of it.

    Attributes:
        rows: indices of the prompts.
        batch: prompts as the model takes them; for the target argmax with what the model said behind them.
        target: the positions to explain.
        answers: for each prompt the answer's text, or ids [prompt, target]; None for the largest logit.
        wrong: texts of wrong answers.
        said: for the target argmax the tokens that the model said.
        general: for relative_attention the same images with a general instruction.
    """

    rows: list[int]
    batch: Batch
    target: Positions
    answers: Any = None
    wrong: list[str] | None = None
    said: list[list[str]] | None = None
    general: Batch | None = None


class Asker:
    """Makes batches for one model.

    Attributes:
        lens: the model.
        settings: what is asked.
        prompts: all prompts of the run.
        pictures_alone: whether the model reads no text.
        pooled: whether the model's logits are of the whole input, as a classifier's are.
        room: how many rows a run of blank_out may have, beside what the batch size says; None for as many.
    """

    def __init__(self, lens: "Lens", settings: AttributeSettings, prompts: Sequence["Prompt"]) -> None:
        name = getattr(lens.model, "main_input_name", "input_ids")
        if name in ("input_features", "input_values"):
            raise UnsupportedError(
                f"{lens.name} reads sounds, and prompt files hold texts and images. From Python: "
                f"lens.prepare({name}=...), then the functions of interp.attribution."
            )
        self.lens, self.settings, self.prompts = lens, settings, prompts
        self.pictures_alone = name == "pixel_values" and tokenizer_of(lens.processor) is None
        self.pooled = False
        self.room: int | None = None
        with self.naming([0]):
            first = self.batch([0])
            with suppress(UnsupportedError):  # without logits there is a position to explain, but no answer
                self.pooled = lens.run(first, Read("logits")).logits.ndim == 2

    @contextmanager
    def naming(self, rows: Sequence[int]) -> Iterator[None]:
        """Errors about one of the prompts at hand get its number in the file."""
        try:
            yield
        except InterpError as error:
            text = str(error)
            found = re.match(r"(?:prompt|sample) (\d+)\b", text)
            if found is not None and int(found[1]) < len(rows):
                text = f"{self.name(rows[int(found[1])])}{text[found.end() :]}"
            elif len(rows) == 1:
                text = f"{self.name(rows[0])}: {text}"
            raise type(error)(text) from error

    def name(self, i: int) -> str:
        """What a prompt is called in errors."""
        return f"prompt {i + 1} of {len(self.prompts)}"

    def check(self, i: int) -> int:
        """Whether one prompt can be used, without running the model; gives the number of its tokens.

        Raises:
            InterpError: it cannot; the message has its number.
        """
        prompt = self.prompts[i]
        with self.naming([i]):
            batch = self.batch([i])
            if self.settings.span is not None:
                batch.find(self.settings.span)
            if self.settings.target != "argmax" and any(map(self.settings.answering, self.settings.methods)):
                for name in ("answer", "wrong"):
                    if (text := getattr(prompt, name)) is not None:
                        answer_ids(self.lens, [text], (1, 1), self.lens.vocabulary, pooled=self.pooled, name=name)
        return batch.mask.shape[1]

    def batch(self, rows: Sequence[int]) -> Batch:
        """The prompts as the model takes them.

        A text without the image placeholder gets it in front, as `interp evaluate` does it.

        Raises:
            InputError: texts for a model that reads none, no text for one that does, or an image that cannot be read.
        """
        lens, prompts = self.lens, [self.prompts[i] for i in rows]
        if self.pictures_alone:
            images = images_of(prompts)
            if any(p.text for p in prompts) or images is None:
                raise InputError(f"{lens.name} reads images alone: prompts have an image and no text.")
            return lens.prepare(images=images)
        return prepared(lens, prompts, padding_side="left" if self.settings.target == "argmax" else None)

    def of(self, rows: list[int]) -> Asked:
        """Some prompts with what is asked of them."""
        settings, lens = self.settings, self.lens
        asked = Asked(rows, self.batch(rows), "last", general=self._general(rows))
        if settings.target == "argmax":
            return self._continued(asked)
        answers, wrong = ([getattr(self.prompts[i], name) for i in rows] for name in ("answer", "wrong"))
        known = {
            "answers": None if answers[0] is None else answers,
            "wrong": None if wrong[0] is None else wrong,
        }
        target: Positions = "last"
        if settings.span is not None:
            target = asked.batch.find(settings.span)
        elif settings.target == "first":
            target = 0
        elif self.pooled:
            read = question(lens, asked.batch, None, None, None, rows=True)
            target = torch.zeros_like(read.stream.mask).scatter_(1, read.chosen.index, True)
        elif lens.anatomy.main == "vision":
            target = 0
        return replace(asked, target=target, **known)

    def _continued(self, asked: Asked) -> Asked:
        """With what the model says, each token of it to be explained where it is predicted."""
        lens = self.lens
        tokens = lens.generate(asked.batch, max_new_tokens=self.settings.max_new_tokens, min_new_tokens=1).tokens
        whole, predicts = continued(lens, asked.batch, tokens)
        counts = predicts.sum(1, keepdim=True).cpu()
        ids = tokens[:, : int(counts.max())].cpu()
        real = torch.arange(ids.shape[1]) < counts
        ids = ids.masked_fill(~real, 0)
        tokenizer = tokenizer_of(lens.processor)
        said = [
            [token_text(tokenizer, t) if r else "" for t, r in zip(a, b, strict=True)]
            for a, b in zip(ids.tolist(), real.tolist(), strict=True)
        ]
        return replace(asked, batch=whole, target=predicts, answers=ids, said=said)

    def _general(self, rows: Sequence[int]) -> Batch | None:
        if "relative_attention" not in self.settings.methods or self.settings.form == "gradient":
            return None
        text = image_prompt(self.lens, self.settings.general)
        return self.lens.prepare([text] * len(rows), images_of([self.prompts[i] for i in rows]))

    def attribute(self, method: str, asked: Asked) -> TokenScores:
        """One method on one batch.

        Raises:
            InterpError: the model, the batch and the method's options do not fit together.
        """
        settings = self.settings
        options = settings.options(method)
        layer = options.pop("layer", None)
        if layer is not None:
            options["layers" if method in UP_TO else "layer"] = layer
        if "image_mode" in options:
            options["image"] = options.pop("image_mode")
        if method == "blank_out":
            rows = BLANKED_ROWS * settings.batch_size
            options["batch_size"] = rows if self.room is None else max(len(asked.batch), min(rows, self.room))
        if method == "relevance":
            options["memory"] = MEMORY // len(asked.batch)
        if method == "relative_attention":
            options["general"] = asked.general
        target = asked.target
        if settings.answering(method):
            options["answers"] = asked.answers
            options |= {"wrong": asked.wrong} if method in CONTRASTING else {}
        elif settings.tower == "vision" and settings.target == "last":
            target = 0
        with self.naming(asked.rows):
            scores = FUNCTIONS[method](self.lens, asked.batch, target=target, **options)
        if len(scores) != len(asked.rows):
            raise UnsupportedError(
                f"{method}: tower {scores.tower!r} has {len(scores)} rows for {len(asked.rows)} prompts: it is for one "
                "picture, in one piece, to each prompt. Leave tower out, or try --batch-size 1."
            )
        more = {"prompt_index": asked.rows} | ({"said": asked.said} if asked.said else {})
        return replace(scores, settings={**scores.settings, **more})
