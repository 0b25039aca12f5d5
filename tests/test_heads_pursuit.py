"""Head Pursuit: the pursuit against its plain form, planted truth, moments in a stream, floors, keywords, bad input."""

import inspect

import pytest
import torch

import interp
from interp import heads
from interp.data import indirect_objects
from interp.errors import EditError, InputError, NonFiniteError, SettingsError, UnknownNameError, UnsupportedError
from interp.heads.concepts import atoms_of, span_basis, token_texts
from interp.heads.matching_pursuit import Dictionary, matching_pursuit
from interp.heads.moments import HeadReader, head_weight, heads_by_layer
from interp.heads.random_lists import random_lists
from interp.heads.resampled import shares
from tests.zoo import build, inputs, processor

IDS = [[70, 80, 90, 100, 110, 75], [71, 81, 91, 101], [72, 82, 92, 102, 112], [73, 83], [74, 84, 99, 105]]
WORDS = ["a", "b", "7", "x"]
DECODERS = ["llama", "gpt2", "gemma2", "granite", "cohere", "olmo2", "gpt_neox", "opt", "gpt_oss", "mixtral"]


@pytest.fixture(scope="module", params=DECODERS)
def lens(request):
    return interp.wrap(build(request.param), processor(request.param), name=request.param)


@pytest.fixture(scope="module")
def llama():
    return interp.wrap(build("llama"), processor("llama"), name="llama")


def plain_pursuit(written, atoms, k):
    """The published loop: the whole matrix, all scores, least squares over all taken atoms at each step."""
    residual, taken, explained = written.clone(), [], []
    coefficients = None
    for _ in range(k):
        score = (atoms @ residual.T).abs().sum(1)
        score[taken] = -1
        taken.append(int(score.argmax()))
        coefficients = torch.linalg.lstsq(atoms[taken].T, written.T).solution.T
        residual = written - coefficients @ atoms[taken]
        explained.append(1 - float(residual.square().sum() / written.square().sum()))
    return taken, torch.tensor(explained, dtype=torch.float64), coefficients


def problem(seed):
    """A head with a steep spectrum and a dictionary whose rows share a direction, as real ones do."""
    g = torch.Generator().manual_seed(seed)
    n, p, d, v = [(60, 8, 24, 300), (200, 16, 64, 1500), (5, 8, 24, 300), (90, 12, 40, 800)][seed % 4]
    outputs = torch.randn(n, p, generator=g, dtype=torch.float64) * torch.logspace(0, -1.5, p)
    weight = torch.randn(p, d, generator=g, dtype=torch.float64)
    atoms = torch.randn(v, d, generator=g, dtype=torch.float64) + torch.randn(d, generator=g, dtype=torch.float64)
    atoms = atoms * torch.rand(v, 1, generator=g, dtype=torch.float64).add(0.3)
    return outputs - outputs.mean(0), weight, atoms, min(n, p) - 1


