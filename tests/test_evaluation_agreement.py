"""Rank correlation against scipy, agreement by hand and against the textbook formula, what is undefined and unseen."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

import interp
from interp.attribution import blank_out, raw_attention, rollout
from interp.errors import InputError, SettingsError, UnknownNameError
from interp.evaluation import Agreement, agreement, joined, rank_correlation
from interp.evaluation.ranks import average_ranks, spearman
from interp.tokens import TokenScores
from tests import zoo

NAN = math.nan
TOKENS = [["<s>", " a", " b", " c", " d"], ["<pad>", "<s>", " e", " f", " g"]]
MASK = torch.tensor([[True] * 5, [False, True, True, True, True]])
SPECIAL = torch.tensor([[True, False, False, False, False], [False, True, False, False, False]])


def make(rows, name="one", **changes):
    """Scores of one target, the last token of each sample."""
    given = {"scores": torch.tensor(rows)[:, None], "targets": torch.full((2, 1), 4), "source_mask": MASK}
    given |= {"tokens": TOKENS, "target_tokens": [[" d"], [" g"]], "name": name, "settings": {"model": "tiny"}}
    return TokenScores(**(given | {"spans": {"text": MASK, "special": SPECIAL}} | changes))


ONE = [[9.0, 1.0, 2.0, 3.0, 4.0], [NAN, 9.0, 1.0, 2.0, 3.0]]
OTHER = [[-9.0, 1.0, 2.0, 4.0, 3.0], [NAN, -9.0, 5.0, 5.0, 7.0]]

# Ranks -------------------------------------------------------------------------------------------------------------

numbers = st.lists(st.sampled_from([-1.5, -0.0, 0.0, 1.0, 2.0, 1e30]), min_size=2, max_size=12)


@settings(max_examples=200, deadline=None)
@given(numbers, st.data())
def test_ranks_and_their_correlation_are_scipy_s(one, data):
    other = data.draw(st.lists(st.integers(0, 3).map(float), min_size=len(one), max_size=len(one)))
    a, b = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    assert average_ranks(a).tolist() == rankdata(one).tolist()
    found = rank_correlation(a, b)
    if len(set(one)) == 1 or len(set(other)) == 1:
        assert found.isnan()
        assert math.isnan(spearman(a.numpy(), b.numpy()))
        return
    assert float(found) == pytest.approx(spearmanr(one, other).statistic, abs=1e-12)
    assert spearman(a.numpy(), b.numpy()) == float(found)


def test_what_lies_outside_the_mask_does_not_matter():
    draw = torch.Generator().manual_seed(0)
    one, other = torch.randint(0, 4, (2, 50, 9), generator=draw).double()
    mask = torch.rand(50, 9, generator=draw) < 0.7
    found = rank_correlation(one, other, mask)
    assert (average_ranks(one, mask)[~mask] == 0).all()
    for i in range(50):
        a, b = one[i, mask[i]], other[i, mask[i]]
        if len(a) < 2 or len(a.unique()) == 1 or len(b.unique()) == 1:
            assert found[i].isnan()
        else:
            assert float(found[i]) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    poison = one.masked_fill(~mask, 1e9)
    torch.testing.assert_close(rank_correlation(poison, other, mask), found, rtol=0, atol=0, equal_nan=True)
    assert rank_correlation(one, other, torch.zeros_like(mask)).isnan().all()


def test_the_paper_s_code_is_wrong_where_there_are_ties():
    """Dense ranks in the formula for values without ties give a number even for a constant row."""
    one, other = np.array([1.0, 1, 1, 1]), np.array([1.0, 2, 3, 4])
    dense = [rankdata(x, method="dense") for x in (one, other)]
    assert 1 - 6 * ((dense[0] - dense[1]) ** 2).sum() / (4 * 15) == pytest.approx(-0.4)
    assert math.isnan(spearman(one, other))


# By hand -----------------------------------------------------------------------------------------------------------


def test_by_hand():
    """Sample 0: ranks 1 2 3 4 against 1 2 4 3 give 1 - 6 * 2 / 60 = .8; sample 1: 1 2 3 against 1.5 1.5 3."""
    found = agreement(make(ONE), make(OTHER, "other"))
    assert found.counts.tolist() == [[[4], [3]]]
    assert found.values.flatten().tolist() == pytest.approx([0.8, math.sqrt(3) / 2])
    assert found.value("spearman") == pytest.approx((0.8 + math.sqrt(3) / 2) / 2)
    assert (found.parts, found.other) == (("one",), "other")
    frame = found.frame()
    assert list(frame.columns) == ["method", "layer", "sample", "target", "sources", "spearman"]
    assert frame["sources"].tolist() == [4, 3]
    with_special = agreement(make(ONE), make(OTHER, "other"), skip_special=False)
    assert with_special.values[0, 0, 0] == pytest.approx(spearmanr(ONE[0], OTHER[0]).statistic)
    assert with_special.values[0, 1, 0] == pytest.approx(spearmanr(ONE[1][1:], OTHER[1][1:]).statistic)
    some = agreement(make(ONE), make(OTHER), sources=torch.tensor([[False, False, True, True, True]] * 2))
    assert some.values.flatten().tolist() == pytest.approx([0.5, math.sqrt(3) / 2])


def test_sizes():
    signed = make([[9.0, -4.0, 1.0, 2.0, -3.0], [NAN, 0.0, -3.0, 2.0, 1.0]])
    other = make([[9.0, 4.0, 1.0, 2.0, 3.0], [NAN, 0.0, 3.0, 2.0, 1.0]])
    assert agreement(signed, other, sizes=True).values.flatten().tolist() == pytest.approx([1, 1])
    assert agreement(signed, other).values.flatten().tolist() == pytest.approx([-0.8, -0.5])


def test_a_constant_row_has_no_correlation_and_is_counted():
    flat = make([[9.0, 1.0, 2.0, 3.0, 4.0], [NAN, 9.0, 2.0, 2.0, 2.0]])
    found = agreement({"flat": flat, "one": make(ONE)}, make(OTHER, "other"))
    assert found.values[0].isnan().flatten().tolist() == [False, True]
    rows = found.summary().set_index("method")
    assert rows.loc["flat", ["rows", "undefined"]].tolist() == [2, 1]
    assert rows.loc["one", "undefined"] == 0
    assert rows.loc["flat", "value"] == pytest.approx(0.8)  # the mean of the others
    assert rows.loc["flat", "std"] == 0
    none = agreement(make([[0.0] * 5, [NAN] + [0.0] * 4]), make(OTHER))
    assert math.isnan(none.value("spearman"))
    assert none.undefined == ("spearman",)
    assert math.isnan(none.summary().loc[0, "p"])
    few = agreement(make(ONE), make(OTHER), sources=torch.tensor([[False, True, False, False, False]] * 2))
    assert few.values.isnan().all()
    assert found._repr_html_()


def test_sources_behind_the_target_do_not_count_where_no_method_sees_them():
    """Two targets: zeros behind the first would be ties that both methods share."""
    causal = torch.tensor([[[0.1, 0.5, 0.4, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4, 0.5]]] * 2)
    causal[1, 0] = torch.tensor([NAN, 0.2, 0.8, 0.0, 0.0])
    changes = {"targets": torch.tensor([[2, 4], [2, 4]]), "target_tokens": [[" b", " d"], [" e", " g"]], "spans": {}}
    one = make(ONE, scores=causal, **changes)
    two = make(ONE, "two", scores=causal.flip(-1).tril(2) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), **changes)
    two = replace(two, scores=torch.where(causal == 0, 0.0, two.scores))
    found = agreement(one, two)
    assert found.counts.tolist() == [[[3, 5], [2, 4]]]
    expected = spearmanr(causal[0, 0, :3], two.scores[0, 0, :3]).statistic
    assert found.values[0, 0, 0] == pytest.approx(expected)
    # Where one of the methods looks ahead, all sources count.
    seeing = replace(two, scores=two.scores + 0.01)
    assert agreement(one, seeing).counts.tolist() == [[[5, 5], [4, 4]]]


def test_fillers_are_left_out():
    changes = {"targets": torch.tensor([[3, 4], [4, -1]]), "target_tokens": [[" c", " d"], [" g", ""]]}
    rows = torch.rand(2, 2, 2, 5, generator=torch.Generator().manual_seed(0))
    one, two = (make(ONE, name, scores=rows[i], **changes) for i, name in enumerate(("one", "two")))
    found = agreement(one, two)
    assert found.counts.tolist() == [[[4, 4], [3, 0]]]
    assert found.values[0, 1].isnan().tolist() == [False, True]
    assert len(found.frame()) == 3
    assert found.summary().loc[0, "rows"] == 3
    assert found.value("spearman") == pytest.approx(float(found.values[0, 0].mean() + found.values[0, 1, 0]) / 2)


# Null, intervals, layers -------------------------------------------------------------------------------------------


def random_scores(seed, size=60, width=12, name="one", noise=None):
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, 1, width, generator=draw)
    rows = rows if noise is None else noise + rows
    mask = torch.arange(width) < torch.randint(5, width + 1, (size, 1), generator=torch.Generator().manual_seed(9))
    tokens = [[str(i) for i in range(width)]] * size
    targets = mask.sum(1, keepdim=True) - 1
    return TokenScores(rows, targets, mask, tokens, [["x"]] * size, name)


def test_chance_and_the_interval():
    """Unrelated scores lie within the null, whose width is that of theory; related ones far outside it."""
    other = random_scores(0, name="other")
    related = random_scores(1, noise=other.scores.nan_to_num(0))
    found = agreement({"unrelated": random_scores(2), "related": related}, other, shuffles=400)
    rows = found.summary().set_index("method")
    assert rows.loc["unrelated", "p"] > 0.02
    assert rows.loc["related", "p"] == pytest.approx(1 / 401)
    assert rows.loc["related", "low"] > rows.loc["related", "null_high"] + 0.2
    # The mean of rho under the null has the variance sum 1 / (n - 1) / samples^2.
    counts = found.counts[0, :, 0].double()
    expected = float((1 / (counts - 1)).sum().sqrt() / len(counts))
    null = found.null[1].double().mean(0)
    assert float(null.std()) == pytest.approx(expected, rel=0.12)
    assert abs(float(null.mean())) < 4 * expected / 20
    spread = found.per_sample[1].std(correction=0)
    half = (rows.loc["related", "high"] - rows.loc["related", "low"]) / 2
    assert half == pytest.approx(1.96 * float(spread) / 60**0.5, rel=0.15)
    assert rows.loc["related", "std"] == pytest.approx(float(spread))
    assert agreement(related, other).summary()["null_low"].notna().all()
    without = agreement(related, other, shuffles=0).summary().iloc[0]
    assert without[["null_low", "null_high", "p"]].isna().all()


def test_a_shuffle_moves_only_what_counts():
    """With two sources there are two orders: every sample's null is -1 or 1, half of the time each."""
    some = torch.tensor([[False, False, True, True, False]] * 2)
    null = agreement(make(ONE), make([*OTHER[:1], [NAN, 0.0, 1.0, 3.0, 2.0]]), sources=some, shuffles=400).null
    torch.testing.assert_close(null.abs(), torch.ones_like(null))
    assert (null.mean(-1).abs() < 0.2).all()


