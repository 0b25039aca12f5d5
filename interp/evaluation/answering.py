"""Captions and answers of a model, in batches: greedy texts, and p(yes) at the first position of the answer.

A batch is padded on the left, so each text is the one that the model gives to its image and prompt alone. p(yes) is
P(yes words) / (P(yes words) + P(no words)) of the next token after the prompt, where the words are "yes", "Yes", "
yes", " Yes" (and no likewise) as far as the vocabulary has them, each by its first token.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from interp.batch import Batch
from interp.edits import Edit
from interp.errors import InputError, SettingsError, UnsupportedError
from interp.evaluation.ids import by_id
from interp.evaluation.questions import Question, check_questions
from interp.inputs import placeholder, tokenizer_of
from interp.lens import Generation, Lens

Fixed = Iterable[Edit | Iterable[Edit]]
Edits = Fixed | Callable[[Batch], Fixed]
Processors = Callable[[Batch], Sequence[Any]]
Watch = Callable[[Batch, Generation], None]
Progress = Callable[[int], None]
_GREY = ("1", "L")


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model answered.

    Attributes:
        texts: the answer to each question, by question id.
        yes_probability: p(yes) of each question, by question id.
    """

    texts: dict[str, str]
    yes_probability: dict[str, float]


def caption_images(
    lens: Lens,
    images: Mapping[Any, Any],
    *,
    prompt: str,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    edits: Edits = (),
    processors: Processors | None = None,
    chat: bool | None = None,
    watch: Watch | None = None,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Caption images with greedy decoding.

    Args:
        lens: a vision-language model with its processor.
        images: a PIL image for each id; it is asked for each only when its batch comes, so that it may load them.
        prompt: what the model is asked (see `image_prompt`).
        max_new_tokens: how long a caption may be, in tokens.
        batch_size: images in one run of the model.
        edits: from `interp.edits` or `interp.steering`, active in the prompt and in every step; or a function that
            makes them for a batch, called once for each as it is run, where they depend on its samples.
        processors: makes transformers `LogitsProcessor`s for a batch, such as `interp.steering.VisualContrast`.
        chat: whether to use the processor's chat template (see `image_prompt`).
        watch: called with each batch and its `Generation`, for what else is to be known of them.
        progress: called after each batch with the number of its images.

    Returns:
        The caption of each image, by id as text, without the blanks around it.

    Raises:
        InputError: there are no images, one is of a mode or size that cannot be used, or the prompt cannot be.
        SettingsError: a count lies outside its range.
        UnsupportedError: the model takes no images, or does not generate.
    """
    _check_counts(max_new_tokens, batch_size)
    known = _Known(images)
    text = image_prompt(lens, prompt, chat=chat)
    edits_of = _for_each(edits)
    found: dict[str, str] = {}
    for ids in _chunks(list(known.keys), batch_size):
        batch = lens.prepare([text] * len(ids), [known.image(lens, one) for one in ids], padding_side="left")
        acting = [] if processors is None else list(processors(batch))
        made = lens.generate(batch, edits_of(batch), max_new_tokens=max_new_tokens, logits_processor=acting or None)
        found |= dict(zip(ids, _stripped(lens, made.texts), strict=True))
        if watch is not None:
            watch(batch, made)
        if progress is not None:
            progress(len(ids))
    return found


def answer_questions(
    lens: Lens,
    questions: Iterable[Question],
    images: Mapping[Any, Any],
    *,
    prompt: str = "{question}",
    max_new_tokens: int = 8,
    batch_size: int = 8,
    edits: Edits = (),
    processors: Processors | None = None,
    chat: bool | None = None,
    progress: Progress | None = None,
) -> Answers:
    """Answer yes/no questions about images with greedy decoding, and read p(yes) at the first position of the answer.

    Args:
        lens: a vision-language model with its processor.
        questions: from `pope_questions` or `read_questions`.
        images: a PIL image for each image id (others may be there too).
        prompt: what is put around a question, with `{question}`, such as "{question} Answer with yes or no.".
        max_new_tokens: how long an answer may be, in tokens.
        batch_size: questions in one run of the model.
        edits: from `interp.edits` or `interp.steering`, active in the prompt and in every step; or a function that
            makes them for a batch, called once for each as it is run, where they depend on its samples.
        processors: makes transformers `LogitsProcessor`s for a batch. p(yes) is of what they make of the logits; of one
            with a method `uncut` (those of `interp.steering`) without its cut-off, which would leave 0 and 1.
        chat: whether to use the processor's chat template (see `image_prompt`).
        progress: called after each batch with the number of its questions.

    Raises:
        InputError: a question without its image, an image of a mode or size that cannot be used, or a prompt that
            cannot be used.
        SettingsError: a count lies outside its range, or the prompt has no `{question}`.
        UnsupportedError: the model takes no images, does not generate, or its vocabulary does not tell yes from no by
            the first token.
    """
    _check_counts(max_new_tokens, batch_size)
    if prompt.count("{question}") != 1:
        raise SettingsError(f"the prompt holds {{question}} once, found {prompt!r}.")
    asked, known = check_questions(questions), _Known(images)
    for question in asked.values():
        if question.image not in known.keys:
            raise InputError(
                f"question {question.id!r} is about image {question.image!r}, which is not among the images."
            )
    yes, no = answer_tokens(lens)
    edits_of = _for_each(edits)
    texts: dict[str, str] = {}
    chance: dict[str, float] = {}
    for ids in _chunks(list(asked), batch_size):
        rows = [asked[one] for one in ids]
        prompts = [image_prompt(lens, prompt.replace("{question}", row.text), chat=chat) for row in rows]
        pictures = {image: known.image(lens, image) for image in dict.fromkeys(row.image for row in rows)}
        batch = lens.prepare(prompts, [pictures[row.image] for row in rows], padding_side="left")
        changes, acting = edits_of(batch), [] if processors is None else list(processors(batch))
        last = lens.run(batch, ["logits@last"], changes).logits[:, -1].double()
        for one in acting:
            last = getattr(one, "uncut", one)(batch.inputs["input_ids"], last)
        last = last.cpu()
        share = torch.sigmoid(last[:, yes].logsumexp(-1) - last[:, no].logsumexp(-1))
        chance |= dict(zip(ids, share.tolist(), strict=True))
        made = lens.generate(batch, changes, max_new_tokens=max_new_tokens, logits_processor=acting or None).texts
        texts |= dict(zip(ids, _stripped(lens, made), strict=True))
        if progress is not None:
            progress(len(ids))
    return Answers(texts, chance)


def image_prompt(lens: Lens, text: str, *, chat: bool | None = None) -> str:
    """A prompt about one image as the model's processor wants it: with its image placeholder once.

    A text that holds the placeholder once is taken as it is. Otherwise the processor's chat template writes the turn of
    the user with the image in front, where there is one and `chat` is not False; without it the placeholder and a line
    break (for models without a chat template: a blank) are put in front.

    Args:
        lens: a vision-language model with its processor.
        text: what is asked.
        chat: True insists on the chat template, False does without; None takes it where there is one.

    Raises:
        InputError: the text is empty or holds the placeholder twice, or holds it although the template places it.
        UnsupportedError: the processor has no image placeholder, or no chat template although one is asked for.
    """
    processor: Any = lens.processor
    token = None if processor is None else placeholder(processor)
    if processor is None or token is None:
        raise UnsupportedError(
            f"{lens.name} has no image placeholder: it needs a vision-language model with its processor."
        )
    if not text.strip():
        raise InputError("the prompt is empty.")
    count = text.count(token)
    if count > 1:
        raise InputError(
            f"the prompt holds the image placeholder {token!r} {count} times; once, or not at all: {text!r}."
        )
    template = getattr(processor, "chat_template", None)
    if chat and not template:
        raise UnsupportedError(f"the processor of {lens.name} has no chat template; leave chat out.")
    if count:
        if chat:
            raise InputError(f"the chat template places the image: leave {token!r} out of the prompt, or chat.")
        return text
    if not template or chat is False:
        return f"{token}{chr(10) if template else ' '}{text}"
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    written = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    begin = getattr(tokenizer_of(processor), "bos_token", None)
    if begin and written.startswith(begin) and _adds_begin(lens):
        written = written.removeprefix(begin)  # the tokenizer puts it there itself
    return written


def answer_tokens(lens: Lens) -> tuple[list[int], list[int]]:
    """The first tokens of yes and of no, in the spellings that the vocabulary has.

    A first token that is blank or the unknown token tells nothing and is left out.

    Raises:
        UnsupportedError: there is no tokenizer, nothing is left of one of the two, or they share a token.
    """
    tokenizer = tokenizer_of(lens.processor)
    if tokenizer is None:
        raise UnsupportedError(f"{lens.name} has no tokenizer, so yes and no cannot be found in its vocabulary.")
    found: dict[str, list[int]] = {}
    for word in ("yes", "no"):
        first = []
        for text in (word, word.title(), f" {word}", f" {word.title()}"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if ids and ids[0] != tokenizer.unk_token_id and tokenizer.decode(ids[:1]).strip():
                first.append(int(ids[0]))
        found[word] = list(dict.fromkeys(first))
    shared = sorted(set(found["yes"]) & set(found["no"]))
    if not found["yes"] or not found["no"] or shared:
        what = (
            f"both start with token {shared[0]} ({tokenizer.decode(shared[:1])!r})"
            if shared
            else f"no token starts {'yes' if not found['yes'] else 'no'}"
        )
        raise UnsupportedError(f"p(yes) cannot be read from {lens.name}: {what}.")
    return found["yes"], found["no"]


def checked_image(lens: Lens, image: Any, name: str) -> Any:
    """One image in RGB, as the model's processor takes it.

    Grey pictures (modes L and 1) get three equal channels, and palettes without transparency their colours: nothing is
    lost. Every other mode is refused, for it would lose something: transparency needs a background, CMYK a profile,
    16-bit and float pictures a range. The processor brings the size to the model's, unless it says that it does not.

    Raises:
        InputError: it is no PIL image, empty, of another mode, or of a size that the model does not take.
    """
    from PIL import Image

    if not isinstance(image, Image.Image):
        raise InputError(f"image {name!r} is a {type(image).__name__}; give PIL images.")
    if 0 in image.size:
        raise InputError(f"image {name!r} is empty: {image.width} x {image.height} pixels.")
    if image.mode in _GREY or (image.mode == "P" and "transparency" not in image.info):
        image = image.convert("RGB")
    if image.mode != "RGB":
        raise InputError(
            f"image {name!r} has the mode {image.mode!r}; RGB is needed (grey pictures and plain palettes are "
            "converted). Convert it yourself, such as by pasting it on a background: what is lost is your choice."
        )
    size = _fixed_size(lens)
    if size is not None and image.size != (size, size):
        raise InputError(
            f"image {name!r} has {image.width} x {image.height} pixels, but {lens.name} takes {size} x {size} and its "
            "processor does not resize."
        )
    return image


class _Known:
    """Images by id as text; each is asked for when it is needed."""

    def __init__(self, images: Mapping[Any, Any]) -> None:
        if not isinstance(images, Mapping):
            raise InputError(f"images are a mapping from ids to PIL images, found {type(images).__name__}.")
        self.keys = by_id({key: key for key in images}, "images")
        self.images = images

    def image(self, lens: Lens, one: str) -> Any:
        return checked_image(lens, self.images[self.keys[one]], one)


def _fixed_size(lens: Lens) -> int | None:
    """The side that images must have, where the processor neither resizes nor crops."""
    inner = getattr(lens.processor, "image_processor", None)
    if inner is None or getattr(inner, "do_resize", True) or getattr(inner, "do_center_crop", False):
        return None
    size = getattr(getattr(lens.model.config, "vision_config", None), "image_size", None)
    return size if isinstance(size, int) else None


def _adds_begin(lens: Lens) -> bool:
    tokenizer: Any = tokenizer_of(lens.processor)
    return tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def _for_each(edits: Edits) -> Callable[[Batch], list[Edit | Iterable[Edit]]]:
    """The edits of a batch; what is fixed may be an iterator, and is read once."""
    if callable(edits):
        return lambda batch: list(edits(batch))
    fixed = list(edits)
    return lambda batch: fixed


def _chunks(items: Sequence[str], size: int) -> list[list[str]]:
    return [list(items[at : at + size]) for at in range(0, len(items), size)]


def _stripped(lens: Lens, texts: Sequence[str] | None) -> list[str]:
    if texts is None:
        raise UnsupportedError(f"{lens.name} has no tokenizer, so its answers cannot be read.")
    return [text.strip() for text in texts]


def _check_counts(max_new_tokens: int, batch_size: int) -> None:
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SettingsError(f"{name} is a whole number of at least 1, found {value!r}.")
