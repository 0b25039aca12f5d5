"""Captions and answers of tiny vision-language models: batched is one by one, p(yes), prompts, unusable images."""

import numpy as np
import pytest
import torch
from PIL import Image

import interp
from interp import edits
from interp.data import scenes
from interp.errors import InputError, SettingsError, UnsupportedError
from interp.evaluation import Question, answer_questions, answer_tokens, caption_images, image_prompt
from interp.evaluation.answering import checked_image
from interp.steering import vision_reinforcement
from tests.conftest import packaged
from tests.zoo import build, processor

FAMILIES = ["llava", "llava_next", "qwen2_vl", "paligemma"]


def lens_of(name):
    lens = interp.wrap(build(name), processor(name), name=name)
    lens.model.generation_config.pad_token_id = 0
    return lens


@pytest.fixture(scope="module")
def llava():
    return lens_of("llava")


def pictures(n, seed=0):
    """Images of different sizes, so that families with image grids pad their batches."""
    random = np.random.default_rng(seed)
    sizes = [(32, 32), (64, 32), (32, 64), (40, 50)]
    return {
        f"i{i}": Image.fromarray(random.integers(0, 256, (*sizes[i % 4][::-1], 3), dtype=np.uint8)) for i in range(n)
    }


def questions(n):
    names = ["dog", "a very long name", "cat", "x", "elephants"]
    return [
        Question(f"q{i}", f"i{i // 2}", f"is there {names[i % 5]} ?", "yes" if i % 2 else "no", "random")
        for i in range(n)
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_batched_captions_are_those_of_one_by_one(name):
    lens, images = lens_of(name), pictures(5)
    asked = {"prompt": "describe", "max_new_tokens": 6, "chat": False}
    seen = []
    batched = caption_images(lens, images, batch_size=3, progress=seen.append, **asked)
    assert seen == [3, 2]
    assert list(batched) == list(images)
    for one, image in images.items():
        alone = caption_images(lens, {one: image}, batch_size=1, **asked)
        assert alone[one] == batched[one]
    assert len(set(batched.values())) > 1  # the images matter


@pytest.mark.parametrize("name", FAMILIES)
def test_batched_answers_are_those_of_one_by_one(name):
    lens, images, asked = lens_of(name), pictures(3), questions(6)
    batched = answer_questions(lens, asked, images, batch_size=4, max_new_tokens=5, chat=False)
    assert list(batched.texts) == [question.id for question in asked]
    for question in asked:
        alone = answer_questions(lens, [question], images, batch_size=1, max_new_tokens=5, chat=False)
        assert alone.texts[question.id] == batched.texts[question.id]
        assert alone.yes_probability[question.id] == pytest.approx(batched.yes_probability[question.id], abs=1e-5)
    assert len({round(p, 6) for p in batched.yes_probability.values()}) == 6


def test_left_padded_generation_is_token_for_token_that_of_each_alone(llava):
    """The tokens themselves, prompts of different lengths, against transformers' own generate without padding."""
    images = list(pictures(4).values())
    texts = [image_prompt(llava, "x" * (1 + 7 * i), chat=False) for i in range(4)]
    batch = llava.prepare(texts, images, padding_side="left")
    assert batch.padding == "left"
    together = llava.generate(batch, max_new_tokens=8).tokens
    for i in range(4):
        alone = llava.prepare([texts[i]], [images[i]])
        assert alone.padding is None
        wanted = llava.model.generate(**alone.inputs, max_new_tokens=8, do_sample=False)[0, alone.mask.shape[1] :]
        assert together[i, : len(wanted)].tolist() == wanted.tolist()


def test_p_yes_by_hand(llava):
    images, (question,) = pictures(1), questions(1)
    yes, no = answer_tokens(llava)
    # One byte is one token: "yes" starts with "y" and "Yes" with "Y"; " yes" starts with a blank, which tells nothing.
    decode = llava.processor.tokenizer.decode
    assert [decode([i]) for i in yes] == ["y", "Y"]
    assert [decode([i]) for i in no] == ["n", "N"]
    found = answer_questions(llava, [question], images, prompt="{question} Answer:", chat=False)
    text = image_prompt(llava, f"{question.text} Answer:", chat=False)
    assert text == "<image>\nis there dog ? Answer:"
    batch = llava.prepare([text], [images["i0"]])
    chance = llava.model(**batch.inputs).logits[0, -1].softmax(-1)
    wanted = (chance[yes].sum() / (chance[yes].sum() + chance[no].sum())).item()
    assert found.yes_probability["q0"] == pytest.approx(wanted, rel=1e-4)


def test_edits_are_active_in_both(llava):
    images, asked = pictures(2), questions(4)
    change = edits.steer(torch.full((32,), 3.0), layers=1)
    plain = answer_questions(llava, asked, images, chat=False)
    steered = answer_questions(llava, asked, images, edits=iter([change]), batch_size=2, chat=False)
    alone = answer_questions(llava, asked, images, edits=[change], batch_size=1, chat=False)
    assert steered.texts == alone.texts != plain.texts
    assert all(abs(steered.yes_probability[one] - plain.yes_probability[one]) > 1e-6 for one in plain.yes_probability)
    captions = {"prompt": "describe", "max_new_tokens": 6}
    assert caption_images(llava, images, edits=[change], **captions) != caption_images(llava, images, **captions)


def test_prompts(llava):
    assert image_prompt(llava, "hello", chat=False) == "<image>\nhello"
    assert image_prompt(llava, "see <image> this") == "see <image> this"
    written = image_prompt(llava, "hello")
    assert written == image_prompt(llava, "hello", chat=True)
    assert written.startswith("<|im_start|>user")
    assert written.count("<image>") == 1
    assert "hello" in written
    with pytest.raises(InputError, match="prompt is empty"):
        image_prompt(llava, "  ")
    with pytest.raises(InputError, match="'<image>' 2 times"):
        image_prompt(llava, "<image><image> a")
    with pytest.raises(InputError, match="leave '<image>' out"):
        image_prompt(llava, "<image> a", chat=True)
    plain = lens_of("llava")
    plain.processor.chat_template = None
    assert image_prompt(plain, "hello") == "<image> hello"
    with pytest.raises(UnsupportedError, match="no chat template"):
        image_prompt(plain, "hello", chat=True)
    with pytest.raises(UnsupportedError, match="no image placeholder"):
        image_prompt(interp.wrap(build("llama"), processor("llama"), name="tiny"), "hello")
    with pytest.raises(UnsupportedError, match="no image placeholder"):
        image_prompt(interp.wrap(build("llava"), name="bare"), "hello")


def test_a_template_that_writes_the_beginning_does_not_double_it():
    lens = lens_of("llava")
    lens.processor.chat_template = "<bos>" + lens.processor.chat_template
    assert image_prompt(lens, "hello").startswith("<bos>")  # this tokenizer adds none of its own
    from tokenizers.processors import TemplateProcessing

    backend = lens.processor.tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    assert image_prompt(lens, "hello").startswith("<|im_start|>")
    batch = lens.prepare([image_prompt(lens, "hello")], [next(iter(pictures(1).values()))])
    assert batch.inputs["input_ids"][0].tolist().count(1) == 1


def test_images_that_lose_nothing_are_converted_and_others_refused(llava):
    random = np.random.default_rng(0)
    grey = Image.fromarray(random.integers(0, 256, (32, 32), dtype=np.uint8))
    made = checked_image(llava, grey, "g")
    assert made.mode == "RGB"
    assert all(np.array_equal(np.asarray(made)[..., channel], np.asarray(grey)) for channel in range(3))
    palette = pictures(1)["i0"].quantize(16)
    assert np.array_equal(np.asarray(checked_image(llava, palette, "p")), np.asarray(palette.convert("RGB")))
    rgb = pictures(1)["i0"]
    assert checked_image(llava, rgb, "r") is rgb
    for mode in ("RGBA", "LA", "CMYK", "I", "F", "I;16"):
        with pytest.raises(InputError, match=f"image 'x' has the mode '{mode}'; RGB is needed"):
            caption_images(llava, {"x": Image.new(mode, (32, 32))}, prompt="p")
    see_through = palette.copy()
    see_through.info["transparency"] = 0
    with pytest.raises(InputError, match="mode 'P'"):
        checked_image(llava, see_through, "x")
    with pytest.raises(InputError, match="image 'x' is empty: 0 x 5"):
        checked_image(llava, Image.new("RGB", (0, 5)), "x")
    with pytest.raises(InputError, match="image 'x' is a ndarray; give PIL images"):
        checked_image(llava, np.zeros((32, 32, 3)), "x")


def test_a_size_that_nobody_changes_must_be_the_models():
    lens = lens_of("llava")
    inner = lens.processor.image_processor
    inner.do_resize = inner.do_center_crop = False
    assert checked_image(lens, Image.new("RGB", (32, 32)), "x").size == (32, 32)
    with pytest.raises(InputError, match="image 'x' has 40 x 32 pixels, but llava takes 32 x 32"):
        checked_image(lens, Image.new("RGB", (40, 32)), "x")


def test_bad_input(llava):
    images, asked = pictures(1), questions(2)
    with pytest.raises(InputError, match="no images were given"):
        caption_images(llava, {}, prompt="p")
    with pytest.raises(InputError, match="mapping from ids to PIL images, found list"):
        caption_images(llava, list(images.values()), prompt="p")
    with pytest.raises(InputError, match="same as text"):
        caption_images(llava, {1: images["i0"], "1": images["i0"]}, prompt="p")
    for options in ({"batch_size": 0}, {"max_new_tokens": 0}, {"batch_size": True}, {"max_new_tokens": 1.5}):
        with pytest.raises(SettingsError, match="whole number of at least 1"):
            caption_images(llava, images, prompt="p", **options)
        with pytest.raises(SettingsError, match="whole number of at least 1"):
            answer_questions(llava, asked, images, **options)
    with pytest.raises(SettingsError, match=r"holds \{question\} once"):
        answer_questions(llava, asked, images, prompt="is it there?")
    with pytest.raises(InputError, match="question 'q2' is about image 'i1', which is not among the images"):
        answer_questions(llava, questions(3), images)
    with pytest.raises(InputError, match="no questions"):
        answer_questions(llava, [], images)


def test_a_vocabulary_that_cannot_tell_yes_from_no():
    lens = lens_of("llava")

    class Halves:
        """Every word starts with the same token; all else is the real tokenizer's."""

        unk_token_id = 3

        def __init__(self, first):
            self.first = first

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [self.first(text), 9]}

        def decode(self, ids):
            return "x"

        def convert_ids_to_tokens(self, ids):
            return ids

    lens.processor = Halves(lambda text: 7)
    with pytest.raises(UnsupportedError, match="both start with token 7"):
        answer_tokens(lens)
    lens.processor = Halves(lambda text: 3 if "n" in text.lower() else 7)  # no is unknown
    with pytest.raises(UnsupportedError, match="no token starts no"):
        answer_tokens(lens)
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        answer_tokens(interp.wrap(build("llava"), name="bare"))


