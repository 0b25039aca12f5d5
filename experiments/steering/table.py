"""Which intervention helps the scenes model, by how much, and at what cost: greedy against greedy.

    python -m experiments.steering.table [--n 500]

Captions of scenes of the test split, and POPE's adversarial questions on the first of them. Everything that is chosen
or estimated (recovery rates, rankings, sink dimensions) comes from the validation split. Beside each intervention that
chooses heads or layers stands the same one with random heads of the same layers, or with the rates permuted over
layers; beside reinforcement also the heads that it did not choose, and its size-keeping form: what attention adds is
brought back to the size that it would have had (of head editing too); beside contrasts with blind tokens the same with
as many random image tokens. Strengths that change nothing must give the plain captions, bit for
bit: the script stops if they do not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
import typer

import interp
from experiments.benchmarks.rounds import interleaved
from experiments.records import Row, record, show
from experiments.steering.contrasts import CONTRASTS, TOKENS, contrasts
from experiments.steering.rates import Recovery, recovery
from experiments.steering.scored import Change, Metrics, Pictures, Said, Scale, batches, interval, said_with, speak
from interp import edits, heads, steering
from interp.batch import Batch
from interp.data import scenes
from interp.edits import Edit
from interp.evaluation import image_prompt
from interp.reads import Read
from interp.scores import HeadScores
from interp.steering import Contrast
from interp.steering.sinks import default_tau, sink_size

SCALES = (0.5, 1.5, 2.0, 3.0, 4.0)
KEPT = (2.0, 3.0, 4.0)
INJECTED = (0.1, 0.26, 0.5)
PERMUTED = (0.26, 0.5)
MLP = 0.16 / 0.26  # the paper's strength for MLPs beside that for attention
TAU = 2.0
ENHANCED = (1.5, 2.0)
TOP = 4
NEW = 20  # tokens of each caption that is timed
PLAIN, REINFORCED, INJECTION, EDITED = "nothing", "VHR", "IRI", "head editing"
RANDOM = ", random heads"
OTHERS = ", the other heads"
PERMUTATION = ", rates permuted"
CAPTIONS = ("CHAIR_I, %", "CHAIR_S, %", "recall, %", "length", "repetition, %", "perplexity")
ANSWERS = ("POPE right, %", "POPE yes, %", "POPE AUROC, %")
COMPARED = ("CHAIR_I, %", "CHAIR_S, %", "recall, %", "length", "POPE right, %", "POPE AUROC, %")
Runs = dict[tuple[str, str], list[Said]]


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """What was estimated on the validation split.

    Attributes:
        recovery: the recovery rates.
        ranked: heads by their divergence without the image.
        dimensions: the sink dimensions at the lowered threshold.
        sinks: a row for each threshold: how many dimensions, and how many image tokens are sinks.
    """

    recovery: Recovery
    ranked: HeadScores
    dimensions: tuple[int, ...]
    sinks: list[Row]


def choose(lens: interp.Lens, n: int) -> Chosen:
    """Estimate everything on the first `n` scenes of the validation split."""
    drawn = list(scenes.scenes("validation", n))
    text = image_prompt(lens, scenes.CAPTION_PROMPT)
    (batch, *_) = batches(lens, [(text, scene) for scene in drawn])
    width = lens.anatomy.towers[lens.anatomy.main].d_model
    read = Read("resid_pre", layers=tuple(range(2, len(lens.anatomy.towers[lens.anatomy.main].layers) - 1)))
    trace, image = lens.run(batch, read), batch.span("image")
    rows: list[Row] = []
    found: tuple[int, ...] = ()
    for tau in (default_tau(width), TAU):
        found = steering.sink_dimensions(lens, batch, tau=tau)
        share = np.mean(
            [
                float((sink_size(trace[read, layer], found or range(width))[image] > tau).float().mean())
                for layer in read.layers or ()
            ]
        )
        first = {"threshold": round(tau, 2), "sink dimensions": len(found)}
        rows.append(first | {"image tokens above it there, %": round(100 * float(share), 2) if found else 0.0})
    return Chosen(recovery(lens, drawn), heads.vision_divergence(lens, batch), found, rows)


class Reinforced:
    """Vision-aware reinforcement of batches; the heads of each batch and scale are chosen once."""

    def __init__(self, lens: interp.Lens) -> None:
        self.lens = lens
        self.known: dict[tuple[int, float], tuple[Batch, steering.VisionHeads]] = {}

    def heads(self, batch: Batch, scale: float) -> steering.VisionHeads:
        """The heads that are chosen with this scale active below."""
        key = (id(batch), scale)
        if key not in self.known:
            found = steering.vision_heads(self.lens, batch, scale=scale)
            self.known[key] = (batch, replace(found, prefix=None))  # keys and values of all batches would be gigabytes
        return self.known[key][1]

    def plain(self, scale: float) -> Change:
        """The published intervention."""
        return lambda batch: self.heads(batch, scale).edits(scale)

    def random(self, scale: float, seed: int) -> Change:
        """As many random heads of the same layers, other ones in every batch."""
        places: dict[int, int] = {}

        def change(batch: Batch) -> Sequence[Edit | Contrast]:
            place = places.setdefault(id(batch), len(places))
            return self.heads(batch, scale).shuffled(self.lens, 1000 * seed + place).edits(scale)

        return change

    def others(self, scale: float) -> Change:
        """The heads of the same layers that were not chosen."""

        def change(batch: Batch) -> Sequence[Edit | Contrast]:
            chosen = self.heads(batch, scale)
            return replace(chosen, chosen=~chosen.chosen).edits(scale)

        return change

    def kept(self, scale: float) -> Change:
        """The size of what attention adds brought back to what it would have been."""
        return lambda batch: heads.norm_matched(self.lens, self.heads(batch, scale).chosen, scale, positions="last")


def injected(lens: interp.Lens, rates: np.ndarray, strength: float, sources: int = 3, targets: int = 10) -> Change:
    """Injection with rates [site, layer]; MLPs are injected with the paper's share of the strength."""
    attn, mlp = (torch.from_numpy(row.copy()) for row in rates)

    def change(batch: Batch) -> Sequence[Edit | Contrast]:
        return steering.representation_injection(
            lens,
            attn=attn,
            mlp=mlp,
            attn_strength=strength,
            mlp_strength=strength * MLP,
            sources=sources,
            targets=targets,
        )

    return change


