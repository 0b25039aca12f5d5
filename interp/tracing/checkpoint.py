"""What a stopped sweep leaves: a file for each finished pass, written whole or not at all, beside the sweep's plan."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.batch import Batch
from interp.errors import FileError, SettingsError
from interp.files import read_json, read_tensors, save_tensors, write_json

PLAN = "plan.json"


class Checkpoint:
    """A folder of finished passes, or nothing.

    Args:
        folder: where; None to keep nothing.
        plan: what makes the sweep: two sweeps with the same plan have the same passes.

    Raises:
        SettingsError: the folder holds another sweep.
        FileError: the folder is no folder of a sweep, or cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, plan: Mapping[str, Any]) -> None:
        self.folder = None if folder is None else Path(folder)
        self.reused = 0
        self.part = ""
        if self.folder is None:
            return
        path = self.folder / PLAN
        if path.exists():
            held = read_json(path)
            differ = [k for k in plan if not isinstance(held, dict) or held.get(k) != plan[k]]
            if differ:
                raise SettingsError(
                    f"checkpoint {self.folder} is of another sweep: {', '.join(differ)} differ. Choose another folder, "
                    "or remove this one."
                )
            return
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise FileError(f"checkpoint {self.folder} is not empty and holds no {PLAN}: choose another folder.")
        write_json(path, dict(plan))

    def runs(self, base: Tensor, source: Tensor) -> None:
        """Keep the metric of both runs, or see that they are what they were: edits and functions have no name.

        Raises:
            SettingsError: the runs gave other values when the sweep began.
        """
        if self.folder is None:
            return
        path = self.folder / f"runs-{self.part}.safetensors"
        if not path.exists():
            save_tensors(path, {"base": base, "source": source})
            return
        held = read_tensors(path)
        for name, value in (("base", base), ("source", source)):
            if held[name].shape != value.shape or not torch.allclose(held[name], value, rtol=1e-3, atol=1e-4):
                raise SettingsError(
                    f"checkpoint {self.folder} is of another sweep: its {name} run gave other values of the metric. "
                    "Choose another folder, or remove this one."
                )

    def get(self, name: str, cells: Tensor, samples: Tensor) -> Tensor | None:
        """The values of a pass that was finished before, or None.

        Raises:
            FileError: the file is damaged, or of other rows.
        """
        if self.folder is None or not (path := self._path(name)).exists():
            return None
        held = read_tensors(path)
        same = [torch.equal(held.get(k, torch.empty(0)), v) for k, v in (("cells", cells), ("samples", samples))]
        if not all(same):
            raise FileError(f"{path} holds other cells than this sweep has there: remove {self.folder} and begin anew.")
        self.reused += len(cells)
        return held["values"]

    def put(self, name: str, cells: Tensor, samples: Tensor, values: Tensor) -> None:
        """Keep the values of a finished pass."""
        if self.folder is not None:
            save_tensors(self._path(name), {"cells": cells, "samples": samples, "values": values})

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"pass-{self.part}-{name}.safetensors"


def held_memory(folder: str | os.PathLike[str] | None) -> int | None:
    """The memory that the sweep in a folder was planned with: it has the same passes with no other."""
    if folder is None or not (path := Path(folder) / PLAN).exists():
        return None
    held = read_json(path)
    memory = held.get("memory") if isinstance(held, dict) else None
    return memory if isinstance(memory, int) else None


def fingerprint(batches: Sequence[Batch], tensors: Sequence[Tensor | None] = ()) -> str:
    """A digest of everything that a sweep reads."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.inputs.items()):
            if isinstance(value, Tensor):
                digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    for tensor in tensors:
        digest.update(b"none" if tensor is None else tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
