"""CHAIR by hand, its intervals, its files, and annotations in COCO's format."""

import json
import math

import numpy as np
import pytest

import interp.scores
from interp.errors import FileError, InputError, SettingsError, UnknownNameError
from interp.evaluation import ChairScores, Vocabulary, chair, coco_classes, coco_files, coco_objects, pieces

COCO = Vocabulary.coco()
CAPTIONS = {
    1: "A puppy and a dog chase a cat; the cat runs.",  # dog, dog, cat, cat: the cats are not there
    "2": "Nothing to see.",  # no mention
    3: "A hot dog on the toilet seat.",  # hot dog, toilet: both there
}
OBJECTS = {1: ["dog", "person"], 2: {"car"}, 3: ("hot dog", "toilet", "dog")}


def scored(**options):
    return chair(CAPTIONS, OBJECTS, vocabulary=COCO, **options)


def test_by_hand():
    found = scored()
    assert found.ids == ("1", "2", "3")
    # Mentions: dog dog cat cat | none | hot dog, toilet. Objects: 2 + 1 + 3; mentioned of them: dog | none | two.
    assert found.counts[:, :4].tolist() == [[4, 2, 2, 1], [0, 0, 1, 0], [2, 0, 3, 2]]
    assert found.chair_i == 2 / 6
    assert found.chair_s == 1 / 3
    assert found.recall == 3 / 6
    assert found.length == (11 + 3 + 7) / 3
    assert found.repetition == 0.0
    assert found.undefined == ()
    frame = found.frame().set_index("id")
    assert frame.loc["1", "mentioned"] == ["dog", "dog", "cat", "cat"]
    assert frame.loc["1", "hallucinated"] == ["cat", "cat"]
    assert frame.loc["1", "missed"] == ["person"]
    assert frame.loc["1", "chair_i"] == 0.5
    assert frame.loc["2", "chair_i"] == 0.0
    assert frame.loc["3", "missed"] == ["dog"]


def test_mentions_are_pooled_not_averaged():
    captions = {"a": "a dog", "b": "a cat, a cat and a cat"}
    found = chair(captions, {"a": ["dog"], "b": ["dog"]}, vocabulary=COCO)
    assert found.chair_i == 3 / 4  # the mean over captions would be 1/2
    assert found.recall == 1 / 2


def test_repetition_is_of_runs_of_four_words():
    found = chair({"a": "a b c d a b c d a", "b": "one two"}, {"a": [], "b": []}, vocabulary=COCO)
    # Six runs in the first caption: abcd bcda cdab dabc abcd bcda; four are different. None in the second.
    assert found.repetition == pytest.approx(2 / 6)


def test_nothing_to_divide_by_is_zero_and_said_so():
    found = chair({"a": "nothing here", "b": ""}, {"a": [], "b": []}, vocabulary=COCO)
    assert (found.chair_i, found.chair_s, found.recall, found.length) == (0.0, 0.0, 0.0, 1.0)
    assert found.undefined == ("chair_i", "recall", "repetition")
    summary = found.summary().set_index("metric")
    assert not summary.loc["chair_i", "defined"]
    assert summary.loc["chair_s", "defined"]
    assert "nothing to divide by" in found._repr_html_()
    assert "nothing to divide by" not in scored()._repr_html_()


def test_intervals_are_seeded_cover_the_value_and_narrow_with_more_images():
    captions = {i: "a dog and a cat" * (i % 3) for i in range(37)}

    def made(seed):
        return chair(captions, {i: ["dog"] for i in captions}, vocabulary=COCO, seed=seed)

    one = made(3).summary()
    assert one.equals(made(3).summary())
    assert not one.equals(made(4).summary())
    assert ((one["low"] <= one["value"]) & (one["value"] <= one["high"])).all()
    assert one.equals(made(0).summary(seed=3))

    def width(n):
        captions = {i: "a cat" if i % 4 == 0 else "a dog" for i in range(n)}
        row = chair(captions, {i: ["dog"] for i in range(n)}, vocabulary=COCO).summary().iloc[0]
        assert row["value"] == 0.25
        return row["high"] - row["low"]

    # The standard error of a share of 1/4 in n independent images, two-sided 95 %.
    for n in (100, 400):
        assert width(n) == pytest.approx(2 * 1.96 * math.sqrt(0.25 * 0.75 / n), rel=0.15)
    alone = chair({1: "a dog"}, {1: ["dog"]}, vocabulary=COCO).summary()
    assert alone[["low", "high"]].isna().all(axis=None)


