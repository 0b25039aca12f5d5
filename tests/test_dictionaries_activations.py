"""Activations: what is streamed is what the model gives, and every source goes on where it was left, bit for bit."""

import os
import resource
import signal
import time

import pytest
import torch

import interp
from interp.data import PictureCorpus, corpus, scenes
from interp.dictionaries.activations import (
    ActivationStore,
    ActivationStream,
    Contexts,
    MixingBuffer,
    Prefetch,
    Rows,
    State,
    Together,
    fingerprint,
    harvest,
    statistics,
)
from interp.dictionaries.activations.manifest import Manifest
from interp.errors import FileError, InputError, NonFiniteError, SettingsError, UnknownNameError, UnsupportedError
from tests.conftest import packaged
from tests.zoo import build, processor

WORDS = "the cat saw a dog and ran home over hills to sleep on warm grass until noon".split()
# One token for each letter: lengths from 1 to 60 tokens.
TEXTS = [" ".join(WORDS[i % 7 : i % 7 + 1 + (i * 5) % 11]) for i in range(23)]


@pytest.fixture(scope="module")
def llama():
    return interp.wrap(build("llama"), processor("llama"), name="llama")


@pytest.fixture(scope="module")
def bert():
    return interp.wrap(build("bert"), processor("bert"), name="bert")


@pytest.fixture(scope="module")
def tiny():
    return interp.load("scenes")


def tokens(lens, text):
    return lens.processor(text, add_special_tokens=False)["input_ids"]


def stream(lens, reads="resid_post.1", *, seed=0, **options):
    options = {"batch": 3, "context": 16} | options
    return ActivationStream(lens, corpus(TEXTS, seed=seed), reads, **options)


def same(one, other):
    """Equal bit for bit, provenance too."""
    assert type(one) is type(other)
    assert one.values.keys() == other.values.keys()
    for name in one.values:
        assert torch.equal(one.values[name], other.values[name])
    fields = ("context", "position") if isinstance(one, Rows) else ("mask", "real", "ids", "document", "number")
    for name in fields:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None and b is None) or torch.equal(a, b), name


def places(items):
    """(context, position) of all rows."""
    rows = [x.rows() if isinstance(x, Contexts) else x for x in items]
    return [p for r in rows for p in zip(r.context.tolist(), r.position.tolist(), strict=True)]


# --- contexts: which tokens, and whose activations ------------------------------------------------------------------


def packed(ids, room, front=(), eos=None):
    """Contexts of packed documents, written plainly: all tokens in a row, cut into pieces."""
    row = [(i, n) for n, document in ids for i in ([*document, eos] if eos is not None else document) if document]
    pieces = [row[k : k + room] for k in range(0, len(row), room)]
    return [[*((f, -1) for f in front), *piece] for piece in pieces]


@pytest.mark.parametrize("special", ["none", "bos"])
@pytest.mark.parametrize("separator", ["eos", "none"])
def test_packed_contexts_hold_all_tokens_in_order(llama, special, separator):
    source = ActivationStream(
        llama,
        corpus(["", *TEXTS]),
        "embed",
        batch=3,
        context=16,
        special=special,
        separator=separator,
        drop_first=False,
    )
    front = [llama.processor.bos_token_id] if special == "bos" else []
    eos = llama.processor.eos_token_id if separator == "eos" else None
    ids = [(n, tokens(llama, t)) for n, t in enumerate(["", *TEXTS])]
    wanted = packed(ids, 16 - len(front), front, eos)
    found = []
    for item in source:
        for i in range(len(item)):
            row = item.real[i]
            found.append(list(zip(item.ids[i][row].tolist(), item.document[i][row].tolist(), strict=True)))
            usable = [t not in (*front, eos) for t, _ in found[-1]]
            assert item.mask[i][row].tolist() == usable
            assert not item.mask[i][~row].any()
    assert found == wanted
    assert int(sum(len(tokens(llama, t)) for t in TEXTS)) == sum(t not in (*front, eos) for c in found for t, _ in c)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_rows_are_those_of_each_document_alone(name, side, request):
    """One document in each context, batches padded: every row is what the model gives for its document alone."""
    lens = request.getfixturevalue(name)
    texts = [t for t in TEXTS if len(t) <= 40]
    source = ActivationStream(
        lens, corpus(texts, seed=1), ["resid_post.1", "mlp_out.0"], batch=4, context=40, packed=False, padding_side=side
    )
    widths, seen = set(), 0
    for item in source:
        widths.add(tuple(item.real.sum(1).tolist()))
        for i in range(len(item)):
            n = int(item.document[i].max())
            trace = lens.run(lens.prepare([texts[n]]), ["resid_post.1", "mlp_out.0"])
            for read in source.reads:
                alone = trace[read][0]
                torch.testing.assert_close(item.values[read][i][item.real[i]], alone, atol=1e-5, rtol=1e-4)
                mine = Contexts(
                    {read: item.values[read][i : i + 1]},
                    item.mask[i : i + 1],
                    item.real,
                    None,
                    item.document,
                    item.number,
                ).rows()
                torch.testing.assert_close(mine[read], alone[1:], atol=1e-5, rtol=1e-4)
            seen += len(alone)
    assert any(len(set(w)) > 1 for w in widths)  # some batches were padded
    assert seen == sum(map(len, texts))


