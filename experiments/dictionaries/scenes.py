"""Dictionaries on `scenes`: do latents answer to objects, checked against the masks, and do captions follow them?

    python -m experiments.dictionaries.scenes [--n 400]

A top-k SAE on the image tokens of the language tower behind layer 0 (before the model hands its objects over). Object
tokens are those of which half the pixels are the object's. For each kind of object the latent that tells its tokens
from all other image tokens best (AUROC) is chosen on one half of the scenes and judged on the other, beside the best
single dimension of the stream and the best direction (difference of means). Then that latent is taken away on all image
tokens, the rest of the reconstruction and its error kept: how often does the caption still name the object, and the
others?
"""

from __future__ import annotations

import time
from typing import Annotated

import numpy as np
import torch
import typer
from scipy.stats import rankdata
from torch import Tensor

import interp
from experiments.records import Row, record, show
from interp import evaluation
from interp.batch import Batch
from interp.data import scenes
from interp.data.corpora import corpus
from interp.dictionaries import SAE, Dictionary, TrainSettings, train
from interp.dictionaries.activations import ActivationStream, MixingBuffer
from interp.edits import splice
from interp.heads.visual_concentration import mask_shares

LAYER, LATENTS, K, STEPS = 0, 1280, 8, 3000
LEAST = 8  # scenes of each half that an object has to stand in


def trained(lens: interp.Lens) -> tuple[Dictionary, Row]:
    """An SAE on the image tokens of training scenes."""
    texts = corpus("scenes", n=6000, seed=0)
    stream = ActivationStream(lens, texts, f"resid_post.{LAYER}", batch=32, tokens="image", epochs=None)
    source = MixingBuffer(stream, rows=16_384, batch=1024, seed=0, dtype=torch.float32)
    sae = SAE(d_in=stream.d_in[f"resid_post.{LAYER}"], d_sae=LATENTS, architecture="topk", k=K)
    settings = TrainSettings(
        steps=STEPS, lr=2e-3, lr_warm_up_steps=100, lr_decay_steps=STEPS // 4, log_every=100, b_dec_init="mean"
    )
    found = train(sae, source, settings)
    last = found.metrics.iloc[-1]
    row = {"latents": LATENTS, "k": K, "steps": STEPS, "FVU": round(float(last["fvu"]), 3), "dead": int(last["dead"])}
    return found.dictionaries["dictionary"], row


