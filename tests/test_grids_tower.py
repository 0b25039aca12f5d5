"""Tokens of vision towers: change one patch's pixels where they enter, see which token changes."""

import pytest
import torch

import interp
from interp import grids
from interp.errors import InputError, UnsupportedError
from tests.zoo import ZOO, build, inputs

LVLMS = [n for n, e in ZOO.items() if e.kind == "lvlm" and n != "mllama"]
TOWERS = [n for n, e in ZOO.items() if e.kind == "vision" or n in ("clip", *LVLMS)]
EMBEDS = r"(patch_embedding|patch_embed\.proj|patch_conv|patch_embeddings\.projection)$"


@pytest.mark.parametrize("name", [n for n in TOWERS if n != "swin"])
def test_tower_tokens(name):
    """Change the pixels of one patch of one picture: of the tower's tokens, exactly that patch's enters changed."""
    model, given = build(name), dict(inputs(name))
    lens = interp.wrap(model, None, sample=given)
    read = interp.Read("resid_pre", layers=(0,), tower="vision")

    def stream(tensors):
        return lens.run(lens.prepare(**tensors), reads=[read])[read, 0]

    table = grids.tower_patches(model.config, given)
    before = stream(given)
    assert table.sequence.max() + 1 == before.shape[0]
    assert len(table) == before.shape[0] * before.shape[1]
    flat = table.sequence * before.shape[1] + table.position
    assert torch.equal(flat, torch.arange(len(table)))
    pixels = given["pixel_values"]
    packed = "image_grid_thw" in given
    for n in (i for i, k in enumerate(table.kind) if k == "patch" and i % 7 in (0, 3)):
        changed = pixels.clone()
        left, top, right, bottom = map(int, table.box[n].tolist())
        picture = int(table.image[n])
        if packed:  # the processor's order: blocks of merged patches, row by row
            side = model.config.vision_config.spatial_merge_size
            start = int(given["image_grid_thw"][:picture].prod(1).sum())
            cols = int(given["image_grid_thw"][picture, 2])
            r, c = int(table.row[n]), int(table.col[n])
            assert (left, top) == (4 * c, 4 * r)
            block = (r // side) * (cols // side) + c // side
            changed[start + block * side**2 + (r % side) * side + c % side] += 1
        else:
            tiles = changed.flatten(0, -4)
            real = [i for i, tile in enumerate(tiles) if bool((tile != 0).any())]
            tiles[real[picture], :, top:bottom, left:right] += 1
        moved = ((stream(given | {"pixel_values": changed}) - before).abs().amax(-1) > 0).flatten()
        assert moved.nonzero()[:, 0].tolist() == [n]
    none = [i for i, k in enumerate(table.kind) if k != "patch"]
    assert bool((table.row[none] == -1).all())
    assert bool((table.box[none, :2] == 0).all())


def test_tower_tokens_that_are_no_patches():
    kinds = {
        n: grids.tower_patches(build(n).config, inputs(n)).kind for n in ("deit", "dinov2_with_registers", "siglip")
    }
    assert kinds["deit"][:3] == ("class", "distillation", "patch")
    assert kinds["dinov2_with_registers"][:5] == ("class", "register", "register", "register", "patch")
    assert set(kinds["siglip"]) == {"patch"}


@pytest.mark.parametrize(("name", "why"), [("swin", "merge patches"), ("mllama", "padded to a multiple")])
def test_towers_without_fixed_patches_are_refused(name, why):
    with pytest.raises(UnsupportedError, match=why):
        grids.tower_patches(build(name).config, inputs(name))
    with pytest.raises(InputError, match="pixel_values"):
        grids.tower_patches(build("vit").config, {})