def test_long_documents_go_on_in_further_contexts(llama):
    text = " ".join(WORDS)
    (item,) = ActivationStream(llama, corpus([text]), "resid_post.0", context=20, packed=False, special="bos")
    whole = tokens(llama, text)
    assert [r[m].tolist() for r, m in zip(item.ids, item.mask, strict=True)] == [
        whole[k : k + 19] for k in range(0, len(whole), 19)
    ]


def test_packed_documents_see_each_other_in_a_causal_model(llama):
    """Said in the documentation: the second document of a context looks back into the first."""
    (item,) = ActivationStream(llama, corpus(["a cat ran", "dogs sleep"]), "resid_post.1", context=64)
    second = (item.document[0] == 1) & item.mask[0]
    alone = llama.run(llama.prepare(["dogs sleep"]), "resid_post.1")["resid_post", 1][0]
    assert not torch.allclose(item["resid_post.1"][0][second], alone, atol=1e-2)
    row = llama.run(llama.prepare(input_ids=item.ids), "resid_post.1")["resid_post", 1][0]
    torch.testing.assert_close(item["resid_post.1"][0], row)


def test_special_tokens_of_the_tokenizer_stand_around_each_context():
    lens = packaged("minilm-l6")
    item = next(ActivationStream(lens, corpus(["one two three four five six"] * 3), "resid_post.2", context=8))
    cls, sep = lens.processor.cls_token_id, lens.processor.sep_token_id
    assert item.ids[:2, 0].tolist() == [cls, cls]
    assert item.ids[:2, -1].tolist() == [sep, sep]
    assert item.ids[1, 1] == sep  # the separator of the first document, carried over
    assert item.mask.int().tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 1, 1, 0],
        [0, 1, 0, 1, 1, 1, 1, 0],
    ] + [[0, 1, 1, 0, 0, 0, 0, 0]] * (len(item) - 3)


def test_unknown_tokens_are_words():
    lens = interp.load("scenes")
    item = next(
        ActivationStream(lens, corpus(["a dog xylophone cat"]), "resid_post.1", special="none", drop_first=False)
    )
    assert lens.processor.tokenizer.unk_token_id in item.ids[item.mask].tolist()
    assert int(item.mask.sum()) == 4


def test_drop_first_leaves_out_the_first_position_only(llama):
    for side in ("left", "right"):
        kept = list(stream(llama, padding_side=side, drop_first=False, packed=False))
        dropped = list(stream(llama, padding_side=side, packed=False))
        for one, other in zip(kept, dropped, strict=True):
            gone = one.mask & ~other.mask
            assert gone.sum(1).tolist() == [1] * len(one)
            assert (gone.int().argmax(1) == one.real.int().argmax(1)).all()


def test_padding_with_an_ordinary_token_is_left_out():
    model = build("llama")
    model.config.pad_token_id = 80
    lens = interp.wrap(model, processor("llama"), name="llama")
    for side in ("left", "right"):
        source = stream(lens, packed=False, padding_side=side, drop_first=False)
        found = list(source)
        assert any((x.ids[~x.real] == 80).any() for x in found)
        assert sum(int(x.mask.sum()) for x in found) == sum(len(tokens(lens, t)) for t in TEXTS)
        assert not any((x.mask & ~x.real).any() for x in found)


def test_reads_of_heads_are_flattened_and_layers_named(llama):
    source = stream(llama, ["z", "resid_post.-1", "k.0/1", "result.0/2"])
    assert (
        source.reads[:3]
        == ("z.0", "z.1", "z.2")[: len(llama.layers_with("z"))] + source.reads[len(llama.layers_with("z")) : 3]
    )
    item = next(source)
    assert {k: v.shape[-1] for k, v in item.values.items()} == source.d_in
    trace = llama.run(llama.prepare(input_ids=item.ids), ["z.1", "k.0/1", "result.0/2"])
    torch.testing.assert_close(item["z.1"], trace["z.1"].flatten(2))
    torch.testing.assert_close(item["k.0/1"], trace["k.0/1"].flatten(2))
    torch.testing.assert_close(item["result.0/2"], trace["result.0/2"].flatten(2))
    heads = llama.anatomy.towers["text"].layers[1].attention["attn"]
    assert torch.equal(item["z.1"][..., heads.d_head : 2 * heads.d_head], trace["z.1"][:, :, 1])
    last = len(llama.anatomy.towers["text"].layers) - 1
    assert f"resid_post.{last}" in source.reads


