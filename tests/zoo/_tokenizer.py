"""One tiny byte-level tokenizer shared by the whole zoo: 64 special tokens, then the 256 bytes."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BYTE_OFFSET = 64
VOCAB = BYTE_OFFSET + 256

_NAMED = [
    "<pad>", "<bos>", "<eos>", "<unk>", "<mask>", "<cls>", "<sep>", "<end_of_utterance>",
    "<image>", "<video>", "<|image|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>",
    "<start_of_image>", "<end_of_image>", "<image_soft_token>",
    "<fake_token_around_image>", "<global-img>", "<img>", "</img>", "<IMG_CONTEXT>",
    "[IMG]", "[IMG_BREAK]", "[IMG_END]",
    "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL",
    *[f"TILE_{i}" for i in range(1, 5)],
    *[f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4)],
    "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip
SPECIAL = [*_NAMED, *[f"<unused_{i}>" for i in range(BYTE_OFFSET - len(_NAMED))]]
IDS: dict[str, int] = {token: index for index, token in enumerate(SPECIAL)}

_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}@IMAGE@{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_template(image_text: str = "") -> str:
    """A minimal chat template that writes ``image_text`` for every image part."""
    return _CHAT.replace("@IMAGE@", image_text)


def tokenizer(**attributes: str) -> PreTrainedTokenizerFast:
    """The shared tokenizer; ``attributes`` (e.g. ``image_token="<image>"``) become named special tokens."""
    vocab = dict(IDS)
    vocab.update({c: BYTE_OFFSET + i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))})
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    kwargs: dict[str, Any] = {"extra_special_tokens": attributes} if attributes else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        mask_token="<mask>",
        cls_token="<cls>",
        sep_token="<sep>",
        padding_side="right",
        model_max_length=4096,
        chat_template=chat_template(attributes.get("image_token", "")),
        **kwargs,
    )
