"""Files written whole or not at all: a temporary name in the same folder, then a rename. Never pickle."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from interp.errors import FileError

if TYPE_CHECKING:
    import pandas as pd


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Hand out a temporary path beside `path`; move it there when the block ends well, remove it when it does not.

    Missing parent folders are made. Two nested blocks write two files together: when either fails, both old files stay.

    Raises:
        FileError: `path` is a folder, or the system refuses to write there.
    """
    path = Path(path)
    if path.is_dir():
        raise FileError(f"cannot write {path}: a folder stands there; give the name of a file.")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}.") from error
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file of bytes, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike[str], content: str) -> None:
    """Write a UTF-8 text file, whole or not at all; line ends are kept as they are."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write an indented json file, whole or not at all.

    Raises:
        TypeError, ValueError: something in `content` has no form in json (NaN and infinities have none).
    """
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_parquet(path: str | os.PathLike[str], frame: "pd.DataFrame") -> None:
    """Write a pandas frame as parquet, whole or not at all."""
    with replacing(path) as temporary:
        frame.to_parquet(temporary)


def save_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors (any device) to one safetensors file, whole or not at all.

    Raises:
        FileError: it cannot be written, for instance because the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # safetensors refuses views that share memory, so each tensor gets its own.
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(own, temporary, metadata=dict(metadata or {}))
        except SafetensorError as error:  # errors of the system come in this form
            raise FileError(f"cannot write {path}: {error}.") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a json file.

    Raises:
        FileError: the file is missing or not json in UTF-8.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise FileError(f"{path} is damaged: it is not json in UTF-8 ({error}).") from error


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        FileError: the file is missing, cut short or not in safetensors form.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise FileError(f"cannot read {path}: there is no such file.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise FileError(f"{path} is damaged: it cannot be read as safetensors ({error}).") from error


def sha256(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