def test_images_are_loaded_batch_by_batch(llava):
    """Only the images of the current batch are asked for."""
    from collections.abc import Mapping

    class Lazy(Mapping):
        def __init__(self):
            self.asked = []

        def __getitem__(self, one):
            self.asked.append(one)
            return pictures(5)[one]

        def __iter__(self):
            return iter([f"i{i}" for i in range(5)])

        def __len__(self):
            return 5

    lazy, at = Lazy(), []
    caption_images(
        llava, lazy, prompt="p", batch_size=2, max_new_tokens=1, progress=lambda n: at.append(len(lazy.asked))
    )
    assert at == [2, 4, 5]


def test_edits_may_be_made_for_each_batch(llava):
    """A function that returns fixed edits is those edits; one that looks at its batch is called once for each."""
    images, asked = pictures(5), questions(6)
    change = edits.steer(torch.full((32,), 3.0), layers=1)
    captions = {"prompt": "describe", "max_new_tokens": 6, "batch_size": 2, "chat": False}
    seen = []

    def fixed(batch):
        seen.append(len(batch))
        return iter([change])

    assert caption_images(llava, images, edits=fixed, **captions) == caption_images(
        llava, images, edits=change, **captions
    )
    assert seen == [2, 2, 1]
    answers = {"batch_size": 4, "max_new_tokens": 5, "chat": False}
    seen.clear()
    assert answer_questions(llava, asked, images, edits=fixed, **answers) == answer_questions(
        llava, asked, images, edits=change, **answers
    )
    assert seen == [4, 2]


