"""The settings of `interp trace`: one frozen dataclass, checked in one place, and which method takes which."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from interp.cli import fields
from interp.cli.fields import setting
from interp.errors import InputError, SettingsError, UnsupportedError, unknown

if TYPE_CHECKING:
    from interp.data import Prompt

_PAIRED = ("sites", "positions", "heads", "direction", "metric")
OPTIONS = {
    "causal": ("sites", "window", "noise", "samples", "severed"),
    "cross_modal": ("sites", "corruption", "noise", "direction", "metric"),
    "sweep": (*_PAIRED, "window"),
    "attribution": (*_PAIRED, "steps", "softmax"),
    "paths": ("receivers", "via", "positions", "mlps", "direction", "metric"),
    "knockout": ("edges", "window", "metric"),
}
"""The methods, and the settings that each takes."""

METHODS = tuple(OPTIONS)
SITES = {
    "causal": ("resid_post", "attn_out", "mlp_out"),
    "cross_modal": ("resid_pre", "attn_out", "mlp_out"),
    "sweep": ("resid_pre", "attn_out", "mlp_out"),
    "attribution": ("z",),
    "paths": ("z",),
}
"""The sites that a method takes where none are named."""

PAIRED = ("sweep", "attribution", "paths")
"""The methods that compare a clean and a corrupt prompt."""

GROUPS = ("each", "all", "last", "image", "text")
METRICS = ("logit_difference", "logit", "probability", "log_probability", "kl", "loss")
CORRUPTIONS = ("auto", "image", "noise", "embedding_noise", "mean", "swap")
NEEDS = {"causal": ("subject",), "cross_modal": ("object",), "sweep": ("corrupt",)}
NEEDS |= {"attribution": ("corrupt",), "paths": ("corrupt",)}
"""Fields of the prompts that a method cannot do without, beside the text; `corrupt` may be `corrupt_image`."""

FILES = ("corrupt_image", "mask")
"""Fields of the prompts that are paths of pictures."""

UNHASHED = ("methods", "prompts", "images", "device", "batch_size", "top")
"""What does not change the meaning of a number: it may differ when a run is taken up again. Files count by content."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSettings:
    """Everything that is chosen for a run of `interp trace`.

    Raises:
        UnknownNameError: a method or an option's value does not exist.
        SettingsError: a value is of the wrong type or outside its range, or settings contradict each other.
    """

    model: str = setting("", "a packaged model (`interp models`), a folder, or a hub id")
    methods: tuple[str, ...] = setting(
        (), f"what to compute, one or several: {', '.join(METHODS)}", choices=METHODS, one="method", named=True
    )
    prompts: str | None = setting(
        None,
        "prompt file, .jsonl or .csv: text, image, answer, wrong, and what the method needs: subject (causal); object, "
        "and box as 'x0 y0 x1 y1' in pixels or mask, a picture (cross_modal); corrupt, a text of as many tokens, or "
        "corrupt_image (sweep, attribution, cross_modal)",
    )
    images: str | None = setting(
        None, "folder that the paths of pictures are relative to; null for the prompt file's own"
    )
    sites: tuple[str, ...] = setting(
        (), "what is patched, names with commas between; none for the method's own", kind=tuple
    )
    layers: str | None = setting(None, "which layers, such as 0-5,8; null for all")
    positions: str | None = setting(
        None,
        f"which positions are patched: {', '.join(GROUPS)}; null for the method's own (sweep: each by itself, "
        "attribution: all together, paths: last)",
    )
    heads: str = setting("each", "patch each head by itself, or all together", choices=("each", "all"))
    window: int | None = setting(
        None,
        "how many layers are patched or cut together; null for the method's own (causal: 10 of attn_out and mlp_out, "
        "knockout: 9, else 1)",
        kind=int,
        least=1,
    )
    direction: str = setting(
        "denoise", "put clean values into the corrupt run, or corrupt ones into the clean", choices=("denoise", "noise")
    )
    metric: str | None = setting(
        None, "what is measured; null for the logit difference with wrong answers, else the method's own"
    )
    corruption: str = setting(
        "auto",
        "how cross_modal spoils the picture: the prompts' corrupt_image, noise on its pixels or on its tokens' "
        "embeddings, its mean colour, the next one's; auto takes corrupt_image where there is one, else noise",
        choices=CORRUPTIONS,
    )
    noise: float | None = setting(
        None,
        "size of the noise: causal in standard deviations of the subjects' embeddings (null: 3), cross_modal in those "
        "of the pixels (null: 1)",
        kind=float,
    )
    samples: int = setting(10, "noise samples of causal", least=1)
    severed: str | None = setting(
        None, "what causal puts back to its corrupt value above the state: attn_out or mlp_out; null for nothing"
    )
    softmax: str = setting(
        "exact", "how attribution takes queries and keys through the softmax", choices=("exact", "linear")
    )
    receivers: tuple[str, ...] = setting(
        (),
        "heads whose input paths changes, such as 23.3,29.1 (through k and v key/value heads); none for the logits",
        kind=tuple,
    )
    via: str = setting("q", "through which input of the receivers", choices=("q", "k", "v"))
    mlps: str = setting(
        "recomputed", "whether MLPs on a path are computed anew or held", choices=("recomputed", "frozen")
    )
    steps: int = setting(5, "gradients on the way from one run to the other (attribution); 0 for one alone", least=0)
    edges: tuple[str, ...] = setting(
        (),
        "what knockout cuts, as from>to with commas between: all, last, image, text (without the last token), or a "
        "field of the prompts whose text stands in them; none for image>text, text>last, image>last",
        kind=tuple,
    )
    min_gap: float = setting(
        0.1, "smallest gap between the runs, in mean gaps, of a prompt that has a ratio of its own", least=0
    )
    seed: int = setting(0, "seed of every random choice", least=0)
    dtype: str | None = setting(None, "float32, float16, bfloat16 or auto; null for the model's default")
    device: str | None = setting(None, "cpu, cuda, cuda:1 or auto; null for the GPU where there is one")
    batch_size: int = setting(16, "prompts that are read and kept together", least=1)
    top: int = setting(20, "how many cells the rankings list", least=1)

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
        if self.metric is not None and self.metric not in METRICS:
            raise unknown("metric", self.metric, METRICS)
        if self.severed not in (None, "attn_out", "mlp_out"):
            raise unknown("severed", self.severed, ("attn_out", "mlp_out"))
        if self.positions is not None and self.positions not in GROUPS:
            raise unknown("positions", self.positions, GROUPS)
        if self.noise is not None and not 0 < self.noise < float("inf"):
            raise SettingsError(f"noise is a number above 0, found {self.noise}.")
        if len(set(self.sites)) < len(self.sites) or len(set(self.edges)) < len(self.edges):
            raise SettingsError("sites and edges are named once each.")
        self.layer_list()
        self.edge_list()
        fields.check_taken(self, self.methods, OPTIONS)

    @classmethod
    def of(cls, *layers: Mapping[str, Any]) -> "TraceSettings":
        """Settings from several mappings, later ones over earlier ones; None in a later one leaves the earlier.

        Raises:
            UnknownNameError: a key is no setting; the nearest are named.
        """
        return fields.merged(cls, layers)

    def layer_list(self) -> list[int] | None:
        """The layers by number; None for all.

        Raises:
            SettingsError: they are written in another way.
        """
        if self.layers is None:
            return None
        found: list[int] = []
        for part in self.layers.split(","):
            ends = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
            if not ends or (ends[2] and int(ends[2]) < int(ends[1])):
                raise SettingsError(f"layers are written such as 0-5,8; found {self.layers!r}.")
            found += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
        return list(dict.fromkeys(found))

    def edge_list(self) -> list[tuple[str, str]]:
        """The edges that are cut, as (from, to); none where none are named.

        Raises:
            SettingsError: they are written in another way.
        """
        found = [re.fullmatch(r"\s*([\w ]+?)\s*>\s*([\w ]+?)\s*", edge) for edge in self.edges]
        if not all(found):
            raise SettingsError(f"edges are written as from>to, such as image>last; found {list(self.edges)}.")
        return [(one[1], one[2]) for one in found if one]

    def sites_of(self, method: str) -> tuple[str, ...]:
        """The sites of one method."""
        return self.sites or SITES[method]

    def hashed(self) -> dict[str, Any]:
        """The settings that decide what the numbers mean."""
        return {key: value for key, value in asdict(self).items() if key not in UNHASHED}

    def check_prompts(self, prompts: Sequence["Prompt"]) -> None:
        """Whether the prompts carry what is asked.

        Raises:
            InputError: some have an answer (or another field that a method needs) and others not, or none has it.
            SettingsError: a folder of pictures is named, but no prompt has one.
            UnsupportedError: a method for pictures, and a prompt without one.
        """
        from interp.cli.prompts import check_answers

        check_answers(prompts, self.prompts)
        pictures = [p for p in prompts if p.image is not None]
        if self.images is not None and not pictures:
            raise SettingsError(f"images names the folder {self.images}, but no prompt of {self.prompts} has an image.")
        for method in self.methods:
            for i, prompt in enumerate(prompts):
                place = f"prompt {i + 1} of {len(prompts)} in {self.prompts}"
                missing = [n for n in NEEDS.get(method, ()) if not any(k in prompt.labels for k in _either(n))]
                if missing:
                    names = " or ".join(map(repr, _either(missing[0])))
                    raise InputError(f"{method} needs the field {names}: {place} has none.")
                if method == "causal" and prompt.labels["subject"] not in prompt.text:
                    raise InputError(f"the subject {prompt.labels['subject']!r} does not stand in the text of {place}.")
                if method == "cross_modal":
                    self._check_picture(prompt, place)
                if method in PAIRED and "corrupt_image" in prompt.labels and prompt.image is None:
                    raise InputError(f"{place} has a corrupt_image, but no image.")
            self._check_answer(method, prompts)
        if "knockout" in self.methods and not self.edges and len(pictures) < len(prompts):
            raise SettingsError(
                "knockout cuts image>text, text>last, image>last; for prompts without an image name others by --edge."
            )

    def _check_answer(self, method: str, prompts: Sequence["Prompt"]) -> None:
        have = prompts[0].answer is not None
        needs = method == "cross_modal" or (method in PAIRED and self.metric not in (None, "kl", "loss"))
        if needs and not have:
            raise InputError(f"{method} needs the field 'answer': the prompts of {self.prompts} have none.")
        if self.metric == "logit_difference" and (not have or prompts[0].wrong is None):
            raise InputError(f"logit_difference needs 'answer' and 'wrong': the prompts of {self.prompts} lack one.")

    def _check_picture(self, prompt: "Prompt", place: str) -> None:
        if prompt.image is None:
            raise UnsupportedError(f"cross_modal follows an object from a picture, but {place} has no image.")
        if "box" not in prompt.labels and "mask" not in prompt.labels:
            raise InputError(f"{place} does not say where the object is: give box, as 'x0 y0 x1 y1', or mask.")
        if self.corruption == "image" and "corrupt_image" not in prompt.labels:
            raise InputError(f"corruption 'image' needs the field 'corrupt_image': {place} has none.")


def _either(name: str) -> tuple[str, ...]:
    return ("corrupt", "corrupt_image") if name == "corrupt" else (name,)


def help_of(name: str) -> str:
    """What a setting is, in one line, with its choices and default."""
    return fields.help_of(TraceSettings, name)


def template() -> str:
    """A commented config with the defaults, and a model, methods and a prompt file in place of what has none."""
    head = "Settings of `interp trace --config`. Options on the command line win over this file."
    shown = {"model": "smollm2-135m", "methods": ["causal"], "prompts": "prompts.jsonl"}
    return fields.template(TraceSettings, head, shown)


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a yaml file; relative `prompts` and `images` are taken relative to the file.

    Raises:
        FileError, SettingsError, UnknownNameError: as `interp.cli.fields.read_config`.
    """
    return fields.read_config(path, TraceSettings, ("prompts", "images"))
