"""Seeded, non-degenerate weights: no bias, norm, LayerScale or gate is left at a value that hides it."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

_SCALES = ("layer_scale", "layerscale", "lambda_", "lambda1", ".ls1", ".ls2")
_GATES = ("attn_gate", "mlp_gate", "gate_attn", "gate_ffn", "embedding.gate")
_NEAR_INIT = ("A_log", "dt_bias")


def _draw(name: str, like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float32)


def redraw(model: nn.Module, seed: int = 0) -> None:
    """Overwrite every floating parameter of ``model`` in place, as a function of its name and ``seed`` only."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    router_biases = [(n, b) for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *router_biases]:
            if not weight.is_floating_point():
                continue
            noise = _draw(name, weight, seed)
            if any(key in name for key in _SCALES) or any(name.endswith(key) for key in _GATES):
                value = 0.5 + 0.1 * noise
            elif name.endswith("sinks"):
                value = noise
            elif name.endswith("logit_scale"):
                value = 2 + 0.1 * noise
            elif any(name.endswith(key) for key in _NEAR_INIT):
                value = weight + 0.1 * noise
            elif name.endswith("weight") and weight.ndim == 1 and bool((weight == weight.flatten()[0]).all()):
                value = weight + 0.1 * noise  # norms: 1 + w, or w for the families that store w - 1
            elif id(weight) in embeddings:
                value = 0.3 * noise
            else:
                value = 0.15 * noise
            weight.copy_(value)
