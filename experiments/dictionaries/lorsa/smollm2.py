"""Lorsas of layer 17 of SmolLM2: how they begin, how wide they are, what else explains the layer, what the heads do.

    python -m experiments.dictionaries.lorsa.smollm2 texts/ runs/lorsa [--tokens 200000]

`texts/` is made by `experiments.dictionaries.texts`. What the layer reads and writes is kept once and replayed; every
run sees the same batches once. A run that is in `runs/lorsa` is taken up, so the groups of runs can be made one by one
(`--group starts-0`, say), on several cores, before the tables are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import interp
from experiments.dictionaries.lorsa.heads import behaviour_rows, induction_rows, repeated_rows, shown_rows, twice
from experiments.records import Row, record, show
from interp.data.corpora import Corpus, corpus
from interp.dictionaries import SAE, Fidelity, Job, Trained, TrainSettings, Transcoder, evaluate, lorsa, train
from interp.dictionaries.activations import ActivationStore, ActivationStream, Contexts, harvest

LAYER, CONTEXT, BATCH = 17, 128, 8
TARGET, STREAM = f"attn_out.{LAYER}", f"text:resid_pre.{LAYER}"
WIDTH, K = 2304, 32
LR = 1e-3
STARTS = ("random", "heads", "subspace", "subspace, QK frozen")
WIDTHS = ((1152, 32), (2304, 16), (2304, 32), (2304, 64), (4608, 32))
SEEDS = (0, 1)
GROUPS = (*(f"starts-{seed}" for seed in SEEDS), "random-fast", "widths", "others")
SMOOTHED = 10  # steps
LEVELS = (0.7, 0.5, 0.3)
TEXTS = 96  # that are repeated


def started(rule: lorsa.AttentionRule, start: str, sample: Contexts, **settings: Any) -> lorsa.Lorsa:
    """A Lorsa with one QK head for each head of the layer, before training."""
    x, y = sample[f"x.{rule.layer}"], sample[f"y.{rule.layer}"]
    settings |= {"n_qk": len(rule.W_Q), "architecture": "topk", "normalize_activations": "expected_average_only_in"}
    if start == "random":
        made = lorsa.shaped(rule, **settings)
    else:
        subspace = None if start == "heads" else "outputs"
        made = lorsa.from_heads(rule, x=x, real=sample.real, subspace=subspace, **settings)
    if start in ("random", "heads"):
        with torch.no_grad():
            made.b_D.copy_(y[sample.mask].mean(0))
    return made.freeze_qk() if start.endswith("frozen") else made


def named(text: str) -> str:
    """A name as files have it."""
    return text.replace(", ", "-").replace(" ", "-")


def jobs(group: str, rule: lorsa.AttentionRule, sample: Contexts) -> dict[str, Job]:
    """The dictionaries of a group of runs by name."""
    x, y = f"x.{rule.layer}", f"y.{rule.layer}"
    if group.startswith("starts"):
        seed = int(group.rpartition("-")[2])
        found = {named(s): started(rule, s, sample, n_ov=WIDTH, k=K, seed=seed) for s in STARTS}
    elif group == "random-fast":
        found = {"random": started(rule, "random", sample, n_ov=WIDTH, k=K, seed=0)}
    else:
        found = {
            f"{n_ov}-{k}": started(rule, STARTS[-1], sample, n_ov=n_ov, k=k)
            for n_ov, k in WIDTHS
            if (n_ov, k) != (WIDTH, K)
        }
    return {name: Job(one, x, y) for name, one in found.items()}


def others(width: int) -> dict[str, Job]:
    """An SAE of what the layer writes, and a transcoder from the stream to it, which sees one token."""
    size: dict[str, Any] = {"d_in": width, "d_sae": WIDTH, "architecture": "topk", "k": K}
    size["normalize_activations"] = "expected_average_only_in"
    return {"SAE": Job(SAE(**size), TARGET), "transcoder": Job(Transcoder(**size, d_out=width), STREAM, TARGET)}


def settings(steps: int, lr: float = LR) -> TrainSettings:
    """The same for all runs."""
    return TrainSettings(
        steps=steps,
        lr=lr,
        lr_warm_up_steps=steps // 10,
        lr_decay_steps=steps // 5,
        dead_feature_window=max(steps // 4, 1),
        scale_rows=8192,
        log_every=1,
        checkpoint_every=steps,
        keep=1,
    )


def run(group: str, store: ActivationStore, rule: lorsa.AttentionRule, folder: Path) -> Trained:
    """Train a group of dictionaries, or take up what is in its folder."""
    contexts = store.contexts(batch=BATCH, seed=0)
    steps = sum(store.counts("contexts")) // BATCH
    how = settings(steps, 3 * LR if group == "random-fast" else LR)
    if group == "others":
        made = others(store.d_in[TARGET])
        how = TrainSettings(**{**how.hashed(), "b_dec_init": "mean", "log_every": 1, "checkpoint_every": steps})
        return train(made, contexts, how, folder=folder / group, progress=True)
    pairs = lorsa.AttentionPairs(contexts, rule)
    return train(jobs(group, rule, sampled(store, rule)), pairs, how, folder=folder / group, progress=True)


def sampled(store: ActivationStore, rule: lorsa.AttentionRule) -> Contexts:
    """Some contexts, on which starts are made."""
    return next(lorsa.AttentionPairs(store.contexts(batch=6 * BATCH, seed=1), rule))


def reached(trained: Trained, name: str, level: float) -> int | None:
    """After how many tokens the FVU of new batches, a mean of some steps, is first below a level."""
    rows: Any = trained.metrics[trained.metrics["dictionary"] == name]
    below = rows[rows["fvu"].rolling(SMOOTHED).mean() < level]
    return int(below["tokens"].iloc[0]) if len(below) else None


@torch.no_grad()
def fidelity(one: lorsa.Lorsa, held: ActivationStore, rule: lorsa.AttentionRule) -> Row:
    """Fidelity on held-out contexts."""
    found = Fidelity(one.cfg.width_out, one.cfg.n_ov)
    for item in lorsa.AttentionPairs(held.contexts(batch=BATCH, seed=None), rule):
        x, y = (item[f"{name}.{rule.layer}"] for name in "xy")
        latents = one.encode(x, real=item.real)[item.mask]
        found.update(y[item.mask], one.decode(latents), latents)
    result = found.result()
    return {"L0": f"{result.l0:.1f}", "FVU": f"{result.fvu:.3f}", "dead": f"{result.dead / one.cfg.n_ov:.0%}"}


def start_rows(trained: Mapping[str, Trained], held: ActivationStore, rule: lorsa.AttentionRule) -> list[Row]:
    """How fast and how well each start learns, with its seeds."""
    rows = []
    runs = [(g, s) for s in STARTS for g in trained if g.startswith("starts")] + [("random-fast", "random")]
    for group, start in runs:
        if group not in trained:
            continue
        fast = group == "random-fast"
        row: Row = {"start": start, "lr": f"{3 * LR if fast else LR:g}", "seed": 0 if fast else int(group[-1])}
        for level in LEVELS:
            tokens = reached(trained[group], named(start), level)
            row[f"tokens to FVU {level:g}"] = "not reached" if tokens is None else f"{round(tokens, -3):,}"
        rows.append({**row, **fidelity(trained[group].dictionaries[named(start)], held, rule)})
    return rows


def width_rows(trained: Mapping[str, Trained], held: ActivationStore, rule: lorsa.AttentionRule) -> list[Row]:
    """FVU against the number of heads and of active ones, all from the active subspace with the layer's own QK."""
    rows = []
    for n_ov, k in WIDTHS:
        same = (n_ov, k) == (WIDTH, K)
        group, name = ("starts-0", named(STARTS[-1])) if same else ("widths", f"{n_ov}-{k}")
        rows.append({"heads": n_ov, "k": k, **fidelity(trained[group].dictionaries[name], held, rule)})
    return rows


