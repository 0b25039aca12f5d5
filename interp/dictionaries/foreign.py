"""Dictionaries of other projects, converted: Gemma Scope, dictionary_learning, sparsify, and what SAELens can name.

    Gemma Scope           params.npz                       JumpReLU (transcoders too)
    dictionary_learning   config.json, ae.pt               standard, gated, top-k, JumpReLU; batch-top-k as JumpReLU
    sparsify              cfg.json, sae.safetensors        top-k; transcoders, with and without a skip

Each gives the reconstructions that its own library gives, and its latents, as they are when it is used and not as it
is when it is trained: kinds that choose within a batch have a threshold. `ae.pt` is a pickle: it is read by the
restricted reader of torch, which makes tensors and nothing else.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.dictionaries.base import SAE, Dictionary, Transcoder
from interp.dictionaries.folding import fold_decoder_norms
from interp.errors import FileError, InputError, UnsupportedError, unknown
from interp.files import read_json, read_tensors

if TYPE_CHECKING:
    import sae_lens

NPZ, PICKLED, SPARSIFY = "params.npz", "ae.pt", "sae.safetensors"


def open_foreign(path: Path) -> Dictionary | None:
    """A file or folder of another project as a dictionary; None if it is none of theirs."""
    if path.suffix == ".npz" or (path / NPZ).is_file():
        return _gemma_scope(path)
    if (path / PICKLED).is_file():
        return _dictionary_learning(path)
    return _sparsify(path) if (path / SPARSIFY).is_file() else None


def from_saelens(sae: str | sae_lens.SAE, sae_id: str | None = None) -> Dictionary:
    """A dictionary that SAELens holds, or one that it can fetch by name.

    Args:
        sae: SAELens's object; or the name of a release, such as `gemma-scope-2b-pt-res-canonical`.
        sae_id: which one of the release, such as `layer_20/width_16k/canonical`.

    Returns:
        The dictionary, with SAELens's metadata.

    Raises:
        InputError: a release without `sae_id`, or something that is not SAELens's.
        UnsupportedError: an architecture that only SAELens has.
    """
    import sae_lens

    from interp.dictionaries.files import load

    if isinstance(sae, str):
        if sae_id is None:
            raise InputError(f"give the sae_id of release {sae!r}: which of its dictionaries is meant.")
        sae = sae_lens.SAE.from_pretrained(sae, sae_id)
    if not isinstance(sae, sae_lens.SAE):
        raise InputError(f"from_saelens takes a sae_lens.SAE or the name of a release, got {type(sae).__name__}.")
    with TemporaryDirectory() as folder:
        sae.save_model(folder)
        return load(folder)


def _made(
    kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], *, transcodes: bool = False, **more: Any
) -> Dictionary:
    """A dictionary with these weights, W_enc [d_in, d_sae] and W_dec [d_sae, d_out] among them."""
    (d_in, d_sae), d_out = tensors["W_enc"].shape, tensors["W_dec"].shape[1]
    width = {"d_out": d_out} if transcodes else {}
    settings = {"d_in": d_in, "d_sae": d_sae, "architecture": kind, "rescale_acts_by_decoder_norm": False, **width}
    found = (Transcoder if transcodes else SAE)(**settings, **more)
    found.metadata = dict(metadata)
    own = found.state_dict()
    wrong = [n for n in own if n not in tensors or tensors[n].shape != own[n].shape]
    if wrong:
        raise FileError(f"the weights do not make a dictionary of architecture {kind!r}: look at {', '.join(wrong)}.")
    found.load_state_dict({n: tensors[n].float() for n in own})
    return found.eval()


def _gemma_scope(path: Path) -> Dictionary:
    """`params.npz`: W_enc, b_enc, W_dec, b_dec, threshold."""
    import numpy as np

    file = path if path.suffix == ".npz" else path / NPZ
    try:
        with np.load(file, allow_pickle=False) as content:
            tensors = {name: torch.from_numpy(content[name]) for name in content.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise FileError(f"{file} cannot be read as an npz of numbers: {error}.") from error
    lacking = {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"} - tensors.keys()
    if lacking:
        raise FileError(f"{file} is not a dictionary of Gemma Scope: it lacks {', '.join(sorted(lacking))}.")
    transcodes = "W_skip" in tensors or tensors["W_enc"].shape[0] != tensors["W_dec"].shape[1]
    transcodes = transcodes or "transcoder" in str(file)
    more = {"skip": "W_skip" in tensors} if transcodes else {}
    return _made("jumprelu", tensors, {}, transcodes=transcodes, apply_b_dec_to_input=False, **more)


def _dictionary_learning(folder: Path) -> Dictionary:
    """`config.json` names the class under `trainer`; `ae.pt` holds its state."""
    trainer = (read_json(folder / "config.json") or {}).get("trainer", {})
    file = folder / PICKLED
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise FileError(f"{file} cannot be read as a file of tensors and nothing else: {error}.") from error
    kind = trainer.get("dict_class")
    if kind not in _CLASSES:
        raise unknown("dict_class", kind, tuple(_CLASSES), f"{folder / 'config.json'}")
    named = {"model_name": "lm_name", "layer": "layer", "submodule_name": "submodule_name"}
    metadata = {ours: trainer[theirs] for ours, theirs in named.items() if trainer.get(theirs) is not None}
    try:
        return _CLASSES[kind](state, trainer, metadata)
    except KeyError as error:
        raise FileError(f"{file} is not a {kind}: it lacks {error}.") from error


def _linear(state: Mapping[str, Tensor], bias: str) -> dict[str, Tensor]:
    """The weights of classes that are made of two `Linear`s."""
    found = {"W_enc": state["encoder.weight"].t(), "W_dec": state["decoder.weight"].t(), "b_dec": state[bias]}
    return found | ({"b_enc": state["encoder.bias"]} if "encoder.bias" in state else {})


def _standard(state: Mapping[str, Tensor], trainer: Mapping, about: Mapping) -> Dictionary:
    # Its loader gives the decoder rows of length one, and the latents their length.
    return fold_decoder_norms(_made("standard", _linear(state, "bias"), about, apply_b_dec_to_input=True))


def _new(state: Mapping[str, Tensor], trainer: Mapping, about: Mapping) -> Dictionary:
    return _made("standard", _linear(state, "decoder.bias"), about, apply_b_dec_to_input=False)


def _gated(state: Mapping[str, Tensor], trainer: Mapping, about: Mapping) -> Dictionary:
    gates = {"b_gate": state["gate_bias"], "b_mag": state["mag_bias"], "r_mag": state["r_mag"]}
    return _made("gated", _linear(state, "decoder_bias") | gates, about, apply_b_dec_to_input=True)


def _jumprelu(state: Mapping[str, Tensor], trainer: Mapping, about: Mapping) -> Dictionary:
    return _made("jumprelu", state, about, apply_b_dec_to_input=False)


def _topk(state: Mapping[str, Tensor], trainer: Mapping, about: Mapping) -> Dictionary:
    k = int(trainer.get("k") or state["k"])
    return _made("topk", _linear(state, "b_dec"), about, k=k, apply_b_dec_to_input=True)


def _batchtopk(state: Mapping[str, Tensor], trainer: Mapping, about: Mapping) -> Dictionary:
    # Matryoshka's weights are parameters of the class itself. A negative threshold was never set: all stay.
    tensors = dict(state) if "W_enc" in state else _linear(state, "b_dec")
    tensors["threshold"] = state["threshold"].clamp_min(0).expand(tensors["W_enc"].shape[1])
    return _made("jumprelu", tensors, about, apply_b_dec_to_input=True)


_CLASSES: dict[str, Callable[[Mapping[str, Tensor], Mapping, Mapping], Dictionary]] = {
    "AutoEncoder": _standard,
    "AutoEncoderNew": _new,
    "GatedAutoEncoder": _gated,
    "JumpReluAutoEncoder": _jumprelu,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batchtopk,
    "MatryoshkaBatchTopKSAE": _batchtopk,
}


def _sparsify(folder: Path) -> Dictionary:
    """`cfg.json` with k and whether it transcodes; the decoder has a row for each latent."""
    cfg, state = read_json(folder / "cfg.json"), read_tensors(folder / SPARSIFY)
    if cfg.get("activation", "topk") != "topk":
        raise UnsupportedError(f"{folder}: sparsify's activation {cfg['activation']!r} has no counterpart here.")
    lacking = {"encoder.weight", "encoder.bias", "W_dec", "b_dec"} - state.keys()
    if lacking:
        raise FileError(f"{folder / SPARSIFY} lacks {', '.join(sorted(lacking))}.")
    tensors = {"W_enc": state["encoder.weight"].t(), "b_enc": state["encoder.bias"]}
    tensors |= {name: state[name] for name in ("W_dec", "b_dec", "W_skip") if name in state}
    skip, centred = "W_skip" in tensors, not cfg.get("transcode")
    transcodes = skip or not centred
    if skip and centred:  # a transcoder here, which subtracts nothing: the encoder's bias does it
        tensors["b_enc"] = tensors["b_enc"] - tensors["b_dec"] @ tensors["W_enc"]
    more = {"skip": skip} if transcodes else {}
    about = {"hook_name": folder.name} if folder.name else {}
    return _made("topk", tensors, about, transcodes=transcodes, k=cfg["k"], **more)
