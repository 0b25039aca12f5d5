"""(c) Rollout and relevance on a vision transformer, against its own saliency head and exact masks.

    python -m experiments.attribution.vision [--n 48]

The packaged transformer was trained to draw saliency maps; its decoder is put back, and what is explained is the mean
logit of the salient pixels. Pictures are scenes of the test split, enlarged to 224 pixels, whose objects' masks are
known. A map is a mean over the patches' rows, or the class token's row. Overlap with the mask of all objects, and rank
correlation over patches with the saliency head's own map.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image

import interp
from experiments.attribution.means import mean_target
from experiments.attribution.saliency_vit import saliency_lens
from experiments.records import Row, interval, record, show
from interp import attribution
from interp.batch import Batch
from interp.data import scenes
from interp.evaluation import agreement, iou, joined, pointing
from interp.tokens import TokenScores

SIDE = 224
BATCH = 8


def pictures(n: int) -> tuple[list[Image.Image], list[np.ndarray]]:
    """Scenes enlarged, with the pixels of all their objects."""
    images, masks = [], []
    for scene in scenes.scenes("test", n):
        images.append(scene.image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        every = np.any([scene.mask(name) for name in scene.names], axis=0)
        wide = Image.fromarray(np.uint8(every) * 255).resize((SIDE, SIDE), Image.Resampling.NEAREST)
        masks.append(np.asarray(wide) > 0)
    return images, masks


def maps(lens: interp.Lens, batch: Batch, blanked: bool) -> dict[str, TokenScores]:
    """Every method's map."""
    depth = len(lens.anatomy.towers["vision"].layers)
    found: dict[str, TokenScores] = {}
    for name, target in (("class token", 0), ("mean of patches", "all")):
        runs = {
            "raw_attention, last layer": attribution.raw_attention(lens, batch, target=target),
            "raw_attention, middle layer": attribution.raw_attention(lens, batch, layer=depth // 2, target=target),
            "rollout": attribution.rollout(lens, batch, target=target),
            "rollout, max over heads": attribution.rollout(lens, batch, target=target, fusion="max"),
            "globenc": attribution.globenc(lens, batch, target=target),
            "relevance": attribution.relevance(lens, batch, target=target),
        }
        found |= {f"{method} ({name})": mean_target(scores) for method, scores in runs.items()}
    found["flow, its upper bound (class token)"] = mean_target(attribution.flow(lens, batch, method="bound", target=0))
    found["input_gradient"] = mean_target(attribution.input_gradient(lens, batch))
    found["gradient_x_input"] = mean_target(attribution.gradient_x_input(lens, batch))
    found["integrated_gradients"] = mean_target(attribution.integrated_gradients(lens, batch, steps=16))
    if blanked:
        found["blank_out, mean colour"] = mean_target(attribution.blank_out(lens, batch, image="mean", batch_size=64))
    return found


def saliency(lens: interp.Lens, batch: Batch, like: TokenScores) -> TokenScores:
    """The saliency head's own map, averaged over each patch."""
    with torch.no_grad():
        whole = lens.model.saliency(batch.inputs["pixel_values"]).sigmoid()
    side = int((like.scores.shape[-1] - 1) ** 0.5)
    small = torch.nn.functional.adaptive_avg_pool2d(whole, side).flatten(1)
    scores = torch.cat([torch.zeros(len(small), 1), small], 1)[:, None]
    return replace(like, scores=scores, name="saliency head", unit="probability")


def main(n: int = 48, blanked: Annotated[int, typer.Option(help="pictures for blank-out, which is slow")] = 8) -> None:
    """Run the experiment, print its table, and write it into the page."""
    lens = saliency_lens()
    images, masks = pictures(n)
    tables: dict[str, list[Row]] = {}
    for title, count, slow in (("vision", n, False), ("vision, with blank-out", blanked, True)):
        parts = []
        for first in range(0, count, BATCH):
            batch = lens.prepare(images=images[first : min(first + BATCH, count)])
            found = maps(lens, batch, slow)
            own = saliency(lens, batch, next(iter(found.values())))
            some = masks[first : first + len(own)]
            same = agreement(found | {"saliency head": own}, own, sources="image")
            parts.append(
                (pointing(found | {"saliency head": own}, some), iou(found | {"saliency head": own}, some), same)
            )
        point, overlap, same = (joined(list(kind)) for kind in zip(*parts, strict=True))
        tables[title] = [
            {
                "map": name,
                "pointing": interval(point, "pointing", name),
                "IoU": interval(overlap, "iou", name),
                "AUROC of pixels": interval(overlap, "auroc", name),
                "Spearman with the saliency head": interval(same, "spearman", name),
            }
            for name in point.names
        ]
        area = interval(point, "chance", point.names[0])
        rest = {"AUROC of pixels": 0.5, "Spearman with the saliency head": 0.0}
        tables[title].append({"map": "chance", "pointing": area, "IoU": area, **rest})
        show(title, tables[title])
    record("attribution", "vision", {"pictures": n, "pictures with blank-out": blanked}, tables)


if __name__ == "__main__":
    typer.run(main)