def test_intervals_resample_images_not_mentions():
    """One image holds all wrong mentions: whether it is drawn decides everything."""
    captions = {"a": "cat cat cat cat", **{f"b{i}": "dog" for i in range(3)}}
    found = chair(captions, {i: ["dog"] for i in captions}, vocabulary=COCO, resamples=2000)
    row = found.summary().iloc[0]
    assert (row["low"], row["high"]) == (0.0, pytest.approx(12 / 13))  # drawn not at all, and three times of four
    assert row["value"] == 4 / 7


def test_settings_hold_the_vocabulary_and_the_callers():
    found = scored(settings={"model": "m", "prompt": "p"})
    assert found.settings == {
        **{"model": "m", "prompt": "p", "vocabulary": "coco", "vocabulary_sha256": COCO.hash},
        **{"seed": 0, "resamples": 1000},
    }
    with pytest.raises(InputError, match="settings hold 'seed'"):
        scored(settings={"seed": 1})
    with pytest.raises(SettingsError, match="json cannot hold"):
        scored(settings={"x": object()})


def test_save_and_load(tmp_path):
    found = scored(settings={"model": "m"})
    found.save(tmp_path / "s")
    for again in (ChairScores.load(tmp_path / "s"), interp.scores.load(tmp_path / "s")):
        assert again.equals(found)
        assert again.frame().equals(found.frame())
        assert again.summary().equals(found.summary())
    assert not found.equals(scored(settings={"model": "n"}))
    path = tmp_path / "s" / "scores.json"
    path.write_text(path.read_text().replace("the cat runs", "the dog runs"))
    path.write_text(
        path.read_text().replace('"cat",\n          "cat",\n          40', '"dog",\n          "dog",\n          40')
    )
    changed = json.loads(path.read_text())
    changed["fields"]["mentions"][0] = changed["fields"]["mentions"][0][:1]
    path.write_text(json.dumps(changed))
    with pytest.raises(FileError, match="damaged"):
        ChairScores.load(tmp_path / "s")


def test_it_shows_itself():
    found = chair({"<i>": "a <b>cat</b> & a dog"}, {"<i>": ["dog"]}, vocabulary=COCO, settings={"model": "<m>"})
    assert "chair_i 0.5" in repr(found)
    page = found._repr_html_()
    assert "<b>cat" not in page
    assert "&lt;b&gt;" in page
    assert "&lt;m&gt;" in page
    assert "&lt;i&gt;" in page
    marked = found.marked("<i>")
    assert marked.count("title='not in the image'>cat<") == 1
    assert marked.count("title='in the image'>dog<") == 1
    with pytest.raises(UnknownNameError, match="image 'x'"):
        found.marked("x")
    figure = scored().plot()
    assert [str(text) for text in figure.data[0].text] == ["chair_i", "chair_s", "recall", "repetition"]
    assert list(scored().plot(("length",)).data[0].x) == [7.0]
    with pytest.raises(UnknownNameError, match="metric 'chairi'"):
        scored().plot(("chairi",))
    with pytest.raises(UnknownNameError, match="metric 'x'"):
        scored().value("x")
    with pytest.raises(UnknownNameError, match="part 'x'"):
        scored().value("recall", "x")


def test_pieces_make_up_the_caption():
    text = "A dog, a hot dog."
    found = pieces(text, COCO.mentions(text), ["dog"])
    assert [tuple(piece) for piece in found] == [
        *[("A ", ""), ("dog", "right"), (", a ", ""), ("hot dog", "wrong"), (".", "")],
    ]


@pytest.mark.parametrize(
    ("captions", "objects", "error", "match"),
    [
        ({1: "a"}, {2: []}, InputError, "1 of 1 captions belong to no known annotated images: '1'"),
        ({1: "a"}, {1: [], 2: []}, InputError, "1 of 2 annotated images have no captions: '2'.*subset=True"),
        ({}, {1: []}, InputError, "no captions were given"),
        ({1: "a", "1": "b"}, {1: []}, InputError, "the same as text"),
        ({1: None}, {1: []}, InputError, "a caption is text, found None"),
        ({1.5: "a"}, {1: []}, InputError, "text or a whole number, found 1.5"),
        (["a"], {1: []}, InputError, "mapping from ids, found list"),
        ({1: "a"}, {1: "dog"}, InputError, "image '1' are a collection of names, found 'dog'"),
        (
            {1: "a"},
            {1: ["unicorn"]},
            UnknownNameError,
            "object 'unicorn' does not exist in the classes, asked for image",
        ),
        ({1: "a"}, {1: ["puppy"]}, UnknownNameError, "object 'puppy'"),  # a synonym is no class
    ],
)
def test_bad_input(captions, objects, error, match):
    with pytest.raises(error, match=match):
        chair(captions, objects, vocabulary=COCO)


