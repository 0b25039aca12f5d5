"""T-VHD against decoding step by step, and numbers of an answer by token, word and sentence."""

import inspect
from itertools import pairwise

import pytest
import torch
from PIL import Image

import interp
from interp import heads
from interp.attribution.continued import continued
from interp.data import scenes
from interp.errors import InputError, NonFiniteError, SettingsError, UnknownNameError, UnsupportedError
from interp.heads import AnswerScores
from interp.heads.answer_scores import answer_spans
from tests.test_heads_vision import SIZES, wrapped
from tests.zoo import build, processor
from tests.zoo._images import images

NEW = [[70, 81, 92, 103], [75, 86, 0, 0]]  # the second answer ends after two tokens
FAMILIES = ["llava", "llava_onevision", "qwen2_vl", "qwen3_vl", "smolvlm", "gemma3_vl", "aya_vision", "mistral3"]


def longer(given, new):
    """A batch's tensors with tokens behind them."""
    more = {"input_ids": new, "attention_mask": torch.ones_like(new)}
    return {
        k: torch.cat([v, more.get(k, torch.zeros_like(new))], 1) if k in more or k.endswith("type_ids") else v
        for k, v in given.items()
    }


@pytest.mark.parametrize("without", ["drop", "mask"])
@pytest.mark.parametrize("name", FAMILIES)
def test_one_pass_is_step_by_step(name, without):
    """Every head at every token: the prompt with the tokens so far, anew for each token, in both branches."""
    lens, batch = wrapped(name)
    tokens = torch.tensor(NEW)
    found = heads.token_divergence(lens, batch, tokens, without=without, per_head=True)
    in_groups = heads.token_divergence(lens, batch, tokens, without=without, per_head=True, memory=1)
    torch.testing.assert_close(found.heads, in_groups.heads, atol=2e-6, rtol=1e-4, equal_nan=True)
    assert found.valid.tolist() == [[True] * 4, [True, True, False, False]]
    for step in range(4):
        so_far = longer(batch.inputs, tokens[:, :step])
        there = heads.vision_divergence(lens, lens.prepare(**so_far), without=without).per_prompt
        for i in range(2 if step < 2 else 1):
            torch.testing.assert_close(found.heads[i, step], there[i], atol=5e-6, rtol=1e-4)


def test_generation_itself_gives_the_same():
    """Head outputs read while the model generates with its cache, with the picture and without it."""
    lens = interp.load("scenes")
    scene = scenes.scene("test", 3)
    batch = lens.prepare([f"<image> {scenes.CAPTION_PROMPT}"], [scene.image])
    made = lens.generate(batch, reads="z@last", max_new_tokens=48)
    found = heads.token_divergence(lens, batch, made.tokens, per_head=True)
    assert found.texts == list(made.texts)
    count = len(found.tokens[0])
    assert count > 8
    ids = batch.inputs["input_ids"][:, ~batch.image_mask[0]]
    cache, rows = None, []
    outputs, hooks = [], []
    for layer in lens.model.model.language_model.layers:
        keep = lambda _, args: outputs.append(args[0][0, -1].unflatten(-1, (8, -1)))  # noqa: E731
        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(keep))
    for step in range(count):
        outputs.clear()
        with torch.no_grad():
            out = lens.model(input_ids=ids if step == 0 else made.tokens[:, step - 1 : step], past_key_values=cache)
        cache = out.past_key_values
        rows.append(torch.stack(outputs))
    for hook in hooks:
        hook.remove()
    seen = torch.stack([made.trace["z@last", i][0, :count] for i in range(6)], 1)
    wanted = (seen - torch.stack(rows)).norm(dim=-1)
    torch.testing.assert_close(found.heads[0], wanted, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found.scores[0], wanted.topk(4, dim=-1).values.sum((1, 2)), atol=1e-4, rtol=1e-4)


