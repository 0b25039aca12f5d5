"""Corpora: what a document is in every kind of file, the order and places in it, and what is said of bad ones."""

import itertools
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from interp.data import Document, PictureCorpus, SceneCorpus, corpus, scenes
from interp.errors import FileError, InputError, SettingsError, UnknownNameError, UnsupportedError


def texts(found, start=0, epoch=0):
    return [d.text for d in found.documents(start, epoch=epoch)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def parquet(path, rows, size):
    pyarrow.parquet.write_table(pyarrow.table({"body": rows, "n": list(range(len(rows)))}), path, row_group_size=size)
    return path


POEM = b"\xef\xbb\xbf\r\n  one\r\ntwo \r\n\r\n \t\r\nthr\xc3\xa9e\r\n\r\n\r\nfour"


def test_text_files(tmp_path):
    path = write(tmp_path / "poem.txt", POEM)
    assert texts(corpus(path)) == ["  one\r\ntwo ", "thr\u00e9e", "four"]
    assert texts(corpus(path, documents="lines")) == ["  one", "two ", "thr\u00e9e", "four"]
    (whole,) = texts(corpus(path, documents="files"))
    assert whole == POEM.decode("utf-8-sig").strip("\r\n")


def test_a_folder_in_the_order_of_paths(tmp_path):
    write(tmp_path / "b" / "two.md", "two\n\nstill two")
    write(tmp_path / "a.txt", "one")
    write(tmp_path / "c.jsonl", '{"text": "three"}\n\n{"text": "four"}\n')
    write(tmp_path / "not.bin", b"\xff")
    found = corpus(tmp_path)
    assert texts(found) == ["one", "two\n\nstill two", "three", "four"]
    assert texts(corpus(tmp_path, documents="paragraphs")) == ["one", "two", "still two", "three", "four"]
    assert found.document(2) == Document(2, "three")


def test_parquet_shuffles_row_groups_and_rows_within(tmp_path):
    rows = [f"text {i}" for i in range(25)]
    path = parquet(tmp_path / "t.parquet", [*rows[:24], None], 10)
    found = corpus(path, column="body")
    assert texts(found) == [*rows[:24], ""]
    mixed = [d.index for d in corpus(path, column="body", seed=3).documents()]
    assert sorted(mixed) == list(range(25))
    groups = [i // 10 for i in mixed]
    assert sum(a != b for a, b in itertools.pairwise(groups)) == 2
    assert mixed != sorted(mixed)


def test_order_and_places(tmp_path):
    rows = [f"{i}" for i in range(50)]
    path = write(tmp_path / "rows.txt", "\n".join(rows))
    for make in (lambda **k: corpus(rows, **k), lambda **k: corpus(path, documents="lines", **k)):
        assert texts(make()) == rows
        once, again, other = make(seed=0), make(seed=0), make(seed=1)
        assert texts(once) == texts(again) != texts(other)
        assert sorted(texts(once)) == sorted(rows) == sorted(texts(once, epoch=1))
        assert texts(once) != texts(once, epoch=1)
        assert texts(once, 17) == texts(once)[17:]
        assert texts(once, 50) == []
        assert once.identity == again.identity != other.identity
        assert json.loads(json.dumps(once.identity)) == once.identity


def test_identity_follows_the_content(tmp_path):
    path = write(tmp_path / "a.txt", "one\n\ntwo")
    before = corpus(path).identity
    copy = write(tmp_path / "elsewhere" / "b.txt", "one\n\ntwo")
    assert corpus(copy).identity == before
    write(path, "one\n\ntwx")
    assert corpus(path).identity != before
    first = corpus(parquet(tmp_path / "a.parquet", ["x", "y"], 2), column="body").identity
    assert corpus(parquet(tmp_path / "a.parquet", ["x", "z"], 2), column="body").identity != first
    assert corpus(["ab", "c"]).identity != corpus(["a", "bc"]).identity


def test_data_sets_of_the_datasets_library():
    datasets = pytest.importorskip("datasets")
    rows = [f"text {i}" for i in range(40)]
    held = datasets.Dataset.from_dict({"body": rows, "n": range(40)})
    assert texts(corpus(held, column="body")) == rows
    mixed = corpus(held, column="body", seed=2)
    assert texts(mixed) != rows
    assert sorted(texts(mixed)) == sorted(rows)
    assert texts(mixed, 11) == texts(mixed)[11:]
    stream = held.to_iterable_dataset(num_shards=4)
    for seed in (None, 5):
        found = corpus(stream, column="body", seed=seed)
        assert sorted(texts(found)) == sorted(rows)
        assert texts(found, 13) == texts(found)[13:]
        assert (texts(found) == rows) is (seed is None)
        assert (texts(found, epoch=1) == texts(found)) is (seed is None)
        with pytest.raises(UnsupportedError, match="how many"):
            len(found)
    with pytest.raises(InputError, match="no column 'text'; it has body, n"):
        corpus(held)
    with pytest.raises(InputError, match="no column 'text'"):
        corpus(stream)
    with pytest.raises(InputError, match="no text but int"):
        texts(corpus(held, column="n"))
    with pytest.raises(FileError, match=r"nobody/nothing.*cannot be opened"):
        corpus("hf:nobody/nothing")


def test_the_datasets_library_is_loaded_where_it_is_used():
    code = (
        "import sys, interp.data; interp.data.corpus(['a']); print('datasets' in sys.modules, 'pyarrow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False"] * 2


def test_pictures(tmp_path):
    for i, name in enumerate(("a.png", "sub/b.jpg")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (8, 6 + i), 100).save(tmp_path / name)
    alone = PictureCorpus(tmp_path)
    assert [(d.text, d.images[0].size, d.images[0].mode) for d in alone.documents()] == [
        (None, (8, 6), "RGB"),
        (None, (8, 7), "RGB"),
    ]
    path = write(tmp_path / "p.jsonl", '{"text": "what?", "image": "sub/b.jpg"}\n{"text": "and?", "image": "a.png"}\n')
    asked = corpus(path, images=tmp_path)
    assert [(d.text, d.images[0].size) for d in asked.documents()] == [("what?", (8, 7)), ("and?", (8, 6))]
    assert asked.identity != alone.identity
    write(tmp_path / "q.jsonl", '{"text": "what?"}\n')
    with pytest.raises(InputError, match="prompt 0 has no image"):
        corpus(tmp_path / "q.jsonl", images=tmp_path)
    write(tmp_path / "a.png", b"no picture")
    with pytest.raises(FileError, match=r"a\.png cannot be read as a picture"):
        alone.document(0)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="holds no picture"):
        PictureCorpus(tmp_path / "none")
    with pytest.raises(FileError, match="no folder"):
        PictureCorpus(tmp_path / "absent")


def test_scenes():
    found = corpus("scenes", split="test", n=3, seed=1)
    assert isinstance(found, SceneCorpus)
    drawn = list(found.documents())
    assert sorted(d.index for d in drawn) == [0, 1, 2]
    one = scenes.scene("test", drawn[0].index)
    assert drawn[0].text == f"{scenes.CAPTION_PROMPT} {scenes.caption(one.names)}"
    assert drawn[0].images[0].tobytes() == one.image.tobytes()
    with pytest.raises(UnknownNameError, match="split"):
        SceneCorpus("tset")
    with pytest.raises(SettingsError, match="at least 1"):
        corpus("scenes", n=0)


@pytest.mark.parametrize(
    ("name", "content", "options", "kind", "message"),
    [
        ("a.txt", "", {}, InputError, "is empty"),
        ("a.txt", " \n\n\t\n", {}, InputError, "is empty"),
        ("a.jsonl", "\n", {}, InputError, "is empty"),
        ("a.txt", "x", {"column": "text"}, SettingsError, "has no columns"),
        ("a.txt", "x", {"documents": "words"}, UnknownNameError, "'words'"),
        ("a.txt", "x", {"split": "train"}, SettingsError, "split cannot be chosen for files"),
        ("a.txt", "x", {"seed": -1}, SettingsError, "seed"),
        ("a.jsonl", '{"text": "x"}', {"documents": "lines"}, SettingsError, "for text files"),
        ("a.jsonl", '{"body": "x"}', {}, InputError, "row 1: there is no column 'text'; it has body"),
        ("a.jsonl", "[1]", {}, InputError, "a json object was expected"),
        ("a.jsonl", '{"text": 3}', {}, InputError, "text is no text but int"),
        ("a.jsonl", '{"text": ', {}, InputError, "row 1: it is not json"),
        ("a.parquet", "no parquet", {}, FileError, "cannot be read as parquet"),
    ],
)
def test_bad_files(tmp_path, name, content, options, kind, message):
    with pytest.raises(kind, match=message):
        corpus(write(tmp_path / name, content), **options)


def test_bad_sources(tmp_path):
    with pytest.raises(FileError, match="there is no corpus at"):
        corpus(tmp_path / "none.txt")
    with pytest.raises(InputError, match="holds no corpus"):
        corpus(tmp_path)
    with pytest.raises(InputError, match="empty list"):
        corpus([])
    with pytest.raises(InputError, match="document 1 is a int"):
        corpus(["a", 3])
    with pytest.raises(InputError, match="cannot be made from a float"):
        corpus(3.0)
    with pytest.raises(SettingsError, match="made already"):
        corpus(corpus(["a"]), seed=1)
    with pytest.raises(InputError, match="no column 'text'; it has body, n"):
        corpus(parquet(tmp_path / "a.parquet", ["x"], 1))
    bad = corpus(write(tmp_path / "latin.txt", b"good\n\nb\xe9d"))
    with pytest.raises(FileError, match=r"latin\.txt, byte 7: 0xe9 is not UTF-8"):
        texts(bad)
    short = corpus(write(tmp_path / "short.txt", "one\n\ntwo"))
    write(tmp_path / "short.txt", "one")
    with pytest.raises(FileError, match="became shorter"):
        texts(short)