def test_layers_and_methods():
    other = random_scores(0, name="other")
    many = {("one", n): random_scores(n + 1) for n in range(3)} | {("two", n): random_scores(n + 7) for n in range(3)}
    found = agreement(many, other)
    assert found.parts[:2] == ("one, layer 0", "one, layer 1")
    frame = found.summary()
    assert frame["method"].tolist() == ["one"] * 3 + ["two"] * 3
    assert frame["layer"].tolist() == [0, 1, 2] * 2
    figure = found.plot()
    lines = [t for t in figure.data if t.name]
    assert [t.name for t in lines] == ["one", "two"]
    assert lines[1].y.tolist() == frame["value"].tolist()[3:]
    assert lines[1].customdata[:, 0].tolist() == frame["low"].tolist()[3:]
    by_layer = agreement({n: random_scores(n + 1, name="one") for n in range(3)}, other)
    assert by_layer.parts == found.parts[:3]
    torch.testing.assert_close(by_layer.values, found.values[:3])
    bars = agreement({"a": random_scores(1), "b": random_scores(2)}, other).plot()
    assert len(bars.data[0].x) == 2


def test_files_and_joining(tmp_path):
    found = agreement({("<b>", 1): make(ONE), "two": make(OTHER)}, make(OTHER, "other"))
    found.save(tmp_path / "x")
    assert Agreement.load(tmp_path / "x").equals(found)
    assert interp.scores.load(tmp_path / "x").equals(found)
    assert found.layers == (1, None)
    assert "<b>" not in found._repr_html_().replace("<b>agreement with", "")
    assert "agreement with other · tiny · 2 samples" in repr(found)
    one, two = (random_scores(s, size=20, name="other") for s in (0, 1))
    parts = [agreement(random_scores(s + 5, size=20), other) for s, other in enumerate((one, two))]
    both = joined(parts)
    assert len(both) == 40
    torch.testing.assert_close(both.values, torch.cat([p.values for p in parts], 1), equal_nan=True)
    assert both.value("spearman") == pytest.approx(sum(p.value("spearman") for p in parts) / 2)
    wide = Agreement(("one",), (None,), "other", torch.zeros(1, 2, 3), torch.ones(1, 2, 3).long(),
                     torch.zeros(1, 2, 200), parts[0].settings)  # fmt: skip
    mixed = joined([parts[0], wide])
    assert mixed.values.shape == (1, 22, 3)
    assert mixed.counts[0, 0].tolist()[1:] == [0, 0]
    with pytest.raises(InputError, match="shape of null"):
        joined([parts[0], agreement(random_scores(6, size=20), two, shuffles=3)])