def test_reinforcement_of_each_batch_is_that_by_hand():
    """Every batch has heads of its own, chosen on it: edits of another batch would not fit, or be others."""
    lens = packaged("scenes")
    drawn = list(scenes.scenes("test", 5))
    images = {s.id: s.image for s in drawn}

    def reinforced(batch):
        return vision_reinforcement(lens, batch, scale=4.0)

    found = caption_images(
        lens, images, prompt=scenes.CAPTION_PROMPT, max_new_tokens=12, batch_size=2, edits=reinforced
    )
    ids, text = list(images), image_prompt(lens, scenes.CAPTION_PROMPT)
    for some in (ids[:2], ids[2:4], ids[4:]):
        batch = lens.prepare([text] * len(some), [images[one] for one in some], padding_side="left")
        made = lens.generate(batch, vision_reinforcement(lens, batch, scale=4.0), max_new_tokens=12)
        assert [found[one] for one in some] == [text.strip() for text in made.texts]
    assert found != caption_images(lens, images, prompt=scenes.CAPTION_PROMPT, max_new_tokens=12, batch_size=2)
    asked = [Question(f"{s.id}-{name}", s.id, scenes.existence(name), "yes", "x") for s in drawn for name in s.names]
    answers = answer_questions(lens, asked, images, max_new_tokens=1, batch_size=3, edits=reinforced)
    rows = asked[3:6]
    prompts = [image_prompt(lens, row.text) for row in rows]
    batch = lens.prepare(prompts, [images[row.image] for row in rows], padding_side="left")
    logits = lens.run(batch, "logits@last", vision_reinforcement(lens, batch, scale=4.0)).logits[:, -1].softmax(-1)
    yes, no = (logits[:, ids].sum(-1) for ids in answer_tokens(lens))
    assert [answers.yes_probability[row.id] for row in rows] == pytest.approx((yes / (yes + no)).tolist(), rel=1e-5)
