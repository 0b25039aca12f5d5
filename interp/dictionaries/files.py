"""Dictionaries as files: the `cfg.json` and `sae_weights.safetensors` of SAELens 6.

`save` writes what `sae_lens.SAE.load_from_disk` opens: batch-top-k kinds folded into JumpReLU, decoder norms folded
into top-k kinds that rank with them. With `training=True` it writes the dictionary as it is trained, for
`sae_lens.TrainingSAE.load_from_disk` and for going on here. Settings and metadata that SAELens has no field for stand
under `metadata` in `cfg.json`, where it keeps them.

SAELens has transcoders of ReLU and JumpReLU latents, with and without a skip, for inference. Others are written under
names of the same form (`topk_skip_transcoder`), which only this package opens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from interp.dictionaries.base import SAE, Dictionary, Transcoder
from interp.dictionaries.config import DTYPES, DictionaryConfig
from interp.dictionaries.folding import fold_batchtopk, fold_decoder_norms
from interp.dictionaries.foreign import open_foreign
from interp.dictionaries.registry import names
from interp.errors import FileError, SettingsError, UnsupportedError, unknown
from interp.files import read_json, read_tensors, replacing

CFG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_FORMAT = "6.54.12"  # the release of SAELens whose files these are; it takes files without a number for much older ones
_SHARED = ("d_in", "d_sae", "dtype", "apply_b_dec_to_input", "normalize_activations", "reshape_activations")
_JUMP = (
    "jumprelu_init_threshold",
    "jumprelu_bandwidth",
    "jumprelu_sparsity_loss_mode",
    "jumprelu_tanh_scale",
    "jumprelu_ste_to_input",
    "target_l0",
    "l0_coefficient",
    "pre_act_loss_coefficient",
)
_INFERENCE = {"topk": ("k", "rescale_acts_by_decoder_norm"), "abstopk": ("k", "rescale_acts_by_decoder_norm")}
_TOPK = ("decoder_init_norm", "k", "rescale_acts_by_decoder_norm", "aux_loss_coefficient")
_TRAINING = {
    "standard": ("decoder_init_norm", "l1_coefficient", "lp_norm"),
    "gated": ("decoder_init_norm", "l1_coefficient"),
    "jumprelu": ("decoder_init_norm", *_JUMP),
    "topk": _TOPK,
    "abstopk": _TOPK,
    "batchtopk": (*_TOPK, "topk_threshold_lr"),
    "matryoshka_batchtopk": (*_TOPK, "topk_threshold_lr", "matryoshka_widths"),
}
_ELSEWHERE = ("temporal", "matching_pursuit")


def save(
    sae: Dictionary,
    folder: str | os.PathLike[str],
    *,
    training: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a dictionary into a folder, whole or not at all.

    Args:
        sae: an SAE or transcoder, trained on activations as they are; one that was trained on scaled activations is
            folded first (`fold_activation_scale`).
        folder: made where it is missing; the two files in it are replaced.
        training: write it as it is trained, not as it is used.
        metadata: what to keep beside the settings (model, site, layer, tower, ...), over what `sae.metadata` holds;
            SAELens's names are `model_name`, `hook_name`, `hook_name_out`, `context_size`, `prepend_bos`.

    Returns:
        The folder.

    Raises:
        SettingsError: metadata cannot be written as json or takes the name `interp`, a batch-top-k kind has no
            threshold yet, or activations are still to be scaled.
        FileError: the folder cannot be written.
    """
    used = sae if training else _for_use(sae)
    own = {**sae.metadata, **(metadata or {})}
    if "interp" in own:
        raise SettingsError("metadata cannot use the name 'interp': settings are kept there.")
    own |= {"sae_lens_version": _FORMAT, "training_architecture": sae.cfg.architecture}
    own["interp"] = {"settings": used.cfg.to_dict(), "trained_with": sae.cfg.to_dict()}
    content = {**_fields(used, training), "device": "cpu", "metadata": own, "architecture": _name(used)}
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise SettingsError(f"the metadata cannot be written as json: {error}.") from error
    folder = Path(folder)
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in used.state_dict().items()}
    if not training and "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].to(used.W_enc.dtype)
    with replacing(folder / CFG) as cfg, replacing(folder / WEIGHTS) as weights:
        save_file(tensors, weights, metadata={"format": "pt"})
        cfg.write_text(text, encoding="utf-8")
    return folder