def test_what_is_wrong_is_said():
    one, other = make(ONE), make(OTHER, "other")
    with pytest.raises(InputError, match="no scores were given"):
        agreement({}, other)
    with pytest.raises(InputError, match="'x' is a Tensor"):
        agreement({"x": one.scores}, other)
    with pytest.raises(InputError, match=r"another batch .* column 2 of sample 0 is ' z' in one, ' b' in the other"):
        agreement(make(ONE, tokens=[["<s>", " a", " z", " c", " d"], TOKENS[1]]), other)
    with pytest.raises(InputError, match="other targets than the other scores"):
        agreement(make(ONE, targets=torch.tensor([[4], [3]])), other)
    with pytest.raises(InputError, match="sources in tower 'vision', the other scores in 'text'"):
        agreement(make(ONE, tower="vision"), other)
    with pytest.raises(InputError, match="explain tower 'decoder'"):
        agreement(make(ONE, target_tower="decoder"), other)
    with pytest.raises(UnknownNameError, match="kind of sources 'words'"):
        agreement(one, other, sources="words")
    with pytest.raises(InputError, match="no 'image' tokens"):
        agreement(one, other, sources="image")
    with pytest.raises(SettingsError, match="shuffles is a whole number from 0, found -1"):
        agreement(one, other, shuffles=-1)
    with pytest.raises(SettingsError, match="resamples"):
        agreement(one, other, resamples=0)
    values = torch.zeros(1, 2, 1)
    with pytest.raises(InputError, match="outside -1 and 1"):
        Agreement(("a",), (None,), "b", values + 2, torch.ones(1, 2, 1).long(), torch.zeros(1, 2, 0))
    with pytest.raises(InputError, match="1 scores have 2 names"):
        Agreement(("a", "b"), (None,), "b", values, torch.ones(1, 2, 1).long(), torch.zeros(1, 2, 0))


