"""A model of two attention layers in which induction is known: does a Lorsa of each layer find its heads?

    python -m experiments.dictionaries.lorsa.two_layers [--steps 1000]

The model is trained here, on rows of random tokens that repeat after 8 to 24 places (so that a fixed distance does not
help); its MLPs write nothing. One half of a Lorsa's rows are such rows, too. What its own heads do is measured on their
patterns, what Lorsa heads do on their z-patterns.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import Tensor

import interp
from experiments.dictionaries.lorsa.heads import FIRINGS, found
from experiments.records import Row, record, show
from interp.data import repeated_tokens
from interp.dictionaries import Fidelity, TrainSettings, lorsa, train
from interp.dictionaries.activations import Contexts, State
from interp.heads.patterns import patterns

VOCABULARY, WIDTH, HEADS, LENGTH, ROWS = 128, 64, 4, 56, 32
OV, K, LORSA_STEPS = 256, 8, 300
STARTS = ("random", "subspace")


def rows_of(seed: int, rows: int = ROWS) -> Tensor:
    """Rows that repeat, all of a batch after the same number of tokens."""
    period = 8 + int(torch.randint(17, (), generator=torch.Generator().manual_seed(seed)))
    once = repeated_tokens(rows, period, vocab_size=VOCABULARY, seed=seed)
    return once.repeat(1, LENGTH // period)[:, :LENGTH]


def model(steps: int, seed: int) -> interp.Lens:
    """The trained model."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=8, num_hidden_layers=2, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, max_position_embeddings=LENGTH, tie_word_embeddings=False,
    )  # fmt: skip
    made: Any = transformers.LlamaForCausalLM(config)
    for layer in made.model.layers:
        layer.mlp.down_proj.weight.data.zero_().requires_grad_(False)
        layer.mlp.down_proj.requires_grad_(False)
    for weight in (w for n, w in made.named_parameters() if "q_proj" in n or "k_proj" in n):
        weight.data.mul_(3)
    optimiser = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.01)
    for step in range(steps):
        ids = rows_of(10_000 * (seed + 1) + step)
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 50) * min(1, 4 * (steps - step) / steps)
        made(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    return interp.wrap(made.eval(), name=f"two layers, seed {seed}")


def second_loss(lens: interp.Lens) -> float:
    """The loss of tokens that were there before, nats."""
    ids = repeated_tokens(64, 24, vocab_size=VOCABULARY, seed=1)
    chance = lens.run(lens.prepare(input_ids=ids), "logits").logits.log_softmax(-1)
    return -float(chance[:, 24:-1].gather(2, ids[:, 25:, None]).mean())


class Drawn:
    """Contexts of one layer, made as they are asked for: half of the rows repeat, half are random."""

    def __init__(self, lens: interp.Lens, rule: lorsa.AttentionRule, seed: int) -> None:
        self.lens, self.rule, self.seed, self.at = lens, rule, seed, 0
        self.d_in = {f"x.{rule.layer}": WIDTH, f"y.{rule.layer}": WIDTH}
        self.settings: dict[str, Any] = {"seed": seed}

    def __iter__(self) -> Drawn:
        return self

    def __next__(self) -> Contexts:
        self.at += 1
        seed = 1_000_000 * (self.seed + 1) + self.at
        other = torch.randint(VOCABULARY, (ROWS // 2, LENGTH), generator=torch.Generator().manual_seed(seed))
        ids = torch.cat([rows_of(seed, ROWS // 2), other])
        trace = self.lens.run(self.lens.prepare(input_ids=ids), list(self.rule.reads))
        resid, z = (trace[read.split(":")[-1].split(".")[0], self.rule.layer] for read in self.rule.reads)
        x, y = self.rule.inputs(resid), self.rule.target(z.flatten(2))
        real = torch.ones_like(ids, dtype=torch.bool)
        values = dict(zip(self.d_in, (x, y), strict=True))
        return Contexts(values, real, real, ids, torch.zeros_like(ids), torch.arange(len(ids)))

    def state(self) -> State:
        return State({"at": self.at})

    def restore(self, state: State) -> None:
        self.at = state.values["at"]

    def close(self) -> None:
        pass


def learnt(lens: interp.Lens, layer: int, start: str, steps: int, seed: int) -> tuple[lorsa.Lorsa, Row]:
    """A Lorsa of a layer, and its numbers on new rows."""
    rule = lorsa.attention_rule(lens, layer, context=LENGTH)
    source = Drawn(lens, rule, seed)
    settings: dict[str, Any] = {"n_qk": HEADS, "n_ov": OV, "k": K, "seed": seed}
    settings["normalize_activations"] = "expected_average_only_in"
    if start == "random":
        made = lorsa.shaped(rule, **settings)
    else:
        sample = next(source)
        made = lorsa.from_heads(rule, x=sample[f"x.{layer}"], real=sample.real, subspace="outputs", **settings)
    how = TrainSettings(
        steps=steps, lr=2e-3, lr_warm_up_steps=steps // 10, lr_decay_steps=steps // 4, scale_rows=4096, log_every=steps
    )
    made = train(made, source, how).dictionaries["dictionary"]
    held, scores = Drawn(lens, rule, seed + 100), Fidelity(WIDTH, OV)
    with torch.no_grad():
        for _ in range(4):
            item = next(held)
            latents = made.encode(item[f"x.{layer}"])
            scores.update(item[f"y.{layer}"], made.decode(latents), latents)
    result = scores.result()
    return made, {"FVU": f"{result.fvu:.3f}", "dead": f"{result.dead / OV:.0%}"}


def best(done: lorsa.Behaviours, kind: str) -> str:
    """The highest score of a head that fires often enough."""
    score = done[kind].nan_to_num().masked_fill(done.counts[kind] < FIRINGS, 0)
    return f"{float(score.max()):.2f}"


def main(steps: Annotated[int, typer.Option(min=1)] = 1000, seeds: Annotated[int, typer.Option(min=1)] = 2) -> None:
    begin = time.process_time()
    tables: dict[str, list[Row]] = {"models": [], "Lorsas": []}
    for seed in range(seeds):
        lens = model(steps, seed)
        batch = lens.prepare(input_ids=repeated_tokens(32, 24, vocab_size=VOCABULARY, seed=2))
        scores = patterns(lens, batch, score="induction")
        row: Row = {"seed": seed, "loss of repeated tokens": f"{second_loss(lens):.3f}"}
        for layer in range(2):
            for kind in ("previous", "induction"):
                values = scores.extra[kind][layer]
                row[f"{kind}, heads of layer {layer}"] = " ".join(f"{v:.2f}" for v in values.tolist())
        tables["models"].append(row)
        for layer in range(2):
            for start in STARTS:
                made, numbers = learnt(lens, layer, start, LORSA_STEPS, seed)
                done = lorsa.head_behaviours(made, lens)
                row = {"seed": seed, "layer": layer, "start": start, **numbers}
                for kind in ("previous", "induction"):
                    row |= {f"{kind} heads": int(found(done, kind).sum()), f"best {kind}": best(done, kind)}
                tables["Lorsas"].append(row)
    for name, rows in tables.items():
        show(name, rows)
    about: dict[str, Any] = {"steps": steps, "Lorsa steps": LORSA_STEPS, "heads": OV, "k": K, "seeds": seeds}
    about["minutes"] = round((time.process_time() - begin) / 60, 1)
    record("dictionaries", "lorsa_two_layers", about, tables, page="lorsa")


if __name__ == "__main__":
    typer.run(main)
