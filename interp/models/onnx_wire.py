"""Read weights and node names from an ONNX file without the onnx package: just enough of the protobuf wire format.

A protobuf message is a run of fields, each a varint key (number << 3 | wire type) and a value. Needed here, with their
field numbers in onnx.proto: ModelProto.graph 7; GraphProto.node 1, initializer 5; NodeProto.input 1, output 2, name 3,
op_type 4; TensorProto.dims 1, data_type 2, name 8, raw_data 9.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from interp.errors import FileError, UnsupportedError

_FLOAT = 1


@dataclass(frozen=True, slots=True)
class Node:
    """One operation of an ONNX graph."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Graph:
    """The operations of an ONNX graph in order, and its stored float32 tensors by name."""

    nodes: tuple[Node, ...]
    tensors: dict[str, np.ndarray]


def read_onnx(path: Path) -> Graph:
    """The graph of an ONNX file whose tensors are float32 and stored inside it.

    Raises:
        FileError: the file is not a whole ONNX file.
        UnsupportedError: a tensor is not float32, or lies in another file.
    """
    content = memoryview(path.read_bytes())
    nodes: list[Node] = []
    tensors: dict[str, np.ndarray] = {}
    try:
        for _, graph in _only(_fields(content), 7):
            for number, value in _fields(graph):
                if number == 1:
                    nodes.append(_node(value))
                elif number == 5:
                    name, array = _tensor(value)
                    tensors[name] = array
    except (IndexError, TypeError, ValueError) as error:
        raise FileError(f"{path} is not a whole ONNX file: {error}") from error
    if not nodes:
        raise FileError(f"{path} is not an ONNX file: it holds no graph.")
    return Graph(tuple(nodes), tensors)


def _only(fields: Iterator[tuple[int, memoryview | int]], wanted: int) -> Iterator[tuple[int, memoryview]]:
    return ((number, value) for number, value in fields if number == wanted and isinstance(value, memoryview))


def _fields(message: memoryview | int) -> Iterator[tuple[int, memoryview | int]]:
    if isinstance(message, int):
        raise TypeError("a number stands where a message should")
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if wire == 2:
            length, at = _varint(message, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + length > len(message):
            raise ValueError(f"a field of {length} bytes at byte {at} runs past the end")
        yield key >> 3, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _text(value: memoryview | int) -> str:
    if isinstance(value, int):
        raise TypeError("a number stands where text should")
    return bytes(value).decode("utf-8")


def _node(message: memoryview | int) -> Node:
    found: dict[int, list[str]] = {1: [], 2: [], 3: [], 4: []}
    for number, value in _fields(message):
        if number in found:
            found[number].append(_text(value))
    return Node("".join(found[3]), "".join(found[4]), tuple(found[1]), tuple(found[2]))


def _tensor(message: memoryview | int) -> tuple[str, np.ndarray]:
    shape: list[int] = []
    kind, name, data = 0, "", None
    for number, value in _fields(message):
        if number == 1:
            shape.extend([value] if isinstance(value, int) else _packed(value))
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8:
            name = _text(value)
        elif number == 9 and isinstance(value, memoryview):
            data = value
    if kind != _FLOAT or data is None:
        raise UnsupportedError(f"The ONNX tensor {name!r} (type {kind}) is not float32 stored as raw data in the file.")
    return name, np.frombuffer(data, "<f4").reshape(shape)


def _packed(message: memoryview) -> Iterator[int]:
    at = 0
    while at < len(message):
        value, at = _varint(message, at)
        yield value
