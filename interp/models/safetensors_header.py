"""Tell a whole safetensors file from a damaged one by its header, without reading the weights."""

import json
from pathlib import Path

from interp.errors import FileError


def check_safetensors(path: Path) -> None:
    """Check that a file begins with a safetensors header and is as long as the header says.

    Raises:
        FileError: it is not a safetensors file, or it is truncated or padded.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise FileError(f"{path} is damaged: {size} bytes cannot hold its header. {_MEND}")
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FileError(f"{path} is damaged: its header cannot be read ({error}). {_MEND}") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise FileError(f"{path} is damaged: it has {size} bytes, but its header asks for {expected}. {_MEND}")


_MEND = "Delete it and copy or download it again."
