"""The rows of contrastive decoding: each by strength, blind tokens beside as many random image tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch

import interp
from experiments.steering.scored import Change
from interp import steering
from interp.batch import Batch

STRENGTHS = (0.5, 1.0, 2.0)
USUAL = 1.0
RATES = (0.02, 0.1)
START = 10  # for answers of one word, which the method does not change when it counts from 0
TOKENS = ", random tokens"
VCD, M3ID, AVISC = "VCD", "M3ID", "AvisC"
CONTRASTS: dict[str, Callable[[interp.Lens, Batch], steering.Contrast]] = {
    VCD: steering.VisualContrast,
    M3ID: steering.M3ID,
    AVISC: steering.BlindTokenContrast,
}


def contrasts(lens: interp.Lens, *, draws: int, seed: int) -> dict[tuple[str, str], list[Change]]:
    """What is run for each name and setting."""
    found: dict[tuple[str, str], list[Change]] = {}
    for strength in STRENGTHS:
        setting = f"alpha = {strength}"
        found[VCD, setting] = [lambda b, s=strength: [steering.VisualContrast(lens, b, strength=s)]]
        found[AVISC, setting] = [lambda b, s=strength: [steering.BlindTokenContrast(lens, b, strength=s)]]
    usual = f"alpha = {USUAL}"
    found[f"{VCD}, no image", usual] = [
        lambda b: [steering.VisualContrast(lens, b, strength=USUAL, distort="drop")],
    ]
    found[AVISC + TOKENS, usual] = [_random_tokens(lens, USUAL, seed + i) for i in range(draws)]
    for rate in RATES:
        found[M3ID, f"lambda = {rate}"] = [lambda b, r=rate: [steering.M3ID(lens, b, rate=r)]]
    largest = RATES[-1]
    for name, options in {"sure or not": {"confidence": 1.0}, f"counted from {START}": {"start": START}}.items():
        found[f"{M3ID}, {name}", f"lambda = {largest}"] = [
            lambda b, o=options: [steering.M3ID(lens, b, rate=largest, **o)]
        ]
    return found


def _random_tokens(lens: interp.Lens, strength: float, seed: int) -> Change:
    """As many random image tokens as are blind, in each sample, other ones in every batch."""
    random = torch.Generator().manual_seed(seed)

    def change(batch: Batch) -> list[steering.Contrast]:
        blind = steering.blind_tokens(lens, batch)
        chosen = random_tokens(blind, batch.span("image"), random)
        return [steering.BlindTokenContrast(lens, batch, strength=strength, blind=chosen)]

    return change


def random_tokens(blind: torch.Tensor, image: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """As many image tokens of each sample as are marked."""
    noise = torch.rand(image.shape, generator=random).masked_fill(~image, 2.0)
    return (noise.argsort(1).argsort(1) < blind.sum(1, keepdim=True)) & image
