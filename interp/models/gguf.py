"""Read a GGUF file with numpy, and write a Llama model from one as a transformers folder.

The layout is that of GGUF version 2 and 3 (little-endian): a header, metadata as key-value pairs, a table of tensors,
and the tensors' data. Three tensor types are read: F32, Q8_0 and Q4_1 (blocks of 32 values with a float16 scale, and
for Q4_1 a float16 offset). Dequantised values are products and sums of float16 numbers that float16 itself cannot hold
(42 % of SmolLM2's would be rounded), so they are written as float32.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from interp.errors import FileError, UnsupportedError
from interp.models.gguf_tokenizer import write_tokenizer
from interp.models.writing import write_json, write_weights

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_BLOCK = 32

_LAYER_PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OUTER_PARTS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def convert(sources: Mapping[str, Path], target: Path) -> None:
    """Write the Llama model of the one GGUF file in `sources` into the folder `target`.

    Raises:
        FileError: the file is not a whole GGUF file.
        UnsupportedError: it holds another architecture, tensor type or tokenizer than those read here.
    """
    (path,) = sources.values()
    metadata, tensors = read_gguf(path)
    write_weights(target, llama_tensors(metadata, tensors))
    write_json(target / "config.json", llama_config(metadata, tied="output.weight" not in tensors))
    write_json(target / "generation_config.json", _special_ids(metadata))
    write_tokenizer(target, metadata)


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The metadata of a GGUF file, and its tensors as float32 arrays in row-major order.

    Raises:
        FileError: the file is not GGUF, or ends too early.
        UnsupportedError: a tensor has another type than F32, Q8_0 or Q4_1.
    """
    content = memoryview(path.read_bytes())
    try:
        return _read(content)
    except (struct.error, IndexError, ValueError) as error:
        raise FileError(f"{path} is not a whole GGUF file: {error}") from error


def llama_config(metadata: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """The transformers configuration of the Llama model that the metadata describes."""
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedError(f"This GGUF file holds the architecture {architecture!r}; only 'llama' is read.")
    heads = metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": metadata["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": metadata["llama.rope.freq_base"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        **_special_ids(metadata),
    }


def llama_tensors(metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """GGUF tensors under the names, and in the row order, of `LlamaForCausalLM`.

    Raises:
        UnsupportedError: a tensor has a name that a Llama model does not have.
    """
    heads = metadata["llama.attention.head_count"]
    rotary = {"attn_q": heads, "attn_k": metadata.get("llama.attention.head_count_kv", heads)}
    renamed: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        parts = name.split(".")
        if name in _OUTER_PARTS:
            renamed[_OUTER_PARTS[name]] = array
        elif len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_PARTS:
            _, layer, part, suffix = parts
            ordered = _half_split_rows(array, rotary[part]) if part in rotary else array
            renamed[f"model.layers.{layer}.{_LAYER_PARTS[part]}.{suffix}"] = ordered
        else:
            raise UnsupportedError(f"The GGUF tensor {name!r} has no place in a Llama model.")
    return renamed


def _half_split_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo the row order of GGUF, which interleaves the two halves of each head that rotary embedding pairs up."""
    return weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    keys = {
        name: f"tokenizer.ggml.{gguf}_token_id" for name, gguf in {"bos": "bos", "eos": "eos", "pad": "padding"}.items()
    }
    return {f"{name}_token_id": metadata[key] for name, key in keys.items() if key in metadata}


class _Cursor:
    def __init__(self, content: memoryview) -> None:
        self.content, self.at = content, 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.content, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        start, self.at = self.at, self.at + length
        return bytes(self.content[start : self.at]).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, length = self.scalar("I"), self.scalar("Q")
            return [self.value(inner) for _ in range(length)]
        if kind not in _SCALARS:
            raise ValueError(f"metadata type {kind} does not exist")
        return self.scalar(_SCALARS[kind])


def _read(content: memoryview) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    if bytes(content[:4]) != b"GGUF":
        raise ValueError("it does not begin with 'GGUF'")
    cursor = _Cursor(content)
    cursor.at = 4
    version, tensor_count, metadata_count = cursor.scalar("I"), cursor.scalar("Q"), cursor.scalar("Q")
    if version not in (2, 3):
        raise ValueError(f"it has version {version}, and versions 2 and 3 are read")
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"))
    table = []
    for _ in range(tensor_count):
        name = cursor.string()
        shape = [cursor.scalar("Q") for _ in range(cursor.scalar("I"))][::-1]
        table.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
    alignment = metadata.get("general.alignment", 32)
    base = -(-cursor.at // alignment) * alignment
    data = np.frombuffer(content, np.uint8)
    return metadata, {name: _dequantised(name, data[base + at :], shape, kind) for name, shape, kind, at in table}


def _dequantised(name: str, data: np.ndarray, shape: list[int], kind: int) -> np.ndarray:
    count = int(np.prod(shape))
    blocks = count // _BLOCK
    if kind == 0:
        values = data[: 4 * count].view(np.float32)
    elif kind == 8:
        block = data[: blocks * 34].reshape(blocks, 34)
        values = _float16(block[:, :2]) * block[:, 2:].view(np.int8)
    elif kind == 3:
        block = data[: blocks * 20].reshape(blocks, 20)
        nibbles = np.concatenate([block[:, 4:] & 15, block[:, 4:] >> 4], axis=1)
        values = nibbles * _float16(block[:, :2]) + _float16(block[:, 2:4])
    else:
        raise UnsupportedError(f"The GGUF tensor {name!r} has type {kind}; F32 (0), Q4_1 (3) and Q8_0 (8) are read.")
    return np.asarray(values, np.float32).reshape(shape)


def _float16(pair: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pair).view(np.float16).astype(np.float32)
