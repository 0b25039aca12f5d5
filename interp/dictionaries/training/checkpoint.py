"""Checkpoints of a training run: complete, written whole or not at all, and checked when they are read.

`FOLDER/checkpoints/step-00000500/` holds one file for each dictionary (weights, Adam, counts), one with the place of
the source for each process, torch's random states, and `checkpoint.json`: the step, the settings, the log so far, and
the sha256 of every file. It is written under another name and then renamed.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.dictionaries.activations import State
from interp.dictionaries.activations.batches import check_settings
from interp.errors import FileError
from interp.files import read_json, read_tensors, save_tensors, sha256, write_json
from interp.processes import Processes

NAME = "checkpoint.json"


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: of the run.
        identity: what decides how it goes on; a checkpoint of another is refused.
        processes: that train together.
        keep: how many are kept.
    """

    def __init__(
        self, folder: str | os.PathLike[str], identity: Mapping[str, Any], processes: Processes, keep: int
    ) -> None:
        self.folder = Path(folder) / "checkpoints"
        self.identity, self.processes, self.keep = dict(identity), processes, keep

    def steps(self) -> list[int]:
        """The steps of which there are complete checkpoints, in order."""
        if not self.folder.is_dir():
            return []
        found = [re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.iterdir()]
        return sorted(int(match[1]) for match in found if match)

    def save(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], source: State, values: Mapping[str, Any]
    ) -> None:
        """Write a checkpoint, then remove the oldest.

        Args:
            step: how many steps were made.
            tensors: of each dictionary.
            source: the place of this process's source.
            values: all else, as json holds it.

        Raises:
            FileError: it cannot be written, for instance because the disk is full; those before it stay.
        """
        target = self.folder / f"step-{step:08d}"
        making = self.folder / f".step-{step:08d}.tmp"
        try:
            if self.processes.first:
                shutil.rmtree(making, ignore_errors=True)
                making.mkdir(parents=True)
        except OSError as error:
            raise FileError(f"cannot write {making}: {error.strerror or error}.") from error
        self.processes.wait()
        rank = self.processes.rank
        source.save(making / f"source-{rank:04d}.safetensors")
        save_tensors(making / f"random-{rank:04d}.safetensors", _random())
        if self.processes.first:
            for name, held in tensors.items():
                save_tensors(making / f"dictionary-{name}.safetensors", held)
        self.processes.wait()
        if self.processes.first:
            hashes = {path.name: sha256(path) for path in sorted(making.iterdir())}
            head = {"step": step, "world": self.processes.world, "identity": self.identity, "sha256": hashes}
            write_json(making / NAME, {**head, "values": dict(values)})
            shutil.rmtree(target, ignore_errors=True)
            os.replace(making, target)
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self.folder / f"step-{old:08d}", ignore_errors=True)
        self.processes.wait()

    def load(self, names: Sequence[str]) -> tuple[int, dict[str, dict[str, Tensor]], State, dict[str, Any]] | None:
        """The newest checkpoint: step, tensors of each dictionary, the source's place, all else; None without one.

        Also sets torch's random states.

        Raises:
            FileError: it is damaged.
            SettingsError: it is of a run with other settings.
        """
        steps = self.steps()
        if not steps:
            return None
        path = self.folder / f"step-{steps[-1]:08d}"
        held = read_json(path / NAME)
        for name, digest in held["sha256"].items():
            if not (path / name).is_file() or sha256(path / name) != digest:
                raise FileError(
                    f"{path / name} is missing or damaged (its sha256 is another). Remove {path} to go on from the "
                    f"checkpoint before it{', or begin anew' if len(steps) < 2 else ''}."
                )
        if self.processes.first:  # the others' sources compare their own place
            there = {**held["identity"], "processes": held["world"]}
            check_settings(there, {**self.identity, "processes": self.processes.world}, f"the checkpoint {path}")
        rank = self.processes.rank
        _set_random(read_tensors(path / f"random-{rank:04d}.safetensors"))
        tensors = {name: read_tensors(path / f"dictionary-{name}.safetensors") for name in names}
        return held["step"], tensors, State.load(path / f"source-{rank:04d}.safetensors"), held["values"]


def _random() -> dict[str, Tensor]:
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def _set_random(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
