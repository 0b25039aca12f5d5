"""The settings of `interp attribute`: one frozen dataclass, checked in one place, and which method takes which."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from interp.cli import fields
from interp.cli.fields import setting
from interp.errors import InputError, SettingsError, UnsupportedError

if TYPE_CHECKING:
    from interp.data import Prompt

OPTIONS = {
    "raw_attention": ("layer", "fusion", "tower"),
    "rollout": ("layer", "residual", "fusion", "tower"),
    "flow": ("layer", "residual", "fusion", "tower"),
    "globenc": ("layer", "tower"),
    "attention_times_gradient": ("layer", "tower"),
    "relevance": ("tower",),
    "input_gradient": ("measure", "tower"),
    "gradient_x_input": ("measure", "tower"),
    "integrated_gradients": ("steps", "baseline", "measure", "tower"),
    "blank_out": ("mode", "image_mode", "measure", "tower"),
    "token_activation_map": (),
    "relative_attention": ("form", "layer", "general"),
}
"""The methods, and the settings that each takes."""

METHODS = tuple(OPTIONS)
CONTRASTING = (
    *("attention_times_gradient", "relevance", "input_gradient", "gradient_x_input", "integrated_gradients"),
    "blank_out",
)
"""Methods that explain an answer, less a wrong one where there is one."""

FORMS = ("relative", "gradient", "pixel_gradient")
TOKENS = 8
NAMED = ("last", "first", "argmax")
SPAN = "text:"
UNHASHED = ("methods", "prompts", "images", "device", "batch_size", "top", "examples")
"""What does not change the meaning of a number: it may differ when a run is taken up again. Files count by content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttributeSettings:
    """Everything that is chosen for a run of `interp attribute`.

    Raises:
        UnknownNameError: a method or an option's value does not exist.
        SettingsError: a value is of the wrong type or outside its range, or settings contradict each other.
    """

    model: str = setting("", "a packaged model (`interp models`), a folder, or a hub id")
    methods: tuple[str, ...] = setting(
        (), f"what to compute, one or several: {', '.join(METHODS)}", choices=METHODS, one="method", named=True
    )
    prompts: str | None = setting(
        None, "prompt file, .jsonl or .csv: text, image, and answer and wrong (in a settings file: relative to it)"
    )
    images: str | None = setting(
        None, "folder that the prompts' images are relative to; null for the prompt file's own"
    )
    target: str = setting(
        "last",
        "what is explained: last (the last position, with the prompt's answer if it has one), first (the first "
        "position, such as a class token), argmax (each token with which the model itself goes on), or a text that "
        "stands in every prompt (each of its tokens; text:last for the word last)",
    )
    max_new_tokens: int = setting(TOKENS, "how many tokens the model goes on at most (target argmax)", least=1)
    layer: int | None = setting(
        None,
        "which layer: for raw_attention, attention_times_gradient and relative_attention the only one, for rollout, "
        "flow and globenc the last one; negative from the end, null for the method's own",
        kind=int,
    )
    residual: float = setting(0.5, "weight of the residual stream, from 0 to below 1 (rollout, flow)", least=0, below=1)
    fusion: str = setting(
        "mean", "how heads become one in raw_attention, rollout and flow", choices=("mean", "max", "min")
    )
    tower: str | None = setting(
        None,
        "where the sources stand: text, vision, encoder, decoder, cross (what the method can); null for the main one",
    )
    mode: str = setting("replace", "what blank_out does to a text token", choices=("replace", "mask", "drop"))
    image_mode: str = setting("mask", "what blank_out does to an image token", choices=("mask", "mean", "blur"))
    measure: str = setting(
        "logit",
        "what of the answer is explained by gradients and by blank_out",
        choices=("logit", "probability", "logprob"),
    )
    steps: int = setting(32, "points on the path of integrated_gradients", least=1)
    baseline: str = setting("mean", "where the path of integrated_gradients begins", choices=("mean", "zero", "pad"))
    form: str = setting("relative", "which map of relative_attention", choices=FORMS)
    general: str = setting(
        "Write a general description of the image.",
        "the instruction whose attention relative_attention divides by; the image is put in front",
    )
    seed: int = setting(0, "seed of every random choice (the intervals of the agreement)", least=0)
    dtype: str | None = setting(None, "float32, float16, bfloat16 or auto; null for the model's default")
    device: str | None = setting(None, "cpu, cuda, cuda:1 or auto; null for the GPU where there is one")
    batch_size: int = setting(8, "prompts in one run of the model (blank_out: up to four times as many)", least=1)
    top: int = setting(5, "how many tokens the rankings list", least=1)
    examples: int = setting(8, "how many prompts the report draws", least=0)

    def __post_init__(self) -> None:
        fields.check(self)
        if not self.model:
            raise SettingsError("no model is named: give a packaged model (see `interp models`), a folder or a hub id.")
        if not self.methods:
            raise SettingsError(
                f"no method is named: give --method, one or several of {', '.join(METHODS)}, with commas between."
            )
        if self.prompts is None:
            raise SettingsError("no prompts are named: give --prompts FILE (.jsonl or .csv).")
        if not self.target or self.target == SPAN:
            raise SettingsError(f"the target is empty: it is {', '.join(NAMED)}, or a text in every prompt.")
        self._check_fit()

    def _check_fit(self) -> None:
        """Whether something was chosen that nothing here takes."""
        fields.check_taken(self, self.methods, OPTIONS)
        if self.max_new_tokens != TOKENS and self.target != "argmax":
            raise SettingsError(f"max_new_tokens is for the target argmax, not for {self.target!r}.")
        if self.tower in ("vision", "encoder") and self.target not in ("last", "first"):
            own = [m for m in self.methods if "tower" in OPTIONS[m] and m not in CONTRASTING]
            if own:
                raise SettingsError(
                    f"{', '.join(own)} in the tower {self.tower} explain a position of that tower: its target is last "
                    f"or first, not {self.target!r}."
                )

    @classmethod
    def of(cls, *layers: Mapping[str, Any]) -> "AttributeSettings":
        """Settings from several mappings, later ones over earlier ones; None in a later one leaves the earlier.

        Raises:
            UnknownNameError: a key is no setting; the nearest are named.
        """
        return fields.merged(cls, layers)

    @property
    def span(self) -> str | None:
        """The text whose tokens are the targets, if it is one."""
        return None if self.target in NAMED else self.target.removeprefix(SPAN)

    def answering(self, method: str) -> bool:
        """Whether a method explains an answer; the others know only the position."""
        if method == "relative_attention":
            return self.form != "relative"
        return method in CONTRASTING or method == "token_activation_map"

    def options(self, method: str) -> dict[str, Any]:
        """The settings that a method takes, by name."""
        return {name: getattr(self, name) for name in OPTIONS[method]}

    def hashed(self) -> dict[str, Any]:
        """The settings that decide what the numbers mean."""
        return {key: value for key, value in asdict(self).items() if key not in UNHASHED}

    def check_prompts(self, prompts: Sequence["Prompt"]) -> None:
        """Whether the prompts carry what is asked.

        Raises:
            InputError: some have an answer (or a wrong one) and others not, or the target's text is not in a prompt.
            SettingsError: a folder of images is named, but no prompt has one.
            UnsupportedError: a method for pictures, and a prompt without one.
        """
        from interp.cli.prompts import check_answers

        check_answers(prompts, self.prompts)
        if self.images is not None and all(p.image is None for p in prompts):
            raise SettingsError(f"images names the folder {self.images}, but no prompt of {self.prompts} has an image.")
        for i, prompt in enumerate(prompts):
            place = f"prompt {i + 1} of {len(prompts)} in {self.prompts}"
            if self.span is not None and self.span not in prompt.text:
                raise InputError(f"the target {self.span!r} does not stand in {place}: {prompt.text[:80]!r}.")
            needing = [m for m in self.methods if m in ("token_activation_map", "relative_attention")]
            if needing and prompt.image is None:
                raise UnsupportedError(f"{needing[0]} explains by the tokens of a picture, but {place} has no image.")


def help_of(name: str) -> str:
    """What a setting is, in one line, with its choices and default."""
    return fields.help_of(AttributeSettings, name)


def template() -> str:
    """A commented config with the defaults, and a model, methods and a prompt file in place of what has none."""
    head = "Settings of `interp attribute --config`. Options on the command line win over this file."
    shown = {"model": "smollm2-135m", "methods": ["rollout", "gradient_x_input", "blank_out"]}
    return fields.template(AttributeSettings, head, {**shown, "prompts": "prompts.jsonl"})


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a yaml file; relative `prompts` and `images` are taken relative to the file.

    Raises:
        FileError, SettingsError, UnknownNameError: as `interp.cli.fields.read_config`.
    """
    return fields.read_config(path, AttributeSettings, ("prompts", "images"))
