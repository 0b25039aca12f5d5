"""Runs of a model with one site replaced, entered as late as they can be.

Below the site nothing changes. With the clean stream that enters the site's layer a run begins there; what is put at
`resid_pre`, or leaves a layer as `resid_post`, is itself the stream that enters a layer, and nothing else is needed.
Images and encoders, whose runs need to be told what was skipped, are handed the prefix of a whole run.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.batch import Batch
from interp.dictionaries.activations import Contexts
from interp.edits import splice
from interp.errors import InputError, UnsupportedError
from interp.lens import Entry, Lens
from interp.reads import Read


class Spliced:
    """A site of a model that is replaced, and where runs enter for it.

    Args:
        lens: the model.
        target: the site, of one layer, at all positions.

    Attributes:
        needs: reads that the contexts have to hold beside the target.
    """

    def __init__(self, lens: Lens, target: Read) -> None:
        self.lens, self.target = lens, target
        self.name = str(target)
        tower = lens.anatomy.towers[lens.anatomy.main]
        self._layer: int | None = None
        self._direct = False
        main = target.tower in (None, lens.anatomy.main) and "encoder" not in lens.anatomy.towers
        if main and target.layers is not None:
            self._layer = target.layers[0]
            above = self._layer + 1
            if target.site == "resid_post" and above < len(tower.layers) and not tower.layers[above].adjusted:
                self._layer = above
            self._direct = target.site == "resid_pre" or self._layer == above
            if not all(layer.skippable for layer in tower.layers[: self._layer]):
                self._layer, self._direct = None, False
        self._stream = None if self._layer is None or self._direct else f"resid_pre.{self._layer}"

    @property
    def needs(self) -> tuple[str, ...]:
        """Reads that the contexts have to hold beside the target."""
        return () if self._stream is None else (self._stream,)

    def runs(self, batch: Batch, contexts: Contexts) -> Runs:
        """The runs of one batch."""
        return Runs(self, batch, contexts)

    def check_causal(self, batch: Batch) -> None:
        """Whether the model predicts each token from those before it alone.

        Raises:
            UnsupportedError: it does not, or has no logits.
        """
        if "encoder" in self.lens.anatomy.towers:
            raise UnsupportedError(
                f"{self.lens.name} is an encoder-decoder: a stream gives its decoder nothing but the start. "
                "Its dictionaries have fidelity only: ablation=()."
            )
        with suppress(InputError):  # images that are packed over samples
            batch = batch[0]
        last = int(batch.mask[0].nonzero()[-1])
        change = splice(lambda x: 1 - 2 * x, site="resid_pre", layers=0, positions="last")
        one, two = (self.lens.run(batch, "logits", edits).logits[0, :last].double() for edits in ((), change))
        if last and not bool((one - two).abs().max() <= 1e-3 * one.abs().max()):
            raise UnsupportedError(
                f"{self.lens.name} sees the token that it predicts, so its loss says nothing. "
                "Its dictionaries have fidelity only: ablation=()."
            )


class Runs:
    """The runs of one batch. Made by `Spliced.runs`."""

    def __init__(self, spliced: Spliced, batch: Batch, contexts: Contexts) -> None:
        self._of, self._batch, self._contexts = spliced, batch, contexts
        self._prefix = None
        if spliced._layer is not None and batch.image_mask is not None:
            cache = spliced.lens.run(batch, "logits", cache=True).cache
            self._prefix = None if cache is None else replace(cache, key_values=None)

    def logits(self, value: Tensor | None = None) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits with the target replaced by a value of its shape [batch, pos, d]; None leaves it as it is."""
        of, lens = self._of, self._of.lens
        given = self._contexts[of.name] if value is None else value
        if of._layer is None:
            return lens.run(self._batch, "logits", () if value is None else self._edit(given)).logits
        stream = given if of._direct else self._contexts[str(of._stream)]
        entry = Entry(of._layer, stream, prefix=self._prefix)
        edits = () if of._direct or value is None else self._edit(given)
        return lens.run(self._batch, "logits", edits, entry=entry).logits

    def _edit(self, value: Tensor) -> list:
        target = self._of.target
        layers = None if target.layers is None else target.layers[0]
        # Sites with heads are flat here: [batch, pos, head * d_head]. A copy, since some models add to it in place.
        return splice(
            lambda old: value.reshape(old.shape).to(old, copy=True), site=target.site, layers=layers, tower=target.tower
        )


def replaced(
    clean: Float[Tensor, "batch pos d"], where: Tensor, rows: Float[Tensor, "token d"] | Float[Tensor, " d"]
) -> Float[Tensor, "batch pos d"]:
    """A copy with other values at some positions [batch, pos], in order."""
    out = clean.clone()
    out[where] = rows.to(out) if rows.ndim == 2 else rows.to(out).expand(int(where.sum()), -1)
    return out


def log_probabilities(
    logits: Float[Tensor, "pos d_vocab"], where: Bool[Tensor, " pos"]
) -> Float[Tensor, "token d_vocab"]:
    """Log-probabilities of one sample at some positions, in float32."""
    return torch.log_softmax(logits[where].float(), -1)


def divergence(p: Float[Tensor, "token d_vocab"], q: Float[Tensor, "token d_vocab"]) -> Float[Tensor, " token"]:
    """KL(p || q) of log-probabilities, in nats; tokens that a model forbids (minus infinity in p) count for nothing."""
    return (p.exp() * (p - q)).masked_fill(p == -torch.inf, 0.0).sum(-1)
