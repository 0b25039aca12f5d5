"""What Head Pursuit costs, beside the published loop, and the scores of all heads of SmolLM2 beside its plain forward.

python -m experiments.benchmarks.pursuit [--rounds 5] [--steps 3] [--prompts 128] [--whole]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

import interp
from experiments.benchmarks.rounds import interleaved, record, show
from interp import heads
from interp.heads.matching_pursuit import Dictionary, matching_pursuit
from interp.heads.moments import head_moments

WORDS = "France Germany Japan China Italy Spain Canada Brazil India Mexico Egypt Russia Kenya Cuba Peru Iran".split()
SAMPLES, D_HEAD, ATOMS = 1000, 64, 50


def published(written: Tensor, atoms: Tensor, steps: int) -> list[int]:
    """The published loop in float64: n x d matrix, all scores, least squares over all taken atoms."""
    residual, taken = written.clone(), []
    for _ in range(steps):
        score = (atoms @ residual.T).abs().sum(1)
        score[taken] = -1
        taken.append(int(score.argmax()))
        coefficients = torch.linalg.lstsq(atoms[taken].T, written.T).solution.T
        residual = written - coefficients @ atoms[taken]
    return taken


def gram(outputs: Tensor, weight: Tensor, atoms: Tensor, steps: int) -> list[int]:
    """Gram updates in head space in float64, every atom scored at every step."""
    products, taken = atoms @ weight.T, []
    directions = atoms.new_empty(atoms.shape[1], 0)
    for _ in range(steps):
        score = torch.cat([(part @ outputs.T).abs().sum(1) for part in products.split(4096)])
        score[taken] = -1
        taken.append(int(score.argmax()))
        row = atoms[taken[-1]]
        row = row - directions @ (directions.T @ row)
        row = (row - directions @ (directions.T @ row)) / row.norm()
        products -= (atoms @ row)[:, None] * (weight @ row)
        directions = torch.cat([directions, row[:, None]], 1)
    return taken


def cpu_seconds(run: Callable[[], object], repeats: int = 3) -> float:
    """Process time on one thread (median), which says more than the clock where other programs run."""
    threads, times = torch.get_num_threads(), []
    torch.set_num_threads(1)
    for _ in range(repeats):
        begin = time.process_time()
        run()
        times.append(time.process_time() - begin)
    torch.set_num_threads(threads)
    return round(statistics.median(times), 3)


def one_head(lens: interp.Lens, rounds: int, steps: int) -> dict:
    """Seconds of 50 atoms over the vocabulary of SmolLM2, on random outputs with a flat and a steep spectrum.

    A step of the published loop costs the same whatever was taken before but for its least squares, so only some steps
    are run and the loop's time for all is reckoned from them, in its favour.
    """
    g = torch.Generator().manual_seed(0)
    assert lens.anatomy.unembed is not None
    rows = lens.anatomy.unembed.direction(torch.arange(lens.vocabulary)).detach()
    wide = rows.double()
    weight = lens.anatomy.attention(None, 23, "result").weight()[4].detach()
    found = {}
    for name, spectrum in {"flat": torch.ones(D_HEAD), "steep": torch.logspace(0, -1.5, D_HEAD)}.items():
        outputs = (torch.randn(SAMPLES, D_HEAD, generator=g) * spectrum).double()
        outputs = outputs - outputs.mean(0)
        written, narrow = outputs @ weight.double(), weight.double()
        ours = matching_pursuit(outputs, weight, Dictionary.of(rows, normalize=False), ATOMS)
        assert ours.atoms[:steps].tolist() == published(written, wide, steps)
        contestants = {
            f"interp, {ATOMS} atoms": lambda o=outputs: matching_pursuit(
                o, weight, Dictionary.of(rows, normalize=False), ATOMS
            ),
            f"published loop, {steps} atoms": lambda h=written: published(h, wide, steps),
            f"Gram updates alone, {steps} atoms": lambda o=outputs, w=narrow: gram(o, w, wide, steps),
        }
        table = interleaved(contestants, rounds=rounds)
        title = (
            f"n={SAMPLES}, d={wide.shape[1]}, v={len(wide)}, k={ATOMS}, {name} spectrum; "
            f"scored: {ours.scored / ATOMS / len(wide):.2%} of all atoms"
        )
        show(title, table)
        scale = ATOMS / steps
        for row in table[1:]:
            print(f"  {row.name}: {row.ratio * scale:.0f} times for {ATOMS} atoms")
        seconds = {name: cpu_seconds(run) for name, run in contestants.items()}
        first = next(iter(seconds.values()))
        print(f"  process time on one thread, seconds: {seconds}")
        found[title] = [
            asdict(r) | {"ratio_for_all_atoms": r.ratio * scale, "process_time_ratio": seconds[r.name] * scale / first}
            for r in table[1:]
        ]
    return found


def same_atoms(lens: interp.Lens) -> dict[str, bool]:
    """All 50 atoms of one real head against the whole published loop (takes a minute or two)."""
    prompts = torch.randint(lens.vocabulary, (200, 8), generator=torch.Generator().manual_seed(1))
    batch = lens.prepare(input_ids=prompts)
    trace = lens.run(batch, [interp.Read("z", layers=(23,), heads=(4,), reduce="mean")])
    z = next(iter(trace.values.values()))[:, 0].double()
    assert lens.anatomy.unembed is not None
    rows = lens.anatomy.unembed.direction(torch.arange(lens.vocabulary)).detach().double()
    weight = lens.anatomy.attention(None, 23, "result").weight()[4].detach().double()
    found = {}
    for normalize in (False, True):
        topic = heads.topics(lens, [batch], [(23, 4)], k=ATOMS, normalize_atoms=normalize)[0]
        atoms = rows / rows.norm(dim=1, keepdim=True) if normalize else rows
        same = topic.ids.tolist() == published((z - z.mean(0)) @ weight, atoms, ATOMS)
        found["rows of length one" if normalize else "rows as they are"] = same
    return found


def all_heads(lens: interp.Lens, rounds: int, prompts: int) -> dict:
    """Collecting and scoring all 270 heads, beside forwards of the same batches, with and without the logits."""
    ids = torch.randint(lens.vocabulary, (prompts, 32), generator=torch.Generator().manual_seed(0))
    batches = [lens.prepare(input_ids=part) for part in ids.split(32)]

    def forward(model: torch.nn.Module) -> None:
        with torch.no_grad():
            for batch in batches:
                model(input_ids=batch.inputs["input_ids"], use_cache=False)

    moments = head_moments(lens, batches)
    table = interleaved(
        {
            "plain forward with logits": lambda: forward(lens.model),
            "plain forward without logits": lambda: forward(lens.model.model),  # type: ignore[arg-type]
            "moments of all heads": lambda: head_moments(lens, batches),
        },
        rounds=rounds,
    )
    title = f"{prompts} prompts of 32 tokens, {int(moments.valid.sum())} heads"
    show(title, table)
    bare = interleaved(
        {
            "plain forward without logits": lambda: forward(lens.model.model),  # type: ignore[arg-type]
            "moments of all heads": lambda: head_moments(lens, batches),
        },
        rounds=rounds,
    )
    show(f"{title}, against the forward without logits", bare)
    score: dict[str, float] = {
        "process time, ratio to the forward with logits": cpu_seconds(lambda: head_moments(lens, batches))
        / cpu_seconds(lambda: forward(lens.model)),
        "process time, ratio to the forward without logits": cpu_seconds(lambda: head_moments(lens, batches))
        / cpu_seconds(lambda: forward(lens.model.model)),  # type: ignore[arg-type]
    }
    for count in (0, 200):
        begin = time.perf_counter()
        heads.pursuit(lens, moments, WORDS, random_lists=count)
        score[f"scores of a list with {count} random lists, seconds"] = round(time.perf_counter() - begin, 3)
    print(score)
    return {title: [asdict(r) for r in table], "against the forward without logits": asdict(bare[1]), **score}


def whole(lens: interp.Lens) -> dict[str, float]:
    """The 1,000 prompts of the requirement once, all together."""
    ids = torch.randint(lens.vocabulary, (1000, 32), generator=torch.Generator().manual_seed(0))
    batches = [lens.prepare(input_ids=part) for part in ids.split(32)]
    times = {}
    for name in ("plain forward with logits", "pursuit", "plain forward without logits"):
        begin = time.perf_counter()
        if name == "pursuit":
            heads.pursuit(lens, batches, WORDS)
        else:
            model = lens.model if name.endswith("with logits") else lens.model.model
            with torch.no_grad():
                for batch in batches:
                    model(input_ids=batch.inputs["input_ids"], use_cache=False)  # type: ignore[operator]
        times[name] = round(time.perf_counter() - begin, 1)
    print(f"\n1,000 prompts, seconds: {times}")
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of the published loop that are timed")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--whole", action="store_true", help="also the 1,000 prompts, and a whole published loop")
    options = parser.parse_args()
    torch.set_num_threads(2)
    lens = interp.load("smollm2-135m", device="cpu")
    content: dict = {"one head": one_head(lens, options.rounds, options.steps)}
    content["all heads"] = all_heads(lens, options.rounds, options.prompts)
    if options.whole:
        content["1,000 prompts, seconds"] = whole(lens)
        content["the same 50 atoms as the published loop"] = same_atoms(lens)
    record(Path(__file__).parent / "results" / "pursuit.json", content)


if __name__ == "__main__":
    main()
