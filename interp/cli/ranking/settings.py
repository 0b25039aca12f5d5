"""The settings of `interp heads`: one frozen dataclass, checked in one place, and which method takes which."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from interp.cli import fields
from interp.cli.fields import setting
from interp.errors import InputError, SettingsError, UnsupportedError

if TYPE_CHECKING:
    from interp.data import Prompt

_OF_KEYWORDS = ("keywords", "positions", "apply_final_norm", "variants", "pieces")
OPTIONS = {
    "direct_effect": ("share",),
    "importance": ("normalize", "absolute"),
    "ablation": ("mode", "ablation_prompts"),
    "patterns": ("patterns_on", "repeat_rows", "repeat_length", "score", "window"),
    "vision_divergence": ("without", "form", "outliers"),
    "visual_concentration": ("sink",),
    "pursuit": (*_OF_KEYWORDS, "center", "random_lists"),
    "logit_lens": _OF_KEYWORDS,
}
"""The methods, and the settings that each takes."""

METHODS = tuple(OPTIONS)
VISUAL = ("vision_divergence", "visual_concentration")
CONCEPTUAL = ("pursuit", "logit_lens")
KINDS = ("induction", "previous", "duplicate", "first", "local")
UNHASHED = ("methods", "prompts", "images", "keywords", "device", "batch_size", "top")
"""What does not change the meaning of a number: it may differ when a run is taken up again. Files count by content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsSettings:
    """Everything that is chosen for a run of `interp heads`.

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
        None, "folder that the prompts' images are relative to; without a prompt file, each of its images is a prompt"
    )
    ask: str = setting("Describe the image.", "what the model is asked about each image of a folder without prompts")
    keywords: str | None = setting(
        None, "keyword file for pursuit and logit_lens: UTF-8, one word on a line, # for remarks"
    )
    patterns_on: str = setting(
        "auto",
        "inputs of `patterns`: the prompts, or random tokens repeated; auto takes the prompts where there are any",
        choices=("auto", "prompts", "repeated"),
    )
    repeat_rows: int = setting(8, "how many rows of repeated random tokens", least=1)
    repeat_length: int = setting(32, "how many tokens each row repeats", least=2)
    score: str = setting(
        "induction", f"which pattern score ranks the heads: {', '.join(KINDS)}", choices=KINDS, named=True
    )
    window: int = setting(4, "width of the pattern score `local`, the query itself included", least=1)
    mode: str = setting("zero", "what ablation puts in a head's place", choices=("zero", "mean"))
    ablation_prompts: int = setting(0, "ablate on the first so many prompts only; 0 for all", least=0)
    normalize: str = setting("none", "divide importance by an L2 norm", choices=("none", "layer", "global"))
    absolute: str = setting("example", "where importance takes the absolute value", choices=("example", "token"))
    share: bool = setting(False, "give direct_effect as a share of the logit difference instead of in logits")
    without: str = setting(
        "drop",
        "how vision_divergence takes the image away",
        choices=("drop", "drop_keep_positions", "mask", "zero", "mean", "noise"),
    )
    form: str = setting(
        "absolute",
        "how vision_divergence compares two outputs",
        choices=("absolute", "relative", "cosine", "projected"),
    )
    outliers: str = setting(
        "keep", "the paper's rule on outlying heads in vision_divergence", choices=("keep", "biased", "unbiased")
    )
    sink: float = setting(5.0, "how many times the median norm makes an image token a sink (visual_concentration)")
    positions: str = setting(
        "all",
        "over which tokens of a prompt pursuit and logit_lens take the mean",
        choices=("all", "image", "text", "last"),
    )
    center: bool = setting(True, "whether pursuit takes the mean over prompts away")
    apply_final_norm: str = setting(
        "none",
        "what of the final norm pursuit and logit_lens apply",
        choices=("none", "gain", "scale_only", "full"),
    )
    variants: bool = setting(True, "also take each keyword with a space in front, and with a capital")
    pieces: str = setting("drop", "what to do with keywords of several tokens", choices=("drop", "first", "all"))
    random_lists: int = setting(200, "random lists beside the keywords, for the floor of pursuit", least=0)
    topic_heads: int = setting(5, "of how many top heads the report shows topics and examples; 0 for none", least=0)
    topic_tokens: int = setting(10, "how many tokens a topic has", least=1)
    effect_heads: int = setting(
        8, "how many heads at each end of a ranking are removed to see what it does; 0 for none", least=0
    )
    effect_scale: float = setting(0.0, "what the outputs of those heads are multiplied with: 0 removes, -1 turns round")
    effect_prompts: int = setting(32, "do so on the first so many prompts; 0 for all", least=0)
    controls: int = setting(10, "random sets of heads beside each end of a ranking", least=1)
    seed: int = setting(0, "seed of every random choice", least=0)
    dtype: str | None = setting(None, "float32, float16, bfloat16 or auto; null for the model's default")
    device: str | None = setting(None, "cpu, cuda, cuda:1 or auto; null for the GPU where there is one")
    batch_size: int = setting(16, "prompts in one run of the model (ablation: up to four times as many)", least=1)
    top: int = setting(20, "how many heads the rankings list", least=1)

    def __post_init__(self) -> None:
        fields.check(self)
        if not self.model:
            raise SettingsError("no model is named: give a packaged model (see `interp models`), a folder or a hub id.")
        if not self.methods:
            raise SettingsError(
                f"no method is named: give --method, one or several of {', '.join(METHODS)}, with commas between."
            )
        needing = [m for m in self.methods if m != "patterns" or self.patterns_on == "prompts"]
        if self.prompts is None and self.images is None and needing:
            raise SettingsError(
                f"{', '.join(needing)} need prompts: give --prompts FILE (.jsonl or .csv), or --images DIR for the "
                "images of a folder."
            )
        conceptual = [m for m in self.methods if m in CONCEPTUAL]
        if self.keywords is None and conceptual:
            raise SettingsError(f"{', '.join(conceptual)} need keywords: give --keywords FILE, one word on a line.")
        if not 1 < self.sink < float("inf"):
            raise SettingsError(f"sink is a number above 1, found {self.sink}.")
        fields.check_taken(self, self.methods, OPTIONS)

    @classmethod
    def of(cls, *layers: Mapping[str, Any]) -> "HeadsSettings":
        """Settings from several mappings, later ones over earlier ones; None in a later one leaves the earlier.

        Raises:
            UnknownNameError: a key is no setting; the nearest are named.
        """
        return fields.merged(cls, layers)

    @property
    def repeated(self) -> bool:
        """Whether `patterns` reads repeated random tokens instead of the prompts."""
        none = self.prompts is None and self.images is None
        return self.patterns_on == "repeated" or (self.patterns_on == "auto" and none)

    def hashed(self) -> dict[str, Any]:
        """The settings that decide what the numbers mean."""
        kept = {key: value for key, value in asdict(self).items() if key not in UNHASHED}
        return kept | {"patterns_on": "repeated" if self.repeated else "prompts"}

    def check_prompts(self, prompts: Sequence["Prompt"]) -> None:
        """Whether the prompts carry what the methods need.

        Raises:
            InputError: some prompts have an answer (or a wrong one) and others not, direct_effect finds none, or
                pursuit a single prompt.
            UnsupportedError: a method for images, and a prompt without one.
            SettingsError: a folder of images is named, but no prompt has one.
        """
        from interp.cli.prompts import check_answers

        check_answers(prompts, self.prompts)
        if prompts and prompts[0].answer is None and "direct_effect" in self.methods:
            raise InputError(
                f"direct_effect needs the field 'answer' in every prompt of {self.prompts} (a next token such as "
                "' Mary'), and 'wrong' for a logit difference; none is there."
            )
        if self.images is not None and all(p.image is None for p in prompts):
            raise SettingsError(f"images names the folder {self.images}, but no prompt of {self.prompts} has an image.")
        visual = [m for m in self.methods if m in VISUAL]
        bare = [i for i, p in enumerate(prompts) if p.image is None]
        if visual and bare:
            raise UnsupportedError(
                f"{visual[0]} compares heads by what they do with an image, but prompt {bare[0] + 1} of {len(prompts)} "
                f"in {self.prompts} has none: give each prompt the field 'image'."
            )
        if "pursuit" in self.methods and self.center and len(prompts) == 1:
            raise InputError("pursuit is of the variance over prompts: give at least two prompts, or --no-center.")


def help_of(name: str) -> str:
    """What a setting is, in one line, with its choices and default."""
    return fields.help_of(HeadsSettings, name)


def template() -> str:
    """A commented config with the defaults, and the demo's model and prompts in place of what has none."""
    head = "Settings of `interp heads --config`. Options on the command line win over this file."
    shown = {"model": "smollm2-135m", "methods": ["direct_effect", "importance"], "prompts": "prompts.jsonl"}
    return fields.template(HeadsSettings, head, shown)


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a yaml file; relative `prompts`, `images` and `keywords` are taken relative to the file.

    Raises:
        FileError, SettingsError, UnknownNameError: as `interp.cli.fields.read_config`.
    """
    return fields.read_config(path, HeadsSettings, ("prompts", "images", "keywords"))
