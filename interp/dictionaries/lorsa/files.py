"""A Lorsa as files, the same function with other weights, and the files of the authors' package.

`save` writes `lorsa.json` and `lorsa_weights.safetensors`. `load_reference` opens the `config.json` and
`sae_weights.safetensors` of llamascopium (`LowRankSparseAttention`), with the norms of its data folded in. Its input is
the stream after the norm, without the norm's gain: what `metadata["hook_point_in"]` names in TransformerLens.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from interp.dictionaries.lorsa.config import LorsaConfig
from interp.dictionaries.lorsa.lorsa import Lorsa
from interp.errors import FileError, SettingsError, UnsupportedError
from interp.files import read_json, read_tensors, replacing

CFG, WEIGHTS = "lorsa.json", "lorsa_weights.safetensors"


def save(lorsa: Lorsa, folder: str | os.PathLike[str], *, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write a Lorsa into a folder, whole or not at all.

    Args:
        lorsa: trained on activations as they are, or with its scales folded in.
        folder: made where it is missing; the two files in it are replaced.
        metadata: what to keep beside the settings, over what `lorsa.metadata` holds.

    Returns:
        The folder.

    Raises:
        SettingsError: metadata cannot be written as json.
        FileError: the folder cannot be written.
    """
    content = {"kind": "lorsa", "settings": lorsa.cfg.to_dict(), "metadata": {**lorsa.metadata, **(metadata or {})}}
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise SettingsError(f"the metadata cannot be written as json: {error}.") from error
    folder = Path(folder)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in lorsa.state_dict().items()}
    with replacing(folder / CFG) as cfg, replacing(folder / WEIGHTS) as weights:
        save_file(tensors, weights, metadata={"format": "pt"})
        cfg.write_text(text, encoding="utf-8")
    return folder


