"""POPE and MME by hand: parsers, questions, numbers, intervals, files."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import interp.scores
from interp.errors import FileError, InputError, NonFiniteError, SettingsError, UnknownNameError
from interp.evaluation import (
    MmeScores,
    PopeScores,
    Question,
    mme,
    parse_answer,
    parse_answer_compat,
    parse_answer_mme,
    pope,
    pope_questions,
)
from interp.evaluation.intervals import auroc
from interp.evaluation.questions import ask

# Parsers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "robust", "compat", "of_mme"),
    [
        ("Yes.", "yes", "yes", "yes"),
        ("No, there is not", "no", "no", "no"),
        ("I do not know", None, "no", None),
        ("", None, "yes", None),
        ("No\n", "no", "yes", "no"),
        ("No!", "no", "yes", "no"),
        ("Not at all", "no", "yes", "no"),
        ("there isn't one", "no", "yes", None),
        ("There isn\u2019t one", "no", "yes", None),
        ("yes", "yes", "yes", "yes"),
        ("no", "no", "no", "no"),
        ("NO", "no", "yes", "no"),
        (" Yes, there is no doubt", "yes", "no", "yes"),
        ("**Yes**", "yes", "yes", None),  # of "**Ye"
        ("The answer is no.", "no", "no", None),
        ("Answer: Yes", "yes", "yes", None),
        ("There is a dog. No cat.", "no", "yes", None),
        ("There is a dog in the image", "yes", "yes", None),
        ("I cannot see a dog", "no", "yes", None),
        ("I cannot tell", None, "yes", None),
        ("No idea", None, "no", "no"),
        ("It is unclear", None, "yes", None),
        ("yes or no", None, "no", "yes"),
        ("Maybe", None, "yes", None),
        ("a dog", None, "yes", None),
        ("I know", None, "yes", None),
        ("know it", None, "yes", "no"),  # MME: "know" holds "no"
        ("nowhere", None, "yes", "no"),
        ("eyes", None, "yes", "yes"),  # MME: "eyes" holds "yes"
    ],
)
def test_parsers(text, robust, compat, of_mme):
    assert (parse_answer(text), parse_answer_compat(text), parse_answer_mme(text)) == (robust, compat, of_mme)


def test_parsers_refuse_what_is_no_text():
    for parse in (parse_answer, parse_answer_compat, parse_answer_mme):
        with pytest.raises(InputError, match="an answer is text, found None"):
            parse(None)


# Questions ---------------------------------------------------------------------------------------------------------

SCENES = {"a": ["dog", "cat", "car"], "b": ["dog", "cat", "owl"], "c": ["dog", "tree", "cat"], "d": ["dog", "owl"]}
CLASSES = ("dog", "cat", "car", "owl", "tree", "ant", "bee", "cow")


def rows(questions):
    return [(q.image, q.object, q.answer) for q in questions]


def test_popular_by_hand():
    # Images a, b, c are used (d has two objects): dog 3, cat 3, then car, owl, tree once each, in that order.
    found = rows(pope_questions(SCENES, split="popular", per_image=2, classes=CLASSES))
    assert found == [
        *[("a", "dog", "yes"), ("a", "owl", "no"), ("a", "cat", "yes"), ("a", "tree", "no")],
        *[("b", "dog", "yes"), ("b", "car", "no"), ("b", "cat", "yes"), ("b", "tree", "no")],
        *[("c", "dog", "yes"), ("c", "car", "no"), ("c", "tree", "yes"), ("c", "owl", "no")],
    ]


def test_adversarial_by_hand():
    scenes = {"a": ["dog", "cat", "bee"], "b": ["dog", "cat", "owl"], "c": ["cow", "dog", "ant"]}
    found = rows(pope_questions(scenes, split="adversarial", per_image=2, classes=CLASSES, seed=5))
    # With a dog: cat 2, bee, owl, cow, ant 1. With a cat: dog 2, bee, owl. With a cow: dog, ant.
    assert found[:8] == [
        *[("a", "dog", "yes"), ("a", "owl", "no"), ("a", "cat", "yes")],
        *[(found[3][0], found[3][1], "no")],
        *[("b", "dog", "yes"), ("b", "bee", "no"), ("b", "cat", "yes")],
        *[(found[7][0], found[7][1], "no")],
    ]
    # The cat has no company left that is absent and not asked after: a random absent class instead.
    assert found[3][1] in {"car", "tree", "ant", "cow"}
    assert found[7][1] in {"car", "tree", "ant", "cow"}
    assert found[8][1] == "cow"
    assert found[9][1] in {"cat", "car", "owl", "tree", "bee"}
    assert found[10:] == [("c", "dog", "yes"), ("c", "cat" if found[9][1] != "cat" else "bee", "no")]


def test_random_is_uniform_over_the_absent_classes():
    scenes = {f"i{i}": ["dog", "cat", "car"] for i in range(2000)}
    found = [q.object for q in pope_questions(scenes, per_image=1, classes=CLASSES) if q.answer == "no"]
    counts = {name: found.count(name) for name in set(found)}
    assert set(counts) == set(CLASSES) - {"dog", "cat", "car"}
    assert all(abs(count - 400) < 5 * np.sqrt(2000 * 0.2 * 0.8) for count in counts.values())


def test_questions_are_seeded_and_named():
    one = pope_questions(SCENES, classes=CLASSES, seed=1)
    assert one == pope_questions(SCENES, classes=CLASSES, seed=1)
    assert one != pope_questions(SCENES, classes=CLASSES, seed=2)
    assert [q.id for q in one[:3]] == ["random-1", "random-2", "random-3"]
    assert {q.kind for q in one} == {"random"}
    assert one[0].text == "is there a dog in the image ?"
    assert {q.object for q in pope_questions({"a": {"dog", "cat", "ant"}}, classes=CLASSES) if q.answer == "yes"} == {
        *("ant", "cat", "dog")
    }
    # Without classes those of the images used are all: d has too few objects, and its own class is none of them.
    assert {q.object for q in pope_questions({**SCENES, "e": ["elk"]}, per_image=1)} <= {
        "dog",
        "cat",
        "car",
        "owl",
        "tree",
    }


@pytest.mark.parametrize(
    ("template", "name", "wanted"),
    [
        ("is there a {name} in the image ?", "owl", "is there an owl in the image ?"),
        ("Is there a {name} in the image?", "dog", "Is there a dog in the image?"),
        ("Is there an {name} in an image?", "dog", "Is there a dog in an image?"),
        ("A {name}, a b?", "ant", "An ant, a b?"),
        ("see {name} in a car?", "ant", "see ant in a car?"),
        ("a cat or a  {name}", "orange", "a cat or an  orange"),
        ("data {name}", "apple", "data apple"),
    ],
)
def test_articles_fit_and_nothing_else_changes(template, name, wanted):
    assert ask(template, name) == wanted


NAMES = [f"{c}{i}" for c, i in itertools.product("abcde", range(4))]


@given(
    scenes=st.dictionaries(
        st.integers(0, 50).map(str), st.lists(st.sampled_from(NAMES), min_size=3, max_size=8, unique=True), min_size=1
    ),
    split=st.sampled_from(["random", "popular", "adversarial"]),
    per_image=st.integers(1, 4),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_questions_hold_their_promises(scenes, split, per_image, seed):
    found = pope_questions(scenes, split=split, classes=NAMES, per_image=per_image, seed=seed)
    assert len({q.id for q in found}) == len(found)
    assert [q.answer for q in found] == ["yes", "no"] * (len(found) // 2)
    for image, group in itertools.groupby(found, key=lambda q: q.image):
        questions = list(group)
        asked = [q.object for q in questions]
        assert len(set(asked)) == len(asked)
        assert [q.object for q in questions if q.answer == "yes"] == scenes[image][:per_image]
        assert not {q.object for q in questions if q.answer == "no"} & set(scenes[image])
    assert {q.image for q in found} == set(scenes)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"split": "hard"}, UnknownNameError, "split 'hard'"),
        ({"per_image": 0}, SettingsError, "per_image and minimum are from 1"),
        ({"minimum": 0}, SettingsError, "per_image and minimum are from 1"),
        ({"template": "is it there?"}, SettingsError, "holds {name} once"),
        ({"minimum": 4}, InputError, "no image has the 4 objects.*the most are 3"),
        ({"classes": ["dog", "cat"]}, UnknownNameError, "object 'car' does not exist.*image 'a'"),
        ({"classes": ["dog", "cat", "car", "owl", "tree"]}, InputError, "image 'a' has 3 objects of 5 classes: 6"),
    ],
)
def test_bad_question_options(options, error, match):
    with pytest.raises(error, match=match):
        pope_questions(SCENES, **options)


def test_bad_questions():
    with pytest.raises(InputError, match="a collection of names"):
        pope_questions({"a": "dog"})
    with pytest.raises(InputError, match="'yes' or 'no', found 'Yes'"):
        Question("1", "a", "dog?", "Yes", "random")
    with pytest.raises(InputError, match="the text of a question is text that is not empty"):
        Question("1", "a", " ", "yes", "random")
    with pytest.raises(InputError, match="cannot be of the kind 'all'"):
        Question("1", "a", "dog?", "yes", "all")


# Scores ------------------------------------------------------------------------------------------------------------


def asked(truth="yn" * 4, kind="random", images=None):
    images = images or [str(i // 2) for i in range(len(truth))]
    return [
        Question(f"{kind}{i}", image, "is it?", "yes" if t == "y" else "no", kind)
        for i, (t, image) in enumerate(zip(truth, images, strict=True))
    ]


def answers(questions, texts):
    return {q.id: text for q, text in zip(questions, texts, strict=True)}


def test_an_all_yes_model():
    questions = asked()
    found = pope(answers(questions, ["Yes."] * 8), questions)
    assert (found.accuracy, found.precision, found.recall, found.yes_ratio) == (0.5, 0.5, 1.0, 1.0)
    assert found.f1 == pytest.approx(2 / 3)
    assert found.value("disagreement") == found.value("unparsed") == 0.0
    assert found.undefined == ()


def test_an_all_no_model_has_no_precision():
    questions = asked()
    found = pope(answers(questions, ["no"] * 8), questions)
    assert (found.accuracy, found.precision, found.recall, found.f1, found.yes_ratio) == (0.5, 0.0, 0.0, 0.0, 0.0)
    assert found.undefined == ("precision",)
    assert not found.summary().set_index("metric").loc["precision", "defined"]


def test_by_hand_with_both_parsers():
    questions = asked("yynnyn")
    texts = ["Yes.", "No, there is not", "No\n", "Yes", "I do not know", ""]
    robust = pope(answers(questions, texts), questions)
    # yes no no yes - -: right are 0 and 2; TP 1, FP 1, three objects are there.
    assert robust.predicted.tolist() == [1, 0, 0, 1, -1, -1]
    assert robust.accuracy == pytest.approx(2 / 6)
    assert (robust.precision, robust.recall) == (1 / 2, pytest.approx(1 / 3))
    assert robust.f1 == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert robust.yes_ratio == pytest.approx(2 / 6)
    assert robust.value("unparsed") == pytest.approx(2 / 6)
    assert robust.value("disagreement") == pytest.approx(3 / 6)
    compat = pope(answers(questions, texts), questions, parser="compat")
    # yes no YES yes NO YES: right is 0 alone; TP 1, FP 3.
    assert compat.predicted.tolist() == [1, 0, 1, 1, 0, 1]
    assert compat.accuracy == pytest.approx(1 / 6)
    assert (compat.precision, compat.recall, compat.yes_ratio) == (1 / 4, pytest.approx(1 / 3), pytest.approx(4 / 6))
    assert compat.value("unparsed") == 0.0
    assert compat.value("disagreement") == pytest.approx(3 / 6)
    frame = robust.frame()
    assert frame["right"].tolist() == [True, False, True, False, False, False]
    assert frame["robust"].tolist() == ["yes", "no", "no", "yes", None, None]
    assert frame["compat"].tolist() == ["yes", "no", "yes", "yes", "no", "yes"]


def test_splits_are_parts():
    one, two = asked("yn"), asked("yn", kind="adversarial")
    said = answers(one, ["yes", "no"]) | answers(two, ["yes", "yes"])
    found = pope(said, [*one, *two])
    assert found.parts == ("random", "adversarial", "all")
    assert [found.value("accuracy", part) for part in found.parts] == [1.0, 0.5, 0.75]
    assert found.accuracy == 0.75
    assert len(found.summary()) == 21
    assert [str(x) for x in found.plot(("accuracy",)).data[0].text] == [
        *("random: accuracy", "adversarial: accuracy", "all: accuracy")
    ]


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.9, 1.0]), st.booleans(), st.integers(0, 3)),
        min_size=1,
        max_size=30,
    )
)
@settings(deadline=None)
def test_auroc_is_the_share_of_pairs(items):
    score, positive, weight = (np.array(column) for column in zip(*items, strict=True))
    found, pairs = auroc(score, positive, weight[None].astype(float))
    good = total = 0.0
    for (s, p, w), (t, q, v) in itertools.product(items, items):
        if p and not q:
            total += w * v
            good += w * v * ((s > t) + 0.5 * (s == t))
    assert pairs[0] == total
    assert found[0] == pytest.approx(good / total if total else 0.5)


def test_auroc_is_scipys_mann_whitney():
    stats = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(0)
    truth, score = random.random(200) < 0.4, random.integers(0, 20, 200) / 20
    found, pairs = auroc(score, truth, np.ones((1, 200)))
    assert found[0] == pytest.approx(stats.mannwhitneyu(score[truth], score[~truth]).statistic / pairs[0])


def test_auroc_in_scores():
    questions = asked("yynn")
    chance = answers(questions, [0.9, 0.4, 0.4, 0.1])
    found = pope(answers(questions, ["yes"] * 4), questions, yes_probability=chance)
    assert found.value("auroc") == (2 + 1 + 0.5) / 4
    assert found.frame()["p_yes"].tolist() == [0.9, 0.4, 0.4, 0.1]
    alone = pope({"random0": "yes"}, asked("y"), yes_probability={"random0": 0.3})
    assert alone.value("auroc") == 0.5
    assert "auroc" in alone.undefined


def test_intervals_draw_whole_images():
    """All eight questions of an image are right or all wrong: the interval is that of two dozen images, not of 200."""
    images = [str(i // 8) for i in range(192)]
    questions = asked("yn" * 96, images=images)
    right = [int(image) % 2 == 0 for image in images]
    texts = [q.answer if ok else ("no" if q.answer == "yes" else "yes") for q, ok in zip(questions, right, strict=True)]
    found = pope(answers(questions, texts), questions, seed=2)
    row = found.summary().iloc[0]
    assert row["value"] == 0.5
    assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(24), rel=0.2)
    assert found.summary().equals(pope(answers(questions, texts), questions, seed=2).summary())
    assert not found.summary().equals(found.summary(seed=3))


def test_save_and_load(tmp_path):
    questions = asked()
    for chance in (None, answers(questions, [0.1 * i for i in range(8)])):
        found = pope(
            answers(questions, ["yes", "No\n"] * 4), questions, yes_probability=chance, settings={"model": "m"}
        )
        found.save(tmp_path / "s")
        again = interp.scores.load(tmp_path / "s")
        assert again.equals(found)
        assert again.frame().equals(found.frame())
        assert again.numbers == found.numbers
    path = tmp_path / "s" / "scores.json"
    path.write_text(path.read_text().replace("No\\n", "Yes"))
    with pytest.raises(FileError, match="damaged"):
        PopeScores.load(tmp_path / "s")


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"answers": {"random0": "yes"}}, InputError, "7 of 8 questions have no answers: 'random1'"),
        ({"extra": {"x": "yes"}}, InputError, "1 of 9 answers belong to no known questions: 'x'"),
        ({"extra": {"random0": None}}, InputError, "an answer is text, found None"),
        ({"questions": []}, InputError, "no questions were given"),
        ({"questions": [*asked(), asked()[0]]}, InputError, "two questions have the id 'random0'"),
        ({"questions": ["q"]}, InputError, "a question is a Question, found str"),
        ({"parser": "loose"}, UnknownNameError, "parser 'loose'"),
        ({"seed": -1}, SettingsError, "seed one from 0"),
        ({"yes_probability": {"random0": 0.5}}, InputError, "7 of 8 questions have no probabilities"),
        ({"p": 1.5}, InputError, "probability of question 'random3' is 1.5, outside 0 to 1"),
        ({"p": float("nan")}, NonFiniteError, "probability of question 'random3' is nan"),
    ],
)
def test_bad_answers(change, error, match):
    questions = asked()
    said = change.pop("answers", None) or answers(questions, ["yes"] * 8) | change.pop("extra", {})
    questions = change.pop("questions", questions)
    if "p" in change:
        change["yes_probability"] = answers(questions, [0.5] * 8) | {"random3": change.pop("p")}
    with pytest.raises(error, match=match):
        pope(said, questions, **change)


def test_bad_results():
    questions = tuple(asked("yn"))
    options = {"parser": "robust", "seed": 0, "resamples": 10}
    with pytest.raises(InputError, match="1 answers were given to 2 questions"):
        PopeScores(questions, ("yes",), options)
    with pytest.raises(InputError, match=r"found shape \[3\] for 2 questions"):
        PopeScores(questions, ("yes", "no"), options, torch.zeros(3))


# MME ---------------------------------------------------------------------------------------------------------------


def test_mme_by_hand(tmp_path):
    existence, count = asked("ynyn", kind="existence"), asked("yn", kind="count")
    said = answers(existence, ["Yes", "No", "yes, it is", "Yes"]) | answers(count, ["Maybe", "not"])
    found = mme(said, [*existence, *count])
    # existence: 3 of 4 right, 1 of 2 images; count: 1 of 2 right ("not" holds "no"), 0 of 1 images.
    assert found.value("accuracy", "existence") == 0.75
    assert found.value("accuracy_plus", "existence") == 0.5
    assert found.value("score", "existence") == 125.0
    assert found.value("score", "count") == 50.0
    assert found.score == 175.0
    assert found.frame()["right"].tolist() == [True, True, True, False, False, True]
    summary = found.summary().set_index(["part", "metric"])
    # Of two images one is perfect (200 points), one has 50: draws give 50, 125 or 200; one alone is itself.
    assert summary.loc[("existence", "score"), ["low", "high"]].tolist() == [50.0, 200.0]
    assert summary.loc[("count", "score"), ["low", "high"]].tolist() == [50.0, 50.0]
    found.save(tmp_path / "s")
    assert interp.scores.load(tmp_path / "s").equals(found)
    assert MmeScores.load(tmp_path / "s").numbers == found.numbers


def test_mme_is_at_most_200_and_random_is_100_or_less():
    questions = asked()
    assert mme(answers(questions, [q.answer for q in questions]), questions).score == 200.0
    assert mme(answers(questions, ["yes"] * 8), questions).score == 50.0


def test_bad_pairs():
    questions = asked("yy")
    with pytest.raises(InputError, match="image '0' of task 'random' needs one question with the answer yes and one"):
        mme(answers(questions, ["yes", "yes"]), questions)
    with pytest.raises(InputError, match="have no answers"):
        mme({"random0": "yes"}, asked("yn"))
