"""Write a compiled program (.npz of tracr's parameters and residual labels) as a TracrModel folder with its tokenizer.

The vocabulary is read off the token embedding: row i is the one-hot vector of the dimension `tokens:<symbol>`. The
file holds no unembedding; tracr reads the answer off the dimensions of the program's last expression, and so does the
unembedding written here, with a one for each of them.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from interp.errors import FileError, unknown
from interp.models.writing import write_json, write_weights

_OUTPUTS = {"tracr_reverse.npz": "aggregate_1", "tracr_sort.npz": "sort_9", "tracr_hist.npz": "hist_7"}
_HEADS = 1
_BOS, _PAD = "bos", "compiler_pad"


def convert(sources: Mapping[str, Path], target: Path) -> None:
    """Write the program of the one .npz file in `sources` into the folder `target`.

    Raises:
        FileError: the file does not hold a program of the expected form.
        UnknownNameError: the file is not one of the bundled programs.
    """
    (path,) = sources.values()
    if path.name not in _OUTPUTS:
        raise unknown("tracr program", path.name, _OUTPUTS)
    with np.load(path, allow_pickle=False) as content:
        arrays = {name: content[name] for name in content.files}
    labels = [str(label) for label in arrays.pop("residual_labels")]
    inputs = _input_symbols(arrays["token_embed/embeddings"], labels)
    prefix = f"{_OUTPUTS[path.name]}:"
    answers = {label.removeprefix(prefix): at for at, label in enumerate(labels) if label.startswith(prefix)}
    symbols = inputs + [symbol for symbol in answers if symbol not in inputs]

    tensors = program_tensors(arrays)
    unembedding = np.zeros((len(symbols), len(labels)), np.float32)
    for symbol, dimension in answers.items():
        unembedding[symbols.index(symbol), dimension] = 1.0
    write_weights(target, tensors | {"lm_head.weight": unembedding})
    write_json(
        target / "config.json",
        {
            "architectures": ["TracrModel"],
            "model_type": "interp_tracr",
            "dtype": "float32",
            "vocab_size": len(symbols),
            "input_vocab_size": len(inputs),
            "hidden_size": len(labels),
            "num_hidden_layers": len({name.split(".")[1] for name in tensors if name.startswith("layers.")}),
            "num_attention_heads": _HEADS,
            "head_dim": tensors["layers.0.self_attn.q_proj.weight"].shape[0] // _HEADS,
            "intermediate_size": tensors["layers.0.mlp.fc_in.weight"].shape[0],
            "max_position_embeddings": tensors["embed_positions.weight"].shape[0],
            "residual_labels": labels,
            "bos_token_id": symbols.index(_BOS),
            "pad_token_id": symbols.index(_PAD),
            "tie_word_embeddings": False,
        },
    )
    _write_tokenizer(target, symbols)


def program_tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """tracr's parameters under the names of `TracrModel`, linear weights transposed to torch's (out, in)."""
    modules = {
        "attn/query": "self_attn.q_proj",
        "attn/key": "self_attn.k_proj",
        "attn/value": "self_attn.v_proj",
        "attn/linear": "self_attn.o_proj",
        "mlp/linear_1": "mlp.fc_in",
        "mlp/linear_2": "mlp.fc_out",
    }
    tensors = {
        "embed_tokens.weight": arrays["token_embed/embeddings"],
        "embed_positions.weight": arrays["pos_embed/embeddings"],
    }
    for name, array in arrays.items():
        parts = name.split("/")
        if parts[0] == "transformer":
            module = f"layers.{parts[1].removeprefix('layer_')}.{modules['/'.join(parts[2:4])]}"
            tensors[f"{module}.{'weight' if parts[4] == 'w' else 'bias'}"] = array.T
    return tensors


def _input_symbols(embedding: np.ndarray, labels: list[str]) -> list[str]:
    symbols = []
    for row in embedding:
        on = (label for label, value in zip(labels, row, strict=True) if value == 1.0)
        named = [label.removeprefix("tokens:") for label in on if label.startswith("tokens:")]
        if len(named) != 1:
            raise FileError(f"A row of the token embedding names {named or 'no token'}; one token was expected.")
        symbols.append(named[0])
    return symbols


def _write_tokenizer(target: Path, symbols: list[str]) -> None:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = [{"id": symbols.index(token), "content": token, **flags} for token in (_BOS, _PAD)]
    bos = {"SpecialToken": {"id": _BOS, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    write_json(
        target / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": special,
            "normalizer": None,
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [bos, text],
                "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {_BOS: {"id": _BOS, "ids": [symbols.index(_BOS)], "tokens": [_BOS]}},
            },
            "decoder": None,
            "model": {
                "type": "WordLevel",
                "vocab": {symbol: index for index, symbol in enumerate(symbols)},
                "unk_token": "[unknown]",
            },
        },
    )
    write_json(
        target / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": _BOS,
            "pad_token": _PAD,
            "padding_side": "right",
            "clean_up_tokenization_spaces": False,
        },
    )