def load(folder: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Lorsa:
    """Read what `save` wrote.

    Args:
        folder: holds `lorsa.json` and `lorsa_weights.safetensors`.
        device: where to put it.

    Returns:
        The Lorsa, in evaluation mode, with the file's metadata.

    Raises:
        FileError: a file is missing or damaged, or the weights do not fit the settings.
        UnknownNameError, SettingsError: settings in the file are unknown or out of range.
    """
    folder = Path(folder)
    content = read_json(folder / CFG)
    if not isinstance(content, dict) or content.get("kind") != "lorsa":
        raise FileError(f"{folder / CFG} is not the file of a Lorsa.")
    lorsa = Lorsa(LorsaConfig.of(content["settings"]), metadata=content["metadata"])
    _fill(lorsa, read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    return lorsa.to(device).eval()


def _fill(lorsa: Lorsa, tensors: Mapping[str, Tensor], path: Path) -> None:
    own = lorsa.state_dict()
    for problem, wrong in (("lacks", own.keys() - tensors.keys()), ("has unknown", tensors.keys() - own.keys())):
        if wrong:
            raise FileError(f"{path} {problem} tensors for this Lorsa: {', '.join(sorted(wrong))}.")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise FileError(
                f"{path} holds {name} as {list(tensor.shape)}; by its settings it is {list(own[name].shape)}."
            )
    lorsa.load_state_dict(dict(tensors))


@torch.no_grad()
def fold_scales(lorsa: Lorsa, scale: float, target_scale: float) -> Lorsa:
    """A Lorsa for activations as they are, from one that was trained on scaled ones; what it writes stays the same.

    Args:
        lorsa: trained on x times `scale` and y times `target_scale`.
        scale: of the input.
        target_scale: of the target.

    Raises:
        SettingsError: a scale is not a finite number above 0.
    """
    if not all(math.isfinite(s) and s > 0 for s in (scale, target_scale)):
        raise SettingsError(f"scales are finite numbers above 0, not {scale} and {target_scale}.")
    folded = copy.deepcopy(lorsa)
    rescale(folded, scale, target_scale)
    folded.cfg = lorsa.cfg.changed(normalize_activations="none")
    return folded


@torch.no_grad()
def rescale(lorsa: Lorsa, scale: float, target_scale: float) -> None:
    """Change weights in place: for x times `scale` and y times `target_scale` before, for x and y after it."""
    for parameter in (lorsa.W_Q, lorsa.W_K, lorsa.W_V):
        parameter.mul_(scale)
    for parameter in (lorsa.W_O, lorsa.b_D):
        parameter.div_(target_scale)
    # Thresholds are in units of contributions.
    if lorsa.cfg.architecture == "jumprelu":
        lorsa.threshold.div_(target_scale)
    if lorsa.cfg.architecture == "batchtopk":
        lorsa.topk_threshold.div_(target_scale)


@torch.no_grad()
def unit_norm(lorsa: Lorsa) -> Lorsa:
    """The same function with output directions of length one: their lengths go to the values.

    Directions of length zero are left as they are.
    """
    folded = copy.deepcopy(lorsa)
    norms = folded.W_O.norm(dim=1)
    norms = torch.where(norms > 0, norms, 1)
    folded.W_O.div_(norms[:, None])
    folded.W_V.mul_(norms[:, None])
    folded.b_V.mul_(norms)
    return folded


def load_reference(folder: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Lorsa:
    """Read a checkpoint of llamascopium.

    Args:
        folder: holds `config.json` and `sae_weights.safetensors`.
        device: where to put it.

    Returns:
        The Lorsa, in evaluation mode, for activations as they are; names of its hooks and model are its metadata.

    Raises:
        FileError: a file is missing or damaged, or the weights do not fit the settings.
        UnsupportedError: it is no Lorsa, or a setting of it has no counterpart.
    """
    folder = Path(folder)
    held, tensors = read_json(folder / "config.json"), read_tensors(folder / "sae_weights.safetensors")
    if not isinstance(held, dict) or held.get("sae_type") != "lorsa" or not {"W_Q", "W_V", "W_O"} <= tensors.keys():
        raise UnsupportedError(f"{folder} does not hold a Lorsa of llamascopium.")
    norm, kind = held.get("norm_activation", "dataset-wise"), held.get("act_fn", "relu")
    if norm not in ("dataset-wise", "inference") or kind not in ("relu", "jumprelu", "topk", "batchtopk"):
        raise UnsupportedError(f"{folder}: norm_activation {norm!r} with act_fn {kind!r} has no counterpart here.")
    if not held.get("sparsity_include_decoder_norm", True):
        raise UnsupportedError(f"{folder}: latents chosen without the lengths of their directions have no counterpart.")
    n_qk, d_in, d_qk = tensors["W_Q"].shape
    rotary = held.get("positional_embedding_type", "rotary") == "rotary"
    adjacent = held.get("rotary_adjacent_pairs", True)
    settings: dict[str, Any] = {
        "d_in": d_in,
        "n_qk": n_qk,
        "n_ov": tensors["W_V"].shape[0],
        "d_qk": d_qk,
        "d_out": tensors["W_O"].shape[1],
        "architecture": kind,
        "k": held.get("top_k", 50),
        "context": held["n_ctx"],
        "scale": 1 / (held.get("attn_scale") or d_qk**0.5),
        "qk_norm": bool(held.get("use_post_qk_ln")),
        "qk_norm_eps": held.get("eps", 1e-6),
        "rotary_dim": held["rotary_dim"] if rotary else 0,
        "rotary_pairing": "interleaved" if adjacent else "half",
        "rotary_base": held.get("rotary_base", 10_000),
        "dtype": str(tensors["W_V"].dtype).removeprefix("torch."),
    }
    about = {name: held.get(name) for name in ("hook_point_in", "hook_point_out", "model_name")}
    lorsa = Lorsa(LorsaConfig.of(settings), metadata={"imported": "llamascopium", **about})
    own: dict[str, Tensor] = {n: tensors[n] for n in ("W_Q", "b_Q", "W_K", "b_K", "W_V", "b_V", "W_O")}
    own["b_D"] = tensors.get("b_D", torch.zeros(settings["d_out"], dtype=tensors["W_O"].dtype))
    own |= {"cos": lorsa.cos, "sin": lorsa.sin}
    if rotary and {"rotary_cos", "rotary_sin"} <= tensors.keys():
        pairs = slice(0, None, 2) if adjacent else slice(0, settings["rotary_dim"] // 2)
        own |= {"cos": tensors["rotary_cos"][:, pairs], "sin": tensors["rotary_sin"][:, pairs]}
    elif rotary and held.get("use_NTK_by_parts_rope"):
        raise UnsupportedError(f"{folder}: the angles of its scaled rotation are not in the file.")
    for name in ("q", "k") if settings["qk_norm"] else ():
        own[f"{name}_gain"] = tensors[f"ln_{name}.w"].expand(n_qk, d_qk).clone()
    if kind == "jumprelu":
        found = [t for name, t in tensors.items() if name.endswith("log_jumprelu_threshold")]
        if len(found) != 1:
            raise FileError(f"{folder} lacks the thresholds of its JumpReLU.")
        own["threshold"] = found[0].exp().expand(settings["n_ov"]).clone()
    if kind == "batchtopk":
        raise UnsupportedError(f"{folder}: a batch-top-k checkpoint has no threshold; convert it to JumpReLU first.")
    _fill(lorsa, own, folder / "sae_weights.safetensors")
    if norm == "dataset-wise":
        lorsa = fold_scales(lorsa, *(_scale(tensors, held, name, d_in) for name in ("hook_point_in", "hook_point_out")))
    return lorsa.to(device).eval()


def _scale(tensors: Mapping[str, Tensor], held: Mapping[str, Any], hook: str, width: int) -> float:
    name = f"dataset_average_activation_norm.{held.get(hook)}"
    if name not in tensors:
        raise FileError(f"the checkpoint lacks {name}, by which its activations were scaled.")
    return width**0.5 / float(tensors[name])
