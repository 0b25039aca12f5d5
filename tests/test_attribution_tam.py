"""Token activation maps: by hand, against plain loops over the model's own logits, invariants, the scenes model."""

from functools import cache

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

import interp
from interp.attribution import continued, raw_attention, token_activation_map
from interp.attribution.image_grids import image_grids
from interp.attribution.token_activation_map import rank_gaussian, without_interference
from interp.data import scenes
from interp.errors import InputError, UnknownNameError, UnsupportedError
from interp.inputs import placeholder
from tests.painting import prepared
from tests.zoo import build, inputs, processor
from tests.zoo._images import image

PROMPT = f"<image> {scenes.CAPTION_PROMPT}"
TEST = list(scenes.scenes("test", 12))


@cache
def lens_of(name):
    return interp.load(name) if name == "scenes" else interp.wrap(build(name), processor(name), name=name)


def plain_filter(grid):
    """The filter window by window."""
    grid = np.asarray(grid, np.float64)
    wide, out = np.pad(grid, 1, mode="reflect"), np.zeros(grid.shape)
    for r, c in np.ndindex(grid.shape):
        window = np.sort(wide[r : r + 3, c : c + 3].ravel())
        if window.mean() > 0:
            sigma = window.std() / window.mean()
            weight = np.exp(-(np.arange(-4, 5) ** 2) / (2 * sigma**2)) if sigma > 0 else np.arange(9) == 4
            out[r, c] = (window * weight).sum() / weight.sum()
    return out


def plain_map(logits, ids, image, special, patches, p, token, eci, filter):
    """One target's row from the logits of one sample alone, written out word by word."""
    scores = np.maximum(logits[:, token], 0)
    scores[p + 1 :] = 0
    if eci:
        interference, weights = np.zeros(len(ids)), 0
        for w in range(1, p + 1):
            if image[w] or image[w - 1] or special[w] or ids[w] == token:
                continue
            word = np.maximum(logits[:, ids[w]], 0)
            word[w:] = 0
            weight = max(logits[w - 1, token], 0)
            interference, weights = interference + weight * word * image, weights + weight
        interference = interference / (weights + 1e-8)
        if (interference**2).sum() > 0:
            solved = minimize_scalar(lambda s: ((scores[image] - s * interference[image]) ** 2).sum()).x
            scores[image] = np.maximum(scores[image] - solved * interference[image], 0)
    if filter:
        for n in {(int(k), kind) for k, kind in zip(patches.image, patches.kind, strict=True)}:
            mine = patches.where([(int(k), x) == n for k, x in zip(patches.image, patches.kind, strict=True)])
            if n[1] in ("break", "whole"):
                continue
            grid = np.zeros((int(mine.row.max()) + 1, int(mine.col.max()) + 1))
            grid[mine.row, mine.col] = scores[mine.column]
            scores[mine.column] = plain_filter(grid)[mine.row, mine.col]
    return scores


def plain_maps(lens, batch, targets, eci=True, filter=True):
    """All rows of a batch of one sample without padding."""
    with torch.no_grad():
        logits = lens.model(**batch.inputs).logits[0].double().numpy()
    ids = batch.inputs["input_ids"][0].numpy()
    special = np.isin(ids, lens.processor.tokenizer.all_special_ids)
    picture = batch.image_mask[0].numpy()
    rows = []
    for p in targets:
        token = ids[p + 1] if p + 1 < len(ids) else logits[p].argmax()
        rows.append(plain_map(logits, ids, picture, special, batch.patches, p, token, eci, filter))
    return torch.tensor(np.stack(rows))


def test_the_filter_by_hand():
    """One bright place: every window that holds it has one 1 and eight 0."""
    grid = torch.zeros(5, 5)
    grid[2, 2] = 1
    sigma = np.sqrt(8 / 81) / (1 / 9)
    weight = np.exp(-(np.arange(-4, 5) ** 2) / (2 * sigma**2))
    found = rank_gaussian(grid)
    inside = torch.zeros(5, 5, dtype=torch.bool)
    inside[1:4, 1:4] = True
    assert found[inside].tolist() == pytest.approx([weight[-1] / weight.sum()] * 9)
    # At the edge the reflected window holds none: (0, 0) sees rows and columns 1, 0, 1.
    assert (found[~inside] == 0).all()


