"""Write the byte-level BPE tokenizer and chat template that a GGUF file carries as tokenizer.json and its config."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interp.errors import UnsupportedError
from interp.models.writing import write_json

_CONTROL = 3
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# What "tokenizer.ggml.pre" means: how text is cut before the merges are applied.
_CUTS = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL]},
}


def write_tokenizer(target: Path, metadata: Mapping[str, Any]) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into the folder `target` from GGUF metadata.

    No beginning-of-sequence token is ever added, which is what the metadata must ask for.

    Raises:
        UnsupportedError: the tokenizer is not byte-level BPE, or cuts text in a way not known here.
    """
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    cut = metadata.get("tokenizer.ggml.pre")
    if metadata.get("tokenizer.ggml.model") != "gpt2" or cut not in _CUTS:
        raise UnsupportedError(
            f"This GGUF file has a tokenizer of model {metadata.get('tokenizer.ggml.model')!r} and pre {cut!r}; "
            f"read are model 'gpt2' with pre {', '.join(map(repr, _CUTS))}."
        )
    if metadata.get("tokenizer.ggml.add_bos_token"):
        raise UnsupportedError("This GGUF file asks for a beginning-of-sequence token, which is not written here.")
    kinds = metadata["tokenizer.ggml.token_type"]
    control = [index for index, kind in enumerate(kinds) if kind == _CONTROL]
    write_json(target / "tokenizer.json", _tokenizer(tokens, metadata["tokenizer.ggml.merges"], control, _CUTS[cut]))
    write_json(target / "tokenizer_config.json", _config(metadata, tokens))


def _tokenizer(tokens: list[str], merges: list[str], control: list[int], cut: Mapping[str, Any]) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": tokens[index], **flags} for index in control],
        "normalizer": None,
        "pre_tokenizer": cut,
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in merges],
        },
    }


def _config(metadata: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
    }
    for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            config[f"{name}_token"] = tokens[index]
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    return config
