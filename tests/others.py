"""Tiny models of tests/zoo as other libraries hold them: TransformerLens (both ways) and nnsight, without a network."""

import copy
import json
import tempfile
import warnings
from functools import cache
from pathlib import Path
from unittest import mock

import torch

from tests.zoo import build, processor

BACKENDS = ("transformers", "HookedTransformer", "TransformerBridge", "nnsight")


@cache
def tokenizer_of(name):
    """The family's tokenizer, loaded from a folder: TransformerLens loads it from there a second time."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        processor(name).save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)


def bridged(name, *, processed=False):
    """A TransformerBridge around the tiny model; with processed weights in compatibility mode."""
    from transformer_lens.model_bridge import TransformerBridge

    model = build(name)
    model.config.architectures = [type(model).__name__]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = copy.deepcopy(tokenizer_of(name))
        tokenizer.save_pretrained(folder)
        tokenizer.init_kwargs["name_or_path"] = folder
        # For a model with images it would install torchvision, and another torch with it, into the environment.
        with mock.patch("subprocess.check_call", side_effect=OSError("nothing is installed")):
            bridge = TransformerBridge.boot_transformers(
                type(model).__name__, hf_model=model, tokenizer=tokenizer, device="cpu"
            )
    if processed:
        bridge.enable_compatibility_mode(disable_warnings=True)
    return bridge


def hooked(name, *, processed=False):
    """A HookedTransformer with the tiny model's weights, by TransformerLens's own conversion."""
    from transformer_lens import HookedTransformerConfig, loading_from_pretrained

    model = build(name)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        path = Path(folder) / "config.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps({"n_ctx": content.get("n_positions"), **content}))
        found = loading_from_pretrained.convert_hf_model_config(folder)
        found |= {"device": "cpu", "model_name": name, "init_weights": False, "tokenizer_name": None}
        config = HookedTransformerConfig.from_dict(found)
        state = loading_from_pretrained.get_pretrained_state_dict(folder, config, hf_model=model)
    made = hooked_of(config)
    if processed:
        made.load_and_process_state_dict(state)
    else:
        made.load_and_process_state_dict(
            state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
        )
    made.tokenizer = copy.deepcopy(tokenizer_of(name))
    return made


def hooked_of(config):
    """A HookedTransformer, without the warning that it is an old class."""
    from transformer_lens import HookedTransformer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HookedTransformer(config)


def random_hooked(**settings):
    """A HookedTransformer of a tiny configuration with random weights, norms and biases included."""
    from transformer_lens import HookedTransformerConfig

    base = {"n_layers": 2, "d_model": 16, "n_ctx": 24, "d_head": 4, "n_heads": 4, "d_mlp": 20, "d_vocab": 50}
    base |= {"act_fn": "gelu_new", "normalization_type": "LN", "device": "cpu", "init_weights": False}
    model = hooked_of(HookedTransformerConfig(**(base | settings)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            wide = 0.3 if p.ndim < 2 else 1.2 * p.shape[-2] ** -0.5
            p.copy_((torch.randn(p.shape, generator=generator) * wide + name.endswith(".w")).to(p.dtype))
    return model


def nnsighted(name):
    """An nnsight TransformersModel around the tiny model."""
    import nnsight

    return nnsight.TransformersModel(build(name), tokenizer=copy.deepcopy(tokenizer_of(name)), task="text-generation")


def made(backend, name):
    """The tiny model as a back end holds it."""
    return {"transformers": build, "HookedTransformer": hooked, "TransformerBridge": bridged, "nnsight": nnsighted}[
        backend
    ](name)
