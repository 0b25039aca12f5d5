"""Read a CTranslate2 model with struct and numpy, and write its Whisper as a transformers folder.

The container (binary version 6, little-endian): version, name of the specification, its revision, then the variables
(name, rank, shape, type, size in bytes, data), then aliases of variables. Strings carry their length, with a final NUL.
The weights read here are float16 and not quantised, so they are written as float16, unchanged.
"""

import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from interp.errors import FileError, UnsupportedError
from interp.models.writing import write_json, write_weights

_VERSION = 6
_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_END, _START, _PREVIOUS, _NO_TIMESTAMPS = 50256, 50257, 50360, 50362


def convert(sources: Mapping[str, Path], target: Path) -> None:
    """Write the English Whisper of a CTranslate2 folder's files into the folder `target`.

    Args:
        sources: `model.bin`, `config.json` and `tokenizer.json`, by name.
        target: an existing, empty folder.

    Raises:
        FileError: `model.bin` is not a whole file of the version read here.
        UnsupportedError: it holds another model than Whisper.
    """
    variables = read_ctranslate2(sources["model.bin"])
    tensors = whisper_tensors(variables)
    decoding = json.loads(sources["config.json"].read_text(encoding="utf-8"))
    write_weights(target, tensors)
    write_json(target / "config.json", _config(variables, tensors, decoding))
    write_json(target / "generation_config.json", _generation_config(decoding))
    write_json(target / "preprocessor_config.json", _preprocessor(tensors))
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    write_json(
        target / "tokenizer_config.json",
        {
            "tokenizer_class": "WhisperTokenizer",
            "processor_class": "WhisperProcessor",
            "model_max_length": 448,
            **special,
        },
    )
    shutil.copyfile(sources["tokenizer.json"], target / "tokenizer.json")


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """The variables of a CTranslate2 `model.bin`, by name, in their stored types.

    Raises:
        FileError: the file has another binary version, or is not whole.
        UnsupportedError: the model is not a Whisper.
    """
    content = path.read_bytes()
    try:
        return _read(content)
    except (struct.error, KeyError, ValueError) as error:
        raise FileError(f"{path} is not a whole CTranslate2 file of version {_VERSION}: {error}") from error


