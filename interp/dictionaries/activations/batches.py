"""What a source of activations hands out (`Contexts`, `Rows`), its `State`, and the protocol that all sources keep.

A source is an iterator. `state()` is the place behind the last item that it handed out; a source made with the same
settings that is given this state (`restore`) hands out the same items from there on, bit for bit on the same machine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.errors import FileError, SettingsError
from interp.files import save_tensors

Item = TypeVar("Item", covariant=True)
_KEY = "state"


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Activations of single tokens.

    Attributes:
        values: by read, such as `resid_post.10`, [row, d]; row i of every read is the same token.
        context: number of the context that each row comes from.
        position: its column there.
    """

    values: Mapping[str, Float[Tensor, "row d"]]
    context: Int[Tensor, " row"]
    position: Int[Tensor, " row"]

    def __len__(self) -> int:
        """How many tokens."""
        return self.context.shape[0]

    @property
    def used(self) -> int:
        """How many tokens are used: all."""
        return len(self)

    def __getitem__(self, read: str) -> Float[Tensor, "row d"]:
        """The activations of a read."""
        return self.values[read]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Rows:
        """The same rows on a device, in a dtype."""
        values = {k: v.to(device=device, dtype=dtype) for k, v in self.values.items()}
        return Rows(values, self.context.to(device), self.position.to(device))


@dataclass(frozen=True, slots=True, eq=False)
class Contexts:
    """Activations of whole contexts, padded to the longest of the batch.

    Attributes:
        values: by read, such as `resid_post.10`, [batch, pos, d].
        mask: the tokens to use: without padding, special tokens and what else the settings leave out.
        real: everything that is no padding, special tokens too: what attention looks at.
        ids: token ids; None where there are none (vision towers).
        document: for each token the number of its document in the corpus (a separator counts to the one before it); -1
            for padding and what stands around the context.
        number: of each context, counted from the beginning of the corpus over all epochs and ranks.
    """

    values: Mapping[str, Float[Tensor, "batch pos d"]]
    mask: Bool[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]
    ids: Int[Tensor, "batch pos"] | None
    document: Int[Tensor, "batch pos"]
    number: Int[Tensor, " batch"]

    def __len__(self) -> int:
        """How many contexts."""
        return self.number.shape[0]

    @property
    def used(self) -> int:
        """How many tokens are used."""
        return int(self.mask.sum())

    def __getitem__(self, read: str) -> Float[Tensor, "batch pos d"]:
        """The activations of a read."""
        return self.values[read]

    def rows(self) -> Rows:
        """The tokens to use, context by context."""
        where, column = self.mask.nonzero(as_tuple=True)
        values = {k: v[where, column] for k, v in self.values.items()}
        return Rows(values, self.number[where], column)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Contexts:
        """The same contexts on a device, their activations in a dtype."""
        values = {k: v.to(device=device, dtype=dtype) for k, v in self.values.items()}
        ids = None if self.ids is None else self.ids.to(device)
        rest = (self.document.to(device), self.number.to(device))
        return Contexts(values, self.mask.to(device), self.real.to(device), ids, *rest)

    @staticmethod
    def joined(parts: Sequence[Contexts]) -> Contexts:
        """Several one below the other, all padded on the right to the longest."""
        longest = max(part.mask.shape[1] for part in parts)

        def below(found: Sequence[Tensor], fill: float) -> Tensor:
            if all(t.shape[1] == longest for t in found):
                return torch.cat(list(found))
            out = found[0].new_full((sum(map(len, found)), longest, *found[0].shape[2:]), fill)
            for place, t in zip(out.split([len(t) for t in found]), found, strict=True):
                place[:, : t.shape[1]] = t
            return out

        values = {name: below([part.values[name] for part in parts], 0) for name in parts[0].values}
        mask, real = below([part.mask for part in parts], False), below([part.real for part in parts], False)
        ids = [part.ids for part in parts if part.ids is not None]
        document = below([part.document for part in parts], -1)
        number = torch.cat([part.number for part in parts])
        return Contexts(values, mask, real, below(ids, 0) if len(ids) == len(parts) else None, document, number)


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """Where a source stands.

    Attributes:
        values: json.
        tensors: what is too large for json, such as the content of a buffer.
    """

    values: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, the json in its header; whole or not at all.

        Raises:
            FileError: it cannot be written.
        """
        save_tensors(path, self.tensors, {_KEY: json.dumps(self.values)})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> State:
        """Read what `save` wrote.

        Raises:
            FileError: the file is missing, damaged, or none of these.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileError(f"cannot read {path}: there is no such file.")
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            values = json.loads(header[_KEY])
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise FileError(f"{path} is damaged, or no state of a source ({error}).") from error
        return State(values, tensors)

    def within(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """This state as a part of another one: json and tensors under a name."""
        return {name: self.values}, {f"{name}.{k}": v for k, v in self.tensors.items()}

    def part(self, name: str) -> State:
        """The state that `within` put there."""
        start = f"{name}."
        return State(self.values[name], {k[len(start) :]: v for k, v in self.tensors.items() if k.startswith(start)})


class Source(Protocol[Item]):
    """An iterator over batches that can be left and taken up again.

    Attributes:
        d_in: width of each read, known before anything is read.
        settings: what decides which items come, as json; a state of other settings is refused.
    """

    @property
    def d_in(self) -> Mapping[str, int]:
        """Width of each read."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """What decides which items come."""
        ...

    def __iter__(self) -> Source[Item]:
        """Itself."""
        ...

    def __next__(self) -> Item:
        """The next batch."""
        ...

    def state(self) -> State:
        """The place behind the last item that was handed out."""
        ...

    def restore(self, state: State) -> None:
        """Go to a place."""
        ...

    def close(self) -> None:
        """Give back threads and files; may be called twice."""
        ...


def check_settings(held: Any, own: Mapping[str, Any], what: str) -> None:
    """Refuse what was made with other settings.

    Raises:
        SettingsError: some differ; the message names them with both values.
    """
    held = held if isinstance(held, dict) else {}
    differ = _differences(held, json.loads(json.dumps(own)))
    if differ:
        raise SettingsError(f"{what} is of another source: {'; '.join(differ)}.")


def _differences(there: Mapping[str, Any], here: Mapping[str, Any], within: str = "") -> list[str]:
    found: list[str] = []
    for key in dict.fromkeys([*here, *there]):
        one, two = there.get(key), here.get(key)
        if isinstance(one, dict) and isinstance(two, dict):
            found += _differences(one, two, f"{within}{key}: ")
        elif one != two:
            found.append(f"{within}{key} (there {_short(one)}, here {_short(two)})")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 90 else text[:87] + "..."
