"""The parts of the scenes model before training: tokenizer, processor, configuration, random weights."""

from typing import Any

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from interp.data import scenes
from interp.data.scenes.questions import NUMBERS

PATCH = 9
PATCHES = (scenes.SIDE // PATCH) ** 2
IMAGE, PAD, BEGIN, END, UNKNOWN = "<image>", "<pad>", "<s>", "</s>", "<unk>"

_WORDS = (
    "a an and the is there in image ? . , photo of nothing describe what color background how many objects are left"
).split()
_TEMPLATE = (
    "{% for message in messages %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}"
    "{% if message['role'] == 'assistant' %}</s> {% endif %}"
    "{% endfor %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the captions and questions; upper case is lowered, marks are split off."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = [PAD, BEGIN, END, UNKNOWN, IMAGE]
    words = [*special, *_WORDS, "yes", "no", *NUMBERS, *scenes.COLOURS, *scenes.NAMES]
    words = list(dict.fromkeys(words))  # "orange" could be a colour and an object
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    fast.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    fast.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    fast.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, words.index(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def processor() -> LlavaProcessor:
    """Pictures of any size are scaled to the scenes' side (the whole picture: nothing is cut off)."""
    pixels = CLIPImageProcessorPil(
        size={"height": scenes.SIDE, "width": scenes.SIDE},
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    return LlavaProcessor(
        pixels,
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=_TEMPLATE,
    )


def configuration(words: PreTrainedTokenizerFast) -> LlavaConfig:
    """A CLIP tower of 4 layers and a llama of 6 layers; every head of both is small enough to look at."""
    ids: dict[str, Any] = {
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
    }
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=scenes.SIDE,
        patch_size=PATCH,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        **ids,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=words.convert_tokens_to_ids(IMAGE),
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        **ids,
    )


def fresh(*, seed: int) -> LlavaForConditionalGeneration:
    """The model with random weights."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(configuration(tokenizer()))
    generation = model.generation_config
    assert generation is not None
    generation.max_new_tokens = 48
    generation.do_sample = False
    return model
