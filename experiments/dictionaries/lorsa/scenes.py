"""Lorsa on `scenes`: do heads bring objects from the picture to the caption, checked against the masks?

    python -m experiments.dictionaries.lorsa.scenes [--n 600]

The layer is the one at which the probability of an object's word falls most if text may not look at the object's image
tokens (scenes of the validation split). A Lorsa is trained there on pictures with their captions (training split). In
captions of the test split, at the token before the word of an object, each object's heads are those whose latents tell
its word from those of others best (AUROC), of the heads whose z-patterns lie on the picture. They are chosen on one
half of the scenes; all that is reported is of the other half. An object's own image tokens are those of which a tenth
is the object's.

Then the Lorsa is put in the layer's place with its error kept, so that nothing changes but what is taken away: an
object's heads; others that fire as often; or only what the object's image tokens give to heads.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
import typer

import interp
from experiments.dictionaries.lorsa.objects import (
    Mentions,
    Removal,
    by_scene,
    captioned,
    chosen,
    effects,
    matched,
    mentions,
    on_picture,
    own_tokens,
    weights,
)
from experiments.dictionaries.scenes import LEAST, auroc
from experiments.heads.intervals import RESAMPLES, mean_interval
from experiments.records import Row, record, show
from experiments.tracing.scenes import rows_of
from interp import evaluation, tracing
from interp.bootstrap import ends
from interp.data import scenes
from interp.data.corpora import corpus
from interp.dictionaries import Fidelity, TrainSettings, logit_effects, lorsa, train
from interp.dictionaries.activations import ActivationStream

CONTEXT, BATCH = 96, 32
WIDTH, K, STEPS = 1280, 8, 400
DRAWS, SHOWN = 3, 8
SPREADS = ("pattern", "moved")
OTHERS = {1: "another", 3: "three others"}


def cut_rows(lens: interp.Lens, drawn: Sequence[scenes.Scene], seed: int = 0) -> list[Row]:
    """Which share of the probability of objects' words is lost if text cannot look at some image tokens in a layer."""
    rows = [(one, name) for one in drawn for name in one.names]
    batch = captioned(lens, [one for one, _ in rows], [name for _, name in rows])
    image = batch.span("image")
    own = torch.zeros_like(batch.mask)
    marks = np.stack([m[n] for m, (_, n) in zip(own_tokens(batch, [o for o, _ in rows]), rows, strict=True)])
    own[image] = torch.from_numpy(marks).flatten()
    other = torch.zeros_like(batch.mask)
    other[image] = torch.from_numpy(as_many(marks, ~marks, seed)).flatten()
    text = batch.mask & ~image & (batch.mask.cumsum(1) > 1)
    edges = {"the object's image tokens": (own, text), "as many others": (other, text)}
    found = tracing.attention_knockout(
        lens, batch, edges, window=1, metric="probability", answers=[name for _, name in rows]
    )
    return rows_of(found)


def as_many(wanted: np.ndarray, among: np.ndarray, seed: int) -> np.ndarray:
    """As many image tokens as are wanted, at random among some; all, where these are too few."""
    order = np.where(among, np.random.default_rng(seed).random(among.shape), 2).argsort(1).argsort(1)
    return among & (order < wanted.sum(1, keepdims=True))


def trained(lens: interp.Lens, rule: lorsa.AttentionRule, steps: int) -> lorsa.Lorsa:
    """A Lorsa of a layer, begun in its active subspaces, its queries and keys frozen."""
    source = pairs(lens, rule, "train", steps * BATCH)
    sample = next(pairs(lens, rule, "train", 128, batch=128))
    options: dict[str, Any] = {"n_qk": len(rule.W_Q), "n_ov": WIDTH, "k": K, "architecture": "topk"}
    options["normalize_activations"] = "expected_average_only_in"
    made = lorsa.from_heads(
        rule, x=sample[f"x.{rule.layer}"], real=sample.real, subspace="outputs", **options
    ).freeze_qk()
    settings = TrainSettings(
        steps=steps, lr=2e-3, lr_warm_up_steps=steps // 20, lr_decay_steps=steps // 4, scale_rows=8192, log_every=steps
    )
    return train(made, source, settings).dictionaries["dictionary"]