def auroc(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """How often a positive has the larger score, ties by half; by column."""
    ranks = rankdata(scores, axis=0)
    n = positive.sum()
    return (ranks[positive].sum(0) - n * (n + 1) / 2) / (n * (len(scores) - n))


def looked_at(lens: interp.Lens, some: list[scenes.Scene]) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
    """The stream at the image tokens [scene, token, d], and for each scene the tokens of each object."""
    batch = prepared(lens, some)
    value = lens.run(batch, f"resid_post.{LAYER}")["resid_post", LAYER]
    image = batch.span("image")
    marks = [{name: share >= 0.5 for name, share in held.items()} for held in object_shares(batch, some)]
    return value[image].view(len(some), -1, value.shape[-1]).numpy(), marks


def object_shares(batch: Batch, some: list[scenes.Scene]) -> list[dict[str, np.ndarray]]:
    """For each scene, which share of each image token is each object's."""
    found: list[dict[str, np.ndarray]] = [{} for _ in some]
    for j in range(max(len(one.names) for one in some)):
        names = [one.names[min(j, len(one.names) - 1)] for one in some]
        masks = [one.mask(name) for one, name in zip(some, names, strict=True)]
        for held, name, share in zip(found, names, mask_shares(batch, masks).numpy(), strict=True):
            held[name] = share
    return found


def prepared(lens: interp.Lens, some: list[scenes.Scene]) -> Batch:
    texts = [evaluation.image_prompt(lens, "describe the image .") for _ in some]
    return lens.prepare(texts, [one.image for one in some], padding_side="left")


def pooled(
    values: np.ndarray, marks: list[dict[str, np.ndarray]], name: str, latents: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All tokens of the scenes with an object: the stream, latents, and which are the object's."""
    rows = [i for i, held in enumerate(marks) if name in held and held[name].any()]
    positive = np.concatenate([marks[i][name] for i in rows])
    return values[rows].reshape(-1, values.shape[-1]), latents[rows].reshape(-1, latents.shape[-1]), positive


def interval(values: list[float]) -> dict[str, float]:
    """A mean with its 95 % bootstrap interval over objects."""
    x = np.array(values)
    drawn = np.random.default_rng(0).choice(x, (2000, len(x))).mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"value": float(x.mean()), "low": float(low), "high": float(high)}


def told(lens: interp.Lens, some: list[scenes.Scene], edits=()) -> list[set[str]]:
    """The objects that the caption of each scene names, of those that are there."""
    out = lens.generate(prepared(lens, some), edits=list(edits), max_new_tokens=48)
    return [{n for n in one.names if n in text} for one, text in zip(some, out.texts, strict=True)]


def without(sae: Dictionary, latent: int):
    """An edit that takes a latent away on image tokens; all else, the error of the SAE too, stays."""
    rows = sae.kind.decoder(sae)

    @torch.no_grad()
    def change(value: Tensor) -> Tensor:
        return value - sae.encode(value)[..., latent, None] * rows[latent]

    return splice(change, site="resid_post", layers=LAYER, positions="image")


def main(n: Annotated[int, typer.Option(min=40)] = 400, objects: Annotated[int, typer.Option(min=1)] = 12) -> None:
    begin = time.process_time()
    torch.manual_seed(0)
    lens = interp.load("scenes", device="cpu")
    sae, row = trained(lens)
    tables: dict[str, list[Row]] = {"training": [row], "objects": [], "captions": []}
    drawn = list(scenes.scenes("test", n))
    halves = [drawn[::2], drawn[1::2]]
    looked = [looked_at(lens, half) for half in halves]
    with torch.no_grad():
        latents = [sae.encode(torch.from_numpy(values)).numpy() for values, _ in looked]
    counts = [
        {name: sum(held.get(name, np.zeros(1)).any() for held in marks) for name in scenes_names(drawn)}
        for _, marks in looked
    ]
    names = [name for name in counts[0] if min(c[name] for c in counts) >= LEAST]
    found: dict[str, list[float]] = {
        "best latent": [],
        "best dimension": [],
        "difference of means": [],
        "latent of another object": [],
    }
    chosen = {}
    for name in names:
        (x, f, yes), (x2, f2, yes2) = (
            pooled(*look, name, latent) for look, latent in zip(looked, latents, strict=True)
        )
        scores = auroc(f, yes)
        chosen[name] = (int(scores.argmax()), float(scores.max()))
        found["best latent"].append(float(auroc(f2[:, [chosen[name][0]]], yes2)[0]))
        signed = auroc(x, yes)
        axis = int(abs(signed - 0.5).argmax())
        found["best dimension"].append(float(auroc(x2[:, [axis]] * np.sign(signed[axis] - 0.5), yes2)[0]))
        way = x[yes].mean(0) - x[~yes].mean(0)
        found["difference of means"].append(float(auroc((x2 @ way)[:, None], yes2)[0]))
    for i, name in enumerate(names):
        (_, f2, yes2) = pooled(*looked[1], name, latents[1])
        found["latent of another object"].append(float(auroc(f2[:, [chosen[names[i - 1]][0]]], yes2)[0]))
    for what, values in found.items():
        tables["objects"].append({"chosen on one half of the scenes": what, "AUROC on the other": interval(values)})
    best = sorted(names, key=lambda name: -chosen[name][1])[:objects]
    shares: dict[str, dict[str, list[float]]] = {
        w: {"the object": [], "the others": []} for w in ("nothing", "its latent", "another latent")
    }
    for name in best:
        some = [one for one in halves[1] if name in one.names]
        plain = told(lens, some)
        some = [one for one, said in zip(some, plain, strict=True) if name in said]
        if not some:
            continue
        latent = chosen[name][0]
        (_, f, yes) = pooled(*looked[0], name, latents[0])
        size = f[yes].mean(0)
        near = np.argsort(abs(size - size[latent]), kind="stable")
        other = int(next(j for j in near if j != latent))  # as strong on the object's tokens
        for what, edits in {
            "nothing": (),
            "its latent": (without(sae, latent),),
            "another latent": (without(sae, other),),
        }.items():
            said = told(lens, some, edits)
            shares[what]["the object"].append(float(np.mean([name in s for s in said])))
            rest = [
                len(s - {name}) / (len(one.names) - 1) for s, one in zip(said, some, strict=True) if len(one.names) > 1
            ]
            shares[what]["the others"].append(float(np.mean(rest)) if rest else 1.0)
    for what, values in shares.items():
        tables["captions"].append({"taken away": what, **{f"names {k}": interval(v) for k, v in values.items()}})
    for name, rows in tables.items():
        show(name, rows)
    about = {"scenes": n, "objects": len(names), "captions of objects": len(best), "layer": LAYER}
    about["minutes"] = round((time.process_time() - begin) / 60, 1)
    record("dictionaries", "objects", about, tables, page="dictionaries")


def scenes_names(drawn: list[scenes.Scene]) -> list[str]:
    """All kinds of objects in some scenes."""
    return sorted({name for one in drawn for name in one.names})


if __name__ == "__main__":
    typer.run(main)
