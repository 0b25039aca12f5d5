"""Token-level vision-aware head divergence (T-VHD): how much each token of an answer rests on the image.

Source: He et al. 2025, "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", arXiv
2412.13949. With VHD(l, i; t) the divergence of [`vision_divergence`][interp.heads.vision_divergence.vision_divergence]
at the position that predicts token t of the answer,

    T-VHD(t) = sum over layers l, sum over the k heads with the largest VHD(l, i; t) in layer l

The paper reports that hallucinated words have a lower T-VHD. It does not give its k: here it is half of a layer's
heads. Nor does it say which token of a word counts (`AnswerScores.words` takes the first) or a sentence's (the mean).

The answer is read in one pass with the image and one without, both with the whole answer as their text, which gives
what two branches that decode step by step give: no position of a decoder sees a later one. Head outputs are kept at
the positions of the answer alone, for as many layers as fit into `memory`, and reduced to one number for each head
before the next group of layers, whose run begins anew and ends at its last layer: g groups cost (g + 1) / 2 passes in
each branch. What is left is batch x token x layer x head at most.

What to know. Both hallucination and T-VHD vary with the place in a caption: compare with a word's position before
believing a difference. Sums over layers are ruled by the layers with the largest outputs; see `form`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.attribution.common import token_text
from interp.attribution.continued import continued
from interp.batch import Batch, Selection
from interp.edits import Edit
from interp.errors import SettingsError
from interp.heads.answer_scores import AnswerScores, answer_spans
from interp.heads.common import head_grid, settings_of
from interp.heads.vision_divergence import UNITS, Form, Outliers, check_options, ruled
from interp.inputs import tokenizer_of
from interp.lens import Lens
from interp.reads import Read
from interp.without_image import Mode, without_image


def token_divergence(
    lens: Lens,
    batch: Batch,
    tokens: Int[Tensor, "batch new"],
    *,
    without: Mode = "drop",
    k: int | None = None,
    form: Form = "absolute",
    outliers: Outliers = "keep",
    per_head: bool = False,
    memory: int = 2**28,
    seed: int = 0,
) -> AnswerScores:
    """How much each token of an answer rests on the image.

    Args:
        lens: a vision-language model.
        batch: prompts with images, padded on the left, as they were given to `lens.generate`.
        tokens: `lens.generate(batch).tokens`. A sample's first end or padding token and all behind it are left out.
        without: how the images are taken away: `drop drop_keep_positions mask zero mean noise`.
        k: how many heads count in each layer (all where there are fewer); None for half of them, at least one.
        form: `absolute`, `relative`, `cosine` or `projected`.
        outliers: `keep`, or give heads that the paper's rule leaves out a zero (`biased` or `unbiased`).
        per_head: whether to keep the divergence of every head.
        memory: bytes of head outputs held at a time; those of one layer at least are.
        seed: for `without="noise"`.

    Returns:
        Scores [batch, token], with the divergences [batch, token, layer, head] as `heads` if asked for.

    Raises:
        UnknownNameError: an unknown option value.
        SettingsError: k or memory lies outside its range.
        UnsupportedError: the model takes no images, cannot do without them in this way, or cannot be continued.
        InputError: the batch holds no images or is padded on the right, or no sample has an answer.
    """
    check_options(form, outliers)
    for name, value in (("k", k), ("memory", memory)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise SettingsError(f"{name} is a whole number of at least 1, found {value!r}.")
    whole, predicts = continued(lens, batch, tokens)
    blind = without_image(lens, whole, without, seed=seed)
    site = "result" if form == "projected" else "z"
    layers, counts, valid = head_grid(lens, site=site)
    chosen = whole.select(predicts)
    size, width = chosen.index.shape
    each = 2 * size * width * torch.finfo(lens.dtype).bits // 8
    groups = _groups(lens, layers, each, site, memory)
    seen = _outputs(lens, whole, site, predicts, groups, ())
    unseen = _outputs(lens, blind.batch, site, blind.columns(predicts), groups, blind.edits)
    scores = torch.zeros(size, width)
    heads = torch.full((size, width, *valid.shape), torch.nan) if per_head else None
    for (layer, one), (_, two) in zip(seen, unseen, strict=True):
        found = ruled(one, two, form, outliers)[0].cpu()
        count = max(1, counts[layer] // 2) if k is None else min(k, counts[layer])
        scores += found.topk(count, dim=-1).values.sum(-1)
        if heads is not None:
            heads[:, :, layer, : counts[layer]] = found
    own = {"form": form, "outliers": outliers, "site": site, "k": "half" if k is None else k}
    settings = settings_of(lens, batch, method="token_divergence", **own, **blind.settings)
    return _answers(lens, whole, chosen, scores, heads, UNITS[form], settings)


def _groups(lens: Lens, layers: Sequence[int], each: int, site: str, memory: int) -> list[list[int]]:
    """Layers that are read together: as many as fit, of which a number costs `each` bytes in both branches."""
    tower = lens.anatomy.towers[lens.anatomy.main]
    groups: list[list[int]] = []
    room = 0
    for layer in layers:
        part = lens.anatomy.attention(None, layer, site)
        need = each * part.n_heads * (part.d_value if site == "z" else tower.d_model)
        if not groups or room + need > memory:
            groups.append([])
            room = 0
        groups[-1].append(layer)
        room += need
    return groups


def _outputs(
    lens: Lens,
    batch: Batch,
    site: str,
    positions: Bool[Tensor, "batch pos"],
    groups: Sequence[Sequence[int]],
    edits: Sequence[Edit],
) -> Iterator[tuple[int, Float[Tensor, "batch token head d"]]]:
    """The head outputs of each layer at some positions, lowest layer first; each run ends at its group's last layer."""
    for group in groups:
        read = Read(site, layers=tuple(group), positions=positions)
        below = [e for e in edits if e.read.layers is not None and e.read.layers[0] <= group[-1]]
        values = dict(lens.run(batch, read, below).values)
        for layer in group:
            yield layer, values.pop((read, layer))


def _answers(
    lens: Lens,
    whole: Batch,
    chosen: Selection,
    scores: Tensor,
    heads: Tensor | None,
    unit: str,
    settings: dict[str, Any],
) -> AnswerScores:
    """A result; a position's number is that of the token that it predicts."""
    tokenizer = tokenizer_of(lens.processor)
    size, width = scores.shape
    spans = torch.zeros(size, width, 2, dtype=torch.long)
    tokens: list[list[str]] = []
    texts: list[str] = []
    for i in range(size):
        ids = whole.inputs["input_ids"][i, chosen.index[i][chosen.valid[i]] + 1].tolist()
        text, places = answer_spans(tokenizer, ids)
        spans[i, : len(ids)] = torch.tensor(places, dtype=torch.long).reshape(-1, 2)
        tokens.append([token_text(tokenizer, x) for x in ids])
        texts.append(text)
    return AnswerScores(scores, spans, tokens, texts, "token_divergence", unit, settings, heads)