def compared(
    lens: interp.Lens, dictionaries: Mapping[str, tuple[Any, dict[str, str]]], text: Corpus, n: int
) -> list[Row]:
    """Fidelity, and the model's loss with each dictionary in the place of the layer's attention output."""
    rows: list[Row] = []
    for name, (one, reads) in dictionaries.items():
        found = evaluate(one, lens, text, contexts=n, batch=BATCH, context=CONTEXT, **reads)  # type: ignore[arg-type]
        frame = found.summary().set_index("metric")

        def number(metric: str, frame: Any = frame) -> Any:
            row = frame.loc[metric]
            return {key: float(row[key]) for key in ("value", "low", "high")}

        added = found.value("ce_reconstruction") - found.value("ce_original")
        rows.append(
            {
                "dictionary": name,
                "L0": f"{found.value('l0'):.1f}",
                "FVU": number("fvu"),
                "added loss": f"{added:.4f}",
                "of it by the mean": f"{found.value('ce_mean') - found.value('ce_original'):.4f}",
                "KL recovered, mean": number("kl_recovered_mean"),
                "CE recovered, mean": f"{found.value('ce_recovered_mean'):.2f}",
            }
        )
    return rows


def halves(held: ActivationStore) -> Tensor:
    """The first halves of held-out contexts [text, pos], to be repeated."""
    whole = [item.ids[item.real.all(1)] for item in held.contexts(batch=BATCH, seed=None) if item.ids is not None]
    return torch.cat([ids[:, : CONTEXT // 2] for ids in whole])[:TEXTS]


def stores(
    lens: interp.Lens, rule: lorsa.AttentionRule, texts: Path, out: Path, counts: Mapping[str, int]
) -> dict[str, ActivationStore]:
    """What the layer reads and writes, harvested once."""
    found = {}
    for part, count in counts.items():
        reads = [*rule.reads, TARGET]
        stream = ActivationStream(lens, corpus(texts / f"{part}.jsonl", seed=0), reads, batch=BATCH, context=CONTEXT)
        found[part] = harvest(stream, out / part, tokens=count, progress=lambda n: print(n, end="\r"))
    return found


def main(
    texts: Path,
    out: Path,
    tokens: Annotated[int, typer.Option(min=2000)] = 200_000,
    held: Annotated[int, typer.Option(min=500)] = 16_000,
    group: Annotated[str | None, typer.Option(help=f"train one group alone: {', '.join(GROUPS)}")] = None,
    contexts: Annotated[int, typer.Option(min=2, help="contexts for losses and relations")] = 40,
) -> None:
    begin = time.process_time()
    lens = interp.load("smollm2-135m", device="cpu")
    rule = lorsa.attention_rule(lens, LAYER, context=CONTEXT)
    kept = stores(lens, rule, texts, out, {"test": held, "train": tokens})
    if group is not None:
        run(group, kept["train"], rule, out)
        return
    trained = {name: run(name, kept["train"], rule, out) for name in GROUPS}
    text = corpus(texts / "test.jsonl", seed=0)
    best = trained["starts-0"].dictionaries[named("subspace")]
    tables: dict[str, list[Row]] = {
        "starts": start_rows(trained, kept["test"], rule),
        "widths": width_rows(trained, kept["test"], rule),
        "comparison": compared(
            lens,
            {
                "Lorsa": (best, {}),
                "Lorsa, QK frozen": (trained["starts-0"].dictionaries[named(STARTS[-1])], {}),
                "Lorsa, random start": (trained["starts-0"].dictionaries["random"], {}),
                "SAE": (trained["others"].dictionaries["SAE"], {"read": TARGET}),
                "transcoder": (trained["others"].dictionaries["transcoder"], {"read": STREAM, "target": TARGET}),
            },
            text,
            contexts,
        ),
    }
    placed = {
        (start, seed): lorsa.PlacedLorsa(trained[f"starts-{seed}"].dictionaries[named(start)], lens, rule=rule)
        for seed in SEEDS
        for start in STARTS
    }
    tables["behaviours"] = behaviour_rows(placed, lens, text, contexts=contexts, context=CONTEXT)
    shown = placed["subspace", 0]
    tables["induction"], heads = induction_rows(shown, lens, text, contexts=contexts, context=CONTEXT)
    repeated = twice(shown, lens, halves(kept["test"]))
    tables["repeated"] = repeated_rows(repeated, lorsa.head_behaviours(shown, lens), heads)
    tables["shown"] = shown_rows(repeated, lens, heads)
    for name, rows in tables.items():
        show(name, rows)
    steps = math.floor(sum(kept["train"].counts("contexts")) / BATCH)
    about = {"model": lens.name, "layer": LAYER, "tokens": kept["train"].used, "held out": kept["test"].used}
    about |= {"context": CONTEXT, "steps": steps, "heads": WIDTH, "k": K, "seeds": list(SEEDS)}
    about["minutes"] = round((time.process_time() - begin) / 60, 1)
    record("dictionaries", "lorsa", about, tables, page="lorsa")


if __name__ == "__main__":
    typer.run(main)
