"""One shard of a store: a safetensors file of tokens, context by context, written from `Contexts` and read mapped.

Tensors: `values.READ` [token, d]; for each token `use` (one to train on), `position` (place in its context, padding not
counted), `document`, and `ids` where there are some; for each context `number` and `length` (its tokens here).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.dictionaries.activations.batches import Contexts
from interp.errors import FileError, SettingsError
from interp.files import save_tensors

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_NAMES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "I64": torch.int64, "I32": torch.int32}
_NAMES |= {"BOOL": torch.bool}
VALUES = "values."


def tokens_of(contexts: Contexts, dtype: torch.dtype, keep_all: bool) -> dict[str, Tensor]:
    """The tensors of a shard that holds these contexts, on the CPU.

    Args:
        contexts: from a stream.
        dtype: of the activations.
        keep_all: keep special tokens and others that are not to be used, so that contexts can be read whole.

    Raises:
        SettingsError: an activation is too large for float16.
    """
    keep = contexts.real if keep_all else contexts.mask
    values = {name: value[keep] for name, value in contexts.values.items()}
    rank = contexts.real.long().cumsum(1) - 1
    out = {
        "use": contexts.mask[keep],
        "position": rank[keep].int(),
        "document": contexts.document[keep],
        "number": contexts.number,
        "length": keep.sum(1).int(),
    }
    if contexts.ids is not None:
        out["ids"] = contexts.ids[keep].int()
    out = {k: v.cpu() for k, v in out.items()}
    for name, value in values.items():
        if dtype == torch.float16:
            _check_range(name, value, out)
        out[VALUES + name] = value.to(dtype).cpu()
    return out


def _check_range(name: str, value: Tensor, tokens: dict[str, Tensor]) -> None:
    largest = torch.finfo(torch.float16).max
    size = value.abs().amax(-1)
    if not bool((size > largest).any()):
        return
    row = int(size.argmax())
    number = tokens["number"].repeat_interleave(tokens["length"])[row]
    raise SettingsError(
        f"float16 cannot hold {name} of context {int(number)}, position {int(tokens['position'][row])}: "
        f"{float(size[row]):.4g} is above {largest:.0f}. Store bfloat16 or float32; first positions, which are often "
        "that large, are left out with keep='rows' and drop_first=True."
    )


def write_shard(path: Path, parts: Sequence[dict[str, Tensor]]) -> None:
    """Write a shard, whole or not at all.

    Raises:
        FileError: it cannot be written, for instance because the disk is full.
    """
    save_tensors(path, {name: torch.cat([p[name] for p in parts]) for name in parts[0]})


class Shard:
    """A shard on disk; its activations are read only where they are asked for.

    Attributes:
        use: tokens to train on [token].
        length: tokens of each context [context].
        number: number of each context [context].
        context: number of the context of each token [token].
        starts: first token of each context, and the number of tokens [context + 1].
    """

    def __init__(self, path: Path) -> None:
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                header = int.from_bytes(file.read(8), "little")
                if not 0 < header < size:
                    raise ValueError("its header is cut")
                rows: dict[str, Any] = json.loads(file.read(header))
            self._bytes = np.memmap(path, dtype=np.uint8, mode="c", offset=8 + header)
            rows.pop("__metadata__", None)
            if max(row["data_offsets"][1] for row in rows.values()) != len(self._bytes):
                raise ValueError("it is cut short")
            self._tensors = {name: self._tensor(row) for name, row in rows.items()}
        except FileNotFoundError as error:
            raise FileError(f"the shard {path} is missing.") from error
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise FileError(f"the shard {path} is damaged ({error}): remove it and harvest again.") from error
        self.use, self.position = self._tensors["use"], self._tensors["position"]
        self.length, self.number = self._tensors["length"].long(), self._tensors["number"]
        self.document, self.ids = self._tensors["document"], self._tensors.get("ids")
        self.context = self.number.repeat_interleave(self.length)
        self.starts = torch.cat([self.length.new_zeros(1), self.length.cumsum(0)])
        self.used = self.use.nonzero()[:, 0]

    def _tensor(self, row: dict[str, Any]) -> Tensor:
        begin, end = row["data_offsets"]
        flat = torch.from_numpy(self._bytes[begin:end])
        return flat.view(_NAMES[row["dtype"]]).reshape(row["shape"])

    def values(self, read: str) -> Tensor:
        """All activations of a read [token, d], mapped from the file."""
        return self._tensors[VALUES + read]