def test_the_model_stops_after_the_last_read(llama):
    calls = []
    layer = llama.model.model.layers[-1]
    source = stream(llama, ["resid_post.0", "mlp_out.0"])
    handle = layer.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        next(source)
        assert not calls
        next(stream(llama, "resid_pre.-1"))
        assert calls
    finally:
        handle.remove()


def test_encoders_of_encoder_decoders():
    lens = interp.wrap(build("t5"), processor("t5"), name="t5")
    texts = [t for t in TEXTS if len(t) <= 30]
    source = ActivationStream(lens, corpus(texts), "encoder:resid_post.1", packed=False, context=32, batch=5)
    for item in source:
        for i in range(len(item)):
            alone = lens.run(lens.prepare([texts[int(item.document[i].max())]]), "encoder:resid_post.1")
            found = item["encoder:resid_post.1"][i][item.real[i]]
            torch.testing.assert_close(found, alone["encoder:resid_post.1"][0], atol=1e-5, rtol=1e-4)


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_pictures_with_text(tiny, side):
    def make(what):
        return ActivationStream(
            tiny, corpus("scenes", n=6), "resid_post.3", batch=4, tokens=what, drop_first=False, padding_side=side
        )

    images, texts, both = (list(make(what)) for what in ("image", "text", "all"))
    special = {tiny.processor.tokenizer.bos_token_id, tiny.processor.tokenizer.eos_token_id}
    image_id = tiny.model.config.image_token_index
    for image, text, every in zip(images, texts, both, strict=True):
        assert (image.ids[image.mask] == image_id).all()
        assert image.mask.sum(1).tolist() == [64] * len(image)
        assert not (text.ids[text.mask] == image_id).any()
        assert torch.equal(image.mask | text.mask, every.mask)
        assert not {*every.ids[every.mask].tolist()} & special
        for i in range(len(every)):
            one = scenes.scene("train", int(every.document[i].max()))
            prompt = f"<image> {scenes.CAPTION_PROMPT} {scenes.caption(one.names)}"
            batch = tiny.prepare([prompt], [one.image])
            alone = tiny.run(batch, "resid_post.3")["resid_post", 3][0]
            torch.testing.assert_close(every["resid_post.3"][i][every.real[i]], alone, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(
                image["resid_post.3"][i][image.mask[i]], alone[batch.span("image")[0]], atol=2e-5, rtol=1e-4
            )


def test_vision_towers(tiny):
    (item,) = ActivationStream(tiny, corpus("scenes", n=2), "vision:resid_post.1", tokens="all")
    batch = tiny.prepare(["<image> describe"], [scenes.scene("train", 1).image])
    alone = tiny.run(batch, "vision:resid_post.1")["vision:resid_post.1"]
    torch.testing.assert_close(item["vision:resid_post.1"][1], alone[0], atol=1e-5, rtol=1e-4)
    assert item.ids is None
    assert item.mask[:, 0].tolist() == [False, False]  # the class token
    assert item.mask[:, 1:].all()
    with pytest.raises(SettingsError, match="reads no text"):
        ActivationStream(tiny, corpus("scenes", n=2), "vision:resid_post.1", tokens="text")


def test_pictures_alone(tmp_path):
    lens = interp.wrap(build("vit"), processor("vit"), name="vit")
    for i in range(3):
        scenes.scene("test", i).image.save(tmp_path / f"{i}.png")
    (item,) = ActivationStream(lens, PictureCorpus(tmp_path), "resid_post.1")
    alone = lens.run(lens.prepare(images=[scenes.scene("test", 2).image]), "resid_post.1")["resid_post", 1]
    torch.testing.assert_close(item["resid_post.1"][2], alone[0], atol=1e-5, rtol=1e-4)
    assert item.document[:, 1].tolist() == [0, 1, 2]


# --- places ---------------------------------------------------------------------------------------------------------


def sources(lens, kind, folder):
    if kind == "stream":
        return stream(lens, ["resid_post.1", "z.0"], epochs=2)
    if kind == "documents":
        return stream(lens, packed=False, epochs=2)
    if kind == "pictures":
        return ActivationStream(lens, corpus("scenes", n=9, seed=1), "resid_post.1", batch=2)
    if kind == "prefetch":
        return Prefetch(stream(lens, epochs=2), depth=2)
    if kind == "buffer":
        return MixingBuffer(stream(lens, epochs=2), rows=100, batch=17, seed=4)
    if kind == "prefetched buffer":
        return MixingBuffer(Prefetch(stream(lens, epochs=2), depth=3), rows=100, batch=17, seed=4)
    if kind == "together":
        shares = [stream(lens, rank=r, world=2, epochs=2) for r in range(2)]
        return Together([MixingBuffer(s, rows=60, batch=11, seed=i) for i, s in enumerate(shares)])
    store = folder / "store"
    if not store.exists():
        harvest(stream(lens), store, shard_tokens=70, dtype="float32")
    if kind == "rows":
        return ActivationStore(store).rows(batch=19, seed=3, epochs=2, window=2)
    return ActivationStore(store).contexts(batch=3, seed=3, epochs=2, window=2)


KINDS = ["stream", "documents", "pictures", "prefetch", "buffer", "prefetched buffer", "together", "rows", "contexts"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_goes_on_where_it_was_left(kind, llama, tiny, tmp_path):
    """At several places, through a file: the same items follow, bit for bit; taking a state changes nothing."""
    lens = tiny if kind == "pictures" else llama
    first = sources(lens, kind, tmp_path)
    states, items = [first.state()], []
    for item in first:
        items.append(item)
        states.append(first.state())
    first.close()
    assert len(items) >= 5
    for step in (0, 1, len(items) // 2, len(items) - 1, len(items)):
        states[step].save(tmp_path / "state.safetensors")
        later = sources(lens, kind, tmp_path)
        if step % 2:
            next(later)  # a source that is in use goes there as well
        later.restore(State.load(tmp_path / "state.safetensors"))
        found = list(later)
        later.close()
        assert len(found) == len(items) - step
        for one, other in zip(found, items[step:], strict=True):
            same(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_states_of_other_settings_are_refused(kind, llama, tiny, tmp_path):
    lens = tiny if kind == "pictures" else llama
    source = sources(lens, kind, tmp_path)
    next(source)
    state = source.state()
    source.close()
    other = {
        "stream": lambda: stream(lens, "resid_post.0", epochs=2),
        "documents": lambda: stream(lens, packed=False, epochs=2, seed=1),
        "pictures": lambda: ActivationStream(lens, corpus("scenes", n=8, seed=1), "resid_post.1", batch=2),
        "prefetch": lambda: Prefetch(stream(lens, epochs=2, context=17)),
        "buffer": lambda: MixingBuffer(stream(lens, epochs=2), rows=100, batch=17, seed=5),
        "prefetched buffer": lambda: MixingBuffer(
            Prefetch(stream(lens, epochs=2, drop_first=False)), rows=100, batch=17
        ),
        "together": lambda: Together([MixingBuffer(stream(lens, epochs=2), rows=60, batch=11)]),
        "rows": lambda: ActivationStore(tmp_path / "store").rows(batch=19, seed=4, epochs=2, window=2),
        "contexts": lambda: ActivationStore(tmp_path / "store").contexts(batch=3, seed=3, epochs=2, window=3),
    }[kind]()
    with pytest.raises(SettingsError, match="this state is of another source"):
        other.restore(state)
    other.close()


def test_a_state_of_another_model_or_corpus_is_refused(llama):
    state = stream(llama).state()
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.001)
    changed = interp.wrap(model, processor("llama"), name="llama")
    assert fingerprint(changed) != fingerprint(llama) == fingerprint(interp.wrap(build("llama")))
    with pytest.raises(SettingsError, match="fingerprint"):
        stream(changed).restore(state)
    with pytest.raises(SettingsError, match="corpus"):
        ActivationStream(llama, corpus([*TEXTS, "more"], seed=0), "resid_post.1", batch=3, context=16).restore(state)


def test_states_on_disk(tmp_path, llama):
    path = tmp_path / "s.safetensors"
    stream(llama).state().save(path)
    with pytest.raises(FileError, match="no such file"):
        State.load(tmp_path / "none")
    whole = path.read_bytes()
    for content in (whole[:-3] if len(whole) % 8 else whole[: len(whole) // 2], b"", b"nonsense" * 9):
        path.write_bytes(content)
        with pytest.raises(FileError, match="damaged"):
            State.load(path)


# --- every token once -----------------------------------------------------------------------------------------------


def test_buffer_hands_out_every_row_once(llama):
    wanted = {}
    for item in stream(llama):
        rows = item.rows()
        wanted |= dict(zip(places([rows]), rows["resid_post.1"], strict=True))
    for rows, batch in ((40, 7), (40, 40), (10_000, 16), (1, 1)):
        found = list(MixingBuffer(stream(llama), rows=rows, batch=batch))
        assert all(len(x) == batch for x in found[:-1])
        where = places(found)
        assert len(where) == len(set(where)) == len(wanted)
        for place, value in zip(where, torch.cat([x["resid_post.1"] for x in found]), strict=True):
            assert torch.equal(value, wanted[place])
        assert where != sorted(where)[: len(where)] or rows == 1
    one, two = (places(MixingBuffer(stream(llama), rows=100, batch=10, seed=s)) for s in (0, 1))
    assert one != two
    assert sorted(one) == sorted(two)


def test_buffer_draws_evenly():
    """From a full buffer every row is as likely as any other, in any place of the batch (chi-square)."""

    class Plain:
        d_in = {"x": 1}  # noqa: RUF012
        settings = {}  # noqa: RUF012

        def __init__(self, n):
            self.left = n

        def __next__(self):
            if not self.left:
                raise StopIteration
            rows = torch.arange(self.left)
            self.left = 0
            return Rows({"x": rows[:, None].float()}, rows, rows)

    counts = torch.zeros(20, 4)
    for seed in range(3000):
        first = next(MixingBuffer(Plain(20), rows=20, batch=4, seed=seed))
        counts[first.context, torch.arange(4)] += 1
    chi = ((counts - 150) ** 2 / 150).sum(0)
    assert (chi < 43.8).all()  # 19 degrees of freedom, p = 0.001
    assert counts.sum() == 12_000


def test_ranks_share_the_contexts(llama):
    whole = places(stream(llama))
    for world in (2, 3):
        shares = [places(stream(llama, rank=r, world=world)) for r in range(world)]
        assert sorted(p for s in shares for p in s) == sorted(whole)
        assert all(c % world == r for r, s in enumerate(shares) for c, _ in s)
    both = Together([MixingBuffer(stream(llama, rank=r, world=2), rows=50, batch=8) for r in range(2)])
    assert sorted(places(both)) == sorted(whole)
    again = Together([MixingBuffer(stream(llama, rank=r, world=2), rows=50, batch=8) for r in range(2)])
    alone = [MixingBuffer(stream(llama, rank=r, world=2), rows=50, batch=8) for r in range(2)]
    for _ in range(3):
        assert places([next(again)]) == places([next(alone[0])]) + places([next(alone[1])])


def test_epochs(llama):
    once, twice = list(stream(llama)), list(stream(llama, epochs=2))
    orders = [d for x in twice for d in dict.fromkeys(x.document[x.document >= 0].tolist())]
    assert len(places(twice)) >= 2 * len(places(once)) - 2
    assert sorted(set(orders)) == list(range(len(TEXTS)))
    forever = stream(llama, epochs=None)
    numbers = [n for _ in range(3 * len(once)) for n in next(forever).number.tolist()]
    assert numbers == list(range(len(numbers)))


# --- reading ahead --------------------------------------------------------------------------------------------------


class Fragile:
    """A stream that fails at one item, once."""

    def __init__(self, source, at, error):
        self.source, self.at, self.error, self.count = source, at, error, 0
        self.d_in, self.settings, self.state, self.restore = source.d_in, source.settings, source.state, source.restore
        self.close = source.close

    def __iter__(self):
        return self

    def __next__(self):
        self.count += 1
        if self.count == self.at:
            raise self.error
        return next(self.source)


@pytest.mark.parametrize("depth", [0, 1, 4])
@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()])
def test_errors_come_where_they_happened(llama, depth, error):
    wanted = list(stream(llama))
    source = Prefetch(Fragile(stream(llama), 4, error), depth=depth)
    found = [next(source) for _ in range(3)]
    with pytest.raises(type(error)):
        next(source)
    state = source.state()
    found += list(source)  # it is not lost: the next attempt goes on behind the last item
    for one, other in zip(found, wanted, strict=True):
        same(one, other)
    later = stream(llama)
    later.restore(state)
    same(next(later), wanted[3])
    assert source._thread is None or not source._thread.is_alive()


def test_the_state_is_that_of_what_was_handed_out(llama):
    source = Prefetch(stream(llama), depth=5)
    next(source)
    time.sleep(0.5)  # the thread is five items ahead
    plain = stream(llama)
    next(plain)
    assert source.state().values == plain.state().values
    with source.paused():
        before = source.source.state().values
        time.sleep(0.1)
        assert source.source.state().values == before
    source.close()
    source.close()
    assert source._thread is None or not source._thread.is_alive()
    buffer = MixingBuffer(stream(llama), rows=20, batch=4)
    next(buffer)
    with pytest.raises(SettingsError, match="in front of the buffer"):
        Prefetch(buffer)
    with pytest.raises(SettingsError, match="depth"):
        Prefetch(stream(llama), depth=-1)


# --- stores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("keep", ["contexts", "rows"])
def test_a_store_holds_what_was_streamed(llama, tmp_path, dtype, keep):
    wanted = list(stream(llama, ["resid_post.1", "z.0"], packed=False))
    seen = []
    store = harvest(
        stream(llama, ["resid_post.1", "z.0"], packed=False),
        tmp_path / "s",
        dtype=dtype,
        keep=keep,
        shard_tokens=90,
        progress=seen.append,
    )
    assert len(store.counts("rows")) > 2
    assert store.used == len(places(wanted)) == seen[-1]
    kind = getattr(torch, dtype)
    ordered = list(store.rows(batch=25, seed=None, dtype=None))
    assert places(ordered) == places(wanted)
    for read in store.d_in:
        rows = torch.cat([x.rows()[read] for x in wanted])
        assert torch.equal(torch.cat([x[read] for x in ordered]), rows.to(kind))
    mixed = list(store.rows(batch=25, seed=1, window=2))
    assert [len(x) for x in mixed[:-1]] == [25] * (len(mixed) - 1)
    assert places(mixed) != places(wanted)
    assert sorted(places(mixed)) == sorted(places(wanted))
    table = dict(zip(places(wanted), torch.cat([x.rows()["z.0"] for x in wanted]), strict=True))
    for place, value in zip(places(mixed), torch.cat([x["z.0"] for x in mixed]), strict=True):
        assert torch.equal(value, table[place].to(kind).float())
    if keep == "rows":
        with pytest.raises(SettingsError, match="keep='rows'"):
            store.contexts(batch=2)
        return
    number = 0
    for item in store.contexts(batch=3, seed=None, dtype=None):
        source = wanted[number // 3]
        number += len(item)
        width = item.real.shape[1]
        assert torch.equal(item.real, source.real[:, :width])
        assert torch.equal(item.mask, source.mask[:, :width])
        assert torch.equal(item.document, source.document[:, :width])
        assert torch.equal(item.ids[item.real], source.ids[source.real])
        assert torch.equal(item["z.0"][item.real], source["z.0"][source.real].to(kind))
        assert not item["z.0"][~item.real].any()
    whole = list(store.contexts(batch=3, seed=5, window=2))
    assert sorted(n for x in whole for n in x.number.tolist()) == list(range(number))
    assert sorted(places(whole)) == sorted(places(wanted))


def test_ranks_share_the_batches_of_a_store(llama, tmp_path):
    store = harvest(stream(llama), tmp_path / "s", shard_tokens=70)
    whole = list(store.rows(batch=12, seed=2, epochs=2))
    shares = [list(store.rows(batch=12, seed=2, epochs=2, rank=r, world=3)) for r in range(3)]
    for step, item in enumerate(whole):
        assert sorted(places([item])) == sorted(p for s in shares for p in places([s[step]]))
    third = store.rows(batch=12, seed=2, epochs=2, rank=1, world=3)
    alone = store.rows(batch=12, seed=2, epochs=2)
    next(alone)
    third.restore(alone.state())  # a run may go on with another number of processes
    same(next(third), shares[1][1])
    with pytest.raises(SettingsError, match="cannot be shared"):
        store.rows(batch=10, world=3)


def test_processes_harvest_side_by_side(llama, tmp_path):
    for rank in range(2):
        harvest(stream(llama, rank=rank, world=2), tmp_path / "s", shard_tokens=70)
        if rank == 0:
            with pytest.raises(FileError, match="shares of 1 processes, but 2"):
                ActivationStore(tmp_path / "s")
    store = ActivationStore(tmp_path / "s", verify=True)
    assert sorted(places(store.rows(batch=30))) == sorted(places(stream(llama)))
    assert store.used == len(places(stream(llama)))


def test_harvest_goes_on_and_grows(llama, tmp_path):
    whole = harvest(stream(llama), tmp_path / "whole", shard_tokens=64, dtype="float32")
    part = harvest(stream(llama), tmp_path / "part", shard_tokens=64, dtype="float32", tokens=128)
    assert 128 <= part.used < whole.used
    harvest(stream(llama), tmp_path / "part", shard_tokens=64, dtype="float32", tokens=100)
    assert ActivationStore(tmp_path / "part").identity == part.identity
    grown = harvest(stream(llama), tmp_path / "part", shard_tokens=64, dtype="float32")
    for one, other in zip(grown.rows(batch=50, seed=None), whole.rows(batch=50, seed=None), strict=True):
        same(one, other)
    (tmp_path / "part" / "shard-00001.safetensors").unlink()
    with pytest.raises(FileError, match="is missing"):
        ActivationStore(tmp_path / "part")
    assert harvest(stream(llama), tmp_path / "part", shard_tokens=64, dtype="float32").identity == grown.identity
    with pytest.raises(SettingsError, match=r"dtype \(there \"float32\", here \"float16\"\)"):
        harvest(stream(llama), tmp_path / "part", shard_tokens=64)
    with pytest.raises(SettingsError, match="drop_first"):
        harvest(stream(llama, drop_first=False), tmp_path / "part", shard_tokens=64, dtype="float32")
    with pytest.raises(SettingsError, match="never ends"):
        harvest(stream(llama, epochs=None), tmp_path / "never")


def in_a_child(work):
    """Do something in a forked process, and tell its number."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)  # the threads of the parent are not in the child
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def test_a_killed_harvest_goes_on(llama, tmp_path):
    def work():
        slow = {"progress": lambda used: time.sleep(0.1)}
        harvest(stream(llama), tmp_path / "s", shard_tokens=40, dtype="float32", **slow)

    kept = {}
    for finished in (1, 3, 6):
        child = in_a_child(work)
        while not (tmp_path / "s" / "manifest.json").exists() or len(Manifest.read(tmp_path / "s").pieces) < finished:
            time.sleep(0.01)
        time.sleep(0.03 * finished)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        held = Manifest.read(tmp_path / "s")
        assert not held.ended
        files = [tmp_path / "s" / p.file for p in held.pieces]
        assert kept.items() <= {f: f.stat().st_mtime_ns for f in files}.items()
        kept = {f: f.stat().st_mtime_ns for f in files}
    assert kept
    done = harvest(stream(llama), tmp_path / "s", shard_tokens=40, dtype="float32")
    assert done.identity == harvest(stream(llama), tmp_path / "whole", shard_tokens=40, dtype="float32").identity
    assert all(f.stat().st_mtime_ns == t for f, t in kept.items())


def test_a_full_disk_loses_nothing(llama, tmp_path):
    """A process that may write 64 KiB to a file stands for a full disk."""

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, 65_536))
        source = stream(llama)
        with pytest.raises(FileError, match="cannot write"):
            harvest(source, tmp_path / "s", dtype="float32")
        same(next(source), next(stream(llama)))
        buffer = MixingBuffer(source, rows=1000, batch=4)
        next(buffer)
        with pytest.raises(FileError, match="cannot write"):
            buffer.state().save(tmp_path / "s" / "state.safetensors")

    child = in_a_child(work)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["manifest.json"]
    done = harvest(stream(llama), tmp_path / "s", dtype="float32")
    assert places(done.rows(batch=50, seed=None)) == places(stream(llama))


def test_damaged_stores(llama, tmp_path):
    folder = tmp_path / "s"
    store = harvest(stream(llama), folder, shard_tokens=64)
    path = folder / "shard-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    for use in (lambda: ActivationStore(folder), lambda: harvest(stream(llama), folder, shard_tokens=64)):
        with pytest.raises(FileError, match=r"shard-00001.* bytes, the manifest says"):
            use()
    changed = bytearray(whole)
    changed[-10] ^= 1
    path.write_bytes(changed)
    ActivationStore(folder)  # sizes are right
    for use in (lambda: ActivationStore(folder, verify=True), lambda: harvest(stream(llama), folder, shard_tokens=64)):
        with pytest.raises(FileError, match=r"shard-00001.* is damaged: its sha256"):
            use()
    path.write_bytes(whole)
    assert ActivationStore(folder, verify=True).identity == store.identity
    manifest = (folder / "manifest.json").read_text()
    for text, message in (
        (manifest[:50], "not json"),
        ("{}", "no manifest"),
        (manifest.replace('"version": 1', '"version": 9'), "version 9"),
        (manifest.replace('"used"', '"usd"', 1), "damaged"),
    ):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(FileError, match=message):
            ActivationStore(folder)
    with pytest.raises(FileError, match="holds no store"):
        ActivationStore(tmp_path / "nothing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(FileError, match="is not empty"):
        harvest(stream(llama), tmp_path / "full")
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(SettingsError, match="whose weights are not those"):
        store.check_model(interp.wrap(build("qwen3"), name="m"))
    store.check_model(llama)


def test_a_shard_that_cannot_be_mapped(llama, tmp_path):
    store = harvest(stream(llama), tmp_path / "s")
    path = tmp_path / "s" / "shard-00000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(b"\xff" * len(whole))
    with pytest.raises(FileError, match="is damaged"):
        next(store.rows(batch=4))
    path.unlink()
    with pytest.raises(FileError, match="is missing"):
        next(store.rows(batch=4))


def test_float16_refuses_what_it_cannot_hold(tmp_path):
    model = build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[70:75] *= 1e8
    lens = interp.wrap(model, processor("llama"), name="large")
    texts = [processor("llama").decode([80, 81, 82, 72, 84])] * 3
    source = ActivationStream(lens, corpus(texts), "embed", packed=False)
    with pytest.raises(SettingsError, match=r"float16 cannot hold embed of context 0, position 3: .* above 65504"):
        harvest(source, tmp_path / "s")
    assert harvest(source, tmp_path / "t", dtype="bfloat16").used == 12
    first = [processor("llama").decode([72, 81, 82])]
    source = ActivationStream(lens, corpus(first), "embed", packed=False)
    assert harvest(source, tmp_path / "u", keep="rows").used == 2  # the first position is not kept


# --- statistics and bad input ---------------------------------------------------------------------------------------


def test_statistics(llama):
    source = stream(llama, ["resid_post.1", "mlp_out.0"])
    next(source)
    before = source.state().values
    found = statistics(source, rows=100)
    assert source.state().values == before
    rows, count = [], 0
    while count < 100:
        rows.append(next(source).rows())
        count += len(rows[-1])
    for read, one in found.items():
        x = torch.cat([r[read] for r in rows]).double()
        assert one.count == len(x)
        torch.testing.assert_close(one.mean, x.mean(0))
        assert one.mean_norm == pytest.approx(float(x.norm(dim=1).mean()))
        assert one.variance == pytest.approx(float(((x - x.mean(0)) ** 2).sum(1).mean()))
        assert one.scale * one.mean_norm == pytest.approx(x.shape[1] ** 0.5)
    list(source)
    with pytest.raises(InputError, match="no tokens left"):
        statistics(source)


def test_bad_input(llama, tiny):
    with pytest.raises(UnknownNameError, match="site"):
        stream(llama, "resid_pots.1")
    with pytest.raises(UnknownNameError, match="layer 40"):
        stream(llama, "resid_post.40")
    with pytest.raises(UnknownNameError, match="tower"):
        stream(llama, "vision:resid_post.0")
    with pytest.raises(SettingsError, match="positions are chosen"):
        stream(llama, "resid_post.1@last")
    with pytest.raises(SettingsError, match="no tensor"):
        stream(llama, "pattern.1")
    with pytest.raises(SettingsError, match="no tensor"):
        stream(llama, "resid_post.1|norm")
    with pytest.raises(SettingsError, match="read twice"):
        stream(llama, ["resid_post.1", "resid_post"])
    with pytest.raises(SettingsError, match="no read"):
        stream(llama, [])
    with pytest.raises(SettingsError, match="one tower"):
        ActivationStream(tiny, corpus("scenes", n=1), ["resid_post.1", "vision:resid_post.1"])
    with pytest.raises(UnknownNameError, match="tokens"):
        stream(llama, tokens="images")
    with pytest.raises(SettingsError, match="at least 2"):
        stream(llama, context=1)
    with pytest.raises(InputError, match="the model can take"):
        ActivationStream(llama, corpus(["a" * 5000]), "resid_post.1", context=4096)
    with pytest.raises(SettingsError, match="rank below world"):
        stream(llama, rank=2, world=2)
    with pytest.raises(InputError, match="text alone"):
        stream(llama, tokens="image")
    with pytest.raises(InputError, match="no usable token"):
        ActivationStream(llama, corpus(["", ""]), "resid_post.1")
    with pytest.raises(InputError, match="no usable token"):
        list(ActivationStream(llama, corpus(["a", "b"]), "resid_post.1", packed=False, epochs=None))
    with pytest.raises(InputError, match="holds an image placeholder"):
        ActivationStream(tiny, corpus(["a <image> dog"]), "resid_post.1")
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        ActivationStream(interp.wrap(build("llama"), name="bare"), corpus(TEXTS), "resid_post.1")
    with pytest.raises(UnsupportedError, match="image placeholder"):
        ActivationStream(llama, corpus("scenes", n=1), "resid_post.1")
    with pytest.raises(SettingsError, match="at most the buffer's"):
        MixingBuffer(stream(llama), rows=4, batch=5)
    with pytest.raises(SettingsError, match="same reads"):
        Together([stream(llama), stream(llama, "z.0")])


def test_infinities_are_refused(llama):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    lens = interp.wrap(build("llama"), processor("llama"), name="llama")
    lens.model.model.layers[1].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight
    with pytest.raises(NonFiniteError):
        list(stream(lens, "resid_post.1"))


def test_a_real_model():
    lens = packaged("smollm2-135m")
    texts = [
        "The capital of France is Paris, and the capital of Italy is Rome.",
        "Water is made of hydrogen and oxygen.",
    ]
    source = ActivationStream(lens, corpus(texts), ["resid_mid.4", "mlp_out.4"], packed=False, context=32)
    (item,) = source
    assert source.d_in == {"resid_mid.4": 576, "mlp_out.4": 576}
    for i, text in enumerate(texts):
        alone = lens.run(lens.prepare([text]), ["resid_mid.4", "mlp_out.4"])
        rows = item["mlp_out.4"][i][item.mask[i]]
        torch.testing.assert_close(rows, alone["mlp_out", 4][0, 1:], atol=1e-3, rtol=1e-3)
    norms = item["resid_mid.4"].norm(dim=-1)
    assert norms[:, 0].min() > 5 * norms[item.mask].median()  # the attention sink that drop_first leaves out