# With methods ------------------------------------------------------------------------------------------------------


def test_methods_by_layer_on_a_padded_batch_equal_a_loop():
    """Batched is single, and each correlation is scipy's over the sample's own tokens."""
    name = "llama"
    lens = interp.wrap(zoo.build(name), zoo.processor(name), name=name)
    rows = [list(range(70, 78)), list(range(90, 95))]
    batch = lens.prepare(input_ids=rows, padding_side="left")
    other = blank_out(lens, batch, target=[3, 4], answers=[100, 101])
    layers = range(len(lens.anatomy.towers["text"].layers))
    many = {("raw", n): raw_attention(lens, batch, target=[3, 4], layer=n) for n in layers}
    many |= {("rollout", n): rollout(lens, batch, target=[3, 4], layers=n) for n in layers}
    found = agreement(many, other)
    assert found.counts[0].tolist() == [[4, 5], [4, 5]]
    for k, scores in enumerate(many.values()):
        for i in range(2):
            for t, end in enumerate((4, 5)):
                mine, theirs = (s.select(i).scores[0, t, :end] for s in (scores, other))
                expected = spearmanr(mine, theirs).statistic
                assert found.values[k, i, t] == pytest.approx(expected, abs=1e-9)
    alone = lens.prepare(input_ids=rows[1:])
    one = agreement(rollout(lens, alone, target=[3, 4]), blank_out(lens, alone, target=[3, 4], answers=[101]))
    torch.testing.assert_close(one.values[0, 0], found.values[-1, 1])