def load(
    folder: str | os.PathLike[str], *, device: torch.device | str = "cpu", dtype: str | None = None
) -> SAE | Transcoder:
    """Read a dictionary that was written here, by SAELens (inference or training form), or by others.

    Args:
        folder: holds `cfg.json` and `sae_weights.safetensors`; or what Gemma Scope (`params.npz`), dictionary_learning
            (`config.json`, `ae.pt`) or sparsify (`cfg.json`, `sae.safetensors`) wrote, which is converted.
        device: where to put it.
        dtype: of its weights; None for that of the file.

    Returns:
        The dictionary, in evaluation mode, with the file's metadata.

    Raises:
        FileError: a file is missing or damaged, or the weights do not fit the settings.
        UnknownNameError: the file names an architecture or a normalisation that does not exist.
        UnsupportedError: the architecture is one that only SAELens has.
        SettingsError: settings in the file contradict each other.
    """
    folder = Path(folder)
    found = open_foreign(folder)
    if found is not None:
        return found.to(device, DTYPES[_dtype(dtype)] if dtype else None)  # type: ignore[return-value]
    content = read_json(folder / CFG)
    if not isinstance(content, dict) or not {"d_in", "d_sae"} <= content.keys():
        raise FileError(f"{folder / CFG} is not the cfg.json of a dictionary: it has no d_in and d_sae.")
    content, metadata = _modern(content)
    own = metadata.pop("interp", {})
    for name in ("sae_lens_version", "training_architecture"):
        metadata.pop(name, None)
    kind, transcodes, skip = _parsed(content["architecture"])
    known = DictionaryConfig.__dataclass_fields__
    settings = {name: value for name, value in own.get("settings", {}).items() if name in known}
    settings |= {name: value for name, value in content.items() if name in known}
    settings.setdefault("aux_loss", "saelens")  # who wrote a file without our settings trained so
    if own.get("settings", {}).get("aux_loss_coefficient", 0) is None:
        settings["aux_loss_coefficient"] = None  # written as the number that it stands for
    settings |= {"architecture": kind, "skip": skip, "dtype": _dtype(dtype or settings.get("dtype", "float32"))}
    settings["matryoshka_widths"] = tuple(settings.get("matryoshka_widths") or ())
    if kind not in ("topk", "abstopk") or "rescale_acts_by_decoder_norm" in content:
        settings.setdefault("rescale_acts_by_decoder_norm", True)
    else:
        settings["rescale_acts_by_decoder_norm"] = False
    sae = (Transcoder if transcodes else SAE)(DictionaryConfig.of(settings), metadata=metadata)
    _fill(sae, read_tensors(folder / WEIGHTS), folder)
    return sae.to(device).eval()


def _for_use(sae: Dictionary) -> Dictionary:
    cfg = sae.cfg
    if cfg.normalize_activations == "expected_average_only_in":
        raise SettingsError(
            "these weights are for scaled activations; give save(fold_activation_scale(sae, scale), folder), "
            "or training=True to keep them so."
        )
    if hasattr(sae, "topk_threshold"):
        return fold_batchtopk(sae)
    if cfg.architecture in ("topk", "abstopk") and cfg.rescale_acts_by_decoder_norm:
        return fold_decoder_norms(sae)
    return sae


def _fields(sae: Dictionary, training: bool) -> dict[str, Any]:
    cfg = sae.cfg.to_dict()
    special = (_TRAINING if training else _INFERENCE).get(sae.cfg.architecture, ())
    found = {name: cfg[name] for name in (*_SHARED, *special)}
    if "k" in found and found["k"] == int(found["k"]):
        found["k"] = int(found["k"])
    if "aux_loss_coefficient" in found:
        found["aux_loss_coefficient"] = sae.cfg.aux_weight
    return found | ({"d_out": sae.cfg.width_out} if sae.transcodes else {})


def _name(sae: Dictionary) -> str:
    kind = sae.cfg.architecture
    if not sae.transcodes:
        return kind
    return ("" if kind == "standard" else f"{kind}_") + ("skip_" if sae.cfg.skip else "") + "transcoder"


def _parsed(name: str) -> tuple[str, bool, bool]:
    """Architecture, whether it is a transcoder's, and whether it has a skip."""
    kind = name.removesuffix("transcoder")
    transcodes, skip = kind != name, kind.endswith("skip_")
    kind = kind.removesuffix("skip_").removesuffix("_") if transcodes else name
    kind = kind or "standard"
    if kind in _ELSEWHERE:
        raise UnsupportedError(f"dictionaries of architecture {name!r} are SAELens's only; open it with sae_lens.")
    if kind not in names():
        both = [*names(), "transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]
        raise unknown("architecture", name, both, "files of dictionaries")
    return kind, transcodes, skip


def _dtype(name: str) -> str:
    short = str(name).removeprefix("torch.")
    if short not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return short


def _modern(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and metadata; those of SAELens before 6 had no metadata of their own."""
    content = dict(content)
    if "metadata" in content:
        return {"architecture": "standard", **content}, dict(content.pop("metadata") or {})
    if content.get("finetuning_scaling_factor"):
        raise UnsupportedError("the file has a finetuning scaling factor, which SAELens 6 has given up, too.")
    names = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
    old = {names.get(name, name): value for name, value in content.items()}
    function, options = old.pop("activation_fn", "relu"), old.pop("activation_fn_kwargs", None) or {}
    old.setdefault("architecture", "standard")
    if function == "topk":
        old |= {"architecture": "topk", "k": options.get("k", old.get("k")), "rescale_acts_by_decoder_norm": False}
    elif function not in ("relu", "jumprelu"):
        raise unknown("activation_fn", function, ("relu", "topk"), "files of dictionaries")
    mode = old.get("normalize_activations")
    if mode in (None, True, False):
        old["normalize_activations"] = "expected_average_only_in" if mode else "none"
    known = {*DictionaryConfig.__dataclass_fields__, "device"}
    return (
        {name: value for name, value in old.items() if name in known},
        {name: value for name, value in old.items() if name not in known},
    )


def _fill(sae: Dictionary, tensors: dict[str, Tensor], folder: Path) -> None:
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    own = sae.state_dict()
    for problem, wrong in (("lacks", own.keys() - tensors.keys()), ("has unknown", tensors.keys() - own.keys())):
        if wrong:
            kind = f"a dictionary of architecture {_name(sae)!r}"
            raise FileError(f"{folder / WEIGHTS} {problem} tensors for {kind}: {', '.join(sorted(wrong))}.")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            shapes = f"{list(tensor.shape)}, by {CFG} it is {list(own[name].shape)}"
            raise FileError(f"{folder / WEIGHTS} holds {name} of shape {shapes}.")
    sae.load_state_dict(tensors)
