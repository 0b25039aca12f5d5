"""Load a model and its processor: a packaged one by its name, else a local folder or a hub id."""

import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import FileError, MissingPackageError, SettingsError, UnknownNameError, UnsupportedError, unknown
from interp.models.cache import folder
from interp.models.catalogue import CATALOGUE
from interp.models.safetensors_header import check_safetensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DTYPES = ("float32", "float16", "bfloat16", "float64")


def load(
    name: str | os.PathLike[str],
    *,
    dtype: "torch.dtype | str | None" = None,
    device: "torch.device | str | None" = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> "tuple[PreTrainedModel, Any | None]":
    """Load a model, in evaluation mode and otherwise as transformers gives it, and its processor.

    Args:
        name: a packaged model (converted into the cache on first use), a folder that holds a transformers model, or a
            hub id `"org/name"`. A packaged name wins over a folder of that name: write `"./name"` for the folder.
        dtype: a torch dtype or its name, or `"auto"` for the one stored in the files. Default: float32 for packaged
            models, `"auto"` for others.
        device: where to put it; `"auto"` lets accelerate spread it. Default: cuda where there is one, else cpu.
        attn_implementation: as in transformers; default: transformers' own choice.
        trust_remote_code: run code that comes with the model; as in transformers.
        revision: a branch, tag or commit of a hub model.

    Returns:
        The model, and its processor, tokenizer or image processor; None where the folder holds none.

    Raises:
        UnknownNameError: the name is neither packaged, nor a folder, nor of the form of a hub id; or no such dtype.
        MissingPackageError: the model, or its processor, needs a package that is not installed.
        FileError: a file is missing or damaged, or the hub did not give the model.
        SettingsError: `revision` for something that is not on the hub; or remote code that was not allowed.
        UnsupportedError: transformers has no class for it, or the class cannot do what was asked.
    """
    source, packaged = _resolve(name)
    if revision is not None and isinstance(source, Path):
        raise SettingsError(f"revision={revision!r} is for hub models, but {os.fspath(name)!r} is on this machine.")
    chosen_dtype = _dtype(dtype, packaged=packaged)
    chosen_device = _device(device)

    import interp.models.tracr  # noqa: F401  registers its model type with transformers
    from interp.models.autoclass import model_class
    from interp.models.processors import load_processor

    remote = {"trust_remote_code": trust_remote_code, "revision": revision}
    config = _config(source, remote)
    options: dict[str, Any] = {"config": config, "dtype": chosen_dtype, **remote}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if chosen_device == "auto":
        options["device_map"] = "auto"
    model = _model(model_class(config, trust_remote_code=trust_remote_code), source, options)
    if chosen_device != "auto":
        model.to(chosen_device)  # pyright: ignore[reportArgumentType]
    model.eval()
    return model, load_processor(source, config, **remote)


def _resolve(name: str | os.PathLike[str]) -> tuple[Path | str, bool]:
    text = os.fspath(name)
    if isinstance(name, str) and text in CATALOGUE:
        return folder(text), True
    path = Path(text).expanduser()
    if path.is_dir():
        _check_folder(path)
        return path, False
    if isinstance(name, str) and _HUB_ID.fullmatch(text):
        return text, False
    near = unknown("model", text, CATALOGUE)
    raise UnknownNameError(f"{near} Also allowed: an existing local folder, or a hub id of the form 'org/name'.")


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise FileError(f"The folder {path} holds no config.json, so it is not a transformers model.")
    for file in sorted(path.glob("*.safetensors")):
        check_safetensors(file)


def _dtype(asked: "torch.dtype | str | None", *, packaged: bool) -> "torch.dtype | str":
    import torch

    if asked is None:
        return torch.float32 if packaged else "auto"
    if isinstance(asked, torch.dtype):
        return asked
    plain = asked.removeprefix("torch.")
    if plain == "auto":
        return "auto"
    if plain not in _DTYPES:
        raise unknown("dtype", asked, ("auto", *_DTYPES))
    return getattr(torch, plain)


def _device(asked: "torch.device | str | None") -> "torch.device | str":
    import torch

    if asked is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked == "auto":
        return "auto"
    try:
        return torch.device(asked)
    except RuntimeError as error:
        raise UnknownNameError(f"device {asked!r} does not exist: {_first_line(error)}") from error


def _config(source: Path | str, remote: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, **remote)
    except OSError as error:
        raise _unreadable(source, error) from error
    except ValueError as error:
        raise _refused(source, error) from error


def _model(cls: Any, source: Path | str, options: dict[str, Any]) -> "PreTrainedModel":
    from safetensors import SafetensorError

    try:
        model, report = cls.from_pretrained(source, output_loading_info=True, **options)
    except SafetensorError as error:
        raise FileError(f"The safetensors files of {source} are damaged: {error}") from error
    except ImportError as error:
        raise MissingPackageError(f"Loading {str(source)!r} needs another package: {error}") from error
    except OSError as error:
        raise _unreadable(source, error) from error
    except ValueError as error:
        raise _refused(source, error) from error
    missing = sorted(report["missing_keys"])
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        warnings.warn(
            f"{len(missing)} tensors of {cls.__name__} are not in the files of {source} and were drawn at random: "
            f"{shown}",
            stacklevel=3,
        )
    return model


def _unreadable(source: Path | str, error: OSError) -> FileError:
    if isinstance(source, Path):
        return FileError(f"The model in {source} could not be read: {_first_line(error)}")
    return FileError(
        f"The hub did not give the model {source!r}, and there is no local folder of that name: {_first_line(error)} "
        "If the hub cannot be reached from here, download the model elsewhere and give its folder."
    )


def _refused(source: Path | str, error: ValueError) -> SettingsError | UnsupportedError:
    if "trust_remote_code" in str(error):
        return SettingsError(
            f"{str(source)!r} brings its own code, which is not run unless trust_remote_code=True is given; "
            "read that code first."
        )
    return UnsupportedError(f"transformers cannot load {str(source)!r} as asked: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)
