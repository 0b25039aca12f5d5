"""Train the bundled model `scenes` from scratch.

    python -m experiments.scenes.train --out runs/scenes               # resumes where it stopped
    python -m experiments.scenes.train --out runs/scenes --export DIR  # write the transformers folder

Seeded: every step draws its own random numbers from (seed, stage, step), so a resumed run goes on as it would have.
Uses a GPU where there is one; on 2 CPU cores it takes about an hour and a half.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import LlavaForConditionalGeneration

from experiments.scenes.checkpoint import load_state, save_state
from experiments.scenes.model import fresh, processor
from experiments.scenes.pool import draw
from experiments.scenes.stages import STAGES, Course, Parts, Stage

KEEP_EVERY = 100
SHOW_EVERY = 20


def course(*, seed: int, pool: int, device: torch.device) -> Course:
    """Everything that training needs, before the first step."""
    words = processor().tokenizer
    parts = Parts(fresh(seed=seed)).to(device)
    return Course(parts, words, draw("train", pool), seed, device)


def optimiser(run: Course, stage: Stage) -> torch.optim.AdamW:
    """AdamW over what the stage trains; norms, biases and embeddings do not decay."""
    parameters = stage.parameters(run.parts)
    decay = [p for p in parameters if p.ndim >= 2]
    plain = [p for p in parameters if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=stage.rate, betas=(0.9, 0.98))


def steps(
    run: Course, stages: tuple[Stage, ...] = STAGES, *, state: Path | None = None, keep_every: int = KEEP_EVERY
) -> Iterator[dict[str, Any]]:
    """Train, and give the numbers of each step (stage, step, loss, ...) as they come.

    With `state`, the run goes on from that file if it exists, and is written to it every `keep_every` steps.
    """
    adam: torch.optim.AdamW | None = None
    if state is not None and state.exists():
        run.state = load_state(state, run.parts, None)
        if run.state["stage"] < len(stages) and run.state["step"] > 0:
            adam = optimiser(run, stages[run.state["stage"]])
            load_state(state, run.parts, adam)
    while run.state["stage"] < len(stages):
        stage = stages[run.state["stage"]]
        adam = adam or optimiser(run, stage)
        while not stage.is_done(run):
            number = run.state["step"]
            yield {"stage": stage.name, "step": number, **_step(run, stage, adam, number)}
            run.state["step"] = number + 1
            if state is not None and run.state["step"] % keep_every == 0:
                save_state(state, run.parts, adam, run.state)
        run.state |= {"stage": run.state["stage"] + 1, "step": 0}
        adam = None
        if state is not None:
            save_state(state, run.parts, None, run.state)


def _step(run: Course, stage: Stage, adam: torch.optim.AdamW, number: int) -> dict[str, float]:
    random = np.random.default_rng([run.seed, STAGES_OFFSET + run.state["stage"], number])
    for group in adam.param_groups:
        group["lr"] = stage.rate_at(number)
    result = stage.step(run, stage, random)
    adam.zero_grad(set_to_none=True)
    result["loss"].backward()
    torch.nn.utils.clip_grad_norm_([p for group in adam.param_groups for p in group["params"]], 1.0)
    adam.step()
    return {name: round(float(value.detach()), 5) for name, value in result.items()}


STAGES_OFFSET = 100
"""Keeps the random numbers of training apart from those that the scenes are drawn with."""


def export(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write the model in float16 with its processor, as transformers loads them."""
    model.half().save_pretrained(folder)
    model.float()
    processor().save_pretrained(folder)


def main(
    out: Annotated[Path, typer.Option(help="where the state and the curve are kept")] = Path("runs/scenes"),
    seed: int = 0,
    pool: Annotated[int, typer.Option(help="how many scenes to draw")] = 40_000,
    folder: Annotated[Path | None, typer.Option("--export", help="write the trained model here")] = None,
) -> None:
    """Train the scenes model, or go on with it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out.mkdir(parents=True, exist_ok=True)
    run = course(seed=seed, pool=pool, device=device)
    started = time.monotonic()
    with (out / "curve.jsonl").open("a", encoding="utf-8") as curve:
        for numbers in steps(run, state=out / "state.safetensors"):
            if numbers["step"] % SHOW_EVERY == 0:
                line = {**numbers, "minutes": round((time.monotonic() - started) / 60, 2)}
                curve.write(json.dumps(line) + "\n")
                curve.flush()
                print(" ".join(f"{k} {v}" for k, v in line.items()), flush=True)
    export(run.parts.model, folder or out / "model")


if __name__ == "__main__":
    typer.run(main)
