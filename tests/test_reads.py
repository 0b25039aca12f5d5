"""Read strings and position selections."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.batch import padding_side, select
from interp.errors import InputError, SettingsError, UnknownNameError, UnsupportedError
from interp.reads import NAMED_POSITIONS, Read
from interp.sites import SITES, from_transformer_lens, to_transformer_lens
from interp.trace import Trace

ints = st.lists(st.integers(-9, 40), min_size=1, max_size=4, unique=True).map(tuple)
positions = st.one_of(
    st.sampled_from(NAMED_POSITIONS),
    st.integers(-30, 30),
    ints,
    st.builds(slice, st.none() | st.integers(0, 9), st.none() | st.integers(0, 9)),
)


@st.composite
def reads(draw):
    row = SITES[draw(st.sampled_from(sorted(SITES)))]
    return Read(
        row.name,
        layers=draw(st.none() | ints) if row.per_layer else None,
        heads=draw(st.none() | ints) if row.head_axis is not None else None,
        positions=draw(positions),
        tower=draw(st.none() | st.sampled_from(["text", "vision", "encoder", "decoder", "cross"])),
        reduce=draw(st.none() | st.sampled_from(["mean", "sum", "max", "norm"])),
    )


@given(reads())
@settings(max_examples=300, deadline=None)
def test_string_form_round_trips(read):
    again = Read.of(str(read))
    assert again == read
    assert hash(again) == hash(read)
    assert str(again) == str(read)


@given(st.text(max_size=25))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_read_or_a_clear_error(text):
    try:
        read = Read.of(text)
    except (UnknownNameError, SettingsError, UnsupportedError):
        return
    assert Read.of(str(read)) == read


def test_short_forms():
    assert Read.of("z.0..2,5/1,2@last") == Read("z", layers=(0, 1, 2, 5), heads=(1, 2), positions="last")
    assert Read.of("vision:resid_post@image|mean") == Read(
        "resid_post", tower="vision", positions="image", reduce="mean"
    )
    assert Read.of("resid_pre.-1@2:5") == Read("resid_pre", layers=-1, positions=slice(2, 5))
    assert Read.of("pattern@3") != Read.of("pattern@3,")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("residpost", "resid_post"),
        ("z.3/x", "'x'"),
        ("z@lats", "last"),
        ("resid_post/1", "no head axis"),
        ("logits.3", "not per layer"),
        ("z.5..3", "empty"),
        ("z.1,1", "twice"),
        ("z|average", "mean"),
        ("", "form"),
    ],
)
def test_bad_reads_name_what_is_allowed(text, words):
    with pytest.raises((UnknownNameError, SettingsError), match=words):
        Read.of(text)


def test_unknown_fields_are_not_swallowed():
    with pytest.raises(TypeError, match="layer"):
        Read("z", layer=3)  # type: ignore[call-arg]


def test_transformer_lens_names_go_both_ways():
    for row in SITES.values():
        if row.lens_name is None:
            with pytest.raises(UnsupportedError):
                to_transformer_lens(row.name, 3)
            continue
        name = to_transformer_lens(row.name, 3 if row.per_layer else None)
        assert from_transformer_lens(name) == (row.name, 3 if row.per_layer else None)
    assert Read.of("blocks.7.attn.hook_pattern@last") == Read("pattern", layers=7, positions="last")


@pytest.mark.parametrize(
    "name", ["blocks.3.attn.hook_q", "blocks.3.attn.hook_k", "blocks.0.mlp.hook_pre", "hook_pos_embed"]
)
def test_transformer_lens_names_of_other_tensors_are_refused(name):
    with pytest.raises(UnsupportedError, match="hook"):
        Read.of(name)
    with pytest.raises(UnknownNameError, match="Known"):
        Read.of("blocks.3.hook_resid_pots")


@st.composite
def masks(draw):
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    side = draw(st.sampled_from(["left", "right"]))
    width = max(lengths) + draw(st.integers(0, 3))
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for i, n in enumerate(lengths):
        mask[i, (width - n if side == "left" else 0) : (width if side == "left" else n)] = True
    return lengths, mask


@given(masks(), st.data())
@settings(max_examples=200, deadline=None)
def test_positions_count_a_samples_own_tokens(case, data):
    lengths, mask = case
    columns = [m.nonzero()[:, 0].tolist() for m in mask]
    p = data.draw(st.integers(-8, 8))
    if all(-n <= p < n for n in lengths):
        assert select(p, mask).index[:, 0].tolist() == [c[p] for c in columns]
    else:
        with pytest.raises(InputError, match="does not exist"):
            select(p, mask)
    assert select("last", mask).index[:, 0].tolist() == [c[-1] for c in columns]
    low, high = data.draw(st.none() | st.integers(-3, 5)), data.draw(st.none() | st.integers(-3, 7))
    wanted = [c[slice(low, high)] for c in columns]
    if low is not None and low < 0 and any(n + low < 0 for n in lengths):
        return
    if all(wanted):
        found = select(slice(low, high), mask)
        assert [found.index[i][found.valid[i]].tolist() for i in range(len(columns))] == wanted
    else:
        with pytest.raises(InputError, match="nothing in sample"):
            select(slice(low, high), mask)


def test_bool_and_index_tensors():
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]).bool()
    assert select(torch.tensor([[0, -1], [0, -1]]), mask).index.tolist() == [[1, 3], [0, 3]]
    marked = torch.tensor([[0, 1, 0, 0], [0, 1, 0, 1]]).bool()
    found = select(marked, mask)
    assert found.valid.tolist() == [[True, False], [True, True]]
    assert found.index[0, 0] == 1
    assert found.index[1].tolist() == [1, 3]
    with pytest.raises(InputError, match="does not fit"):
        select(torch.zeros(3, 4, dtype=torch.bool), mask)


def test_padding_side():
    assert padding_side(torch.tensor([[1, 1], [1, 1]]).bool()) is None
    assert padding_side(torch.tensor([[0, 1], [1, 1]]).bool()) == "left"
    assert padding_side(torch.tensor([[1, 0], [1, 1]]).bool()) == "right"
    assert padding_side(torch.tensor([[0, 1], [1, 0]]).bool()) == "mixed"


def test_looking_up_is_no_search_through_all_pairs(monkeypatch):
    """Proofs and sweeps look up hundreds of reads among hundreds of others."""
    reads = [Read(site, layers=(i,)) for i in range(60) for site in ("resid_pre", "attn_out", "mlp_out")]
    trace = Trace({(r, r.layers[0]): torch.tensor(float(n)) for n, r in enumerate(reads)}, depth={"text": 60})
    compared, plain = [], Read.__eq__
    monkeypatch.setattr(Read, "__eq__", lambda a, b: (compared.append(0), plain(a, b))[1])
    assert [float(trace[r, r.layers[0]]) for r in reads] == list(range(180))
    assert len(compared) <= 2 * len(reads)
    compared.clear()
    assert float(trace["attn_out", 20]) == 61
    assert float(trace["mlp_out", -1]) == 179
    assert len(compared) <= 20 * len(reads)
