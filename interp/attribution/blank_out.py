"""Blank-out: what happens to the answer when one token, or one image patch, is taken away.

Source: Zeiler and Fergus 2014, "Visualizing and Understanding Convolutional Networks" (arXiv 1311.2901), section 4.2,
for pictures; Li, Monroe, Jurafsky 2016, "Understanding Neural Networks through Representation Erasure" (arXiv
1612.08220), and, as `blank-out`, Abnar and Zuidema 2020 (arXiv 2005.00928), section 5, for text. With y the answer's
number,

    score(j) = y(all) - y(without j)

so that a token that speaks for the answer has a positive score. What "without" means is chosen:

    replace   the token becomes the tokenizer's mask token, else its unknown, else its padding token
    mask      no other position may attend to the token, in any layer (its own position still does)
    drop      the prompt without the token; the positions close up behind it

and for patches and image tokens: `mask` as above; `mean`, the pixels become the picture's mean colour; `blur`, they
become those of the picture under a Gaussian (`sigma` pixels, half the box's longer side by default). Columns of a
vision tower that have no pixels of their own (class token, registers) are always masked.

What to know: under `mask`, and in a decoder, a target's own token has its score from its own position alone, so `mask`
gives it exactly zero; under `drop` the position to read from would be gone, and it is set to zero. Every mode makes an
input that the model did not see in training, each in another way: compare two.

Departures. Abnar and Zuidema replace by the unknown token and take the probability; both can be had (`token="[UNK]"`,
`measure="probability"`). Zeiler and Fergus slide a grey square; here a box is exactly what one token stands for.
"""

from __future__ import annotations

import torch

from interp.attribution.blanks import Blanks, ImageMode, Mode, causal, check_modes, source_tower, waves
from interp.attribution.common import Stream, settings_of, stream_of, token_scores
from interp.attribution.targets import MEASURES, Answers, Measure, question
from interp.batch import Batch
from interp.errors import InputError
from interp.lens import Lens
from interp.reads import Positions, Read
from interp.tokens import TokenScores


def blank_out(
    lens: Lens,
    batch: Batch,
    *,
    target: Positions | None = None,
    answers: Answers | None = None,
    wrong: Answers | None = None,
    mode: Mode = "replace",
    image: ImageMode = "mask",
    token: str | int | None = None,
    sigma: float | None = None,
    measure: Measure = "logit",
    tower: str | None = None,
    batch_size: int = 32,
) -> TokenScores:
    """The answer's number less the one without each source token. One forward pass for each token of each sample.

    All targets of a sample share them. The answers are those of the whole prompt, also where None chooses them.

    Args:
        lens: a model with logits.
        batch: prompts.
        target: positions as in a read, whose logits are explained; None for the last one (a classifier's logits belong
            to the whole input).
        answers: for each sample a text of one token or an id (a class for a classifier), or one for each target; None
            for the largest logit.
        wrong: the same; their number is subtracted.
        mode: what is done to text tokens.
        image: what is done to patches and image tokens.
        token: for `replace`, which token: its text or id; None takes the tokenizer's mask, unknown or padding token.
        sigma: for `blur`, in pixels of the picture that the model gets.
        measure: `logit`, `probability` or `logprob`.
        tower: where the sources stand: None for the main tower, or the encoder of an encoder-decoder.
        batch_size: how many rows a run may have; at least one for each sample.

    Returns:
        Scores [batch, target, source] with their sign, in units of the measure; a decoder's future tokens have exactly
        zero (zero within rounding in models whose layers have no patterns).

    Raises:
        UnknownNameError: a mode, measure, tower, position or class does not exist.
        SettingsError: options that contradict each other or lie outside their range.
        InputError: a position outside a sample, answers that do not fit, a token that is none, or `drop` or `mask`
            where nothing would be left.
        UnsupportedError: no logits; a mode that the tower cannot do.
    """
    check_modes(mode, image, token, sigma, batch_size)
    asked = question(lens, batch, target, answers, wrong, measure=measure)
    main = lens.anatomy.main
    name = source_tower(lens, tower, "blank_out")
    sources = asked.stream if name == main else stream_of(lens, batch, name)
    last = not asked.pooled and (target is None or (isinstance(target, str) and target == "last"))
    read = Read("logits", positions="last") if last else Read("logits")
    pixels = sources.spans.get("image", torch.zeros_like(sources.mask))
    kinds = {"text": sources.mask & ~pixels, "image": pixels}
    blanks = Blanks(lens, batch, asked, sources, mode, image, token, sigma, kinds)
    _check_left(blanks.how, sources)
    width = sources.mask.shape[1]
    without = torch.zeros(*asked.chosen.index.shape, width)
    for columns in blanks.kinds.values():
        counts = columns.sum(1)
        most = int(counts.max())
        order = torch.argsort((~columns).to(torch.int8), dim=1, stable=True)[:, :most]
        real = torch.arange(most) < counts[:, None]
        # Fillers blank their sample's first column of the kind, or nothing, once more; nobody looks at them.
        order = torch.where(real, order, order[:, :1])
        for rows, some in waves(batch, most, batch_size):
            gone, valid = order[:, some].T.reshape(-1), real[:, some].T.reshape(-1)
            copies = some.stop - some.start
            blanked = blanks.of(rows, torch.nn.functional.one_hot(gone, width).bool())
            logits = lens.run(blanked.batch, read, blanked.edits).logits
            values = asked.values(logits, copies=copies, columns=blanked.columns).cpu()
            sample = torch.arange(len(batch)).repeat(copies)[valid]
            without[sample, :, gone[valid]] = values[valid]
    scores = asked.value[:, :, None] - without
    if mode == "drop" and name == main:
        own = torch.nn.functional.one_hot(asked.chosen.index, width).bool()
        scores = scores.masked_fill(own & (not asked.pooled), 0)
    if name == main and not asked.pooled:
        later = torch.arange(width) > asked.chosen.index[:, :, None]
        if bool((later & sources.mask[:, None]).any()) and causal(lens, batch):
            scores = scores.masked_fill(later, 0)
    settings = settings_of(lens, batch, "blank_out", tower=tower, **blanks.settings) | asked.settings(lens)
    of = None if sources is asked.stream else asked.stream
    return token_scores("blank_out", scores, asked.chosen, sources, settings, of=of, unit=MEASURES[measure])


def _check_left(how: dict[str, str], sources: Stream) -> None:
    """Whether every sample has something left when one of its tokens is gone."""
    single = sources.mask.sum(1) < 2
    if "drop" in how.values() and bool(single.any()):
        raise InputError(f"sample {int(single.nonzero()[0])} is one token: nothing would be left without it.")
    if "mask" in how.values() and sources.tower == "encoder" and bool(single.any()):
        raise InputError("a sample's encoder reads one token: masked, it leaves the decoder nothing to attend to.")
