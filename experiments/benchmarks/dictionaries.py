"""What a training step of a sparse dictionary costs, beside SAELens and, where they import, two other libraries.

python -m experiments.benchmarks.dictionaries [--rounds 7] [--steps 100] [--tokens 4096] [--dead 500]

A step is the loss, its gradient, clipping, Adam and the bookkeeping of dead latents, on the same activations with the
same first weights. Then each trains for some steps on the same batches, and fresh activations give the fraction of
variance unexplained. dictionary_learning and sparsify are not dependencies: put them on PYTHONPATH to have them timed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from experiments.benchmarks.pursuit import cpu_seconds
from experiments.benchmarks.rounds import interleaved, record, show
from interp.dictionaries import SAE, Fidelity

D_IN, D_SAE, K, LR = 576, 9216, 32, 3e-4
Step = Callable[[Tensor], object]


def activations(batches: int, tokens: int, seed: int = 0) -> list[Tensor]:
    """Sums of few of 4,096 directions, some far commoner than others, on an offset and with a little noise."""
    g = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)
    directions = torch.nn.functional.normalize(torch.randn(4096, D_IN, generator=fixed), dim=1)
    offset = torch.randn(D_IN, generator=fixed)
    weight = 1 / torch.arange(1, 4097).float()
    found = []
    for _ in range(batches):
        which = torch.multinomial(weight.expand(tokens, -1), 40, generator=g)
        size = torch.empty(tokens, 40).exponential_(generator=g) * 3
        x = torch.nn.functional.embedding_bag(which, directions, mode="sum", per_sample_weights=size)
        found.append(x + offset + 0.05 * torch.randn(tokens, D_IN, generator=g))
    return found


def ours(kind: str, dead: Tensor | None = None) -> tuple[SAE, Step]:
    sae = SAE(d_in=D_IN, d_sae=D_SAE, architecture=kind, k=K)
    optimiser = torch.optim.Adam(sae.parameters(), lr=LR, fused=True)
    since = torch.zeros(D_SAE, dtype=torch.long)

    def step(x: Tensor) -> None:
        loss = sae.loss(x, dead=since > 1000 if dead is None else dead)
        since.add_(1)[loss.counts() > 0] = 0
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return sae, step


def saelens(kind: str, sparse: bool = False, dead: Tensor | None = None) -> tuple[torch.nn.Module, Step]:
    import sae_lens
    from sae_lens.config import LoggingConfig, SAETrainerConfig

    cfg, module = {
        "topk": (sae_lens.TopKTrainingSAEConfig, sae_lens.TopKTrainingSAE),
        "batchtopk": (sae_lens.BatchTopKTrainingSAEConfig, sae_lens.BatchTopKTrainingSAE),
    }[kind]
    sae = module(cfg(d_in=D_IN, d_sae=D_SAE, k=K, use_sparse_activations=sparse))
    first = SAE(d_in=D_IN, d_sae=D_SAE, architecture=kind, k=K).state_dict()
    sae.load_state_dict(first)
    options = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=4096,
        lr=LR,
        lr_end=LR,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = sae_lens.SAETrainer(options, sae, iter(()))  # type: ignore[arg-type]
    if dead is not None:
        waited = dead.float() * 10**9

        def step(x: Tensor) -> None:
            trainer.n_forward_passes_since_fired.copy_(waited)
            trainer.step(x)

        return sae, step
    return sae, trainer.step


def dictionary_learning(kind: str) -> tuple[torch.nn.Module, Step]:
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer  # type: ignore[import-not-found]
    from dictionary_learning.trainers.top_k import TopKTrainer  # type: ignore[import-not-found]

    make = {"topk": TopKTrainer, "batchtopk": BatchTopKTrainer}[kind]
    names = {"steps": 10**6, "activation_dim": D_IN, "dict_size": D_SAE, "k": K, "layer": 0, "lm_name": "none"}
    trainer, count = make(**names, lr=LR, device="cpu"), [0]

    def step(x: Tensor) -> None:
        trainer.update(count[0], x)
        count[0] += 1

    return trainer.ae, step


def sparsify(kind: str) -> tuple[torch.nn.Module, Step]:
    from sparsify import SparseCoder, SparseCoderConfig  # type: ignore[import-not-found]

    if kind != "topk":
        raise ImportError("sparsify has no batch-top-k")
    sae = SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=K))
    optimiser = torch.optim.Adam(sae.parameters(), lr=LR)
    fired = torch.zeros(D_SAE, dtype=torch.bool)

    def step(x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x)
        (out.fvu + out.auxk_loss / 32).backward()
        fired[out.latent_indices.flatten()] = True
        sae.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return sae, step


def contestants(kind: str, x: Tensor) -> dict[str, tuple[torch.nn.Module, Step]]:
    makers: dict[str, Callable[[], tuple[torch.nn.Module, Step]]] = {
        f"interp {kind}": lambda: ours(kind),
        f"sae_lens {kind}": lambda: saelens(kind),
        f"dictionary_learning {kind}": lambda: dictionary_learning(kind),
        f"sparsify {kind}": lambda: sparsify(kind),
    }
    if kind == "topk":
        makers["sae_lens topk, sparse activations"] = lambda: saelens(kind, sparse=True)
    found = {}
    for name, make in makers.items():
        try:
            sae, step = make()
            step(x)
        except (ImportError, NotImplementedError) as error:
            print(f"left out: {name} ({str(error)[:80]})")
        else:
            found[name] = sae, step
    return found


def timed(steps: dict[str, Step], batches: list[Tensor], rounds: int, title: str) -> list[dict]:
    place = dict.fromkeys(steps, 0)

    def once(name: str) -> None:
        steps[name](batches[place[name] % len(batches)])
        place[name] += 1

    rows = interleaved({name: lambda name=name: once(name) for name in steps}, rounds=rounds)
    show(title, rows)
    seconds = {name: cpu_seconds(lambda name=name: once(name), repeats=2) for name in steps}
    print(f"  process time on one thread, seconds: {seconds}")
    first = next(iter(seconds.values()))
    return [asdict(row) | {"process_time_ratio": round(seconds[row.name] / first, 3)} for row in rows]


def unexplained(sae: torch.nn.Module, batches: list[Tensor]) -> float:
    scores = Fidelity(D_IN, D_SAE)
    with torch.no_grad():
        for x in batches:
            scores.update(x, sae(x), x.new_zeros(len(x), D_SAE))
    return scores.result().fvu


def quality(kind: str, batches: list[Tensor], fresh: list[Tensor], steps: int) -> dict[str, float]:
    """The same steps on the same batches (a quarter of each), from the same weights, here and in SAELens."""
    found = {}
    for name, (sae, step) in {"interp": ours(kind), "sae_lens": saelens(kind)}.items():
        for i in range(steps):
            step(batches[i % len(batches)][:1024])
        found[name] = unexplained(sae, [x[:1024] for x in fresh])  # in training mode: both by the batch rule
    found["relative difference"] = abs(found["interp"] / found["sae_lens"] - 1)
    print(f"FVU of {kind} after {steps} steps of 1,024 tokens: {found}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=100, help="steps before the fractions of variance are compared")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dead", type=int, default=500, help="dead latents in a further comparison; 0 leaves it out")
    options = parser.parse_args()
    torch.set_num_threads(2)
    batches, fresh = activations(8, options.tokens), activations(2, options.tokens, seed=1)
    content: dict = {}
    for kind in ("topk", "batchtopk"):
        entrants = contestants(kind, batches[0])
        title = f"{kind}: {options.tokens} tokens, d_in={D_IN}, d_sae={D_SAE}, k={K}"
        content[title] = timed({n: step for n, (_, step) in entrants.items()}, batches, options.rounds, title)
        del entrants
        if options.dead and kind == "topk":
            dead = torch.zeros(D_SAE, dtype=torch.bool)
            dead[: options.dead] = True
            both = {f"interp {kind}": ours(kind, dead)[1], f"sae_lens {kind}": saelens(kind, dead=dead)[1]}
            content[f"{title}, {options.dead} dead"] = timed(
                both, batches, options.rounds, f"{title}, {options.dead} dead"
            )
        if options.steps:
            content[f"fraction of variance unexplained, {kind}, {options.steps} steps"] = quality(
                kind, batches, fresh, options.steps
            )
    content["one dense product"] = matrix_peak()
    record(Path(__file__).parent / "results" / "dictionaries.json", content)


def matrix_peak() -> dict[str, float]:
    """Seconds of the encoder's product alone, which every training step must do."""
    import time

    x, w, out = torch.randn(4096, D_IN), torch.randn(D_IN, D_SAE), torch.empty(4096, D_SAE)
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        torch.mm(x, w, out=out)
        times.append(time.perf_counter() - begin)
    return {"encoder's product, seconds": statistics.median(times)}


if __name__ == "__main__":
    main()