def pairs(lens: interp.Lens, rule: lorsa.AttentionRule, split: Any, n: int, batch: int = BATCH) -> lorsa.AttentionPairs:
    """Pictures with their captions, padded on the right."""
    texts = corpus("scenes", n=n, split=split, seed=0)
    stream = ActivationStream(lens, texts, list(rule.reads), batch=batch, context=CONTEXT)
    return lorsa.AttentionPairs(stream, rule)


@torch.no_grad()
def fidelity(lens: interp.Lens, one: lorsa.Lorsa, rule: lorsa.AttentionRule, n: int) -> list[Row]:
    """How well image tokens and text tokens of held-out scenes are reconstructed."""
    source = pairs(lens, rule, "validation", n)
    found = {part: Fidelity(one.cfg.width_out, one.cfg.n_ov) for part in ("all tokens", "image tokens", "text tokens")}
    for item in source:
        x, y = (item[f"{name}.{rule.layer}"] for name in "xy")
        latents = one.encode(x, real=item.real)
        image = source.source.inputs.image_mask  # type: ignore[attr-defined]
        for part, mask in zip(found, (item.mask, item.mask & image, item.mask & ~image), strict=True):
            found[part].update(y[mask], one.decode(latents[mask]), latents[mask])
    rows = []
    for part, scores in found.items():
        result = scores.result()
        row: Row = {"on": part, "tokens": int(result.tokens), "L0": f"{result.l0:.1f}", "FVU": f"{result.fvu:.3f}"}
        rows.append({**row, "heads that fire": int(one.cfg.n_ov - result.dead)})
    return rows


def told_rows(first: Mentions, second: Mentions, heads: Mapping[str, list[int]]) -> list[Row]:
    """How well single numbers tell an object's word from others, mean over objects, resampled over scenes."""
    names, scores = list(heads), {}
    for i, name in enumerate(names):
        yes = first.name == name
        signed = auroc(first.z, yes)
        axis = int(abs(signed - 0.5).argmax())
        way = first.z[yes].mean(0) - first.z[~yes].mean(0)
        scores[name] = {
            "best Lorsa head": second.latents[:, heads[name][0]],
            "Lorsa head of another object": second.latents[:, heads[names[i - 1]][0]],
            "best coordinate of the layer's heads": second.z[:, axis] * np.sign(signed[axis] - 0.5),
            "difference of means of the layer's heads": second.z @ way,
        }
    ones, rows = np.ones((1, len(second.name))), []
    for what in scores[names[0]]:
        found = [(scores[name][what], second.name == name) for name in names]
        value = np.mean([evaluation.intervals.auroc(s, yes, ones)[0][0] for s, yes in found])
        drawn = [
            np.mean([evaluation.intervals.auroc(s, yes, part)[0] for s, yes in found], axis=0)
            for part in weights(second, RESAMPLES)
        ]
        low, high = ends(np.concatenate(drawn), 0.95)
        rows.append({"chosen on one half of the scenes": what, "AUROC on the other": cell(value, low, high)})
    return rows


def cell(value: float, low: float, high: float) -> dict[str, float]:
    """A number with its interval."""
    return {"value": round(float(value), 3), "low": round(float(low), 3), "high": round(float(high), 3)}


