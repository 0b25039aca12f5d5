"""Write the parts of a transformers folder: weights as safetensors, the rest as json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

WEIGHTS = "model.safetensors"


def write_weights(folder: Path, tensors: "Mapping[str, np.ndarray]") -> None:
    """Write `model.safetensors` into a folder, in the form that transformers reads."""
    import numpy as np
    from safetensors.numpy import save_file

    # safetensors writes the buffer as it lies in memory, so a transposed view would be stored wrongly.
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(contiguous, folder / WEIGHTS, metadata={"format": "pt"})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a json file, indented, in UTF-8."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
