"""Keep the state of a training run: weights and optimiser as safetensors, counters as json, written atomically."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from interp.files import write_bytes


def save_state(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer | None, state: dict[str, Any]) -> None:
    """Write everything that a run needs to go on."""
    tensors = {f"model.{name}": p.detach().cpu().contiguous() for name, p in model.state_dict().items()}
    if optimiser is not None:
        for index, moments in optimiser.state_dict()["state"].items():
            for name, value in moments.items():
                tensors[f"optimiser.{index}.{name}"] = torch.as_tensor(value).cpu().contiguous()
    write_bytes(path, save(tensors, metadata={"state": json.dumps(state)}))


def load_state(path: Path, model: nn.Module, optimiser: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Fill the model and the optimiser, and return the counters.

    The optimiser may be None, or of another stage than the one that was saved: then only the model is filled.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        names = list(file.keys())
        model.load_state_dict({n.removeprefix("model."): file.get_tensor(n) for n in names if n.startswith("model.")})
        if optimiser is not None:
            moments: dict[int, dict[str, torch.Tensor]] = {}
            for name in names:
                if name.startswith("optimiser."):
                    _, index, what = name.split(".")
                    moments.setdefault(int(index), {})[what] = file.get_tensor(name)
            optimiser.load_state_dict({**optimiser.state_dict(), "state": moments})
    return json.loads(metadata["state"])
