"""Latents set, scaled, added to or taken away in a run, with what the dictionary does not explain kept.

Source: Templeton et al. 2024, "Scaling Monosemanticity", feature steering; the form with the error kept is that of the
specification of Zhang et al. 2024 (arXiv 2411.14982), whose own code puts the reconstruction in the place of the
activation and lets the error fall. With latents f of an activation x and decoder rows d,

    x + s sum over the chosen j of (f'_j - f_j) d_j        f' = value, scale f, or f + add

where s is the length by which the dictionary divides each token (1 where it does not). Where no f' differs from its f,
x stays as it was, bit for bit. For a transcoder f is of the activation at its input and the sum is added at its target.

Departures: the paper clamps in every token; here positions can be chosen. Latents that were not chosen keep what they
write even where a changed activation would activate others: nothing is encoded again. No gradient runs through latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.dictionaries.base import Dictionary
from interp.dictionaries.features.common import (
    Latents,
    check_weights,
    chosen,
    input_read,
    latent_rows,
    output_read,
    reading,
)
from interp.edits import Edit, Where
from interp.errors import EditError, SettingsError, UnsupportedError
from interp.reads import Positions, Read

Strength = float | Sequence[float] | Float[Tensor, " latents"] | Float[Tensor, "batch latents"]


def feature_edits(
    dictionary: Dictionary,
    latents: Latents,
    *,
    value: Strength | None = None,
    scale: Strength | None = None,
    add: Strength | None = None,
    read: str | Read | None = None,
    target: str | Read | None = None,
    positions: Positions = "all",
) -> list[Edit]:
    """Edits that change latents, for `lens.run` and `lens.generate`.

    Exactly one of `value`, `scale` and `add` is given: a number for all latents, one for each [latents], or one for
    each sample and latent [batch, latents].

    Args:
        dictionary: an SAE, or a transcoder whose input comes before its target in a run.
        latents: which.
        value: what they are set to, in tokens where they are not active too; 0 ablates them.
        scale: what they are multiplied by; 1 changes nothing.
        add: what is added to them, in every token.
        read: the site that the dictionary reads, where its metadata do not say it.
        target: the site that a transcoder writes, where its metadata do not say it.
        positions: where.

    Raises:
        SettingsError: none or several of `value`, `scale` and `add`, nothing says where the dictionary reads, a target
            for an SAE, or input and target of a transcoder in two towers.
        UnknownNameError: there is no such latent or site.
        EditError: a strength is not finite, or not one for each latent. In a run, when the site is not as wide as the
            dictionary, or a transcoder's target comes before its input.
        UnsupportedError: the site cannot be edited, or the latents are those of whole sequences (a Lorsa).
    """
    given = {name: v for name, v in (("value", value), ("scale", scale), ("add", add)) if v is not None}
    if len(given) != 1:
        raise SettingsError(f"give one of value, scale and add; found {', '.join(given) or 'none'}.")
    ((how, strength),) = given.items()
    if dictionary.sequences:
        raise UnsupportedError("heads of a Lorsa are changed by lorsa.replace_attention(..., change=..., error=True).")
    check_weights(dictionary)
    asked = chosen(dictionary, latents)
    amount = _checked(strength, len(asked))
    change = _Change(dictionary, asked, how, amount)
    source = input_read(dictionary, read).but(positions=positions)
    aim = output_read(dictionary, read, target).but(positions=positions)
    name = f"feature_edits[{how}]"
    if not dictionary.transcodes:
        return [Edit(source, change.at_once, name)]
    if (source.tower or "") != (aim.tower or ""):
        raise SettingsError(f"{source} and {aim} are of two towers: their positions are not the same.")
    return [Edit(source, change.look, name), Edit(aim, change.write, name)]


def _checked(strength: Strength, count: int) -> Tensor:
    amount = torch.as_tensor(strength, dtype=torch.float32)
    if amount.ndim > 2 or (amount.ndim and amount.shape[-1] != count):
        raise EditError(
            f"feature_edits: a strength is a number, [latents {count}] or [batch, latents {count}], found "
            f"{list(amount.shape)}."
        )
    if not bool(amount.isfinite().all()):
        raise EditError("feature_edits: the strength holds NaN or infinity.")
    return amount


class _Change:
    """What is added to a site; for transcoders made at the input and kept until the target is reached."""

    def __init__(self, dictionary: Dictionary, latents: Tensor, how: str, amount: Tensor) -> None:
        self.dictionary, self.latents, self.how, self.amount = dictionary, latents, how, amount
        # For each row of beam search its own.
        self.kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def at_once(self, x: Tensor, where: Where) -> Tensor:
        """An SAE's site."""
        return self._added(x, *self._difference(x))

    def look(self, x: Tensor, where: Where) -> Tensor:
        """A transcoder's input, left as it is."""
        self.kept[where.copy] = (*self._difference(x), where.columns)
        return x

    def write(self, y: Tensor, where: Where) -> Tensor:
        """A transcoder's target."""
        kept = self.kept.pop(where.copy, None)
        if kept is None or kept[2].shape != where.columns.shape or not torch.equal(kept[2], where.columns.to(kept[2])):
            raise EditError(
                "feature_edits: the transcoder's input was not reached before its target in this run, so its latents "
                "are not known there."
            )
        return self._added(y, *kept[:2])

    def _difference(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is added [batch, n, d_out], and at which tokens anything is [batch, n]."""
        flat = x.flatten(2)
        cfg = self.dictionary.cfg
        if flat.shape[-1] != cfg.d_in:
            raise EditError(f"feature_edits: the site is {flat.shape[-1]} wide, the dictionary reads {cfg.d_in}.")
        with reading(self.dictionary):
            weights = self.dictionary.W_enc
            wide = flat.to(weights.device, torch.promote_types(weights.dtype, torch.float32))
            fine = wide.isfinite().all(-1)  # padding may hold anything
            wide = wide.masked_fill(~fine[..., None], 0)
            index = self.latents.to(weights.device)
            f = self.dictionary.encode(wide)[..., index].to(wide.dtype)
            new = self._changed(f)
            difference = (new - f) @ latent_rows(self.dictionary, self.latents)
            scale = self.dictionary._pass(wide).scale
            if scale is not None:
                difference = difference * scale.view(*wide.shape[:-1], 1)
        return difference, (new != f).any(-1) & fine

    def _changed(self, f: Tensor) -> Tensor:
        amount = self.amount.to(f)
        if amount.ndim == 2:
            if len(amount) not in (1, len(f)):
                raise EditError(f"feature_edits: strengths for {len(amount)} samples, the batch has {len(f)}.")
            amount = amount[:, None]
        changes: dict[str, Callable[[], Any]] = {
            "value": lambda: amount.expand_as(f),
            "scale": lambda: f * amount,
            "add": lambda: f + amount,
        }
        return changes[self.how]()

    def _added(self, y: Tensor, difference: Tensor, changed: Tensor) -> Tensor:
        width, written = y.flatten(2).shape[-1], difference.shape[-1]
        if width != written:
            raise EditError(f"feature_edits: the site is {width} wide, the dictionary writes {written}.")
        wide = torch.promote_types(y.dtype, torch.float32)
        new = (y.to(wide) + difference.to(y.device, wide).view_as(y)).to(y.dtype)
        return torch.where(changed.to(y.device).view(*y.shape[:2], *([1] * (y.ndim - 2))), new, y)
