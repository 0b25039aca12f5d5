"""`Batch`: prompts and images as padded tensors, and the named spans in them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.errors import InputError, UnknownNameError, unknown
from interp.packed import Division
from interp.patches import Patches
from interp.reads import Positions


@dataclass(frozen=True, slots=True)
class Selection:
    """Columns chosen in each sample of a batch.

    Attributes:
        index: columns [batch, n]; where `valid` is False the entry is a filler.
        valid: which entries are real [batch, n].
    """

    index: Int[Tensor, "batch n"]
    valid: Bool[Tensor, "batch n"]

    @property
    def uniform(self) -> bool:
        """Whether every entry is real."""
        return bool(self.valid.all())


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Prompts (and images) as the model takes them. Made by `Lens.prepare`.

    Attributes:
        inputs: the tensors that the model's forward takes, by name.
        mask: real tokens [batch, pos] of the main tower's stream; False on padding.
        source_mask: for encoder-decoders, the real tokens [batch, pos] of the encoder, if it reads tokens.
        texts: the prompts, if the batch was made from text.
        tokens: for each sample, the token string of each column.
        offsets: for each sample, the (start, end) characters of each column in its text.
        image_mask: columns that hold image tokens [batch, pos], if the model takes images.
        patches: where each image token looks, if the model takes images.
    """

    inputs: Mapping[str, Any]
    mask: Bool[Tensor, "batch pos"]
    source_mask: Bool[Tensor, "batch source"] | None = None
    texts: tuple[str, ...] | None = None
    tokens: tuple[tuple[str, ...], ...] | None = None
    offsets: tuple[tuple[tuple[int, int], ...], ...] | None = field(default=None, repr=False)
    image_mask: Bool[Tensor, "batch pos"] | None = None
    patches: Patches | None = None

    def __len__(self) -> int:
        """Number of samples."""
        return self.mask.shape[0]

    def __repr__(self) -> str:
        """Sizes, not contents."""
        images = "" if self.image_mask is None else f", {int(self.image_mask.sum())} image tokens"
        return f"Batch({len(self)} samples, {self.mask.shape[1]} columns, {int(self.mask.sum())} tokens{images})"

    def __iter__(self) -> Iterator["Batch"]:
        """The samples, one by one, without padding."""
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> "Batch":
        """Sample `i` alone, without its padding.

        Raises:
            UnknownNameError: there is no such sample.
            InputError: it cannot be told which rows of an input are whose.
        """
        if not -len(self) <= i < len(self):
            raise UnknownNameError(f"sample {i} does not exist: the batch has {len(self)} (0 to {len(self) - 1}).")
        i %= len(self)
        one = self.part(i, i + 1)
        keep = self.mask[i].nonzero()[:, 0]
        columns, width = keep.tolist(), self.mask.shape[1]
        inputs = dict(one.inputs)
        names = _DECODER_INPUTS if "decoder_input_ids" in inputs else _TOKEN_INPUTS
        for name, axis in names.items():
            value = inputs.get(name)
            if isinstance(value, Tensor) and value.ndim > 1 and value.shape[axis] == width:
                inputs[name] = value.index_select(axis, keep)
        return replace(
            one,
            inputs=inputs,
            mask=one.mask[:, keep],
            tokens=None if self.tokens is None else (tuple(self.tokens[i][c] for c in columns),),
            offsets=None if self.offsets is None else (tuple(self.offsets[i][c] for c in columns),),
            image_mask=None if one.image_mask is None else one.image_mask[:, keep],
            patches=None if self.patches is None else self.patches.sample_alone(i, columns),
        )

    def part(self, first: int, stop: int) -> "Batch":
        """Samples from `first` to before `stop`, with the padding that they have; pictures go with their samples.

        Raises:
            InputError: it cannot be told which rows of an input are whose.
        """
        if (first, stop) == (0, len(self)):
            return self
        tokens = None if self.image_mask is None else self.image_mask.sum(1).tolist()
        pictures = None if self.patches is None else [len(row) for row in self.patches.sizes]

        def some(x: Any) -> Any:
            return None if x is None else x[first:stop]

        names = ("mask", "source_mask", "texts", "tokens", "offsets", "image_mask")
        return replace(
            self,
            inputs=Division(self.inputs, len(self), tokens, pictures).part(first, stop),
            patches=None if self.patches is None else self.patches.part(first, stop),
            **{name: some(getattr(self, name)) for name in names},
        )

    @property
    def repeatable(self) -> bool:
        """Whether every input has one row for each sample, so that samples can be repeated."""
        tensors = [v for v in self.inputs.values() if isinstance(v, Tensor)]
        return all(v.ndim > 0 and v.shape[0] == len(self) for v in tensors) and self.patches is None

    def repeat(self, copies: int) -> "Batch":
        """The whole batch several times, one copy after the other.

        Raises:
            InputError: the inputs hold tensors that are packed over samples.
        """
        if not self.repeatable:
            raise InputError("this batch cannot be repeated: its images are packed over samples.")

        def wide(x: Any) -> Any:
            return x.repeat(copies, *([1] * (x.ndim - 1))) if isinstance(x, Tensor) else x

        return replace(
            self,
            inputs={k: wide(v) for k, v in self.inputs.items()},
            mask=wide(self.mask),
            source_mask=wide(self.source_mask),
            image_mask=wide(self.image_mask),
            texts=None if self.texts is None else self.texts * copies,
            tokens=None if self.tokens is None else self.tokens * copies,
            offsets=None if self.offsets is None else self.offsets * copies,
        )

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Real tokens of each sample."""
        return self.mask.sum(1)

    @property
    def padding(self) -> str | None:
        """Where the main tower's stream is padded: `left`, `right`, `mixed`, or None when nothing is."""
        return padding_side(self.mask)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch with every tensor on `device`."""
        move = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.inputs.items()}
        masks = {
            name: None if getattr(self, name) is None else getattr(self, name).to(device)
            for name in ("mask", "source_mask", "image_mask")
        }
        return replace(self, inputs=move, **masks)

    def find(self, text: str, *, occurrence: int = 0) -> Bool[Tensor, "batch pos"]:
        """The columns of each sample whose characters overlap `text`.

        Args:
            text: what to look for in every prompt.
            occurrence: which one, if it stands there several times (-1 for the last).

        Raises:
            InputError: the batch was not made from text, or a prompt does not hold `text` that often.
        """
        if self.texts is None or self.offsets is None:
            raise InputError("batch.find needs a batch made from text with a fast tokenizer; this one has no offsets.")
        found = torch.zeros_like(self.mask)
        plain = self.span("text").tolist()
        for i, (prompt, spans) in enumerate(zip(self.texts, self.offsets, strict=True)):
            starts = [s for s in range(len(prompt)) if prompt.startswith(text, s)] if text else []
            hits = [
                [c for c, (a, b) in enumerate(spans) if a < s + len(text) and b > s and plain[i][c]] for s in starts
            ]
            # What stands inside an image placeholder has no token of its own and does not count.
            hits = [h for h in hits if h]
            if not -len(hits) <= occurrence < len(hits):
                raise InputError(
                    f"sample {i} holds {text!r} {len(hits)} times; occurrence {occurrence} was asked: {prompt[:80]!r}"
                )
            found[i, hits[occurrence]] = True
        return found

    def span(self, name: str) -> Bool[Tensor, "batch pos"]:
        """The columns of a named span: `image`, `text` (real tokens that are no image tokens), `all` or `last`.

        Raises:
            UnknownNameError: no such span.
            InputError: the batch has no image tokens.
        """
        if name == "all":
            return self.mask
        if name == "last":
            last = torch.zeros_like(self.mask)
            columns = torch.arange(self.mask.shape[1], device=self.mask.device)
            last[torch.arange(len(self), device=self.mask.device), (self.mask * columns).argmax(1)] = True
            return last
        if name == "image":
            if "cross_attention_mask" in self.inputs:
                raise InputError("images reach this model through cross-attention: no image tokens stand in its text.")
            if self.image_mask is None or not bool(self.image_mask.any()):
                raise InputError("the batch holds no image tokens: give images to lens.prepare.")
            return self.image_mask
        if name == "text":
            return self.mask if self.image_mask is None else self.mask & ~self.image_mask
        raise unknown("span", name, ("image", "text", "all", "last"))

    def select(self, positions: Positions) -> Selection:
        """Columns that a position selection means in this batch (see `interp.reads.check_positions`).

        Raises:
            InputError: a position outside a sample, or a tensor of another batch size.
        """
        return select(positions, self.mask, self)


def padding_side(mask: Bool[Tensor, "batch pos"]) -> str | None:
    """`left`, `right` or `mixed`, by where the padding of a mask stands; None when there is none."""
    if bool(mask.all()):
        return None
    steps = mask.int().diff(dim=1)
    if bool((steps >= 0).all()):
        return "left"
    return "right" if bool((steps <= 0).all()) else "mixed"


_TOKEN_INPUTS = {
    **dict.fromkeys(("input_ids", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids"), -1),
    **dict.fromkeys(("inputs_embeds", "cross_attention_mask"), 1),
}
_DECODER_INPUTS = {"decoder_input_ids": -1, "decoder_attention_mask": -1}
"""Inputs with an entry for each column of the main tower, and the axis of their columns."""


def select(positions: Positions, mask: Bool[Tensor, "batch pos"], batch: Batch | None = None) -> Selection:
    """Columns that a position selection means in a stream whose real positions are `mask`.

    Args:
        positions: a normalised selection.
        mask: real positions of the stream.
        batch: the batch, for the spans `image` and `text`.

    Raises:
        InputError: a position outside a sample, or a tensor of another size.
    """
    size, width = mask.shape
    device = mask.device
    if isinstance(positions, str):
        if positions == "all":
            index = torch.arange(width, device=device).expand(size, width)
            return Selection(index, torch.ones_like(mask))
        if positions == "last":
            return _relative(torch.full((size, 1), -1, device=device), mask)
        if positions in ("image", "text"):
            if batch is None:
                raise InputError(f"positions {positions!r} mean something in the text tower only.")
            return _marked(batch.span(positions))
        raise InputError(f"positions {positions!r} mean something in lens.generate only, not in a single run.")
    if isinstance(positions, Tensor):
        if positions.shape[0] != size or (positions.dtype == torch.bool and positions.shape[1] != width):
            raise InputError(
                f"positions tensor {tuple(positions.shape)} does not fit a batch of {size} samples, {width} columns."
            )
        if positions.dtype == torch.bool:
            return _marked(positions.to(device))
        return _relative(positions.to(device).long(), mask)
    if isinstance(positions, slice):
        rank = mask.long().cumsum(1) - 1
        lengths = mask.sum(1, keepdim=True)
        low = _bound(positions.start, 0, lengths)
        high = _bound(positions.stop, None, lengths)
        chosen = mask & (rank >= low) & (rank < high)
        if not bool(chosen.any(1).all()):
            row = int((~chosen.any(1)).nonzero()[0])
            raise InputError(
                f"positions {positions} select nothing in sample {row}, which has {int(lengths[row])} tokens."
            )
        return _marked(chosen)
    listed = (positions,) if isinstance(positions, int) else positions
    return _relative(torch.tensor(listed, device=device).expand(size, len(listed)), mask)


def _bound(value: int | None, default: int | None, lengths: Tensor) -> Tensor:
    if value is None:
        return lengths if default is None else torch.full_like(lengths, default)
    return lengths + value if value < 0 else torch.full_like(lengths, value)


def _relative(wanted: Int[Tensor, "batch n"], mask: Bool[Tensor, "batch pos"]) -> Selection:
    lengths = mask.sum(1, keepdim=True)
    rank = torch.where(wanted < 0, wanted + lengths, wanted)
    outside = (rank < 0) | (rank >= lengths)
    if bool(outside.any()):
        row, column = outside.nonzero()[0].tolist()
        raise InputError(
            f"position {int(wanted[row, column])} does not exist in sample {row}, which has {int(lengths[row])} tokens "
            f"(0 to {int(lengths[row]) - 1})."
        )
    # Column of the r-th real token of each row: real columns first, in order.
    order = torch.argsort((~mask).to(torch.int8), dim=1, stable=True)
    index = order.gather(1, rank)
    return Selection(index, torch.ones_like(index, dtype=torch.bool))


def _marked(chosen: Bool[Tensor, "batch pos"]) -> Selection:
    counts = chosen.sum(1)
    n = int(counts.max()) if counts.numel() else 0
    if n == 0:
        raise InputError("the position selection is empty in every sample.")
    order = torch.argsort((~chosen).to(torch.int8), dim=1, stable=True)[:, :n]
    return Selection(order, torch.arange(n, device=chosen.device) < counts[:, None])