def mask_rows(first: Mentions, second: Mentions, heads: Mapping[str, list[int]], group: int) -> list[Row]:
    """Which image tokens feed heads before the word of an object, where its head fires; `group` OV heads share a QK."""
    mine = np.array([heads.get(name, [0])[0] for name in second.name])
    fires = np.isin(second.name, list(heads)) & (second.latents[np.arange(len(mine)), mine] > 0)
    some, mine = second.at(fires), mine[fires]
    n, marks = np.arange(len(mine)), (np.ones_like(some.own), some.own, some.other)
    best = {what: int((getattr(first, what) * first.own[:, None]).sum(-1).mean(0).argmax()) for what in SPREADS}
    given = (some.on_image, some.on_own, some.on_other)
    parts = {
        "its Lorsa head: z-pattern": [part[n, mine] for part in given],
        "the layer's head with the same QK: pattern": _on(some.pattern[n, mine // group], marks),
        "all Lorsa heads that fire: z-pattern": [np.nanmean(part, 1) for part in given],
        f"best head of the layer ({best['pattern']}): pattern": _on(some.pattern[:, best["pattern"]], marks),
        f"best head of the layer ({best['moved']}): what it moves": _on(some.moved[:, best["moved"]], marks),
        "share of the image tokens": [mark.mean(1) for mark in marks],
    }
    columns = ("on the picture", "on the object", "on other objects")
    return [
        {"of": what, **{c: mean_interval(by_scene(v, some.scene)) for c, v in zip(columns, values, strict=True)}}
        for what, values in parts.items()
    ]


def _on(spread: np.ndarray, marks: Sequence[np.ndarray]) -> list[np.ndarray]:
    """How much of what is spread over image tokens lies on marked ones."""
    return [(spread * mark).sum(1) for mark in marks]


def head_rows(
    at: lorsa.PlacedLorsa, lens: interp.Lens, first: Mentions, second: Mentions, heads: Mapping[str, list[int]]
) -> tuple[list[Row], int]:
    """The heads of the objects that are told best on the first half; and of how many objects the word is promoted."""
    listed = sorted({mine[0] for mine in heads.values()})
    promoted = logit_effects(at, lens, listed, 3)  # type: ignore[arg-type]
    rows_of_words = dict(zip(listed, promoted.promoted.tolist(), strict=True))
    words = {name: [promoted.names[i].strip() for i in rows_of_words[mine[0]]] for name, mine in heads.items()}
    told = {name: float(auroc(first.latents[:, [mine[0]]], first.name == name)[0]) for name, mine in heads.items()}
    rows = []
    for name in sorted(heads, key=lambda name: -told[name])[:SHOWN]:
        head, yes = heads[name][0], second.name == name
        value, rest = (second.latents[mask, head] for mask in (yes, ~yes))
        rows.append(
            {
                "object": name,
                "head": head,
                "QK of": f"{at.layer}.{head // at.cfg.group}",
                "AUROC": float(auroc(second.latents[:, [head]], yes)[0]),
                "fires before its word": f"{(value > 0).mean():.0%}",
                "before others": f"{(rest > 0).mean():.0%}",
                "z-pattern on the object": f"{np.nanmean(second.on_own[yes, head]):.0%}",
                "promotes": " ".join(words[name]),
            }
        )
    return rows, sum(name in mine for name, mine in words.items())


def removals(
    first: Mentions, some: Mentions, heads: Mapping[str, list[int]], firing: np.ndarray
) -> dict[str, list[Removal]]:
    """What is taken away, one or several draws each."""
    n_ov = some.latents.shape[1]

    def of(choose: Mapping[str, Sequence[int]]) -> np.ndarray:
        marks = np.zeros((len(some.name), n_ov), dtype=bool)
        for row, name in enumerate(some.name):
            marks[row, list(choose[name])] = True
        return marks

    there = {name: (first.latents[first.name == name] > 0).mean(0) for name in heads}
    blind = {name: np.flatnonzero(~on_picture(first, name)).tolist() for name in heads}
    found = {"nothing": [Removal()], "the Lorsa's error": [Removal(error=False)]}
    for count, what in ((1, "its head"), (3, "its three heads")):
        own = {name: mine[:count] for name, mine in heads.items()}
        near = {n: matched(there[n], mine, 0, near=1, without=heads[n]) for n, mine in own.items()}
        seeing = {n: matched(there[n], mine, 0, near=1, without=[*heads[n], *blind[n]]) for n, mine in own.items()}
        far = [
            {name: matched(firing, mine, seed, without=heads[name]) for name, mine in own.items()}
            for seed in range(DRAWS)
        ]
        found[what] = [Removal(of(own))]
        found[f"{OTHERS[count]}, firing as often before its word"] = [Removal(of(near))]
        found[f"{OTHERS[count]}, the same, and on the picture"] = [Removal(of(seeing))]
        found[f"{OTHERS[count]}, firing as often in text"] = [Removal(of(one)) for one in far]
    one = {name: mine[:1] for name, mine in heads.items()}
    every, own = np.ones((len(some.name), n_ov), dtype=bool), some.own
    for what, mine in {"its head": of(one), "all heads": every}.items():
        found[f"{what}: what the object's image tokens give"] = [Removal(mine, own)]
        found[f"{what}: what as many others give"] = [Removal(mine, as_many(own, ~own, 0))]
        found[f"{what}: what as many of other objects give"] = [Removal(mine, as_many(own, some.other, 0))]
    return found


def effect_rows(lens: interp.Lens, one: lorsa.Lorsa, rule: Any, drawn: Any, some: Mentions, what: Any) -> list[Row]:
    """What the words of objects lose, of log-probability, and the other words of their captions."""
    flat = {(name, i): removal for name, draws in what.items() for i, removal in enumerate(draws)}
    found, rows = effects(lens, one, rule, drawn, some, flat), []  # type: ignore[arg-type]
    for name, draws in what.items():
        own, rest = np.stack([found[name, i] for i in range(len(draws))]).swapaxes(0, 1)
        own, rest = (v[0] if len(draws) == 1 else v for v in (own, rest))
        heads = [removal.heads for removal in draws if removal.heads is not None and removal.tokens is None]
        fires = f"{np.mean([(some.latents > 0)[mine].mean() for mine in heads]):.0%}" if heads else "-"
        picture = f"{np.mean([np.nanmean(some.on_image[mine]) for mine in heads]):.0%}" if heads else "-"
        values = {"the object's word": own, "other words": rest, "difference": own - rest}
        row: Row = {"taken away": name, "fires there": fires, "on the picture": picture}
        rows.append({**row, **{k: mean_interval(by_scene(v, some.scene)) for k, v in values.items()}})
    return rows


def main(
    n: Annotated[int, typer.Option(min=40)] = 600,
    steps: Annotated[int, typer.Option(min=4)] = STEPS,
    looked: Annotated[int, typer.Option(min=4, help="scenes by which the layer is chosen")] = 80,
) -> None:
    begin = time.process_time()
    torch.manual_seed(0)
    lens = interp.load("scenes", device="cpu")
    tables: dict[str, list[Row]] = {"cut": cut_rows(lens, list(scenes.scenes("validation", looked)))}
    layer = max(tables["cut"], key=lambda row: row["the object's image tokens"]["value"])["layer"]
    rule = lorsa.attention_rule(lens, layer, context=CONTEXT)
    one = trained(lens, rule, steps)
    tables["scenes"] = fidelity(lens, one, rule, 400)
    drawn = list(scenes.scenes("test", n))
    seen, firing = mentions(lens, one, rule, drawn)
    first, second = (seen.at(seen.scene % 2 == half) for half in range(2))
    names = [name for name in scenes.NAMES if min((half.name == name).sum() for half in (first, second)) >= LEAST]
    heads = chosen(first, names)
    tables["told"] = told_rows(first, second, heads)
    tables["masks"] = mask_rows(first, second, heads, one.cfg.group)
    at = lorsa.PlacedLorsa(one, lens, rule=rule)
    tables["objects"], promoted = head_rows(at, lens, first, second, heads)
    some = second.at(second.known & np.isin(second.name, names))
    tables["taken away"] = effect_rows(lens, one, rule, drawn, some, removals(first, some, heads, firing))
    for name, rows in tables.items():
        show(name, rows)
    about: dict[str, Any] = {"scenes": n, "layer": layer, "heads": WIDTH, "k": K, "steps": steps, "objects": len(names)}
    about |= {"different heads": len({mine[0] for mine in heads.values()}), "heads that promote the word": promoted}
    about |= {"words": len(some.name), "words of the half": len(second.name)}
    about["minutes"] = round((time.process_time() - begin) / 60, 1)
    print(about)
    record("dictionaries", "lorsa_scenes", about, tables, page="lorsa")


if __name__ == "__main__":
    typer.run(main)
