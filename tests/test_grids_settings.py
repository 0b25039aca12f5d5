"""Patch maps under settings that change the layout, and what is refused."""

from types import SimpleNamespace

import pytest
import torch
import transformers

import interp
from interp import grids
from interp.batch import Batch
from interp.errors import InputError
from tests.painting import check_painting, core, features, keys, painted, prepared, unmixed, zoo_processor
from tests.zoo import build, inputs, processor
from tests.zoo._images import image


def test_onevision_shrinks_a_large_canvas():
    def change(config, process):
        config.vision_aspect_ratio = process.vision_aspect_ratio = "anyres_max_2"

    lens = unmixed("llava_onevision", change)
    picture = image(120, 120, 1)
    batch = prepared(lens, [[picture]])
    patches = batch.patches
    tiles = patches.where([k == "tile" for k in patches.kind])
    assert len(tiles) == 25  # 8 x 8 cells, of which two tiles of 16 may stay: 5 x 5
    assert tiles.box[6].tolist() == pytest.approx([24, 24, 48, 48])
    before = features(lens, batch)
    for n in (n for n, k in enumerate(patches.kind) if k == "tile"):
        rect = core(patches.box[n])
        after = features(lens, prepared(lens, [[painted(picture, rect)]]))
        change = (after - before).abs().amax(1) * torch.tensor([float(k == "tile") for k in patches.kind])
        near = (patches.row - patches.row[n]).abs().maximum((patches.col - patches.col[n]).abs()) <= 1
        assert bool(near[change > 0].all())
        assert int(change.argmax()) == n


def test_llava_keeps_the_class_token_when_told_to():
    def change(config, process):
        config.vision_feature_select_strategy = process.vision_feature_select_strategy = "full"

    lens = unmixed("llava", change)
    patches = prepared(lens, [[image(90, 50, 1)]]).patches
    assert patches.kind == ("whole",) + ("patch",) * 16
    assert patches.box[0].tolist() == [0, 0, 90, 50]
    check_painting(lens, [[image(90, 50, 1)]], ("patch",))


def test_llava_that_pads_to_a_square():
    process = zoo_processor("llava")
    old = process.image_processor
    process.image_processor = transformers.LlavaImageProcessorPil(size=old.size, crop_size=old.crop_size, do_pad=True)
    lens = unmixed("llava", process=process)
    patches = check_painting(lens, [[image(100, 50, 1)], [image(48, 97, 1)]], ("patch",))
    assert patches.box[4].tolist() == [0, 0, 25, 25]
    assert patches.box[:4, 3].tolist() == [0] * 4


def test_gemma_pan_and_scan():
    process = zoo_processor("gemma3_vl")
    process.images_kwargs = {
        "do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16, "pan_and_scan_max_num_crops": 4,
        "pan_and_scan_min_ratio_to_activate": 1.2, "do_convert_rgb": True,
    }  # fmt: skip
    lens = unmixed("gemma3_vl", process=process)
    pictures = [[image(151, 74, 1), image(80, 80, 2)], [image(70, 215, 3)]]
    patches = check_painting(lens, pictures, ("patch", "tile", "thumbnail"))
    counts = {k: keys(patches).count(k) for k in keys(patches)}
    assert counts == {
        (0, 0, "thumbnail"): 4, (0, 0, "tile"): 8, (0, 1, "patch"): 4, (1, 0, "thumbnail"): 4, (1, 0, "tile"): 12,
    }  # fmt: skip


def test_pictures_that_are_not_split():
    for name in ("internvl", "aya_vision"):
        patches = check_painting(unmixed(name), [[image(40, 40, 1)]], ("patch",))
        assert set(patches.kind) == {"patch"}
    process = zoo_processor("idefics3")
    process.image_processor.do_image_splitting = False
    patches = check_painting(unmixed("idefics3", process=process), [[image(90, 60, 1)]], ("patch",))
    assert patches.kind == ("patch",) * 4


def test_query_tokens_see_the_whole_image():
    ids = torch.tensor([[0, 7, 7, 7, 1], [7, 7, 7, 1, 1]])
    batch = Batch({"input_ids": ids}, torch.ones_like(ids).bool(), image_mask=ids == 7)
    config = SimpleNamespace(model_type="blip-2", num_query_tokens=3)
    patches = grids.patches_of(config, None, batch, (((30, 20),), ((10, 40),)))
    assert patches.kind == ("whole",) * 6
    assert patches.box[[0, 5]].tolist() == [[0, 0, 30, 20], [0, 0, 10, 40]]
    assert patches.column.tolist() == [1, 2, 3, 0, 1, 2]
    assert set(patches.row.tolist()) == {-1}