@pytest.mark.parametrize("shape", [(4, 7), (1, 6), (6, 1), (2, 2), (1, 1)])
def test_the_filter_is_a_loop_over_windows(shape):
    draw = torch.Generator().manual_seed(0)
    maps = torch.rand(3, 2, *shape, generator=draw)
    maps[1] = maps[1] * (maps[1] > 0.6)
    maps[2, 0] = 0
    expected = np.stack([[plain_filter(g) for g in row] for row in maps.numpy()])
    torch.testing.assert_close(rank_gaussian(maps).double(), torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_the_filter_leaves_a_constant_map_as_it_is():
    for value in (0.0, 0.1, 3.7, 1e-20, 1e20):
        maps = torch.full((5, 6), value)
        assert rank_gaussian(maps).equal(maps)


def test_the_closed_form_is_what_a_solver_finds():
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        m, i = torch.rand(2, 30, generator=draw, dtype=torch.float64)
        solved = minimize_scalar(lambda s, m=m, i=i: float(((m - s * i) ** 2).sum())).x
        torch.testing.assert_close(without_interference(m, i), (m - solved * i).clamp_min(0), atol=1e-6, rtol=1e-5)
    assert without_interference(m, torch.zeros(30)).equal(m)


def test_planted_interference_is_removed():
    own, others = torch.zeros(2, 16), torch.zeros(2, 16)
    own[:, 3:5], others[:, 8:12] = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), 5.0
    found = without_interference(own + 0.7 * others, others)
    torch.testing.assert_close(found, own, atol=1e-6, rtol=0)
    assert (own + 0.7 * others).argmax(1).tolist() == [8, 8]
    assert found.argmax(1).tolist() == [3, 4]


@pytest.mark.parametrize("name", ["gemma2", "cohere", "phi", "llava"])
def test_columns_of_the_head_are_those_of_all_logits(name):
    """Norm, scale, bias and soft cap included."""
    model, ids = build(name), torch.tensor([5, 80, 7, 80])
    for part, parameter in model.named_parameters():
        if part.endswith("bias"):
            parameter.data = torch.linspace(-1, 1, parameter.numel()).view_as(parameter)
    lens = interp.wrap(model, name=name)
    stream = 3 * torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = lens.anatomy.unembed.columns(stream, ids)
    torch.testing.assert_close(found, lens.unembed(stream)[..., ids])
    with torch.no_grad():
        assert lens.anatomy.unembed.columns(stream, ids[:1]).shape == (2, 3, 1)


@pytest.mark.parametrize(("eci", "filter"), [(False, False), (True, False), (False, True), (True, True)])
def test_maps_are_those_of_plain_loops(eci, filter):
    """On the scenes model, whose logits over image tokens are of many sizes and signs."""
    lens, scene = lens_of("scenes"), TEST[0]
    batch = lens.prepare([f"{PROMPT} {scenes.caption(scene.names)}"], images=[scene.image])
    first = int(batch.image_mask[0].nonzero()[-1]) + 1
    targets = list(range(first, batch.mask.shape[1]))
    found = token_activation_map(lens, batch, target=targets, eci=eci, filter=filter)
    expected = plain_maps(lens, batch, targets, eci, filter)
    torch.testing.assert_close(found.scores[0].double(), expected, atol=2e-4, rtol=1e-3)
    pictures = found.scores[0][:, batch.image_mask[0]]
    assert (pictures.amax(1) > 0).sum() >= len(targets) / 2
    assert found.unit == "logits"
    if eci:
        # Something is taken out, not all, and it matters which words do it.
        raw = token_activation_map(lens, batch, target=targets, eci=False, filter=filter).scores[0]
        assert not torch.allclose(pictures, raw[:, batch.image_mask[0]], atol=1e-2)
        assert pictures.sum() < raw[:, batch.image_mask[0]].sum()
        assert all(0 <= c <= 1 + 1e-6 for c in found.settings["interference"][0])


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_vl", "idefics3"])
def test_families_with_several_images(name):
    """Tiles with a thumbnail, row breaks, packed pictures: each grid is filtered alone."""
    lens = lens_of(name)
    token = placeholder(lens.processor)
    batch = lens.prepare([f"{token} a b {token} c d"], images=[[image(60, 30, 1), image(40, 44, 2)]])
    targets = [-4, -2, -1]
    found = token_activation_map(lens, batch, target=targets)
    length = batch.mask.shape[1]
    expected = plain_maps(lens, batch, [length + t for t in targets])
    torch.testing.assert_close(found.scores[0].double(), expected, atol=1e-5, rtol=1e-3)
    assert found.scores[0][:, batch.image_mask[0]].amax() > 0
    # A target between the images sees the first alone.
    columns = batch.image_mask[0].nonzero()[:, 0]
    gap = int(columns[columns.diff().argmax()]) + 2
    early = token_activation_map(lens, batch, target=gap)
    torch.testing.assert_close(early.scores[0].double(), plain_maps(lens, batch, [gap]), atol=1e-5, rtol=1e-3)
    assert (early.scores[0, 0, gap + 1 :] == 0).all()


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batched_is_single_and_padding_changes_nothing(name, side):
    lens = lens_of(name)
    pictures = [[image(60, 30, 1)], [image(40, 40, 2), image(32, 64, 3)], [image(44, 36, 4)]]
    together = token_activation_map(lens, prepared(lens, pictures, side), target=[-3, -2, -1])
    for i, row in enumerate(pictures):
        text = "ab " * (2 * i) + " and ".join([placeholder(lens.processor)] * len(row)) + "?"
        alone = token_activation_map(lens, lens.prepare([text], images=[row]), target=[-3, -2, -1])
        mine = together.select(i)
        torch.testing.assert_close(mine.scores, alone.scores, atol=1e-5, rtol=1e-4)
        assert mine.target_tokens == alone.target_tokens
        assert alone.scores.amax() > 0


