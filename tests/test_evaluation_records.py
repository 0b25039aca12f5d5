"""Files of captions, answers and questions: round trips, foreign forms, and every bad line."""

import json

import pytest

from interp.errors import FileError, InputError
from interp.evaluation import (
    Question,
    pope_questions,
    read_answers,
    read_captions,
    read_questions,
    write_answers,
    write_captions,
    write_questions,
)

QUESTIONS = pope_questions(
    {"a": ["dog", "cat", "owl"], "7": ["ant", "cat", "bee"]}, classes="dog cat owl ant bee cow elk gnu".split()
)


def lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_captions_round_trip_and_foreign_forms(tmp_path):
    captions = {1: 'a "dog"\nand\u2028a cat', "b": ""}
    write_captions(tmp_path / "c.jsonl", captions)
    assert read_captions(tmp_path / "c.jsonl", images=["b", 1]) == {"1": captions[1], "b": ""}
    (tmp_path / "c.json").write_text(json.dumps([{"image_id": 3, "caption": "x", "score": 1}]))
    assert read_captions(tmp_path / "c.json") == {"3": "x"}
    assert read_captions(lines(tmp_path / "d.jsonl", {"image_id": 3, "caption": "x"})) == {"3": "x"}
    (tmp_path / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"image": 1, "caption": "x"}\r\n')
    assert read_captions(tmp_path / "bom.jsonl") == {"1": "x"}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"image": 1, "caption": "a"}\n{"image": "1", "caption": "b"}\n', "line 2: image '1' stands there twice"),
        (
            '{"image": 1, "caption": "a"}\n{"img": 2, "caption": "b"}\n',
            "line 2: no field 'image' .or 'image_id'.; found img",
        ),
        ('{"image": 1, "text": "a"}\n', r"line 1: caption is text, found None .fields: image, text."),
        ('{"image": 1, "caption": 5}\n', "line 1: caption is text, found 5"),
        ('{"image": 1.5, "caption": "a"}\n', "line 1: image is text or a whole number, found 1.5"),
        ('{"image": true, "caption": "a"}\n', "line 1: image is text or a whole number, found True"),
        ('{"image": 1, "caption": "a"}\n\n{"image": 2, "caption": "a"}\n', "line 2: the line is empty"),
        ('{"image": 1, "caption": "a"}\n{"image": 2, "capt', "line 2: not json"),
        ("[1]\n", "line 1: a json object is needed, found list"),
        ("", "is empty; it needs at least one entry"),
    ],
)
def test_bad_lines(tmp_path, content, match):
    (tmp_path / "c.jsonl").write_text(content)
    with pytest.raises(InputError, match=match):
        read_captions(tmp_path / "c.jsonl")


def test_bad_files(tmp_path):
    with pytest.raises(FileError, match="cannot read"):
        read_captions(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=r"extension '.csv'; allowed: .jsonl and .json"):
        read_captions(tmp_path / "c.csv")
    (tmp_path / "c.jsonl").write_bytes(b"\xff")
    with pytest.raises(FileError, match="not UTF-8"):
        read_captions(tmp_path / "c.jsonl")
    (tmp_path / "c.json").write_text("[1,")
    with pytest.raises(InputError, match="not json"):
        read_captions(tmp_path / "c.json")
    (tmp_path / "c.json").write_text('"x"')
    with pytest.raises(InputError, match="a list of json objects is needed, found str"):
        read_captions(tmp_path / "c.json")
    (tmp_path / "c.json").write_text("[[]]")
    with pytest.raises(InputError, match="entry 0: a json object is needed"):
        read_captions(tmp_path / "c.json")


def test_missing_and_unknown_ids(tmp_path):
    path = lines(tmp_path / "c.jsonl", {"image": 1, "caption": "a"}, {"image": 2, "caption": "b"})
    with pytest.raises(InputError, match=r"2 of 4 images have no captions: '3', '4'. The file is .*c.jsonl"):
        read_captions(path, images=[1, 2, 3, 4])
    with pytest.raises(InputError, match=r"1 of 2 captions belong to no known images: '2'. Known: '1' .1 in all"):
        read_captions(path, images=[1])
    with pytest.raises(InputError, match="no captions"):
        write_captions(tmp_path / "x.jsonl", {})
    with pytest.raises(InputError, match="caption is text, found None"):
        write_captions(tmp_path / "x.jsonl", {1: None})
    assert not (tmp_path / "x.jsonl").exists()


def test_answers_round_trip(tmp_path):
    answers = {q.id: "No\n" for q in QUESTIONS}
    chance = {q.id: i / 12 for i, q in enumerate(QUESTIONS)}
    write_answers(tmp_path / "a.jsonl", answers)
    assert read_answers(tmp_path / "a.jsonl", questions=QUESTIONS) == (answers, None)
    write_answers(tmp_path / "a.jsonl", answers, chance)
    assert read_answers(tmp_path / "a.jsonl") == (answers, chance)
    assert read_answers(lines(tmp_path / "b.jsonl", {"question_id": 1, "answer": "x"})) == ({"1": "x"}, None)
    with pytest.raises(InputError, match="probabilities"):
        write_answers(tmp_path / "a.jsonl", answers, {"x": 0.5})
    with pytest.raises(InputError, match="1 of 1 answers belong to no known questions: '1'"):
        read_answers(tmp_path / "b.jsonl", questions=QUESTIONS)
    for bad in (1.5, "0.5", True, None):
        path = lines(tmp_path / "c.jsonl", {"id": 1, "answer": "x", "p_yes": bad})
        with pytest.raises(InputError, match="line 1: p_yes is a number from 0 to 1"):
            read_answers(path)
    path = lines(tmp_path / "c.jsonl", {"id": 1, "answer": "x", "p_yes": 0.5}, {"id": 2, "answer": "x"})
    with pytest.raises(InputError, match="line 2: no field 'p_yes', but other lines have it"):
        read_answers(path)


def test_questions_round_trip_and_popes_own_files(tmp_path):
    write_questions(tmp_path / "q.jsonl", QUESTIONS)
    assert read_questions(tmp_path / "q.jsonl") == QUESTIONS
    # The form of POPE's files: json lines under the name .json, numbered from 1 in every file.
    row = {"question_id": 1, "image": "x.jpg", "text": "Is there a dog in the image?", "label": "yes"}
    path = lines(tmp_path / "coco_pope_random.json", row, {**row, "question_id": 2, "label": "no"})
    found = read_questions(path)
    assert found[0] == Question("coco_pope_random-1", "x.jpg", row["text"], "yes", "coco_pope_random")
    assert [q.kind for q in read_questions(path, kind="random")] == ["random", "random"]
    (tmp_path / "one.json").write_text(json.dumps([row]))
    assert read_questions(tmp_path / "one.json")[0].answer == "yes"
    with pytest.raises(InputError, match=r"line 2: the question '.*-1' stands there twice"):
        read_questions(lines(tmp_path / "t.jsonl", row, row))
    with pytest.raises(InputError, match=r"line 1: the answer of question '.*' is 'yes' or 'no', found 'maybe'"):
        read_questions(lines(tmp_path / "t.jsonl", {**row, "label": "maybe"}))
    with pytest.raises(InputError, match="line 1: the text of a question"):
        read_questions(lines(tmp_path / "t.jsonl", {**row, "text": None}))
    with pytest.raises(InputError, match="no field 'image'"):
        read_questions(lines(tmp_path / "t.jsonl", {"id": 1}))
    with pytest.raises(InputError, match="no questions"):
        write_questions(tmp_path / "t.jsonl", [])
