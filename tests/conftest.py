"""What all tests share: quiet libraries, one thread per worker, lenses of the packaged models."""

import importlib.metadata
import os
import warnings

import pytest
import torch
from jaxtyping import install_import_hook

# Shapes in annotations are checked at run time here, and only here.
install_import_hook(
    ["interp.batch", "interp.engine.attention", "interp.engine.norms", "interp.heads", "interp.patches"],
    "beartype.beartype",
)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_configure(config):
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        # In the environment, so that commands and notebooks that a test starts keep to it: threads of two workers that
        # wait for each other on two cores take many times as long.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


def packaged(name: str):
    """The lens of a packaged model; skips when its package is not installed (a publisher may withdraw it)."""
    import interp

    row = interp.models.row(name)
    if not row.bundled:
        try:
            importlib.metadata.distribution(row.package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{row.package} is not installed")
    return interp.load(name)


@pytest.fixture(scope="session")
def smollm():
    return packaged("smollm2-135m")
