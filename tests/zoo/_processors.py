"""The real processor class of each vision-language family, with tiny sizes, PIL backends and no hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import transformers
from transformers import ProcessorMixin

from ._tokenizer import chat_template, tokenizer

PIXELS = 32
PATCH = 8
GRID = (PIXELS // PATCH) ** 2
SQUARE = {"height": PIXELS, "width": PIXELS}
PINPOINTS = [[32, 64], [64, 32], [64, 64], [32, 32]]
IMAGE_TEXT: dict[str, str] = {
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "internvl": "<IMG_CONTEXT>",
    "gemma3_vl": "<start_of_image>",
    "mllama": "<|image|>",
    "mistral3": "[IMG]",
}  # every other family: <image>


@contextmanager
def _without_video() -> Iterator[None]:
    """Accept any ``video_processor``, None too: the real ones need torchvision, and images never reach them."""
    check = ProcessorMixin.check_argument_for_proper_class

    def lenient(self: ProcessorMixin, name: str, argument: Any) -> Any:
        return None if name == "video_processor" else check(self, name, argument)

    with mock.patch.object(ProcessorMixin, "check_argument_for_proper_class", lenient):
        yield


def _pixels(class_name: str, **kwargs: Any) -> Any:
    return getattr(transformers, class_name)(**kwargs)


def _llava() -> Any:
    pixels = _pixels("CLIPImageProcessorPil", size={"shortest_edge": PIXELS}, crop_size=SQUARE)
    return transformers.LlavaProcessor(
        pixels,
        tokenizer(image_token="<image>"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _llava_next() -> Any:
    size: dict[str, Any] = {"size": {"shortest_edge": PIXELS}, "crop_size": SQUARE}
    return transformers.LlavaNextProcessor(
        _pixels("LlavaNextImageProcessorPil", image_grid_pinpoints=PINPOINTS, **size),
        tokenizer(image_token="<image>"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _llava_onevision() -> Any:
    return transformers.LlavaOnevisionProcessor(
        _pixels("LlavaOnevisionImageProcessorPil", image_grid_pinpoints=PINPOINTS, size=SQUARE),
        tokenizer(image_token="<image>", video_token="<video>"),
        None,
        num_image_tokens=GRID,
        vision_feature_select_strategy="full",
    )


def _qwen(class_name: str) -> Callable[[], Any]:
    def make() -> Any:
        pixels = _pixels(
            "Qwen2VLImageProcessorPil",
            patch_size=4,
            merge_size=2,
            temporal_patch_size=2,
            size={"shortest_edge": 8 * 8, "longest_edge": 64 * 64},
        )
        tokens = tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>")
        return getattr(transformers, class_name)(pixels, tokens, None)

    return make


def _internvl() -> Any:
    tokens = tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    pixels = _pixels("GotOcr2ImageProcessorPil", size=SQUARE, max_patches=3)
    return transformers.InternVLProcessor(pixels, tokens, None, image_seq_length=GRID // 4)


def _idefics3() -> Any:
    size = {"size": {"longest_edge": 2 * PIXELS}, "max_image_size": {"longest_edge": PIXELS}}
    return transformers.Idefics3Processor(
        _pixels("Idefics3ImageProcessorPil", **size), tokenizer(image_token="<image>"), image_seq_len=GRID // 4
    )


def _smolvlm() -> Any:
    from transformers.models.smolvlm import processing_smolvlm

    size = {"size": {"longest_edge": 2 * PIXELS}, "max_image_size": {"longest_edge": PIXELS}}
    pixels = _pixels("SmolVLMImageProcessorPil", **size)
    tokens = tokenizer(image_token="<image>", video_token="<video>", fake_image_token="<fake_token_around_image>")
    spell = processing_smolvlm.num2words or str  # only used in video prompts, but required at construction
    videos: Any = SimpleNamespace(num_frames=1, fps=1)  # what its apply_chat_template reads whatever the modality
    with mock.patch.object(processing_smolvlm, "num2words", spell):
        return transformers.SmolVLMProcessor(pixels, tokens, videos, image_seq_len=GRID // 4)


def _paligemma() -> Any:
    pixels = _pixels("SiglipImageProcessorPil", size=SQUARE)
    pixels.image_seq_length = GRID
    return transformers.PaliGemmaProcessor(pixels, tokenizer(image_token="<image>"))


def _gemma3() -> Any:
    tokens = tokenizer(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    return transformers.Gemma3Processor(
        _pixels("Gemma3ImageProcessorPil", size=SQUARE), tokens, image_seq_length=GRID // 4
    )


def _mllama() -> Any:
    pixels = _pixels("MllamaImageProcessorPil", size=SQUARE, max_image_tiles=4)
    return transformers.MllamaProcessor(pixels, tokenizer(image_token="<|image|>"))


def pixtral_pixels() -> Any:
    """The image processor of mistral3, which works without torchvision where its processor does not."""
    return _pixels("PixtralImageProcessorPil", size={"longest_edge": 2 * PIXELS}, patch_size=2 * PATCH)


def _mistral3() -> Any:
    try:
        from transformers.models.pixtral.processing_pixtral import PixtralProcessor
    except ImportError as error:
        raise NotImplementedError("PixtralProcessor's own module imports torchvision, which is missing") from error
    return PixtralProcessor(pixtral_pixels(), tokenizer(image_token="[IMG]"), patch_size=PATCH, spatial_merge_size=2)


def _aya_vision() -> Any:
    pixels = _pixels("GotOcr2ImageProcessorPil", size=SQUARE, max_patches=3)
    return transformers.AyaVisionProcessor(
        pixels, tokenizer(image_token="<image>"), patch_size=PATCH, img_size=PIXELS, downsample_factor=2
    )


PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen("Qwen2VLProcessor"),
    "qwen2_5_vl": _qwen("Qwen2_5_VLProcessor"),
    "qwen3_vl": _qwen("Qwen3VLProcessor"),
    "internvl": _internvl,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "paligemma": _paligemma,
    "gemma3_vl": _gemma3,
    "mllama": _mllama,
    "mistral3": _mistral3,
    "aya_vision": _aya_vision,
}


def processor(name: str) -> Any:
    """The processor of vision-language family ``name``; images only, no family's video processor is real."""
    with _without_video():
        made = PROCESSORS[name]()
    made.chat_template = chat_template(IMAGE_TEXT.get(name, "<image>"))
    return made