def test_the_explained_token_is_the_one_that_follows():
    lens = lens_of("scenes")
    batch = lens.prepare([f"{PROMPT} a photo of a cow ."], images=[TEST[0].image])
    cow = batch.find("cow")
    found = token_activation_map(lens, batch, target=cow.roll(-1, 1))
    assert found.target_tokens == [["cow"]]
    token = int(batch.inputs["input_ids"][cow])
    for answer in ("cow", token):
        again = token_activation_map(lens, batch, target=cow.roll(-1, 1), answers=[answer])
        assert again.scores.equal(found.scores)
    other = token_activation_map(lens, batch, target=cow.roll(-1, 1), answers=["pig"])
    assert not other.scores.allclose(found.scores)
    last = token_activation_map(lens, batch)
    logits = lens.run(batch, "logits@last").logits
    assert last.settings["answers"] == [[lens.processor.decode([int(logits.argmax())])]]
    # The target's own column holds the logit that the model really gave.
    at = int(found.targets[0, 0])
    own = lens.run(batch, "logits").logits[0, at, token]
    torch.testing.assert_close(found.scores[0, 0, at], own.clamp_min(0), rtol=1e-4, atol=1e-4)


def test_every_generated_token_is_explained():
    """Prompts of different lengths: what `continued` makes is what writing the whole text gives."""
    lens = lens_of("scenes")
    prompts = [PROMPT, f"<image> {scenes.existence('cow')}", PROMPT]
    pictures = [s.image for s in TEST[:3]]
    batch = lens.prepare(prompts, images=pictures)
    assert batch.padding == "left"
    out = lens.generate(batch, max_new_tokens=40)
    whole, said = continued(lens, batch, out.tokens)
    counts = said.sum(1).tolist()
    assert counts[1] == 1
    assert counts[0] > 5
    found = token_activation_map(lens, whole, target=said)
    for i, (prompt, text) in enumerate(zip(prompts, out.texts, strict=True)):
        assert "".join(t.strip() for t in found.target_tokens[i]) == text.replace(" ", "")
        assert whole.texts[i].split() == f"{prompt} {text}".split()
        written = lens.prepare([f"{prompt} {text.strip()}"], images=[pictures[i]])
        alone = token_activation_map(lens, written, target=list(range(-counts[i] - 1, -1)))
        mine = found.select(i)
        assert mine.scores.shape == alone.scores.shape
        torch.testing.assert_close(mine.scores, alone.scores, atol=1e-3, rtol=1e-3)
        assert mine.target_tokens == alone.target_tokens
    single, _ = continued(lens, batch[0], out.tokens[:1])
    for word in set(out.texts[0].split()) - {"."}:
        ((_, column),) = single.find(f" {word} ", occurrence=-1).nonzero()
        assert single.tokens[0][column] == word


def test_an_answer_that_cannot_be_appended():
    lens = lens_of("scenes")
    batch = lens.prepare([PROMPT, f"{PROMPT} a photo"], images=[TEST[0].image, TEST[1].image], padding_side="right")
    words = torch.full((2, 3), 20)
    with pytest.raises(InputError, match="padding_side='left'"):
        continued(lens, batch, words)
    batch = batch[0]
    with pytest.raises(InputError, match=r"\[batch 1, new\]"):
        continued(lens, batch, words)
    end = lens.model.config.eos_token_id
    with pytest.raises(InputError, match="no sample has an answer"):
        continued(lens, batch, torch.full((1, 3), end))
    _, said = continued(lens, batch, torch.tensor([[20, end, 20]]))
    assert said.sum() == 1
    double = interp.wrap(build("t5"), processor("t5"), sample=inputs("t5"), name="t5")
    other = double.prepare(**inputs("t5"))
    with pytest.raises(UnsupportedError, match="decoder"):
        continued(double, other, words)


