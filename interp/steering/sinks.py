"""Attention sinks: tokens that a few dimensions of the stream mark, and that draw attention without being read.

Source: Kang, Kim, Kim, Hwang 2025, "See What You Are Told: Visual Attention Sink in Large Multimodal Models", ICLR,
arXiv 2503.03321. With x the stream that enters a layer,

    phi(x) = max over sink dimensions of |x| / sqrt(mean of x squared + 1e-6)        a token is a sink if phi(x) > tau

The published code lists the dimensions of each language model by number (those in which its first token has massive
activations). Here they are found: the first token of any text has them. The paper's tau of 20 is for streams of 4096
dimensions; |x| / rms cannot exceed the square root of the width, so that tau scales with it: tau = 20 sqrt(d / 4096).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from interp.batch import Batch
from interp.errors import SettingsError
from interp.lens import Lens
from interp.reads import Read

PAPER_TAU, PAPER_WIDTH = 20.0, 4096
EPSILON = 1e-6
SHARE = 0.25  # of first tokens, over the middle third of the layers, that are massive in a sink dimension


def default_tau(width: int) -> float:
    """The paper's threshold for a stream of another width."""
    return PAPER_TAU * math.sqrt(width / PAPER_WIDTH)


def relative_size(stream: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
    """|x| / rms(x), in float32 or wider."""
    wide = stream.to(torch.promote_types(stream.dtype, torch.float32))
    return wide.abs() * _over_rms(wide)


def _over_rms(wide: Float[Tensor, "... d_model"]) -> Float[Tensor, "... 1"]:
    return (wide.square().mean(-1, keepdim=True) + EPSILON).rsqrt()


def sink_size(stream: Float[Tensor, "batch pos d_model"], dimensions: Sequence[int]) -> Float[Tensor, "batch pos"]:
    """phi of every token."""
    wide = stream.to(torch.promote_types(stream.dtype, torch.float32))
    return wide[..., list(dimensions)].abs().amax(-1) * _over_rms(wide)[..., 0]


def sink_dimensions(lens: Lens, batch: Batch, *, tau: float | None = None, most: int = 4) -> tuple[int, ...]:
    """The dimensions in which first tokens are massive, in the middle third of the layers.

    Models that put no token of their own in front have another first token in each prompt, and not each is massive in
    the same dimension: one counts if it is in a quarter of them.

    Args:
        lens: the model.
        batch: any prompts.
        tau: how many times the root mean square is massive; None for the paper's, scaled with the width.
        most: at most so many dimensions, the largest first.

    Returns:
        Indices of the stream's dimensions; empty where the model has no such tokens.

    Raises:
        SettingsError: tau is not above 0, or `most` is less than 1.
    """
    tower = lens.anatomy.towers[lens.anatomy.main]
    if most < 1 or (tau is not None and not 0 < tau < math.inf):
        raise SettingsError(f"tau is a finite number above 0 and most at least 1, got {tau} and {most}.")
    limit = default_tau(tower.d_model) if tau is None else tau
    depth = len(tower.layers)
    layers = tuple(range(depth // 3, max(depth // 3 + 1, 2 * depth // 3)))
    read = Read("resid_post", layers=layers, positions=0)
    with torch.no_grad():
        trace = lens.run(batch, read)
    size = torch.stack([relative_size(trace[read, layer])[:, 0] for layer in layers]).flatten(0, 1)
    found = ((size > limit).float().mean(0) >= SHARE).nonzero()[:, 0]
    order = size.mean(0)[found].argsort(descending=True, stable=True)
    return tuple(int(i) for i in found[order][:most])