def test_unknown_families_and_disagreements_get_no_map_and_a_reason():
    lens = unmixed("llava")
    batch = prepared(lens, [[image(64, 64, 1)]])
    strange = SimpleNamespace(model_type="strange_vl", image_token_id=3)
    assert grids.patches_of(strange, lens.processor, batch, (((64, 64),),)) is None
    assert "strange_vl is not known" in grids.explain(strange)
    with pytest.warns(UserWarning, match="its images make 32"):
        assert grids.patches_of(lens.model.config, lens.processor, batch, (((64, 64), (64, 64)),)) is None
    other = SimpleNamespace(image_processor=SimpleNamespace())
    with pytest.warns(UserWarning, match="SimpleNamespace preprocesses images in a way"):
        assert grids.patches_of(lens.model.config, other, batch, (((64, 64),),)) is None
    assert "a warning said how" in grids.explain(lens.model.config)
    assert "no image tokens" in grids.explain(build("gpt2").config)


def tower_of(side, patch=8):
    return {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "image_size": side, "patch_size": patch,
    }  # fmt: skip


def test_pixels_behind_the_last_whole_patch_are_seen_by_no_token():
    """SigLIP 384 with patches of 14 leaves 6 pixels of each tile; here 36 with patches of 8 leaves 4."""

    def change(config, process):
        config.image_grid_pinpoints = [[36, 72], [72, 36], [72, 72]]
        process.image_processor.image_grid_pinpoints = config.image_grid_pinpoints
        process.image_processor.size = transformers.image_utils.SizeDict(height=36, width=36)

    config = build("llava_onevision").config
    config.vision_config.image_size = 36
    model = transformers.LlavaOnevisionForConditionalGeneration._from_config(config).eval()
    lens = unmixed(model, change, zoo_processor("llava_onevision"))
    picture = image(144, 72, 1)
    patches = check_painting(lens, [[picture]], ("tile", "thumbnail"))
    tiles = patches.where([k == "tile" for k in patches.kind])
    assert tiles.box[3].tolist() == pytest.approx([48, 0, 64, 16])
    assert tiles.box[4].tolist() == pytest.approx([72, 0, 88, 16])  # the next tile
    before = features(lens, prepared(lens, [[picture]]))
    rows = torch.tensor([k == "tile" for k in patches.kind])
    after = features(lens, prepared(lens, [[painted(picture, (68, 0, 69, 72))]]))
    assert torch.equal(after[rows], before[rows])


def test_llava_with_a_pixtral_tower():
    tower = tower_of(64) | {"model_type": "pixtral"}
    config = build("llava").config
    config = transformers.LlavaConfig(
        vision_config=tower, text_config=config.text_config, image_token_index=zoo_processor("mistral3").image_token_id,
        vision_feature_select_strategy="full", vision_feature_layer=-1,
    )  # fmt: skip
    process = zoo_processor("mistral3")
    process.spatial_merge_size = 1
    process.image_processor.patch_size = {"height": 8, "width": 8}
    model = transformers.LlavaForConditionalGeneration._from_config(config).eval()
    lens = unmixed(model, process=process)
    patches = check_painting(lens, [[image(100, 50, 1), image(40, 72, 2)], [image(64, 64, 2)]], ("patch",))
    assert len(patches) == 8 * 4 + 5 * 8 + 64


def test_vipllava():
    base = build("llava").config
    config = transformers.VipLlavaConfig(
        vision_config=base.vision_config, text_config=base.text_config, image_token_index=base.image_token_index,
        vision_feature_layers=[-2, -1],
    )  # fmt: skip
    model = transformers.VipLlavaForConditionalGeneration._from_config(config).eval()
    check_painting(unmixed(model, process=zoo_processor("llava")), [[image(100, 50, 1)]], ("patch",))


def test_a_prompt_without_images():
    lens = unmixed("qwen2_vl")
    batch = lens.prepare(["abc", "<|image_pad|>?"], images=[[], [image(64, 32, 1)]])
    assert set(batch.patches.sample.tolist()) == {1}
    assert batch.patches.sizes == ((), ((64, 32),))
    assert len(batch.patches.sample_rows(0)) == 0


def test_mllama_has_no_image_tokens():
    model, process = build("mllama"), processor("mllama")
    lens = interp.wrap(model, process, sample=inputs("mllama"))
    batch = lens.prepare(["<|image|>ab", "<|image|>cde"], images=[[image(60, 30, 1)], [image(40, 40, 2)]])
    assert batch.image_mask is None
    assert batch.patches is None
    with pytest.raises(InputError):
        batch.span("image")
    assert "mllama" in grids.explain(model.config)
    assert "cross-attention" in grids.explain(model.config)