def test_qwen_inputs_are_continued():
    """Its token types and its own positions go on behind the answer."""
    lens = lens_of("qwen2_vl")
    batch = prepared(lens, [[image(60, 30, 1)], [image(40, 40, 2)]], "left")
    out = lens.generate(batch, max_new_tokens=4, min_new_tokens=4)
    whole, said = continued(lens, batch, out.tokens)
    logits = lens.run(whole, "logits").logits
    for i in range(2):
        columns = said[i].nonzero()[:, 0]
        assert logits[i, columns].argmax(-1).tolist() == out.tokens[i, : len(columns)].tolist()


def test_a_word_that_a_patch_speaks_is_found_at_its_pixels():
    """Layers that add nothing, and a head that reads one patch's vector as the word: the map's peak is that patch."""
    lens = interp.wrap(build("llava"), processor("llava"), name="llava")
    for name, weight in lens.model.named_parameters():
        if "language_model" in name and name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.zero_()
    picture = image(64, 64, 1)
    batch = lens.prepare(["<image> a b c"], images=[[picture]])
    head = lens.anatomy.unembed
    stream = lens.run(batch, "resid_post.2")["resid_post", 2][0]
    with torch.no_grad():
        spoken = head.norm_modules[0](stream)
    columns, word = batch.image_mask[0].nonzero()[:, 0], int(batch.inputs["input_ids"][0, -1])
    for n in (0, 6, 15):
        # What this patch has and the others have not.
        vector = spoken[columns[n]] - spoken[columns].mean(0)
        head.module.weight.data[word] = vector / vector.norm()
        found = token_activation_map(lens, batch, target=-2, filter=False)
        grid = found.image_map()
        left, top, right, bottom = batch.patches.box[n].int().tolist()
        peak = (grid == grid.max()).nonzero()
        assert peak.amin(0).tolist() == [top, left]
        assert peak.amax(0).tolist() == [bottom - 1, right - 1]


def test_what_is_wrong_is_said():
    llama, llava = lens_of("llama"), lens_of("llava")
    with pytest.raises(InputError, match="no image tokens"):
        token_activation_map(llama, llama.prepare(["a b"]))
    with pytest.raises(InputError, match="no image tokens"):
        token_activation_map(llava, llava.prepare(["a b"]))
    crossed = lens_of("mllama")
    with pytest.raises(InputError, match="through cross-attention"):
        token_activation_map(crossed, crossed.prepare(**inputs("mllama")))
    bare = llava.prepare(**inputs("llava"))
    with pytest.raises(InputError, match=r"the filter \(filter=True\) needs to know .* ready tensors"):
        token_activation_map(llava, bare)
    assert token_activation_map(llava, bare, filter=False).patches is None
    batch = prepared(llava, [[image(40, 40, 1)]])
    with pytest.raises(UnknownNameError, match="position 'middle'"):
        token_activation_map(llava, batch, target="middle")
    with pytest.raises(InputError, match="2 answers were given for 1 samples"):
        token_activation_map(llava, batch, answers=[70, 71])
    with pytest.raises(InputError, match=r"lens\.generate only"):
        token_activation_map(llava, batch, target="generated")


def test_grids_that_are_no_rectangle_are_refused():
    lens = lens_of("llava")
    patches = prepared(lens, [[image(40, 40, 1)]]).patches
    assert [tuple(g.rows.shape) for g in image_grids(patches)] == [(4, 4)]
    with pytest.raises(UnsupportedError, match="15 tokens of kind 'patch' of image 0 in sample 0 do not fill"):
        image_grids(patches.where([n != 5 for n in range(16)]))


def test_the_result_is_drawn_and_saved(tmp_path):
    lens = lens_of("scenes")
    batch = lens.prepare([f"{PROMPT} a photo of a cow ."], images=[TEST[0].image])
    found = token_activation_map(lens, batch, target=[-3, -2])
    assert found.image_map().shape == (72, 72)
    assert "token_activation_map" in found.plot(picture=TEST[0].image).layout.title.text
    assert interp.scores.load(found.save(tmp_path)).equals(found)
    # The same targets as any other method.
    assert raw_attention(lens, batch, target=[-3, -2]).targets.equal(found.targets)