def ways(lens: interp.Lens, chosen: Chosen, *, draws: int, seed: int) -> dict[tuple[str, str], list[Change]]:
    """Every row of the table: its name and setting, and what is run for it (several times where it is random)."""
    reinforced, rates = Reinforced(lens), chosen.recovery.rates
    best = chosen.ranked.top(TOP)
    top = [(int(layer), int(head)) for layer, head in zip(best["layer"], best["head"], strict=True)]
    random = heads.random_heads(top, chosen.ranked, draws=draws, seed=seed)
    order = np.random.default_rng(seed)
    permuted = [rates[:, order.permutation(rates.shape[1])] for _ in range(draws)]
    found: dict[tuple[str, str], list[Change]] = {(PLAIN, ""): [lambda batch: []]}
    for scale in SCALES:
        found[REINFORCED, f"x {scale}"] = [reinforced.plain(scale)]
        found[REINFORCED + RANDOM, f"x {scale}"] = [reinforced.random(scale, seed + i) for i in range(draws)]
        found[REINFORCED + OTHERS, f"x {scale}"] = [reinforced.others(scale)]
        if scale in KEPT:
            found[REINFORCED + ", size kept", f"x {scale}"] = [reinforced.kept(scale)]
    for strength in INJECTED:
        found[INJECTION, str(strength)] = [injected(lens, rates, strength)]
        if strength in PERMUTED:
            found[INJECTION + PERMUTATION, str(strength)] = [injected(lens, one, strength) for one in permuted]
    found[INJECTION + ", 1 source, 2 targets", str(INJECTED[1])] = [injected(lens, rates, INJECTED[1], 1, 2)]
    found |= {("VAR, published threshold", "p = 0.6"): [lambda b: steering.attention_redistribution(lens, b)]}
    for p in (0.6, 0.0):
        found[f"VAR, threshold {TAU}", f"p = {p}"] = [
            lambda b, p=p: steering.attention_redistribution(lens, b, dimensions=chosen.dimensions, tau=TAU, p=p)
        ]
    for scale in ENHANCED:
        found[EDITED, f"x {scale}"] = [lambda b, s=scale: steering.edit_heads(top, s)]
        found[EDITED + RANDOM, f"x {scale}"] = [lambda b, r=r, s=scale: steering.edit_heads(r, s) for r in random]
    found[EDITED + ", size kept", f"x {ENHANCED[-1]}"] = [lambda b: heads.norm_matched(lens, top, ENHANCED[-1])]
    return found | contrasts(lens, draws=draws, seed=seed)


def check_nothing(lens: interp.Lens, batch: Batch, chosen: Chosen) -> None:
    """Stop unless strengths that change nothing give the plain tokens."""
    plain = lens.generate(batch, max_new_tokens=NEW).tokens
    nothing: dict[str, Sequence[Edit | Contrast]] = {
        "VHR x 1": steering.vision_reinforcement(lens, batch, scale=1.0),
        "IRI 0": injected(lens, chosen.recovery.rates, 0.0)(batch),
        "VAR p = 1": steering.attention_redistribution(lens, batch, dimensions=(0,), tau=0.1, p=1.0),
        "head editing x 1": steering.edit_heads(chosen.ranked, 1.0, k=TOP),
        "heads scaled by 1 in place": edits.scale_heads(1.0),
        "VCD 0": [steering.VisualContrast(lens, batch, strength=0.0)],
        "M3ID 0": [steering.M3ID(lens, batch, rate=0.0)],
        "AvisC 0": [steering.BlindTokenContrast(lens, batch, strength=0.0)],
    }
    for name, made in nothing.items():
        if not torch.equal(said_with(lens, batch, made, max_new_tokens=NEW).tokens, plain):
            raise SystemExit(f"{name} changes captions, and should not.")


