"""The labelled scenes: exact annotations, counterfactuals that change one thing, seeds, planted company."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from interp.data import scenes
from interp.errors import InputError, SettingsError, UnknownNameError

MANY = [scenes.scene("train", index) for index in range(400)]


def test_the_catalogue_is_what_was_promised():
    assert len(scenes.NAMES) >= 32
    assert len(scenes.CATEGORIES) >= 4
    assert all(name.isalpha() and name.islower() for name in scenes.NAMES)
    assert set(scenes.CATEGORY.values()) == set(scenes.CATEGORIES)
    assert sorted(name for members in scenes.THEMES.values() for name in members) == sorted(scenes.NAMES)
    assert all(scenes.PARTNER[other] == name for name, other in scenes.PARTNER.items())


def test_the_mask_is_what_differs_from_the_background():
    for scene in MANY[:100]:
        differs = (scene.pixels != scene.background).any(-1)
        masks = np.stack([scene.mask(name) for name in scene.names])
        assert masks.sum(0).max() <= 1, "two objects claim a pixel"
        np.testing.assert_array_equal(differs, masks.any(0))
        for placed in scene.objects:
            if len(scene.objects) == 1:
                rows, columns = np.flatnonzero(differs.any(1)), np.flatnonzero(differs.any(0))
                assert placed.box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


def test_each_object_keeps_its_size_and_most_of_it_is_seen():
    for scene in MANY:
        for placed in scene.objects:
            left, top, right, bottom = placed.box
            assert 0 <= left < right <= scenes.SIDE
            assert 0 <= top < bottom <= scenes.SIDE
            assert placed.size - 2 <= max(right - left, bottom - top) <= placed.size
            assert scene.mask(placed.name).sum() >= 0.88 * placed.outline.sum()


def test_a_scene_without_an_object_differs_only_inside_its_mask():
    for scene in MANY[:100]:
        for name in scene.names:
            other = scene.without(name)
            changed = (other.pixels != scene.pixels).any(-1)
            outline = scene.object(name).outline
            assert not (changed & ~outline).any()
            assert changed.sum() >= 0.95 * scene.mask(name).sum(), "the object must be gone"
            assert name not in other.names
            assert set(other.names) | {name} == set(scene.names)
            assert other.id != scene.id


@given(index=st.integers(0, 10_000), new=st.sampled_from(scenes.NAMES))
@settings(max_examples=60, deadline=None)
def test_a_swap_differs_only_inside_the_two_outlines(index, new):
    scene = scenes.scene("validation", index)
    if new in scene.names:
        return
    old = scene.names[0]
    other = scene.swapped(old, new)
    changed = (other.pixels != scene.pixels).any(-1)
    assert not (changed & ~(scene.object(old).outline | other.object(new).outline)).any()
    assert changed.any()
    kept = set(scene.objects) & set(other.objects)
    assert len(kept) == len(scene.objects) - 1
    assert other.object(new).size == scene.object(old).size


def test_the_same_seed_gives_the_same_picture_and_splits_share_none():
    again = scenes.scene("train", 7)
    np.testing.assert_array_equal(again.pixels, MANY[7].pixels)
    assert again.objects == MANY[7].objects
    pictures = {
        (split, seed): scenes.scene(split, 7, seed=seed).pixels.tobytes() for split in scenes.SPLITS for seed in (0, 1)
    }
    assert len(set(pictures.values())) == 6
    assert [s.id for s in scenes.scenes("test", 2, start=5)] == ["test-00005", "test-00006"]
    assert len({s.background.tobytes() for split in scenes.SPLITS for s in scenes.scenes(split, 100)}) == 300


def test_company_is_planted_and_sometimes_broken():
    alone = together = 0
    for scene in MANY:
        present = set(scene.names)
        for name in present & scenes.PARTNER.keys():
            if len(present) > 1:
                together += scenes.PARTNER[name] in present
                alone += scenes.PARTNER[name] not in present
    assert 0.6 < together / (together + alone) < 0.95
    counts = Counter(name for scene in MANY for name in scene.names)
    assert counts["cow"] > 2 * counts["bed"], "some objects are popular"


def test_captions_name_the_objects_in_reading_order():
    blank = MANY[0]
    row = [scenes.Placed("dog", 12, 40, 2), scenes.Placed("cow", 12, 2, 3)]  # middles in the first row of nine pixels
    below = scenes.Placed("car", 14, 20, 40)
    scene = scenes.Scene("x", "red", blank.background, blank.noise, (below, *row))
    assert [(o.box[1] + o.box[3]) // 2 // scenes.ROW for o in scene.objects] == [4, 0, 0]
    assert scene.names == ("cow", "dog", "car")
    assert scene.caption == scenes.caption(scene.names) == "a photo of a cow , a dog and a car ."
    assert scenes.caption(["dog"]) == "a photo of a dog ."
    assert scenes.caption([]) == "a photo of nothing ."
    assert scenes.caption(["owl", "cat"]) == "a photo of an owl and a cat ."


def test_questions_are_answered_by_the_scene():
    scene = scenes.compose(["dog", "car"], colour="blue", size=14, seed=1)
    assert scenes.exists(scene, "dog").answer == "yes"
    assert scenes.exists(scene, "cat") == scenes.SceneQuestion("is there a cat in the image ?", "no", "existence")
    assert scenes.count(scene).answer == "two"
    assert scenes.colour(scene).answer == "blue"
    left = min(scene.objects, key=lambda o: o.box[0] + o.box[2]).name
    for question in scenes.positions(scene, apart=0):
        assert question.answer == ("yes" if question.text.startswith(f"is the {left} ") else "no")


def test_the_dataset_holds_the_truth():
    table = scenes.dataset("test", 12)
    assert len(table) == 12
    for row, scene in zip(table, scenes.scenes("test", 12), strict=True):
        np.testing.assert_array_equal(np.asarray(row["image"]), scene.pixels)
        np.testing.assert_array_equal(np.asarray(row["background"]), scene.background)
        assert row["image_id"] == scene.id
        assert row["caption"] == scenes.caption(scene.names)
        assert [o["name"] for o in row["objects"]] == list(scene.names)
        for item in row["objects"]:
            placed = scene.object(item["name"])
            assert tuple(item["box"]) == placed.box
            assert (item["category"], item["size"]) == (placed.category, placed.size)
            np.testing.assert_array_equal(np.asarray(item["mask"]) > 0, scene.mask(placed.name))


def test_what_cannot_be_is_refused():
    scene = MANY[0]
    absent = next(n for n in scenes.NAMES if n not in scene.names)
    with pytest.raises(UnknownNameError, match="unicorn"):
        scenes.compose(["unicorn"])
    with pytest.raises(UnknownNameError, match=rf"{absent}.*{scene.id}"):
        scene.mask(absent)
    with pytest.raises(UnknownNameError, match="unicorn"):
        scene.swapped(scene.names[0], "unicorn")
    with pytest.raises(InputError, match="already"):
        scene.swapped(scene.names[0], scene.names[-1])
    with pytest.raises(UnknownNameError, match=r"testing.*test"):
        scenes.scene("testing", 0)
    with pytest.raises(SettingsError, match="-1"):
        scenes.scene("test", -1)
    with pytest.raises(SettingsError, match="0"):
        scenes.dataset("test", 0)
    with pytest.raises(UnknownNameError, match="mauve"):
        scenes.compose(["dog"], colour="mauve")
    with pytest.raises(SettingsError, match="200"):
        scenes.compose(["dog"], size=200)
    with pytest.raises(InputError, match="No room"):
        scenes.compose(list(scenes.NAMES), size=40)
    with pytest.raises(InputError, match="twice"):
        scenes.compose(["dog", "dog"])
    with pytest.raises(InputError, match="reaches out"):
        scenes.Scene("x", "red", scene.background, scene.noise, (scenes.Placed("dog", 20, 70, 0),))
    with pytest.raises(InputError, match="uint8"):
        scenes.Scene("x", "red", scene.background[:10], scene.noise, ())


def test_the_sprites_come_with_their_licence():
    from importlib.resources import files

    folder = files("interp.data.scenes") / "sprites"
    names = sorted(entry.name for entry in folder.iterdir())
    assert names == sorted([*(f"{name}.png" for name in scenes.NAMES), "LICENSE.txt"])
    assert "SIL OPEN FONT LICENSE" in (folder / "LICENSE.txt").read_text()
    for name in scenes.NAMES:
        with (folder / f"{name}.png").open("rb") as file:
            assert max(Image.open(file).size) == 40