def test_how_many_heads_count():
    lens, batch = wrapped("llava")
    tokens = torch.tensor(NEW)
    every = heads.token_divergence(lens, batch, tokens, k=99, per_head=True)
    torch.testing.assert_close(every.scores[0], every.heads[0].sum((1, 2)))
    half = heads.token_divergence(lens, batch, tokens)
    ordered = every.heads[0].sort(dim=-1, descending=True).values
    torch.testing.assert_close(half.scores[0], ordered[..., :2].sum((1, 2)))
    assert half.heads is None
    one = heads.token_divergence(lens, batch, tokens, k=1, form="relative", outliers="biased")
    assert (one.scores[one.valid] <= 3 * 2).all()
    assert (one.settings["k"], half.settings["k"], one.settings["form"]) == (1, "half", "relative")
    projected = heads.token_divergence(lens, batch, tokens, form="projected", per_head=True, memory=1)
    first = heads.vision_divergence(lens, batch, form="projected").per_prompt
    torch.testing.assert_close(projected.heads[:, 0], first, atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("without", ["drop", "drop_keep_positions", "mask", "mean"])
def test_a_batch_is_its_prompts(without):
    lens, _ = wrapped("llava")
    texts, pictures = ["ab<image>cdefgh", "<image>c"], images(2, SIZES, 1)
    tokens = torch.tensor(NEW)
    together = heads.token_divergence(lens, lens.prepare(texts, pictures), tokens, without=without, per_head=True)
    for i in range(2):
        alone = lens.prepare([texts[i]], [pictures[i]])
        found = heads.token_divergence(lens, alone, tokens[i : i + 1], without=without, per_head=True)
        n = len(found.tokens[0])
        assert n == [4, 2][i]
        torch.testing.assert_close(together.heads[i, :n], found.heads[0], atol=5e-6, rtol=1e-4)
        assert together.scores[i, n:].isnan().all()


def test_layers_are_read_in_groups_that_fit(monkeypatch):
    """No run returns more than a group at the positions of the answer, and none goes beyond it."""
    lens, batch = wrapped("llava")
    tokens = torch.tensor(NEW)
    each = 8 * 2 * 4 * 4 * 8  # two branches of float32: samples, tokens, heads, their width
    runs, real = [], lens.run

    def run(batch, reads, edits=()):
        trace = real(batch, reads, edits)
        runs.append([(layer, tuple(t.shape)) for (_, layer), t in trace.values.items()])
        return trace

    monkeypatch.setattr(lens, "run", run)
    shape = (2, 4, 4, 8)
    heads.token_divergence(lens, batch, tokens, memory=2 * each)
    assert runs == [[(0, shape), (1, shape)]] * 2 + [[(2, shape)]] * 2
    runs.clear()
    heads.token_divergence(lens, batch, tokens, memory=3 * each)
    assert runs == [[(0, shape), (1, shape), (2, shape)]] * 2


def test_a_prompt_does_not_see_its_answer():
    """Paligemma's prompt sees all of the text that is marked as prompt; one pass is right only with the right marks."""
    lens, batch = wrapped("paligemma")
    tokens = torch.tensor([[70, 81], [75, 86]])
    whole, _ = continued(lens, batch, tokens)
    assert bool((whole.inputs["token_type_ids"][:, -2:] == 1).all())
    found = heads.token_divergence(lens, batch, tokens, per_head=True)
    first = heads.vision_divergence(lens, batch).per_prompt
    torch.testing.assert_close(found.heads[:, 0], first, atol=5e-6, rtol=1e-4)


def made_scores():
    """Two answers, one with a word of two tokens over two sentences, and a shorter one."""
    tokens = [["A", " hot", "-dog", ".", " It", " is", "\nred"], [" no"]]
    texts = ["A hot-dog. It is\nred", " no"]
    spans = torch.zeros(2, 7, 2, dtype=torch.long)
    at = 0
    for t, token in enumerate(tokens[0]):
        spans[0, t] = torch.tensor([at, at + len(token)])
        at += len(token)
    spans[1, 0] = torch.tensor([0, 3])
    scores = torch.tensor([[1.0, 2.0, 6.0, 3.0, 4.0, 5.0, 7.0], [9.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    return AnswerScores(scores, spans, tokens, texts, "made", "u", {"model": "m"}, torch.ones(2, 7, 1, 2))


def test_words_and_sentences_by_hand(tmp_path):
    made = made_scores()
    frame = made.frame()
    assert frame["word"].tolist() == [0, 1, 1, -1, 2, 3, 4, 0]
    assert frame["sentence"].tolist() == [0, 0, 0, 0, 1, 1, 2, 0]
    words = made.words()
    assert words["text"].tolist() == ["A", "hot-dog", "It", "is", "red", "no"]
    assert words["score"].tolist() == [1, 2, 4, 5, 7, 9]
    assert words["token"].tolist() == [0, 1, 4, 5, 6, 0]
    assert words["sentence"].tolist() == [0, 0, 1, 1, 2, 0]
    assert made.words("mean")["score"].tolist() == [1, 4, 4, 5, 7, 9]
    assert made.words("max")["score"].tolist() == [1, 6, 4, 5, 7, 9]
    sentences = made.sentences()
    assert sentences["text"].tolist() == ["A hot-dog.", "It is", "red", " no"]
    assert sentences["score"].tolist() == [3, 4.5, 7, 9]
    for table in (words, sentences):
        for row in table.itertuples():
            assert made.texts[row.prompt][row.start : row.end] == row.text
    assert made.scores[1, 1:].isnan().all()
    assert made.heads[1, 1:].isnan().all()
    made.save(tmp_path)
    assert interp.scores.load(tmp_path).equals(made)
    figure = made.plot(0)
    assert "hot" in " ".join(figure.data[0].text)
    assert "2 answers, 8 tokens" in repr(made)
    assert "<span" in made._repr_html_()


def test_answer_scores_check_themselves():
    made = made_scores()
    whole = {k: getattr(made, k) for k in ("spans", "tokens", "texts", "name")}
    with pytest.raises(NonFiniteError, match="sample 0, token 2"):
        AnswerScores(made.scores.index_fill(1, torch.tensor([2]), torch.inf), **whole)
    with pytest.raises(InputError, match="found \\[7\\]"):
        AnswerScores(made.scores, **{**whole, "tokens": made.tokens[:1]})
    with pytest.raises(UnknownNameError, match="mean"):
        inspect.unwrap(AnswerScores.words)(made, "median")
    with pytest.raises(UnknownNameError, match="sample 2 does not exist"):
        made.plot(2)


def test_spans_are_those_of_the_decoded_text():
    tokenizer = processor("llama")
    text = "A dog\u2019s é. Two"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found, spans = answer_spans(tokenizer, ids)
    assert found == text
    assert spans[0] == (0, 1)
    assert spans[-1] == (len(text) - 1, len(text))
    assert all(a[1] == b[0] for a, b in pairwise(spans))
    assert answer_spans(None, [7, 12]) == ("7 12", [(0, 1), (1, 4)])


def test_bad_input():
    lens, batch = wrapped("llava")
    tokens = torch.tensor(NEW)
    for bad in ({"k": 0}, {"memory": 0}, {"k": True}):
        with pytest.raises(SettingsError, match="at least 1"):
            heads.token_divergence(lens, batch, tokens, **bad)
    with pytest.raises(InputError, match="no sample has an answer"):
        heads.token_divergence(lens, batch, torch.tensor([[0], [0]]))
    right = lens.prepare(["<image>a", "<image>abc"], images(2, SIZES, 0), padding_side="right")
    with pytest.raises(InputError, match="padding_side='left'"):
        heads.token_divergence(lens, right, tokens)
    text = interp.wrap(build("llama"), processor("llama"), name="llama")
    with pytest.raises(UnsupportedError, match="llama takes no images"):
        heads.token_divergence(text, text.prepare(["The cat"]), tokens[:1])


def test_a_picture_of_one_colour_has_nothing_to_take_away():
    """In the trained model: painted with its mean colour it stays as it is, and a scene does not."""
    lens = interp.load("scenes")
    blank = Image.new("RGB", (72, 72), (120, 160, 200))
    batch = lens.prepare([f"<image> {scenes.CAPTION_PROMPT}"] * 2, [blank, scenes.scene("test", 0).image])
    tokens = lens.generate(batch, max_new_tokens=48).tokens
    found = heads.token_divergence(lens, batch, tokens, without="mean")
    assert found.scores[0, : len(found.tokens[0])].max() < 1e-2
    assert found.scores[1, : len(found.tokens[1])].min() > 10