def whisper_tensors(variables: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """CTranslate2 variables under the names of `WhisperForConditionalGeneration`; fused projections are split.

    Raises:
        FileError: the key projection has a bias that is not zero, which Whisper has no place for.
    """
    tensors = {"model.decoder.embed_tokens.weight": variables["decoder/embeddings/weight"]}
    for index in (1, 2):
        tensors.update(_linear(variables, f"encoder/conv{index}", f"model.encoder.conv{index}"))
    for side in ("encoder", "decoder"):
        tensors[f"model.{side}.embed_positions.weight"] = variables[f"{side}/position_encodings/encodings"]
        tensors.update(_norm(variables, f"{side}/layer_norm", f"model.{side}.layer_norm"))
        for layer in range(_layers(variables, side)):
            old, new = f"{side}/layer_{layer}", f"model.{side}.layers.{layer}"
            tensors.update(_norm(variables, f"{old}/self_attention/layer_norm", f"{new}.self_attn_layer_norm"))
            tensors.update(_split(variables, f"{old}/self_attention/linear_0", f"{new}.self_attn", "qkv"))
            tensors.update(_linear(variables, f"{old}/self_attention/linear_1", f"{new}.self_attn.out_proj"))
            if side == "decoder":
                tensors.update(_norm(variables, f"{old}/attention/layer_norm", f"{new}.encoder_attn_layer_norm"))
                tensors.update(_split(variables, f"{old}/attention/linear_0", f"{new}.encoder_attn", "q"))
                tensors.update(_split(variables, f"{old}/attention/linear_1", f"{new}.encoder_attn", "kv"))
                tensors.update(_linear(variables, f"{old}/attention/linear_2", f"{new}.encoder_attn.out_proj"))
            tensors.update(_norm(variables, f"{old}/ffn/layer_norm", f"{new}.final_layer_norm"))
            tensors.update(_linear(variables, f"{old}/ffn/linear_0", f"{new}.fc1"))
            tensors.update(_linear(variables, f"{old}/ffn/linear_1", f"{new}.fc2"))
    return tensors


def _read(content: bytes) -> dict[str, np.ndarray]:
    at = 0

    def number(code: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{code}", content, at)
        at += struct.calcsize(f"<{code}")
        return value

    def raw(length: int) -> bytes:
        nonlocal at
        start, at = at, at + length
        if at > len(content):
            raise ValueError(f"it ends at byte {len(content)}, before byte {at}")
        return content[start:at]

    def string() -> str:
        return raw(number("H"))[:-1].decode("utf-8")

    version = number("I")
    if version != _VERSION:
        raise ValueError(f"it has version {version}")
    specification = string()
    if specification != "WhisperSpec":
        raise UnsupportedError(f"The CTranslate2 model is a {specification!r}; only 'WhisperSpec' is read.")
    number("I")
    variables: dict[str, np.ndarray] = {}
    for _ in range(number("I")):
        name = string()
        shape = [number("I") for _ in range(number("B"))]
        kind = _TYPES[number("B")]
        variables[name] = np.frombuffer(raw(number("I")), kind).reshape(shape)
    for _ in range(number("I")):
        alias, name = string(), string()
        variables[alias] = variables[name]
    return variables


def _layers(variables: Mapping[str, np.ndarray], side: str) -> int:
    prefix = f"{side}/layer_"
    numbered = (name.removeprefix(prefix).split("/")[0] for name in variables if name.startswith(prefix))
    return len({number for number in numbered if number.isdigit()})


def _linear(variables: Mapping[str, np.ndarray], old: str, new: str) -> Iterator[tuple[str, np.ndarray]]:
    yield f"{new}.weight", variables[f"{old}/weight"]
    yield f"{new}.bias", variables[f"{old}/bias"]


def _norm(variables: Mapping[str, np.ndarray], old: str, new: str) -> Iterator[tuple[str, np.ndarray]]:
    yield f"{new}.weight", variables[f"{old}/gamma"]
    yield f"{new}.bias", variables[f"{old}/beta"]


def _split(variables: Mapping[str, np.ndarray], old: str, new: str, parts: str) -> Iterator[tuple[str, np.ndarray]]:
    weights = np.split(variables[f"{old}/weight"], len(parts))
    biases = np.split(variables[f"{old}/bias"], len(parts))
    for part, weight, bias in zip(parts, weights, biases, strict=True):
        yield f"{new}.{part}_proj.weight", weight
        if part != "k":
            yield f"{new}.{part}_proj.bias", bias
        elif bias.any():
            raise FileError(f"The key bias in {old!r} is not zero, but Whisper's key projection has none.")


def _config(
    variables: Mapping[str, np.ndarray], tensors: Mapping[str, np.ndarray], decoding: Mapping[str, Any]
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "dtype": "float16",
        "vocab_size": tensors["model.decoder.embed_tokens.weight"].shape[0],
        "d_model": tensors["model.decoder.embed_tokens.weight"].shape[1],
        "num_mel_bins": tensors["model.encoder.conv1.weight"].shape[1],
        "max_source_positions": tensors["model.encoder.embed_positions.weight"].shape[0],
        "max_target_positions": tensors["model.decoder.embed_positions.weight"].shape[0],
        "begin_suppress_tokens": decoding["suppress_ids_begin"],
        **_special_ids(),
    }
    for side in ("encoder", "decoder"):
        config[f"{side}_layers"] = _layers(variables, side)
        config[f"{side}_attention_heads"] = int(variables[f"{side}/num_heads"])
        config[f"{side}_ffn_dim"] = tensors[f"model.{side}.layers.0.fc1.weight"].shape[0]
    return config


def _special_ids() -> dict[str, int]:
    return {"bos_token_id": _END, "eos_token_id": _END, "pad_token_id": _END, "decoder_start_token_id": _START}


def _generation_config(decoding: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_special_ids(),
        "max_length": 448,
        "is_multilingual": False,
        "return_timestamps": False,
        "max_initial_timestamp_index": 50,
        "no_timestamps_token_id": _NO_TIMESTAMPS,
        "prev_sot_token_id": _PREVIOUS,
        "begin_suppress_tokens": decoding["suppress_ids_begin"],
        "suppress_tokens": decoding["suppress_ids"],
        "alignment_heads": decoding["alignment_heads"],
    }


def _preprocessor(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "WhisperProcessor",
        "feature_size": tensors["model.encoder.conv1.weight"].shape[1],
        "sampling_rate": 16_000,
        "hop_length": 160,
        "chunk_length": 30,
        "n_fft": 400,
        "padding_value": 0.0,
        "return_attention_mask": False,
    }
