import json
from collections import Counter

import pytest
import torch

from interp.data import Prompt, indirect_objects, read_prompts, repeated_tokens
from interp.errors import FileError, InputError, SettingsError


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_jsonl(tmp_path):
    write(tmp_path / "cat.png", "x")
    rows = [
        {"text": "When Mary", "answer": " Mary", "wrong": " John", "kind": "ioi", "n": 3, "ok": True},
        {"text": " caf\u00e9\u2028\n", "image": "cat.png", "answer": None},
    ]
    path = write(tmp_path / "p.jsonl", "\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n")
    first, second = read_prompts(path)
    assert first == Prompt("When Mary", " Mary", " John", None, {"kind": "ioi", "n": "3", "ok": "true"})
    assert second == Prompt(" caf\u00e9\u2028\n", image=tmp_path / "cat.png")


def test_csv_keeps_white_space_and_reads_quotes_and_a_byte_order_mark(tmp_path):
    content = '\ufefftext,answer,wrong,kind\r\n"Hi, ""Mary""\nand", Mary,,\r\nTwo, x, y,b\r\n\r\n'
    first, second = read_prompts(write(tmp_path / "p.csv", content))
    assert first == Prompt('Hi, "Mary"\nand', " Mary", None, None, {"kind": ""})
    assert second == Prompt("Two", " x", " y", None, {"kind": "b"})


GOOD = '{"text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GOOD + '{"text": "a", "anwser": " b"}', r"line 2: the field 'anwser'.*did you mean 'answer'\?"),
        ("a.jsonl", '{"text": "a", "Text": "b"}', "line 1: the field 'Text'.*did you mean 'text'"),
        ("a.jsonl", '{"text": "a", "img": "b"}', "did you mean 'image'"),
        ("a.jsonl", '{"text": "a", "wrongs": "b"}', "did you mean 'wrong'"),
        ("a.jsonl", GOOD + GOOD + '{"prompt": "a"}', "line 3: no field 'text'; found 'prompt'.*known: text"),
        ("a.jsonl", '{"text": "a", "text": "b"}', "line 1: the field 'text' stands there twice"),
        ("a.jsonl", '{"text": "a", "x": {"y": 1, "y": 2}}', "line 1: the field 'y' stands there twice"),
        ("a.jsonl", GOOD + '{"text": "a"', "line 2: not json: .* at column 13"),
        ("a.jsonl", '["a"]', r"line 1: a json object.*found \[\"a\"\]"),
        ("a.jsonl", GOOD + "\n" + GOOD, "line 2: the line is empty"),
        ("a.jsonl", '{"text": ""}', "line 1: text is empty"),
        ("a.jsonl", '{"text": " \\n"}', "line 1: text is empty, or nothing but white space"),
        ("a.jsonl", '{"text": 3}', "line 1: text is text in quotes, found 3"),
        ("a.jsonl", '{"text": "\\ud800"}', "line 1: text holds half of a surrogate"),
        ("a.jsonl", '{"text": "a", "answer": ""}', "line 1: answer is empty"),
        ("a.jsonl", '{"text": "a", "answer": " b", "wrong": " b"}', "line 1: answer and wrong are the same: ' b'"),
        ("a.jsonl", '{"text": "a", "kind": ["b"]}', "line 1: label 'kind'.*found"),
        ("a.jsonl", '{"text": "a", "image": 3}', "line 1: image is a path"),
        ("a.jsonl", '{"text": "a", " ": "b"}', "a field has no name"),
        ("a.jsonl", "", "holds no prompts"),
        ("a.jsonl", "\n \n", "holds no prompts"),
        ("a.csv", "", "holds no prompts"),
        ("a.csv", "text\n", "holds no prompts"),
        ("a.csv", "text,text\na,b\n", "line 1: the field 'text' stands there twice"),
        ("a.csv", 'text,kind\n"a\nb",c\nd\n', r"line 4: 1 cells, but the header has 2 \(text, kind\)"),
        ("a.csv", "text\na\n\nb\n", "line 3: 0 cells"),
        ("a.csv", "text,answr\na,b\n", "line 2: the field 'answr'.*did you mean 'answer'"),
        ("a.csv", "kind,answer\na,b\n", "line 2: no field 'text'"),
        ("a.csv", "text,kind\n,b\n", "line 2: text is empty"),
        ("a.csv", 'text\n"a\n', "not csv"),
        ("a.txt", "a", r"extension '\.txt'; allowed: \.jsonl and \.csv"),
        ("a", "a", "no extension; allowed"),
    ],
)
def test_bad_files_name_the_file_the_line_and_the_remedy(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileError, match=r"a\.jsonl, line 2: byte 0xe9 is not UTF-8"):
        read_prompts(write(tmp_path / "a.jsonl", GOOD.encode() + b'{"text": "caf\xe9"}'))
    with pytest.raises(FileError, match="No such file"):
        read_prompts(tmp_path / "none.jsonl")
    for name in ("folder", "folder.jsonl"):
        (tmp_path / name).mkdir()
        with pytest.raises(FileError, match=r"folder|directory"):
            read_prompts(tmp_path / name)
    with pytest.raises(FileError, match=r"line 1: there is no image file .*cat\.png"):
        read_prompts(write(tmp_path / "b.jsonl", '{"text": "a", "image": "cat.png"}'))