@pytest.mark.parametrize("normalize", [False, True])
def test_the_same_atoms_as_the_published_loop(normalize):
    for seed in range(20):
        outputs, weight, atoms, k = problem(seed)
        found = matching_pursuit(outputs, weight, Dictionary.of(atoms, normalize=normalize), k)
        used = atoms / atoms.norm(dim=1, keepdim=True) if normalize else atoms
        taken, explained, coefficients = plain_pursuit(outputs @ weight, used, k)
        assert found.atoms.tolist() == taken, seed
        torch.testing.assert_close(found.explained, explained, atol=1e-10, rtol=0)
        torch.testing.assert_close(found.coefficients, coefficients, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_inexact_float32_products_change_nothing(precision):
    """Where torch may use TF32 or bfloat16, the margins are wider and more is scored in float64."""
    outputs, weight, atoms, k = problem(1)
    before = torch.get_float32_matmul_precision()
    exact = matching_pursuit(outputs, weight, Dictionary.of(atoms, normalize=False), k)
    try:
        torch.set_float32_matmul_precision(precision)
        found = matching_pursuit(outputs, weight, Dictionary.of(atoms, normalize=False), k)
    finally:
        torch.set_float32_matmul_precision(before)
    assert found.atoms.tolist() == exact.atoms.tolist()
    assert found.scored >= exact.scored


@pytest.mark.parametrize("noise", [0.0, 1e-4, 0.05])
def test_planted_atoms_are_recovered(noise):
    """H = random coefficients x known atoms + noise: exactly these atoms, and the share of variance that they have."""
    g = torch.Generator().manual_seed(3)
    atoms = torch.nn.functional.normalize(torch.randn(3000, 96, generator=g, dtype=torch.float64), dim=1)
    planted = [5, 2999, 77, 1234, 640, 2000]
    weight = torch.cat([atoms[planted], torch.randn(10, 96, generator=g, dtype=torch.float64)])
    outputs = torch.randn(400, 16, generator=g, dtype=torch.float64)
    outputs[:, :6] *= torch.tensor([6.0, 5.0, 4.0, 3.5, 3.0, 2.5])
    outputs[:, 6:] *= noise
    found = matching_pursuit(outputs, weight, Dictionary.of(atoms, normalize=False), 12)
    assert sorted(found.atoms[:6].tolist()) == sorted(planted)
    written = outputs @ weight
    basis = torch.linalg.qr(atoms[planted].T).Q
    share = (written @ basis).square().sum() / written.square().sum()
    torch.testing.assert_close(found.explained[5], share, atol=1e-12, rtol=0)
    if noise == 0.0:
        assert len(found.atoms) == 6  # nothing is left to explain
        order = [planted.index(i) for i in found.atoms.tolist()]
        torch.testing.assert_close(found.coefficients, outputs[:, order], atol=1e-10, rtol=1e-10)
    else:
        taken, explained, _ = plain_pursuit(written, atoms, 12)
        assert found.atoms.tolist() == taken  # also among the last thousandths of the variance
        torch.testing.assert_close(found.explained, explained, atol=1e-10, rtol=0)


def test_explained_variance_is_the_projection_on_the_span():
    outputs, weight, atoms, k = problem(5)
    found = matching_pursuit(outputs, weight, Dictionary.of(atoms, normalize=False), k)
    written = outputs @ weight
    for i in range(1, k + 1):
        basis = torch.linalg.qr(atoms[found.atoms[:i]].T).Q
        share = (written @ basis).square().sum() / written.square().sum()
        torch.testing.assert_close(found.explained[i - 1], share, atol=1e-12, rtol=0)
    rest = written - found.coefficients @ atoms[found.atoms]
    torch.testing.assert_close(1 - rest.square().sum() / written.square().sum(), found.explained[-1])


def test_most_atoms_are_never_scored():
    g = torch.Generator().manual_seed(0)
    outputs = torch.randn(300, 32, generator=g) * torch.logspace(0, -1, 32)
    weight, atoms = torch.randn(32, 96, generator=g), torch.randn(20000, 96, generator=g)
    found = matching_pursuit(outputs, weight, Dictionary.of(atoms, normalize=False), 20)
    assert found.scored < 0.05 * 20 * len(atoms)
    taken, _, _ = plain_pursuit((outputs.double() @ weight.double()), atoms.double(), 4)
    assert found.atoms[:4].tolist() == taken


def test_the_best_atom_may_have_a_low_bound():
    """A hundred atoms along outputs of few large numbers have twice the length of the best one, whose are all equal."""
    outputs = torch.zeros(100, 2, dtype=torch.float64)
    outputs[:9, 0] = 10 / 3  # length 10, sum of sizes 30
    outputs[:, 1] = 0.5 * torch.tensor([1.0, -1.0]).repeat(50)  # length 5, sum 50: the bound sqrt(n) times length
    atoms = torch.zeros(201, 2, dtype=torch.float64)
    atoms[:200, 0] = torch.linspace(0.95, 1.0, 200)
    atoms[200, 1] = 1.0
    found = matching_pursuit(outputs, torch.eye(2, dtype=torch.float64), Dictionary.of(atoms, normalize=False), 2)
    assert found.atoms.tolist() == [200, 199]


def test_a_dictionary_without_anything_new_to_say_ends_the_pursuit():
    outputs, weight, atoms, _ = problem(0)
    few = torch.cat([atoms[:3], atoms[:1] - 2 * atoms[1:2], 3 * atoms[2:3]])
    for normalize in (False, True):
        assert len(matching_pursuit(outputs, weight, Dictionary.of(few, normalize=normalize), 5).atoms) == 3


def test_equal_atoms_are_taken_once_and_in_their_order():
    outputs, weight, atoms, k = problem(4)
    first = int(matching_pursuit(outputs, weight, Dictionary.of(atoms, normalize=False), 1).atoms[0])
    doubled = torch.cat([atoms, atoms[first : first + 1], torch.zeros(2, atoms.shape[1], dtype=torch.float64)])
    for normalize in (False, True):
        found = matching_pursuit(outputs, weight, Dictionary.of(doubled, normalize=normalize), k).atoms.tolist()
        assert len(set(found) & {first, len(atoms)}) <= 1
        assert not set(found) & {len(atoms) + 1, len(atoms) + 2}
    assert int(matching_pursuit(outputs, weight, Dictionary.of(doubled.flip(0), normalize=False), 1).atoms[0]) == 2


def test_a_pursuit_of_nothing_is_an_error():
    outputs, weight, atoms, _ = problem(0)
    dictionary = Dictionary.of(atoms, normalize=False)
    with pytest.raises(SettingsError, match="between 1 and the number of atoms, 300; got 301"):
        matching_pursuit(outputs, weight, dictionary, 301)
    with pytest.raises(InputError, match="nothing that could be explained"):
        matching_pursuit(torch.zeros_like(outputs), weight, dictionary, 3)
    outputs[2, 1] = torch.nan
    with pytest.raises(NonFiniteError, match="outputs"):
        matching_pursuit(outputs, weight, dictionary, 3)
    atoms[7, 3] = torch.inf
    with pytest.raises(NonFiniteError, match="atom 7"):
        Dictionary.of(atoms, normalize=False)


def read(lens, batch, positions="all", frozen_scale=False, pairs=None):
    by_layer, _ = heads_by_layer(lens, pairs)
    return HeadReader(lens, by_layer, positions, frozen_scale)(batch)


def test_outputs_times_weight_are_the_mean_of_what_the_heads_add(lens):
    """Through multipliers and post-norms too: against `result`, the tensor of every head in the stream's space."""
    batch = lens.prepare(input_ids=IDS, padding_side="left")
    mask = batch.mask[:, :, None, None].float()
    result = lens.run(batch, ["result"])["result"]
    for layer, found in read(lens, batch).items():
        written = torch.einsum("bhi,hid->bhd", found.float(), head_weight(lens, layer))
        wanted = (result[layer] * mask).sum(1) / mask.sum(1)
        torch.testing.assert_close(written, wanted, atol=1e-5, rtol=1e-4)
    some = read(lens, batch, positions="last", pairs=[(1, 3), (1, 0)])
    written = torch.einsum("bhi,hid->bhd", some[1].float(), head_weight(lens, 1)[[0, 3]])
    torch.testing.assert_close(written, result[1][:, -1, [0, 3]], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("positions", ["all", "last", slice(1, None)])
def test_padding_and_batching_change_nothing(lens, positions):
    for frozen in (False, True):
        left = read(lens, lens.prepare(input_ids=IDS, padding_side="left"), positions, frozen)
        right = read(lens, lens.prepare(input_ids=IDS, padding_side="right"), positions, frozen)
        for i, row in enumerate(IDS):
            alone = read(lens, lens.prepare(input_ids=[row]), positions, frozen)
            for layer, found in alone.items():
                torch.testing.assert_close(left[layer][i], found[0], atol=2e-6, rtol=1e-4)
                torch.testing.assert_close(right[layer][i], found[0], atol=2e-6, rtol=1e-4)


def test_with_the_whole_final_norm_the_logit_lens_is_the_direct_effect(lens):
    batch = lens.prepare(input_ids=IDS, padding_side="left")
    found = heads.logit_lens_ranking(lens, batch, [70, 90], positions="last", apply_final_norm="full")
    wanted = [heads.direct_effect(lens, batch, answers=[i] * len(IDS)).per_prompt for i in (70, 90)]
    both = torch.stack(wanted).mean(0)
    torch.testing.assert_close(found.scores, both.mean(0), atol=2e-5, rtol=1e-3)
    torch.testing.assert_close(found.extra["sd"], both.std(0), atol=2e-5, rtol=1e-3)


def test_final_norm_options_by_hand(llama):
    """RMSNorm: the gain times the rows; the scale of the last stream times each position."""
    batch = llama.prepare(input_ids=[IDS[0]])
    rows = llama.model.lm_head.weight.detach()
    gain = llama.model.model.norm.weight.detach()
    torch.testing.assert_close(atoms_of(llama, "scale_only"), rows)
    torch.testing.assert_close(atoms_of(llama, "full"), rows * gain, atol=1e-5, rtol=1e-4)
    trace = llama.run(batch, ["z.1", "resid_post.2"])
    scale = trace["resid_post", 2].pow(2).mean(-1).add(1e-6).rsqrt()
    wanted = (trace["z", 1] * scale[..., None, None]).mean(1)
    torch.testing.assert_close(read(llama, batch, frozen_scale=True)[1].float(), wanted, atol=1e-5, rtol=1e-3)
    centred = interp.wrap(build("gpt2"), processor("gpt2"))
    gain, rows = centred.model.transformer.ln_f.weight.detach(), centred.model.lm_head.weight.detach()
    stream = torch.randn(3, rows.shape[1], generator=torch.Generator().manual_seed(0))
    through = (stream - stream.mean(1, keepdim=True)) * gain
    torch.testing.assert_close(stream @ atoms_of(centred, "gain").T, through @ rows.T, atol=1e-4, rtol=1e-3)


def test_a_stream_of_batches_is_one_batch(lens):
    batch = lens.prepare(input_ids=IDS, padding_side="left")
    whole = heads.head_moments(lens, batch)
    rows = [lens.prepare(input_ids=[row]) for row in IDS]
    stream = heads.head_moments(lens, (row for row in rows))
    assert whole.count == stream.count == len(IDS)
    outputs = read(lens, batch)
    for layer, found in outputs.items():
        torch.testing.assert_close(stream.mean[layer], whole.mean[layer], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(stream.spread[layer], whole.spread[layer], atol=1e-6, rtol=1e-4)
        for h in range(found.shape[1]):
            torch.testing.assert_close(whole.second(layer, True)[h], torch.cov(found[:, h].T), atol=1e-12, rtol=1e-9)
            square = found[:, h].T @ found[:, h] / len(IDS)
            torch.testing.assert_close(whole.second(layer, False)[h], square, atol=1e-12, rtol=1e-9)


def test_prompts_come_as_texts_or_batches_in_any_iterable(llama):
    texts = ["The cat", "A dog barks", "seven", "it is", "no"]
    ready = llama.prepare(texts)
    one = heads.head_moments(llama, ready)
    for data in (texts, iter(texts), [ready], [*texts[:2], llama.prepare(texts[2:4]), texts[4]]):
        many = heads.head_moments(llama, data, batch_size=2)
        assert many.count == 5
        assert many.settings["tokens"] == int(ready.mask.sum())
        torch.testing.assert_close(many.spread[2], one.spread[2], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("norm", ["none", "gain", "full"])
def test_the_score_is_the_projection_of_the_whole_matrix(lens, center, norm):
    """Against the n x d matrix, its QR projection, and the pursuit run through the keywords to the end."""
    batch = lens.prepare(input_ids=IDS, padding_side="left")
    scores = heads.pursuit(lens, batch, WORDS, center=center, apply_final_norm=norm, random_lists=0)
    ids = scores.settings["ids"]
    atoms = atoms_of(lens, norm)[ids].double()
    outputs = read(lens, batch, frozen_scale=norm == "full")
    for layer, found in outputs.items():
        for h in range(found.shape[1]):
            own = found[:, h] - found[:, h].mean(0) if center else found[:, h]
            written = own @ head_weight(lens, layer)[h].double()
            share = (written @ torch.linalg.qr(atoms.T).Q).square().sum() / written.square().sum()
            torch.testing.assert_close(scores.scores[layer, h].double(), share, atol=1e-6, rtol=1e-5)
            total = written.square().sum() / (len(IDS) - center)
            torch.testing.assert_close(scores.extra["variance"][layer, h].double(), total, atol=1e-9, rtol=1e-5)
            if len(ids) <= len(IDS) - 1:
                full = matching_pursuit(
                    own, head_weight(lens, layer)[h], Dictionary.of(atoms, normalize=False), len(ids)
                )
                torch.testing.assert_close(full.explained[-1], share, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(scores.extra["explained"], scores.scores * scores.extra["variance"])


def test_a_planted_concept_head_is_found():
    """A head that is made to write along three tokens' rows explains all of its variance by them, and no other does."""
    lens = interp.wrap(build("llama"), processor("llama"), name="planted")
    batch = lens.prepare(input_ids=IDS, padding_side="left")
    part = lens.anatomy.attention(None, 1, "result")
    rows = atoms_of(lens, "none")[[100, 120, 140]]
    with torch.no_grad():
        along = torch.randn(part.d_value, 3, generator=torch.Generator().manual_seed(0)) @ rows
        part.out_proj.weight[:, 2 * part.d_value : 3 * part.d_value] = along.T
    scores = heads.pursuit(lens, batch, [100, 120, 140], random_lists=99)
    assert scores.scores[1, 2] > 1 - 1e-5
    assert scores.extra["p"][1, 2] == 0.01
    others = scores.scores.clone()
    others[1, 2] = 0
    assert others.max() < 0.8
    assert (scores.top(1)[["layer", "head"]].iloc[0] == [1, 2]).all()
    topic = heads.topics(lens, batch, [(1, 2)], k=4)[0]
    # Four outputs' worth of variance lie in three directions.
    assert float(heads.topics(lens, batch, [(1, 2)], k=3, among=[100, 120, 140, 90])[0].explained[-1]) > 1 - 1e-5
    assert float(topic.explained[-1]) <= 1 + 1e-6


@pytest.mark.parametrize("center", [True, False])
def test_an_interval_is_of_pursuits_on_resampled_prompts(llama, center):
    texts = ["ab cd", "the cat", "7 8 9", "xyz", "hello you", "a b c d"]
    scores = heads.pursuit(llama, texts, WORDS, center=center, random_lists=0)
    top = scores.top(2)
    ways = {"resamples": 1, "seed": 3, "confidence": 0.9}
    one = heads.pursuit_interval(llama, texts, scores, top, **ways)
    (weights,) = shares(len(texts), 1, 3)
    again = [text for text, share in zip(texts, weights[0], strict=True) for _ in range(round(share * len(texts)))]
    assert len(again) == len(texts) != len(set(again))
    wanted = heads.pursuit(llama, again, WORDS, center=center, random_lists=0)
    for row in one.to_dict("records"):
        assert row["score"] == float(scores.scores[row["layer"], row["head"]])
        assert row["low"] == row["high"]
        assert row["low"] == pytest.approx(float(wanted.scores[row["layer"], row["head"]]), abs=1e-6)
    many = heads.pursuit_interval(llama, texts, scores, top, batch_size=2)
    assert (many["low"] < many["high"]).all()
    whole = heads.pursuit_interval(llama, texts, scores, top)
    assert torch.allclose(torch.tensor(many.to_numpy()), torch.tensor(whole.to_numpy()), atol=1e-6)


def test_intervals_of_other_scores_or_prompts_are_refused(llama):
    scores = heads.pursuit(llama, ["ab", "cd", "xy"], WORDS, random_lists=0)
    with pytest.raises(InputError, match="of 3 prompts, but 2"):
        heads.pursuit_interval(llama, ["ab", "cd"], scores, [(0, 0)])
    other = heads.logit_lens_ranking(llama, ["ab", "cd"], WORDS)
    with pytest.raises(InputError, match="scores of logit_lens"):
        heads.pursuit_interval(llama, ["ab", "cd"], other, [(0, 0)])
    with pytest.raises(SettingsError, match="confidence"):
        heads.pursuit_interval(llama, ["ab", "cd", "xy"], scores, [(0, 0)], confidence=1.0)
    frame = heads.pursuit(interp.wrap(build("gpt2"), processor("gpt2"), name="gpt2"), ["ab", "c"], WORDS).top(2)
    with pytest.raises(EditError, match="gpt2"):
        heads.pursuit_interval(llama, ["ab", "cd", "xy"], scores, frame)


def test_floor_and_p_value_by_hand(llama):
    batch = llama.prepare(input_ids=IDS, padding_side="left")
    scores = heads.pursuit(llama, batch, WORDS, random_lists=30, seed=4)
    atoms = atoms_of(llama, "none")
    words = heads.keyword_tokens(llama, WORDS)
    ids, how = random_lists(llama, words, atoms.norm(dim=1), count=30, matched=True, seed=4)
    assert ids.shape == (30, len(words.ids))
    assert scores.settings["random_lists"] == {"count": 30, "drawn": how, "seed": 4}
    each = torch.stack([heads.pursuit(llama, batch, row.tolist(), random_lists=0).scores for row in ids])
    torch.testing.assert_close(scores.extra["floor"], each.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scores.extra["above_floor"], scores.scores - each.mean(0), atol=1e-5, rtol=1e-4)
    p = (1 + (each >= scores.scores).float().sum(0)) / 31
    assert (scores.extra["p"] - p).abs().max() < 1e-6
    again = heads.pursuit(llama, batch, WORDS, random_lists=30, seed=4)
    assert again.equals(scores)
    assert not heads.pursuit(llama, batch, WORDS, random_lists=30, seed=5).equals(scores)
    assert heads.pursuit(llama, batch, WORDS, random_lists=0).extra.keys() == {"variance", "explained"}


def test_random_directions_score_rank_over_width():
    """The floor that the paper leaves out, on a head that writes in all directions alike."""
    g = torch.Generator().manual_seed(0)
    written = torch.randn(4000, 48, generator=g, dtype=torch.float64)
    basis, rank, _ = span_basis(torch.randn(9, 48, generator=g))
    share = (written @ basis).square().sum() / written.square().sum()
    assert int(rank) == 9
    assert abs(float(share) - 9 / 48) < 0.01


def test_span_and_condition_of_correlated_rows():
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(6, 30, generator=g, dtype=torch.float64)
    basis, rank, condition = span_basis(rows * torch.tensor([[1e-4], [1.0], [1.0], [50.0], [1.0], [1.0]]))
    torch.testing.assert_close(basis @ basis.T, torch.linalg.qr(rows.T).Q @ torch.linalg.qr(rows.T).Q.T)
    unit = rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(condition, torch.linalg.cond(unit))
    dependent = torch.cat([rows, rows[:1] - 2 * rows[1:2]])
    basis, rank, condition = span_basis(dependent)
    assert int(rank) == 6
    assert condition > 1e6
    torch.testing.assert_close(basis.T @ basis, torch.diag((basis.norm(dim=0) > 0.5).double()), atol=1e-9, rtol=0)


def test_keywords_of_a_byte_vocabulary(llama):
    """Every word of two letters is several tokens there."""
    found = heads.keyword_tokens(llama, ["a", "bc", "a"], variants=False)
    assert found.words == ("a",)
    assert found.tokens == ("a",)
    assert found.dropped == {"bc": "2 tokens: b c"}
    assert heads.keyword_tokens(llama, ["bc"], variants=False, pieces="first").tokens == ("b",)
    assert heads.keyword_tokens(llama, ["bc"], variants=False, pieces="all").tokens == ("b", "c")
    assert heads.keyword_tokens(llama, ["a"]).tokens == ("a", "A")  # " a" is two tokens
    assert heads.keyword_tokens(llama, [70, 71, 70]).ids == (70, 71)
    with pytest.raises(InputError, match=r"no keyword can be used .* 'bc' is 2 tokens: b c.*pieces='first'"):
        heads.keyword_tokens(llama, ["bc", "de"], variants=False)
    with pytest.raises(InputError, match="found '  '"):
        heads.keyword_tokens(llama, ["a", "  "])
    with pytest.raises(InputError, match="at least one"):
        heads.keyword_tokens(llama, [])
    with pytest.raises(InputError, match="list of words"):
        heads.keyword_tokens(llama, "red")
    with pytest.raises(InputError, match=r"token id 5000 is outside .* 320 rows"):
        heads.keyword_tokens(llama, [70, 5000])
    with pytest.raises(UnknownNameError, match="drop, first, all"):
        inspect.unwrap(heads.keyword_tokens)(llama, ["a"], pieces="last")
    with pytest.raises(InputError, match="no tokenizer"):
        heads.keyword_tokens(interp.wrap(build("llama")), ["a"])


def test_words_that_the_tokenizer_cannot_express():
    scenes = interp.load("scenes")
    found = heads.keyword_tokens(scenes, ["red", "zebra", "blue"])
    assert found.tokens == ("red", "blue")
    assert found.dropped == {"zebra": "unknown to the tokenizer"}
    with pytest.raises(InputError, match="'zebra' is unknown to the tokenizer"):
        heads.keyword_tokens(scenes, ["zebra"], pieces="all")


def test_keywords_and_random_lists_of_a_real_vocabulary(smollm):
    found = heads.keyword_tokens(smollm, ["France", "red", "Liechtenstein"])
    assert [t for t, w in zip(found.tokens, found.words, strict=True) if w == "red"] == [" red", " Red", "red", "Red"]
    assert " france" not in found.tokens
    assert "Liechtenstein" in found.dropped
    assert found.report()["kept"]["France"][0] == " France"
    lengths = atoms_of(smollm, "none").norm(dim=1)
    ids, how = random_lists(smollm, found, lengths, count=40, matched=True, seed=0)
    assert "same forms" in how
    plain = found.words.count("France")
    for row in ids.tolist():
        texts = token_texts(smollm, row)
        assert len(set(row)) == len(row) == len(found.ids)
        assert not set(row) & set(found.ids)
        small = texts[plain:]  # the word in the place of red has its four forms
        assert small[1] == small[0].title()
        assert [small[2], small[3]] == [small[0].strip(), small[1].strip()]
        assert texts[0][0] == " "
        assert texts[0][1].isupper()
    gap = (lengths[ids] - lengths[list(found.ids)]).abs().mean()
    any_token, _ = random_lists(smollm, found, lengths, count=40, matched=False, seed=0)
    assert gap < 0.7 * (lengths[any_token] - lengths[list(found.ids)]).abs().mean()


COUNTRIES = ["France", "Germany", "Japan", "China", "Italy", "Spain", "Canada", "Brazil", "India", "Mexico", "Egypt"]


def test_heads_of_a_real_model_that_write_countries(smollm):
    """Heads whose task it is to copy names forward: country tokens explain what they write, beyond random words."""
    prompts = [f"{c} is a large country. My friends all live in the same country, which is" for c in COUNTRIES]
    moments = heads.head_moments(smollm, prompts, positions="last")
    scores = heads.pursuit(smollm, moments, COUNTRIES, random_lists=50)
    assert scores.scores.shape == (30, 9)
    assert ((scores.scores >= 0) & (scores.scores <= 1)).all()
    strong = scores.top(3, by="above_floor")
    assert (strong["p"] < 0.03).all()
    assert (strong["layer"] > 14).all()
    # Early heads score high for every list of words: only the floor shows that it means nothing.
    assert (scores.extra["p"][0] > 0.05).all()
    topic = heads.topics(smollm, prompts, [(29, 2)], k=10, positions="last")[0]
    named = {token.strip() for token in topic.tokens}
    assert len(named & {*COUNTRIES, "Chinese", "German", "African", "Austrian", "Mexican", "Italian", "French"}) >= 4
    raw = heads.topics(smollm, prompts, [(29, 2)], k=10, positions="last", normalize_atoms=False)[0]
    assert raw.explained[-1] < topic.explained[-1]
    baseline = heads.logit_lens_ranking(smollm, moments, COUNTRIES)
    assert baseline.unit == "logits"
    assert baseline.scores.isfinite().all()


def test_topics_are_the_pursuit_of_the_materialised_matrix(lens):
    batch = lens.prepare(input_ids=IDS, padding_side="left")
    pairs = [(2, 3), (0, 1)]
    rows = atoms_of(lens, "none").double()
    outputs = read(lens, batch)
    for normalize in (False, True):
        found = heads.topics(lens, [batch], pairs, k=3, normalize_atoms=normalize)
        used = rows / rows.norm(dim=1, keepdim=True) if normalize else rows
        for (layer, head), topic in zip(pairs, found, strict=True):
            own = outputs[layer][:, head]
            written = (own - own.mean(0)) @ head_weight(lens, layer)[head].double()
            taken, explained, coefficients = plain_pursuit(written, used, 3)
            assert (topic.layer, topic.head) == (layer, head)
            assert topic.ids.tolist() == taken
            torch.testing.assert_close(topic.explained, explained, atol=1e-6, rtol=0)
            torch.testing.assert_close(topic.coefficients.double(), coefficients, atol=1e-4, rtol=1e-4)
            assert topic.variance == pytest.approx(float(written.square().sum() / 4), rel=1e-6)
    some = [70, 75, 90, 300]
    topic = heads.topics(lens, [batch], pairs, k=2, among=some)[0]
    assert set(topic.ids.tolist()) <= set(some)


def test_a_topic_as_frame_picture_and_files(llama, tmp_path):
    texts = ["The cat", "A dog barks", "seven", "it is", "no <b>"]
    topic = heads.topics(llama, texts, [(1, 2)], k=3, batch_size=2)[0]
    frame = topic.frame()
    assert frame.columns.tolist() == ["rank", "id", "token", "gain", "explained", "weight"]
    assert frame["gain"].sum() == pytest.approx(float(topic.explained[-1]))
    assert (frame["gain"] > 0).all()
    assert torch.allclose(topic.weights, topic.coefficients.square().sum(0).sqrt())
    assert topic.settings["k"] == 3
    assert topic.settings["prompts"] == 5
    assert "L1 H2" in repr(topic)
    assert "<table>" in topic._repr_html_()
    assert len(topic.plot(k=2).data[0].x) == 2
    topic.save(tmp_path / "topic")
    assert interp.scores.load(tmp_path / "topic").equals(topic)
    with pytest.raises(InputError, match="ids must be int64"):
        heads.HeadTopic(0, 0, topic.ids, topic.tokens[:2], topic.explained, topic.coefficients, 1.0)


def test_image_tokens_alone():
    given = inputs("llava")
    lens = interp.wrap(build("llava"), processor("llava"), sample=given)
    batch = lens.prepare(**given)
    result = lens.run(batch, ["result"])["result"]
    mask = batch.image_mask[:, :, None, None].float()
    for layer, found in read(lens, batch, positions="image").items():
        written = torch.einsum("bhi,hid->bhd", found.float(), head_weight(lens, layer))
        torch.testing.assert_close(written, (result[layer] * mask).sum(1) / mask.sum(1), atol=1e-5, rtol=1e-4)
    scores = heads.pursuit(lens, batch, [70, 71, 72], positions="image", random_lists=5)
    assert scores.settings["positions"] == "image"
    with pytest.raises(InputError, match="no image tokens"):
        heads.pursuit(lens, ["a text", "another"], [70, 71], positions="image")


def test_some_heads_alone(llama):
    batch = llama.prepare(input_ids=IDS, padding_side="left")
    whole = heads.pursuit(llama, batch, WORDS, random_lists=5)
    some = heads.pursuit(llama, batch, WORDS, random_lists=5, pairs=[(2, 1), (0, -1)])
    assert int(some.valid.sum()) == 2
    torch.testing.assert_close(some.scores[some.valid], whole.scores[some.valid])
    torch.testing.assert_close(some.extra["p"][some.valid], whole.extra["p"][some.valid])
    again = heads.pursuit(llama, batch, WORDS, random_lists=0, pairs=whole.top(3))
    assert int(again.valid.sum()) == 3


def test_bad_input(llama):
    texts = ["The cat", "A dog"]
    with pytest.raises(InputError, match="one prompt has no variance"):
        heads.pursuit(llama, ["The cat"], WORDS)
    assert heads.pursuit(llama, ["The cat"], WORDS, center=False, random_lists=2).scores.isfinite().all()
    with pytest.raises(InputError, match="one prompt has no variance"):
        heads.topics(llama, "The cat", [(0, 0)])
    with pytest.raises(UnknownNameError, match="head 4 of layer 1 does not exist: the layer has 4 heads"):
        heads.pursuit(llama, texts, WORDS, pairs=[(1, 4)])
    with pytest.raises(UnknownNameError, match="layer 9 does not exist"):
        heads.topics(llama, texts, [(9, 0)])
    strongest = heads.pursuit(llama, texts, WORDS, random_lists=0).top(2)
    other = interp.wrap(build("gpt2"), processor("gpt2"), name="gpt2")
    with pytest.raises(EditError, match="another model"):
        heads.topics(other, texts, strongest)
    with pytest.raises(InputError, match="no prompts"):
        heads.pursuit(llama, [], WORDS)
    with pytest.raises(InputError, match="found a int"):
        heads.head_moments(llama, iter([3]))
    with pytest.raises(SettingsError, match="not a tensor"):
        heads.head_moments(llama, texts, positions=torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(InputError, match="no image tokens"):
        heads.head_moments(llama, texts, positions="image")
    with pytest.raises(SettingsError, match="batch_size"):
        heads.head_moments(llama, texts, batch_size=0)
    with pytest.raises(SettingsError, match="random_lists"):
        heads.pursuit(llama, texts, WORDS, random_lists=-1)
    many = heads.keyword_tokens(llama, list(range(64, 220)))
    with pytest.raises(SettingsError, match="100 tokens are too few to draw random lists of 156 from"):
        random_lists(llama, many, torch.ones(320), count=1, matched=True, seed=0)
    with pytest.raises(InputError, match="span the whole stream"):
        heads.pursuit(llama, texts, list(range(64, 300)), random_lists=0)
    with pytest.raises(SettingsError, match="number of tokens to choose from, 2; got 3"):
        heads.topics(llama, texts, [(0, 0)], k=3, among=[70, 71])
    with pytest.raises(InputError, match="writes the same for every prompt"):
        heads.topics(llama, ["The cat", "The cat"], [(0, 0)], k=3)
    same = heads.pursuit(llama, ["The cat", "The cat"], WORDS, random_lists=3)
    assert (same.scores == 0).all()
    assert (same.extra["p"] == 1).all()
    with pytest.raises(UnknownNameError, match="gain"):
        inspect.unwrap(atoms_of)(llama, "gamma")  # past the tests' type check


def test_moments_serve_many_lists_but_only_as_they_were_collected(llama):
    texts = [p.text for p in indirect_objects(4, seed=0)]
    moments = heads.head_moments(llama, texts, positions="last")
    direct = heads.pursuit(llama, texts, WORDS, positions="last", random_lists=5)
    assert heads.pursuit(llama, moments, WORDS, random_lists=5).equals(direct)
    with pytest.raises(SettingsError, match="settled when the moments were collected"):
        heads.pursuit(llama, moments, WORDS, positions="all")
    with pytest.raises(SettingsError, match="frozen_scale=True"):
        heads.pursuit(llama, moments, WORDS, apply_final_norm="full")
    with pytest.raises(InputError, match="of llama, not of other"):
        heads.pursuit(interp.wrap(build("llama"), processor("llama"), name="other"), moments, WORDS)


def test_models_without_an_unembedding_are_refused_by_name():
    lens = interp.wrap(build("bert"), processor("bert"), name="the-encoder")
    for ask in (heads.pursuit, heads.logit_lens_ranking):
        with pytest.raises(UnsupportedError, match="the-encoder"):
            ask(lens, ["The cat", "A dog"], ["a"])
    with pytest.raises(UnsupportedError, match="the-encoder"):
        heads.topics(lens, ["The cat", "A dog"], [(0, 0)])
    state = interp.wrap(build("mamba"), processor("mamba"))
    with pytest.raises(UnsupportedError, match="result"):
        heads.pursuit(state, ["The cat", "A dog"], ["a"])


def test_layers_without_heads_are_empty_rows():
    lens = interp.wrap(build("jamba"), processor("jamba"))
    scores = heads.pursuit(lens, lens.prepare(input_ids=IDS, padding_side="left"), WORDS, random_lists=4)
    have = [x.index for x in lens.anatomy.towers["text"].layers if "attn" in x.attention]
    for layer in range(len(lens.anatomy.towers["text"].layers)):
        assert bool(scores.scores[layer].isnan().all()) == (layer not in have)
