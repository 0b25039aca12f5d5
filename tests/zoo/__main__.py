"""Self-check: ``python -m tests.zoo [name ...]`` builds and runs every family under two attention implementations."""

from __future__ import annotations

import sys
import time
import traceback
import warnings

import torch
from torch import Tensor
from transformers.utils import logging

from . import ZOO, build, inputs, processor


def output(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The main output tensor of a forward pass."""
    with torch.no_grad():
        result = model(**batch)
    for key in ("logits", "logits_per_image", "last_hidden_state"):
        value = getattr(result, key, None)
        if isinstance(value, Tensor):
            return value
    raise TypeError(f"no tensor to compare in {type(result).__name__}")


def check(name: str, verbose: bool) -> bool:
    """Print one line about family ``name``; whether all is well."""
    start = time.perf_counter()
    try:
        batch = inputs(name)
        model = build(name)
        default = model.config._attn_implementation
        first = output(model, batch)
        second = output(build(name, attn_implementation="eager"), batch)
        diff = (first - second).abs().max().item()
        size = sum(p.numel() for p in model.parameters())
        spread = first.flatten(1).std().item()
        good = bool(first.isfinite().all() and second.isfinite().all()) and diff < 1e-3 and spread > 1e-3
        text = (
            f"{type(model).__name__:36s} {size:7d} {tuple(first.shape)!s:18s} {default!s:6s} diff {diff:.1e} "
            f"std {spread:6.2f} max {first.abs().max().item():6.1f}"
        )
    except Exception as error:
        if verbose:
            traceback.print_exc()
        good, text = False, f"{type(error).__name__}: {str(error)[:150]}"
    try:
        processed = type(processor(name)).__name__
    except Exception as error:
        if verbose and not isinstance(error, NotImplementedError):
            traceback.print_exc()
        processed = f"{type(error).__name__}: {str(error)[:60]}"
    seconds = time.perf_counter() - start
    print(f"{'ok ' if good else 'BAD'} {name:22s} {text} | {processed} | {seconds:.2f}s", flush=True)
    return good


def main(names: list[str]) -> int:
    """Check ``names`` (all families by default); the number of failures."""
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(2)
    results = [check(name, verbose=bool(names)) for name in names or ZOO]
    print(f"{sum(results)} of {len(results)} families work")
    return results.count(False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