def test_names_that_are_merely_alike_stay_labels(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a", "context": "b", "test": "c", "target": "d"}')
    assert read_prompts(path)[0].labels == {"context": "b", "test": "c", "target": "d"}


@pytest.mark.parametrize("n", [1, 2, 7, 44, 500])
def test_indirect_objects_are_balanced_and_consistent(n):
    prompts = indirect_objects(n, seed=1)
    assert len(prompts) == n == len({p.text for p in prompts})
    orders = Counter(p.labels["order"] for p in prompts)
    assert abs(orders["ABBA"] - orders["BABA"]) <= n % 2
    templates = Counter(p.labels["template"] for p in prompts)
    assert max(templates.values()) - min(templates.values() if len(templates) == 11 else [0]) <= 2
    for prompt in prompts:
        io_name, subject = prompt.labels["io"], prompt.labels["subject"]
        assert (prompt.answer, prompt.wrong) == (f" {io_name}", f" {subject}")
        assert prompt.text.count(io_name) == 1
        assert prompt.text.count(subject) == 2
        answer_first = prompt.text.index(io_name) < prompt.text.index(subject)
        assert answer_first == (prompt.labels["order"] == "ABBA")
        assert prompt.text.endswith(" to")
        assert "{" not in prompt.text


def test_generators_repeat_by_seed_and_leave_global_state_alone():
    import random

    random.seed(0)
    torch.manual_seed(0)
    before = random.getstate(), torch.get_rng_state()
    assert indirect_objects(20, seed=3) == indirect_objects(20, seed=3)
    assert indirect_objects(20, seed=3) != indirect_objects(20, seed=4)
    ids = repeated_tokens(3, 5, vocab_size=50, seed=3)
    assert torch.equal(ids, repeated_tokens(3, 5, vocab_size=50, seed=3))
    assert not torch.equal(ids, repeated_tokens(3, 5, vocab_size=50, seed=4))
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_repeated_tokens():
    ids = repeated_tokens(4, 6, vocab_size=9, bos_id=2)
    assert ids.dtype == torch.int64
    assert ids.shape == (4, 13)
    assert (ids[:, 0] == 2).all()
    assert torch.equal(ids[:, 1:7], ids[:, 7:])
    assert all(len(set(row.tolist())) == 6 for row in ids[:, 1:7])
    assert 2 not in ids[:, 1:]
    assert ids.max() <= 8
    assert set(repeated_tokens(2, 3, allowed_ids=[5, 7, 11, 7]).flatten().tolist()) == {5, 7, 11}


@pytest.mark.parametrize(
    "options",
    [{}, {"vocab_size": 9, "allowed_ids": [1]}, {"vocab_size": 4}, {"allowed_ids": [1, 1, 1, 1, 1]}],
)
def test_repeated_tokens_refuses_bad_sources(options):
    with pytest.raises(SettingsError):
        repeated_tokens(2, 5, **options)


def test_counts_are_checked():
    for n in (0, -1, 100_001):
        with pytest.raises(SettingsError, match="between 1 and"):
            indirect_objects(n)
    with pytest.raises(SettingsError, match="at least 1"):
        repeated_tokens(0, 5, vocab_size=9)
