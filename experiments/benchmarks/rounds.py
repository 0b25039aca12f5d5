"""Interleaved rounds: every contestant once a round, in changing order; ratios to the first one, by round."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class Row:
    """One contestant's outcome: seconds (median) and ratio to the baseline of the same round."""

    name: str
    seconds: float
    ratio: float
    low: float
    high: float


def interleaved(
    contestants: dict[str, Callable[[], object]],
    *,
    rounds: int,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Time all contestants, one after the other in every round; the first is the baseline.

    On a busy machine `time.process_time` with one thread tells more than the clock on the wall.

    The ratio is the median over rounds of (time / baseline's time in the same round), with its quartiles.
    """
    names = list(contestants)
    for run in contestants.values():
        run()
    times: dict[str, list[float]] = {n: [] for n in names}
    order = random.Random(seed)
    for _ in range(rounds):
        for name in order.sample(names, len(names)):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            begin = clock()
            contestants[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[name].append(clock() - begin)
    rows = []
    for name in names:
        ratios = [t / b for t, b in zip(times[name], times[names[0]], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(Row(name, statistics.median(times[name]), middle, low, high))
    return rows


def peak_bytes(run: Callable[[], object]) -> int:
    """Largest number of bytes that were allocated at once beyond what was there before (exact, from the allocator)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        held = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        del held
        return peak
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        held = run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    del held
    return peak


def hardware() -> str:
    """The machine in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")]
        model = lines[0] if lines else model
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def show(title: str, rows: list[Row]) -> None:
    """Print a table of ratios."""
    print(f"\n{title}")
    print(f"{'':46}{'median':>10}{'ratio':>9}{'quartiles':>18}")
    for row in rows:
        print(f"{row.name:46}{row.seconds * 1e3:>8.0f}ms{row.ratio:>9.3f}{f'{row.low:.3f} to {row.high:.3f}':>18}")


def record(path: Path, content: dict) -> None:
    """Write the results beside the script, with the hardware named."""
    import transformers

    content = {
        "hardware": hardware(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **content,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nwritten: {path}")
