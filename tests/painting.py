"""Painting one token's box in a picture, and seeing which image features change.

The vision tower's attention output is zeroed, so that a token's features depend on its own pixels only.
"""

import importlib
import importlib.util
import re
import sys
import types
import warnings

import numpy as np
import torch
from PIL import Image

import interp
from interp.inputs import placeholder
from tests.zoo import build, inputs, processor
from tests.zoo._images import image

# Filters reach 2 pixels (bicubic) or 3 (Lanczos) of the smaller picture; the smallest cells measure 8.
MARGIN = 0.4


def zoo_processor(name):
    """The family's processor; Pixtral's needs one function of a module that imports torchvision."""
    module = "transformers.models.pixtral.image_processing_pixtral"
    if name == "mistral3" and importlib.util.find_spec("torchvision") is None and module not in sys.modules:
        pil = importlib.import_module("transformers.models.pixtral.image_processing_pil_pixtral")
        sys.modules[module] = types.ModuleType(module)
        sys.modules[module].get_resize_output_image_size = pil.get_resize_output_image_size
    return processor(name)


def unmixed(name, change=None, process=None):
    """A lens on the family's model whose vision tower's tokens do not see each other."""
    model, process = build(name) if isinstance(name, str) else name, process or zoo_processor(name)
    if change is not None:
        change(model.config, process)
    lens = interp.wrap(model, process, sample=inputs(name) if name == "paligemma" else None)
    token = placeholder(process)
    lens.run(lens.prepare([f"{token} a"], images=[[image(64, 64, 0)]]), reads=["resid_pre.0"])
    out = re.compile(r"(vision|visual).*att.*\.(out_proj|o_proj|proj|projection_layer)$")
    found = [m for n, m in model.named_modules() if out.search(n)]
    assert len(found) == 3
    for module in found:
        for weight in module.parameters():
            weight.data.zero_()
    return lens


def prepared(lens, pictures, side=None):
    token = placeholder(lens.processor)
    texts = ["ab " * (2 * i) + " and ".join([token] * len(row)) + "?" for i, row in enumerate(pictures)]
    if "PaliGemma" in type(lens.processor).__name__:
        texts = [token * len(row) + "ab " * (1 + i) for i, row in enumerate(pictures)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no patch map")
        return lens.prepare(texts, images=pictures, padding_side=side)


def features(lens, batch):
    """Image features as they enter the text model, one row for each row of the patch map [n, d_model]."""
    stream = lens.run(batch, reads=["resid_pre.0"])["resid_pre", 0]
    return stream[batch.patches.sample, batch.patches.column]


def painted(picture, rect):
    """The picture with another colour inside (left, top, right, bottom)."""
    pixels = np.array(picture)
    left, top, right, bottom = rect
    inside = pixels[top:bottom, left:right]
    pixels[top:bottom, left:right] = np.where(inside.mean((0, 1)) < 128, 255, 0)
    return Image.fromarray(pixels)


def core(box):
    """Whole pixels in the middle of a box."""
    left, top, right, bottom = box.tolist()

    def middle(a, b):
        low, high = int(np.ceil(a + MARGIN * (b - a))), int(np.floor(b - MARGIN * (b - a)))
        return (low, high) if high > low else (int((a + b) / 2), int((a + b) / 2) + 1)

    (x0, x1), (y0, y1) = middle(left, right), middle(top, bottom)
    return x0, y0, x1, y1


def cell_sizes(patches):
    """Width and height of a full cell of each token's grid [n, 2]."""
    size = patches.box[:, 2:] - patches.box[:, :2]
    out = size.clone()
    for key in set(keys(patches)):
        mine = torch.tensor([k == key for k in keys(patches)])
        out[mine] = size[mine].max(0).values
    return out


def keys(patches):
    return list(zip(patches.sample.tolist(), patches.image.tolist(), patches.kind, strict=True))


def corners(patches, key):
    """Rows of one grid to try: its corners, the ends of its first full row, the middle, and the ends of tiles."""
    mine = [n for n, k in enumerate(keys(patches)) if k == key]
    full = cell_sizes(patches)[mine[0]]
    size = patches.box[mine, 2:] - patches.box[mine, :2]
    good = [n for n, s in zip(mine, size, strict=True) if bool((s >= 0.9 * full).all())]
    at = {(int(patches.row[n]), int(patches.col[n])): n for n in good}
    rows, cols = sorted({r for r, _ in at}), sorted({c for _, c in at})
    half = len(rows) // 2, len(cols) // 2
    wanted = {(r, c) for r in (rows[0], rows[-1]) for c in (cols[0], cols[-1])}
    wanted |= {(rows[half[0]], cols[half[1]]), (rows[half[0] - 1], cols[half[1] - 1]), (rows[half[0] - 1], cols[-1])}
    return [at[w] for w in sorted(wanted) if w in at]


def check_painting(lens, pictures, targets, side=None):
    """Paint every target's box in turn; exactly the tokens that look there may change."""
    batch = prepared(lens, pictures, side)
    before, patches = features(lens, batch), batch.patches
    margin = MARGIN * cell_sizes(patches)
    chosen = [n for key in dict.fromkeys(keys(patches)) if key[2] in targets for n in corners(patches, key)]
    assert chosen
    for n in chosen:
        i, j = int(patches.sample[n]), int(patches.image[n])
        rect = core(patches.box[n])
        changed_pictures = [list(row) for row in pictures]
        changed_pictures[i][j] = painted(pictures[i][j], rect)
        after = prepared(lens, changed_pictures, side)
        assert torch.equal(after.patches.column, patches.column)
        change = (features(lens, after) - before).abs().amax(1)
        here = (patches.sample == i) & (patches.image == j)
        looks = torch.tensor([k in ("patch", "tile", "thumbnail") for k in patches.kind])
        spot = torch.tensor(rect).float()

        def over(box, here=here, looks=looks, spot=spot):
            return here & looks & (box[:, :2] < spot[2:]).all(1) & (box[:, 2:] > spot[:2]).all(1)

        def around(sign, patches=patches, margin=margin):
            return torch.cat([patches.box[:, :2] - sign * margin, patches.box[:, 2:] + sign * margin], 1)

        where = f"row {n}: {patches.kind[n]} {int(patches.row[n])}, {int(patches.col[n])} of {patches.box[n].tolist()}"
        assert bool(over(around(1))[change > 0].all()), f"{where}: changed {(change > 0).nonzero()[:, 0].tolist()}"
        inside = here & looks & (around(-1)[:, :2] <= spot[:2]).all(1) & (around(-1)[:, 2:] >= spot[2:]).all(1)
        assert bool((change[inside] > 1e-3).all()), where
        same = torch.tensor([k == keys(patches)[n] for k in keys(patches)])
        assert (same & (change > 0)).nonzero()[:, 0].tolist() == [n], where
    return patches
