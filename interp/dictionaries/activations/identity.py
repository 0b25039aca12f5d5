"""What tells one model from another: a digest of its parameters' names, shapes and some of their values."""

from __future__ import annotations

import hashlib

import torch

from interp.lens import Lens

SAMPLES = 256


def fingerprint(lens: Lens) -> str:
    """A digest of the model: two models with the same one are the same for what is computed with them.

    It covers the name, shape and dtype of every parameter and buffer, and of each up to 256 values, evenly spaced: a
    model that was trained further has another digest, and large models cost no more than small ones.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    model = lens.model
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()], key=lambda pair: pair[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if tensor.device.type == "meta" or tensor.numel() == 0:
            continue
        flat = tensor.detach().reshape(-1)
        places = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat)), dtype=torch.float64).long()
        digest.update(flat[places.to(flat.device)].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