@pytest.mark.parametrize("options", [{"seed": -1}, {"resamples": 0}, {"seed": True}, {"resamples": 1.5}])
def test_bad_options(options):
    with pytest.raises(SettingsError, match="resamples is a whole number from 1"):
        scored(**options)
    with pytest.raises(SettingsError, match="confidence lies between 0 and 1"):
        scored().summary(1.0)


def test_a_subset_is_asked_for():
    found = chair({1: "a dog"}, {1: ["dog"], 2: ["cat"]}, vocabulary=COCO, subset=True)
    assert found.recall == 1.0


# COCO's format -----------------------------------------------------------------------------------------------------

INSTANCES = {
    "images": [{"id": 9, "file_name": "nine.jpg"}, {"id": 4, "file_name": "four.jpg"}, {"id": 5, "file_name": "e.jpg"}],
    "categories": [{"id": 18, "name": "dog"}, {"id": 64, "name": "potted plant"}, {"id": 72, "name": "TV"}],
    "annotations": [
        {"id": 1, "image_id": 9, "category_id": 64},
        {"id": 2, "image_id": 9, "category_id": 18},
        {"id": 3, "image_id": 9, "category_id": 64},
        {"id": 4, "image_id": 4, "category_id": 72},
    ],
}
REFERENCES = {
    "annotations": [
        {"id": 7, "image_id": 9, "caption": "A puppy beside a man."},
        {"id": 8, "image_id": 4, "caption": "A screen."},
    ]
}


def files(tmp_path, instances=INSTANCES, references=REFERENCES):
    paths = tmp_path / "instances.json", tmp_path / "captions.json"
    for path, content in zip(paths, (instances, references), strict=True):
        path.write_text(json.dumps(content))
    return paths


def test_coco_truth_is_instances_and_captions(tmp_path):
    instances, references = files(tmp_path)
    assert coco_objects(instances) == {"9": ("potted plant", "dog"), "4": ("tv",), "5": ()}
    whole = coco_objects(instances, references)
    assert whole == {"9": ("potted plant", "dog", "person"), "4": ("tv",), "5": ()}
    assert coco_objects([instances, instances], references, images=[4]) == {"4": ("tv",)}
    assert coco_files(instances) == {"9": "nine.jpg", "4": "four.jpg", "5": "e.jpg"}
    assert coco_classes(instances) == ("dog", "potted plant", "TV")
    found = chair({9: "a dog and a man", 4: "a TV", 5: "x"}, whole, vocabulary=COCO)
    assert (found.chair_i, found.recall) == (0.0, 3 / 4)
    only = chair({9: "a dog and a man", 4: "a TV", 5: "x"}, coco_objects(instances), vocabulary=COCO)
    assert only.chair_i == pytest.approx(1 / 3)  # without the captions the man is not known to be there


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda i, r: i["images"].pop(1), InputError, "annotation 4 is of image 4, which the file does not list"),
        (lambda i, r: i["categories"].pop(), InputError, "annotation 4 has category 72, which is not listed"),
        (lambda i, r: i["categories"][0].update(name="dgo"), UnknownNameError, "object 'dgo'.*Did you mean 'dog'"),
        (lambda i, r: i.pop("images"), FileError, "not in COCO's format"),
        (lambda i, r: i["annotations"][2].pop("image_id"), FileError, "entry 2 of annotations has no 'image_id'"),
        (lambda i, r: r["annotations"][1].update(image_id=77), InputError, "caption 8 is of image 77"),
        (lambda i, r: r["annotations"][1].update(caption=None), InputError, "a caption is text"),
        (lambda i, r: r["annotations"].append(3), FileError, "entry 2 of annotations"),
    ],
)
def test_bad_annotations(tmp_path, change, error, match):
    instances, references = (json.loads(json.dumps(x)) for x in (INSTANCES, REFERENCES))
    change(instances, references)
    with pytest.raises(error, match=match):
        coco_objects(*files(tmp_path, instances, references))


def test_missing_annotation_files_and_images(tmp_path):
    instances, _ = files(tmp_path)
    with pytest.raises(FileError, match="cannot read"):
        coco_objects(tmp_path / "none.json")
    with pytest.raises(InputError, match="no annotation file"):
        coco_objects([])
    with pytest.raises(InputError, match="image 12 "):
        coco_objects(instances, images=[9, 12])


def test_a_large_set_is_scored_in_vectors():
    """5,000 captions with their intervals: no loop over resamples."""
    import time

    n = 5000
    captions = {i: "a dog and a cat" if i % 3 else "a cat" for i in range(n)}
    start = time.process_time()
    found = chair(captions, {i: ["dog"] for i in range(n)}, vocabulary=COCO)
    row = found.summary().iloc[0]
    assert time.process_time() - start < 20
    assert row["value"] == pytest.approx(np.mean([1 if i % 3 == 0 else 0.5 for i in range(n)]), abs=0.2)
