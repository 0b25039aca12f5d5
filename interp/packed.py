"""Which rows of each input belong to which sample: pictures, tiles and patches of all samples are often packed.

Processors put all pictures of a batch one after the other into one tensor: picture by picture (LLaVA with several to a
prompt, Pixtral), tile by tile (InternVL, Aya Vision, Gemma 3) or patch by patch (Qwen-VL). Nothing says whose they are
but their order, the sizes that stand beside them, and how many image tokens each sample has. A division is taken only
where these agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor

from interp.errors import InputError

_OF_PICTURES = ("pixel", "image")


class Division:
    """The inputs of a batch by sample.

    Args:
        inputs: the model's inputs.
        size: number of samples.
        tokens: image tokens of each sample; None where none stand in the text.
        pictures: pictures of each sample, where that is known.

    Raises:
        InputError: it cannot be told whose the rows of an input are.
    """

    def __init__(
        self, inputs: Mapping[str, Any], size: int, tokens: Sequence[int] | None, pictures: Sequence[int] | None
    ) -> None:
        self.inputs, self.size = inputs, size
        self.tokens = list(tokens) if tokens is not None and any(tokens) else None
        self._pixels = inputs.get("pixel_values")
        self.weights = self._weights()
        counts = inputs.get("batch_num_images")
        if self.weights is not None and self.tokens is not None:
            self.pictures = _shared(self.tokens, self.weights)
        elif pictures is not None:
            self.pictures = list(pictures)
        elif isinstance(counts, Tensor) and self.tokens is not None and len(counts) == sum(map(bool, self.tokens)):
            left = iter(counts.tolist())
            self.pictures = [next(left) if count else 0 for count in self.tokens]
        else:
            self.pictures = None
        self.ends = {name: self._ends(name, value) for name, value in inputs.items() if isinstance(value, Tensor)}

    def part(self, first: int, stop: int) -> dict[str, Any]:
        """The inputs of some samples; those that hold pictures are left out where these have none."""
        found: dict[str, Any] = dict(self.inputs)
        none = self.tokens is not None and not any(self.tokens[first:stop])
        for name, ends in self.ends.items():
            a, b = ends[first], ends[stop]
            found[name] = found[name][:, a:b] if self._along(name) else found[name][a:b]
            if a == b or (none and name.startswith(_OF_PICTURES)):
                del found[name]
        return found

    def _along(self, name: str) -> int:
        """The axis of the samples."""
        value = self.inputs[name]
        return int(name == "position_ids" and value.ndim == 3 and value.shape[1] == self.size)

    def _weights(self) -> list[int] | None:
        """To what the image tokens of each picture are in proportion, where the sizes beside the pixels say so."""
        grids, sizes = self.inputs.get("image_grid_thw"), self.inputs.get("image_sizes")
        if isinstance(grids, Tensor):
            return grids.prod(-1).tolist()
        # With a further axis, of tiles, the number of tokens is another one.
        if isinstance(sizes, Tensor) and isinstance(self._pixels, Tensor) and self._pixels.ndim == 4:
            return sizes.prod(-1).tolist()
        return None

    def _ends(self, name: str, value: Tensor) -> list[int]:
        """Where the rows of each sample begin, and where the last one's end."""
        alone = list(range(self.size + 1))
        if self._along(name):
            return alone
        count = value.shape[0] if value.ndim else -1
        if name == "batch_num_images" and self.tokens is not None and count == sum(map(bool, self.tokens)):
            return [0, *accumulate(map(bool, self.tokens))]  # of samples that have any
        if not name.startswith(_OF_PICTURES) or "video" in name or self.tokens is None or self._by_sample():
            if count == self.size:
                return alone
        elif self.pictures is not None and count == sum(self.pictures):
            return [0, *accumulate(self.pictures)]
        elif name.startswith("pixel") and self.weights is not None and self.pictures is not None:
            if count == sum(self.weights):
                patches = [0, *accumulate(self.weights)]
                return [patches[n] for n in (0, *accumulate(self.pictures))]
        elif name.startswith("pixel") and value.ndim == 4 and (tiles := _shared(self.tokens, [1] * count)) is not None:
            return [0, *accumulate(tiles)]
        elif count == self.size and self.pictures is None and all(self.tokens):
            return alone
        raise InputError(
            f"sample by sample this batch cannot be taken: {name} {tuple(value.shape)} is packed over its {self.size} "
            "samples, and its image tokens do not say whose the rows are. Prepare the samples one by one."
        )

    def _by_sample(self) -> bool:
        """Whether pictures have an axis of their own behind that of the samples, as Idefics and Mllama have it."""
        pixels = self._pixels
        return isinstance(pixels, Tensor) and pixels.ndim >= 5 and "image_sizes" not in self.inputs


def _shared(tokens: Sequence[int], weights: Sequence[int]) -> list[int] | None:
    """How many items each sample has, if tokens are in proportion to weights; None where no end falls on an end."""
    found, total, at, reached, wanted = [], sum(weights), 0, 0, 0
    for count in tokens:
        wanted, begun = wanted + count * total, at
        while at < len(weights) and reached < wanted:
            reached += weights[at] * sum(tokens)
            at += 1
        if reached != wanted:
            return None
        found.append(at - begun)
    return found if at == len(weights) else None
