"""All architectures on the same activations of SmolLM2: what is left unexplained, with how many active latents.

    python -m experiments.dictionaries.frontier texts/ runs/frontier [--tokens 250000]

`texts/` is made by `experiments.dictionaries.texts`. Activations of the stream behind layer 10 (and of what its MLP
reads and writes) are kept once and replayed; every dictionary sees the same batches. FVU, L0 and dead latents are those
of held-out documents.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import interp
from experiments.records import Row, record, show
from interp.data.corpora import corpus
from interp.dictionaries import SAE, Dictionary, Fidelity, Job, TrainSettings, Transcoder, train
from interp.dictionaries.activations import ActivationStore, ActivationStream, harvest

LAYER, EXPANSION, BATCH = 10, 4, 1024
READ, MID, OUT = f"resid_post.{LAYER}", f"resid_mid.{LAYER}", f"mlp_out.{LAYER}"
KS = (16, 32, 64)
# Penalties that give about as many active latents; they depend on the scale, which is the same for all (mean norm 24).
PENALTIES: dict[str, tuple[str, tuple[float, ...]]] = {
    "standard": ("l1_coefficient", (5.0, 15.0)),
    "gated": ("l1_coefficient", (5.0, 15.0)),
    "jumprelu": ("l0_coefficient", (2.0, 5.0)),
}


# The recipe of Anthropic's JumpReLU: a wide window and a tanh, so that thresholds move from the beginning.
TANH = {"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_bandwidth": 2.0, "jumprelu_init_threshold": 0.1}


def jobs(width: int) -> dict[str, Job]:
    """Every dictionary by name."""
    size: dict[str, Any] = {"d_in": width, "d_sae": EXPANSION * width}
    size["normalize_activations"] = "expected_average_only_in"
    made: dict[str, Job] = {}
    for architecture in ("topk", "batchtopk", "matryoshka_batchtopk"):
        nested = {"matryoshka_widths": (width, 3 * width)} if architecture.startswith("m") else {}
        for k in KS:
            made[f"{architecture}-{k}"] = Job(SAE(**size, architecture=architecture, k=k, **nested), READ)
    for architecture, (name, values) in PENALTIES.items():
        for value in values:
            own = {**TANH, name: value} if architecture == "jumprelu" else {name: value}
            made[f"{architecture}-{value:g}"] = Job(SAE(**size, architecture=architecture, **own), READ)
    for skip in (False, True):
        name = "skip transcoder" if skip else "transcoder"
        made[name.replace(" ", "_") + "-32"] = Job(Transcoder(**size, architecture="topk", k=32, skip=skip), MID, OUT)
    return made


@torch.no_grad()
def fidelity(one: Dictionary, job: Job, held: ActivationStore) -> Row:
    """The numbers of a trained dictionary on held-out activations."""
    found = Fidelity(one.cfg.width_out, one.cfg.d_sae)
    for rows in held.rows(batch=BATCH, seed=None):
        x = rows[job.read]
        latents = one.encode(x)
        found.update(x if job.target is None else rows[job.target], one.decode(latents, x), latents)
    result = found.result()
    return {
        "L0": round(result.l0, 1),
        "FVU": round(result.fvu, 3),
        "FVU, legacy": round(1 - result.explained_variance_legacy, 3),
        "dead": f"{result.dead / one.cfg.d_sae:.0%}",
    }


def main(
    texts: Path,
    out: Path,
    tokens: Annotated[int, typer.Option(min=1)] = 250_000,
    held: Annotated[int, typer.Option(min=1)] = 40_000,
) -> None:
    begin = time.process_time()
    lens = interp.load("smollm2-135m", device="cpu")
    stores = {}
    for part, count in (("train", tokens), ("test", held)):
        stream = ActivationStream(lens, corpus(texts / f"{part}.jsonl", seed=0), [READ, MID, OUT], epochs=1)
        stores[part] = harvest(stream, out / part, tokens=count, keep="rows", progress=lambda n: print(n, end="\r"))
    made = jobs(stores["train"].d_in[READ])
    steps = tokens // BATCH
    settings = TrainSettings(
        steps=steps,
        b_dec_init="mean",
        lr=2e-3,
        lr_warm_up_steps=steps // 10,
        lr_decay_steps=steps // 4,
        sparsity_warm_up_steps=steps // 5,
        dead_feature_window=max(steps // 4, 1),
        log_every=10,
        checkpoint_every=100,
        keep=1,
    )
    source = stores["train"].rows(batch=BATCH, seed=0, epochs=None)
    trained = train(made, source, settings, folder=out / "run", progress=True)
    table: list[Row] = []
    for name, one in trained.dictionaries.items():
        kind, _, value = name.rpartition("-")
        numbers = fidelity(one, made[name], stores["test"])
        table.append({"dictionary": kind.replace("_", " "), "k or penalty": value, **numbers})
    show("frontier", table)
    about = {"model": lens.name, "layer": LAYER, "tokens": tokens, "held out": held, "latents": EXPANSION * 576}
    about |= {"steps": steps, "batch": BATCH, "minutes": round((time.process_time() - begin) / 60, 1)}
    record("dictionaries", "frontier", about, {"frontier": table}, page="dictionaries")


if __name__ == "__main__":
    typer.run(main)
