"""Text encoders, vision encoders, dual encoders and encoder-decoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from ._entry import TEXT, VISION, Entry, builder, text_ids, text_inputs
from ._images import images
from ._tokenizer import VOCAB, tokenizer

_BERT = TEXT | {"type_vocab_size": 2}
_SIZE = {"height": 32, "width": 32}
_PIXELS = 32

# name -> (config class, model class, config arguments)
_TEXT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForMaskedLM", _BERT),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", _BERT),
    "distilbert": (
        "DistilBertConfig", "DistilBertForMaskedLM",
        {"vocab_size": VOCAB, "dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4,
         "max_position_embeddings": 128, "pad_token_id": 0},
    ),
    "electra": ("ElectraConfig", "ElectraForMaskedLM", _BERT | {"embedding_size": 16}),
    "albert": ("AlbertConfig", "AlbertForMaskedLM", _BERT | {"embedding_size": 16}),
    "modernbert": (
        "ModernBertConfig", "ModernBertForMaskedLM",
        TEXT | {
            "num_hidden_layers": 4, "local_attention": 4, "cls_token_id": 5, "sep_token_id": 6,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "deberta_v2": (
        "DebertaV2Config", "DebertaV2ForMaskedLM",
        TEXT | {
            "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0,
            "conv_kernel_size": 3, "conv_act": "gelu",
        },
    ),
}  # fmt: skip
_SEGMENTED = {"bert", "electra", "albert"}

# name -> (config class, model class, config arguments, image processor class, its arguments)
_VISION: dict[str, tuple[str, str, dict[str, Any], str, dict[str, Any]]] = {
    "vit": ("ViTConfig", "ViTForImageClassification", VISION, "ViTImageProcessorPil", {"size": _SIZE}),
    "deit": (
        "DeiTConfig", "DeiTForImageClassification", VISION,
        "DeiTImageProcessorPil", {"size": _SIZE, "crop_size": _SIZE},
    ),
    "beit": (
        "BeitConfig", "BeitForImageClassification",
        VISION | {"use_relative_position_bias": True, "use_absolute_position_embeddings": True, "vocab_size": 16},
        "BeitImageProcessorPil", {"size": _SIZE, "do_center_crop": False},
    ),
    "dinov2": (
        "Dinov2Config", "Dinov2ForImageClassification", VISION | {"mlp_ratio": 2},
        "BitImageProcessorPil", {"size": {"shortest_edge": 32}, "crop_size": _SIZE},
    ),
    "dinov2_with_registers": (
        "Dinov2WithRegistersConfig", "Dinov2WithRegistersForImageClassification",
        VISION | {"mlp_ratio": 2, "num_register_tokens": 3, "use_swiglu_ffn": True},
        "BitImageProcessorPil", {"size": {"shortest_edge": 32}, "crop_size": _SIZE},
    ),
    "swin": (
        "SwinConfig", "SwinForImageClassification",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
         "mlp_ratio": 2.0},
        "ViTImageProcessorPil", {"size": _SIZE},
    ),
}  # fmt: skip

_SEQ2SEQ_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
_BART = _SEQ2SEQ_IDS | {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 128,
    "forced_eos_token_id": None,
}  # fmt: skip
_T5 = _SEQ2SEQ_IDS | {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2,
    "num_heads": 4, "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
}  # fmt: skip
_MEL, _FRAMES = 16, 100
_SEQ2SEQ: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("T5Config", "T5ForConditionalGeneration", _T5),
    "bart": ("BartConfig", "BartForConditionalGeneration", _BART),
    "mbart": ("MBartConfig", "MBartForConditionalGeneration", _BART),
    "marian": ("MarianConfig", "MarianMTModel", _BART),
    "whisper": (
        "WhisperConfig", "WhisperForConditionalGeneration",
        _BART | {"num_mel_bins": _MEL, "max_source_positions": _FRAMES // 2, "max_target_positions": 128,
                 "begin_suppress_tokens": None},
    ),
}  # fmt: skip


def _config(class_name: str, kwargs: dict[str, Any]) -> Callable[[], Any]:
    return lambda: getattr(transformers, class_name)(**kwargs)


def _text_entry(name: str) -> Entry:
    config, model, kwargs = _TEXT[name]

    def segmented(batch: int, length: int, seed: int) -> dict[str, Tensor]:
        plain = text_inputs(batch, length, seed)
        segments = (torch.arange(length) >= length // 2).long().expand(batch, -1).clone()
        return plain | {"token_type_ids": segments}

    make_inputs = segmented if name in _SEGMENTED else text_inputs
    modern = name != "deberta_v2"  # whose disentangled attention is written out in full
    build = builder(model, _config(config, kwargs))
    return Entry(name, "encoder", build, make_inputs, tokenizer, sdpa=modern, interface=modern)


def _vision_entry(name: str) -> Entry:
    config, model, kwargs, processor_class, processor_kwargs = _VISION[name]

    def processor() -> Any:
        return getattr(transformers, processor_class)(**processor_kwargs)

    def make_inputs(batch: int, length: int, seed: int) -> dict[str, Tensor]:
        return dict(processor()(images(batch, [(_PIXELS, _PIXELS)], seed), return_tensors="pt"))

    return Entry(name, "vision", builder(model, _config(config, kwargs | {"num_labels": 5})), make_inputs, processor)


def _dual_entry(name: str) -> Entry:
    text, vision = TEXT | {"max_position_embeddings": 128}, VISION
    if name == "clip":
        text, vision = text | {"projection_dim": 24}, vision | {"projection_dim": 24}

    def config() -> Any:
        if name == "clip":
            return transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        return transformers.SiglipConfig(text_config=text, vision_config=vision)

    def processor() -> Any:
        if name == "clip":
            pixels = transformers.CLIPImageProcessorPil(size={"shortest_edge": _PIXELS}, crop_size=_SIZE)
            return transformers.CLIPProcessor(pixels, tokenizer())
        return transformers.SiglipProcessor(transformers.SiglipImageProcessorPil(size=_SIZE), tokenizer())

    def make_inputs(batch: int, length: int, seed: int) -> dict[str, Tensor]:
        pixels = processor().image_processor(images(batch, [(_PIXELS, _PIXELS)], seed), return_tensors="pt")
        return text_inputs(batch, length, seed) | dict(pixels)

    model = "CLIPModel" if name == "clip" else "SiglipModel"
    return Entry(name, "dual", builder(model, config), make_inputs, processor)


def _seq2seq_entry(name: str) -> Entry:
    config, model, kwargs = _SEQ2SEQ[name]

    def make_inputs(batch: int, length: int, seed: int) -> dict[str, Tensor]:
        decoder = text_ids(batch, max(2, length - 3), seed + 1)
        decoder[:, 0] = kwargs["decoder_start_token_id"]
        if name != "whisper":
            return text_inputs(batch, length, seed) | {"decoder_input_ids": decoder}
        audio = np.random.default_rng(seed).normal(size=(batch, 16000)).astype(np.float32)
        features = processor().feature_extractor(list(audio), sampling_rate=16000, return_tensors="pt")
        return {"input_features": features["input_features"], "decoder_input_ids": decoder}

    def processor() -> Any:
        if name != "whisper":
            return tokenizer()
        extractor = transformers.WhisperFeatureExtractor(feature_size=_MEL, chunk_length=1)
        return transformers.WhisperProcessor(extractor, tokenizer())

    return Entry(name, "encoder-decoder", builder(model, _config(config, kwargs)), make_inputs, processor)


ENTRIES: list[Entry] = [
    *map(_text_entry, _TEXT),
    *map(_vision_entry, _VISION),
    *map(_dual_entry, ["clip", "siglip"]),
    *map(_seq2seq_entry, _SEQ2SEQ),
]
