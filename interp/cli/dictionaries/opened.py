"""Which kind of dictionary a folder holds, and opening it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import FileError

if TYPE_CHECKING:
    from interp.dictionaries import Dictionary
    from interp.dictionaries.lorsa import Lorsa

FILES = ("cfg.json", "sae_weights.safetensors")
LORSA_FILES = ("lorsa.json", "lorsa_weights.safetensors")


def files_of(folder: str | Path) -> tuple[str, str]:
    """The names of the settings and of the weights in a folder; those of an SAE where it holds neither.

    Raises:
        FileError: it holds an SAE and a Lorsa.
    """
    held = [names for names in (FILES, LORSA_FILES) if (Path(folder) / names[0]).is_file()]
    if len(held) > 1:
        raise FileError(f"{folder} holds two dictionaries, {FILES[0]} and {LORSA_FILES[0]}: keep one in each folder.")
    return held[0] if held else FILES


def opened(folder: str | Path) -> "Dictionary | Lorsa":
    """The SAE, transcoder or Lorsa in a folder.

    Raises:
        FileError: there is none, or its files are damaged.
    """
    from interp.dictionaries import load
    from interp.dictionaries.lorsa import load as load_lorsa

    return load_lorsa(folder) if files_of(folder) == LORSA_FILES else load(folder)


def context_of(dictionary: Any, context: int) -> int:
    """Tokens of a context: as asked, but no more than a Lorsa knows."""
    return min(context, dictionary.cfg.context) if dictionary.sequences else context