def written(found: dict[tuple[str, str], tuple[Metrics, Metrics]], runs: Runs) -> dict[str, list[Row]]:
    """The tables of numbers, and of differences to the plain model and to the control with the same setting."""
    tables: dict[str, list[Row]] = {"captions": [], "answers": [], "against nothing": [], "against the control": []}
    base = found[PLAIN, ""]

    def row(key: tuple[str, str], metrics: Sequence[str], *, to: tuple[Metrics, Metrics] | None = None) -> Row:
        value, drawn = found[key]
        cells = {}
        for name in metrics:
            less = (0.0, 0.0) if to is None else (to[0][name], to[1][name])
            cells[name] = interval(value[name] - less[0], drawn[name] - less[1])
        return {"intervention": key[0], "setting": key[1]} | cells

    for key in found:
        tables["captions"].append(row(key, CAPTIONS) | {"runs": len(runs[key])})
        tables["answers"].append(row(key, ANSWERS) | {"runs": len(runs[key])})
        if key[0] != PLAIN:
            tables["against nothing"].append(row(key, COMPARED, to=base))
        for ending in (RANDOM, OTHERS, PERMUTATION, TOKENS):
            control = (key[0] + ending, key[1])
            if control in found:
                less = row(key, COMPARED, to=found[control])
                tables["against the control"].append({"intervention": key[0], "control": ending[2:]} | less)
    return tables


def latency(lens: interp.Lens, batch: Batch, chosen: Chosen, *, rounds: int) -> list[Row]:
    """Time of captions of the same length, with all that an intervention needs, over that of the plain model."""
    options: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    rates = chosen.recovery.rates

    def reinforced() -> object:
        picked = steering.vision_heads(lens, batch)
        return lens.generate(batch, picked.edits(2.0), prefix=picked.prefix, **options)

    def redistributed() -> object:
        made = steering.attention_redistribution(lens, batch, dimensions=chosen.dimensions, tau=TAU)
        return lens.generate(batch, made, **options)

    contestants: dict[str, Callable[[], object]] = {
        PLAIN: lambda: lens.generate(batch, **options),
        REINFORCED: reinforced,
        INJECTION: lambda: said_with(lens, batch, injected(lens, rates, 0.26)(batch), **options),
        f"VAR, threshold {TAU}": redistributed,
        EDITED: lambda: lens.generate(batch, steering.edit_heads(chosen.ranked, 2.0, k=TOP), **options),
    }
    for name, make in CONTRASTS.items():
        contestants[name] = lambda make=make: lens.generate(batch, logits_processor=[make(lens, batch)], **options)
    timed = interleaved(contestants, rounds=rounds)
    return [
        {"intervention": one.name, "time / plain": round(one.ratio, 3), "quartiles": f"{one.low:.2f} to {one.high:.2f}"}
        for one in timed
    ]


def main(
    n: Annotated[int, typer.Option(help="how many scenes are captioned")] = 500,
    questioned: Annotated[int, typer.Option(help="how many of them are asked about")] = 120,
    estimated: Annotated[int, typer.Option(help="how many of the validation split rates are estimated on")] = 200,
    draws: Annotated[int, typer.Option(help="runs of each random control")] = 3,
    rounds: Annotated[int, typer.Option(help="rounds of the timing")] = 9,
    seed: int = 0,
    write: Annotated[bool, typer.Option(help="write results and page")] = True,
) -> None:
    """Run the experiment, print its tables, and write them into the page."""
    start = time.process_time()
    lens = interp.load("scenes", device="cpu")
    chosen = choose(lens, estimated)
    pictures = Pictures.of(lens, "test", n, questioned)
    check_nothing(lens, pictures.captions[0], chosen)
    scale, runs = Scale(pictures, seed), {}
    found: dict[tuple[str, str], tuple[Metrics, Metrics]] = {}
    for key, made in ways(lens, chosen, draws=draws, seed=seed).items():
        runs[key] = [speak(lens, pictures, change) for change in made]
        found[key] = scale.of(runs[key])
        print(f"{time.process_time() - start:5.0f} s  {' '.join(key)}", flush=True)
    tables = written(found, runs)
    p = chosen.recovery
    tables["rates"] = p.rows(seed)
    means = {"with the object": p.clean.mean(), "without it": p.removed.mean()}
    tables["p(yes)"] = [{"questions": len(p.clean)} | {name: round(float(x), 3) for name, x in means.items()}]
    tables["sinks"] = chosen.sinks
    tables["latency"] = latency(lens, pictures.captions[0], chosen, rounds=rounds)
    for name, rows in tables.items():
        show(name, rows)
    said = {"scenes": n, "scenes with questions": questioned, "questions": len(pictures.questions)}
    settings = {"model": lens.name, "split": "test", **said, "estimated on": f"{estimated} of validation"}
    settings |= {"draws": draws, "seed": seed, "minutes": round((time.process_time() - start) / 60, 1)}
    if write:
        record("steering", "table", settings, tables, page="steering")


if __name__ == "__main__":
    typer.run(main)
