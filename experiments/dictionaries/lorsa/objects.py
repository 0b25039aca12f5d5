"""Where captions of scenes name objects: what the heads of a Lorsa do there, and what the words lose without them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

import interp
from experiments.dictionaries.scenes import auroc, object_shares
from interp import evaluation
from interp.batch import Batch
from interp.data import scenes
from interp.dictionaries import lorsa

OWN = 0.1  # share of an image token from which on it is the object's
ON_IMAGE = 0.5  # share of a head's z-pattern on image tokens from which on it draws on the picture
CHUNK = 48  # rows in a pass


@dataclass(frozen=True, slots=True, eq=False)
class Mentions:
    """The places of captions before the words of objects, `n` in all, and what was seen there.

    Attributes:
        scene: number of the scene [n].
        name: the object [n].
        column: the token that predicts the word [n].
        known: whether the model gives the word the highest probability [n].
        own: the image tokens of the object [n, image].
        other: those of other objects, and not of it [n, image].
        latents: of the Lorsa [n, n_ov].
        on_image, on_own, on_other: share of each head's |z-pattern| on the image, on `own` and on `other`, NaN where it
            does not fire [n, n_ov].
        z: what the layer's own heads take up, heads side by side [n, head * d].
        pattern: of the layer's own heads on the image tokens [n, head, image].
        moved: the same weighted with the lengths of what is moved, of all that the head moves there.
    """

    scene: np.ndarray
    name: np.ndarray
    column: np.ndarray
    known: np.ndarray
    own: np.ndarray
    other: np.ndarray
    latents: np.ndarray
    on_image: np.ndarray
    on_own: np.ndarray
    on_other: np.ndarray
    z: np.ndarray
    pattern: np.ndarray
    moved: np.ndarray

    def at(self, rows: np.ndarray) -> Mentions:
        """Some of them."""
        return Mentions(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


def captioned(lens: interp.Lens, some: Sequence[scenes.Scene], until: Sequence[str | None] | None = None) -> Batch:
    """The scenes with their captions, or what stands before the word of an object; padded on the right, or left."""
    texts = []
    for one, name in zip(some, until or [None] * len(some), strict=True):
        words = scenes.caption(one.names).split()
        said = " ".join(words[: None if name is None else words.index(name)])
        texts.append(evaluation.image_prompt(lens, f"{scenes.CAPTION_PROMPT} {said}", chat=False))
    side = "right" if until is None else "left"
    return lens.prepare(texts, [one.image for one in some], padding_side=side)


def own_tokens(batch: Batch, some: Sequence[scenes.Scene]) -> list[dict[str, np.ndarray]]:
    """The image tokens of each object of each scene."""
    return [{name: share >= OWN for name, share in held.items()} for held in object_shares(batch, list(some))]


def before(batch: Batch, row: int, word: int) -> int:
    """The column before a word."""
    return int((batch.inputs["input_ids"][row] == word).nonzero()[0]) - 1


def word_ids(lens: interp.Lens) -> dict[str, int]:
    """The token of each object's name."""
    tokenizer = interp.inputs.tokenizer_of(lens.processor)
    return {name: tokenizer.convert_tokens_to_ids(name) for name in scenes.NAMES}


@torch.no_grad()
def mentions(
    lens: interp.Lens, one: lorsa.Lorsa, rule: lorsa.AttentionRule, drawn: Sequence[scenes.Scene]
) -> tuple[Mentions, np.ndarray]:
    """All mentions in the captions of some scenes, and how often each head fires in the text [n_ov]."""
    found: list[dict[str, np.ndarray]] = []
    firings, tokens, ids = torch.zeros(one.cfg.n_ov), 0, word_ids(lens)
    for start in range(0, len(drawn), CHUNK):
        some = drawn[start : start + CHUNK]
        batch = captioned(lens, some)
        trace = lens.run(batch, [*rule.reads, f"pattern.{rule.layer}", "logits"])
        x, z = rule.inputs(trace["resid_pre", rule.layer]), trace["z", rule.layer].flatten(2)
        marks, image = own_tokens(batch, some), batch.span("image")
        latents = one.encode(x, real=batch.mask)
        text = batch.mask & ~image
        firings, tokens = firings + (latents[text] > 0).sum(0), tokens + int(text.sum())
        rows = [(row, name) for row, scene in enumerate(some) for name in scene.names]
        row = torch.tensor([r for r, _ in rows])
        column = torch.tensor([before(batch, r, ids[name]) for r, name in rows])
        own = torch.from_numpy(np.stack([marks[r][name] for r, name in rows]))
        objects = torch.from_numpy(np.stack([np.any(list(marks[r].values()), axis=0) for r, _ in rows]))
        keys = torch.stack([image[r].nonzero()[:, 0] for r in row.tolist()])
        values = torch.einsum("bsd,hdv->bshv", x, rule.W_V) + rule.b_V
        lengths = torch.einsum("bshv,hvd->bshd", values, rule.W_O).norm(dim=-1)
        pattern = trace["pattern", rule.layer][row, :, column]
        moved = pattern * lengths[row].transpose(1, 2)
        moved = moved / moved.sum(-1, keepdim=True)
        spread = [each.gather(2, keys[:, None].expand(-1, each.shape[1], -1)) for each in (pattern, moved)]
        best = trace.logits[row, column].argmax(-1)
        shares = _shares(one, x, batch.mask, row, column, keys, own, objects & ~own)
        parts = (latents[row, column], *shares, z[row, column], *spread)
        found.append(
            {
                "scene": row.numpy() + start,
                "name": np.array([name for _, name in rows]),
                "column": column.numpy(),
                "known": (best == torch.tensor([ids[name] for _, name in rows])).numpy(),
                "own": own.numpy(),
                "other": (objects & ~own).numpy(),
                **dict(zip([f.name for f in fields(Mentions)][6:], (part.numpy() for part in parts), strict=True)),
            }
        )
    whole = {key: np.concatenate([part[key] for part in found]) for key in found[0]}
    return Mentions(**whole), (firings / tokens).numpy()


def _shares(
    one: lorsa.Lorsa, x: Tensor, real: Tensor, row: Tensor, column: Tensor, keys: Tensor, *groups: Tensor
) -> list[Tensor]:
    """Shares of the z-patterns of the heads that fire at some places, on the image and on groups of image tokens."""
    fired = lorsa.fired(one, x, real=real)
    place = torch.full(real.shape, -1)
    place[row, column] = torch.arange(len(row))
    which = place[fired.sample, fired.query]
    fired, which = fired.at(which >= 0), which[which >= 0]
    size = lorsa.z_patterns(one, x, fired, real=real).abs()
    picture = size.gather(1, keys[which]) / size.sum(1, keepdim=True)
    out = []
    for mark in (torch.ones_like(groups[0]), *groups):
        table = torch.full((len(row), one.cfg.n_ov), torch.nan)
        table[which, fired.head] = (picture * mark[which]).sum(1)
        out.append(table)
    return out


def on_picture(seen: Mentions, name: str) -> np.ndarray:
    """The heads whose z-patterns lie on the picture where they fire before the word of an object, bools [n_ov]."""
    mine = seen.on_image[seen.name == name]
    fires = (~np.isnan(mine)).sum(0)
    return np.divide(np.nansum(mine, 0), fires, out=np.zeros(len(fires)), where=fires > 0) >= ON_IMAGE


def chosen(seen: Mentions, names: Sequence[str], most: int = 3) -> dict[str, list[int]]:
    """For each object the heads whose latents tell its word from others best, of those that draw on the picture."""
    found = {}
    for name in names:
        score = np.where(on_picture(seen, name), auroc(seen.latents, seen.name == name), 0)
        found[name] = np.argsort(-score, kind="stable")[:most].tolist()
    return found


def matched(
    rates: np.ndarray, own: Sequence[int], seed: int, *, near: int = 10, without: Sequence[int] = ()
) -> list[int]:
    """For each of some heads another that fires about as often: one of the nearest, by chance; `without` some more."""
    random, found = np.random.default_rng(seed), []
    for head in own:
        order = np.argsort(abs(rates - rates[head]), kind="stable")
        order = order[~np.isin(order, [*own, *without, *found])][:near]
        found.append(int(random.choice(order)))
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Removal:
    """What is taken away for each of some mentions, the Lorsa's error kept unless `error` is False.

    Attributes:
        heads: these [n, n_ov]; None for none.
        tokens: only what these image tokens give to the heads, at text tokens [n, image]; None for the whole latent.
        error: whether the error stays.
    """

    heads: np.ndarray | None = None
    tokens: np.ndarray | None = None
    error: bool = True


@torch.no_grad()
def effects(
    lens: interp.Lens,
    one: lorsa.Lorsa,
    rule: lorsa.AttentionRule,
    drawn: Sequence[scenes.Scene],
    seen: Mentions,
    removals: Mapping[str, Removal],
) -> dict[str, np.ndarray]:
    """What log-probabilities gain: of each mention's word, and of other words of its caption, mean [2, n].

    Other words count where the model gives them the highest probability as it is; NaN where there is none.
    """
    ids, found = word_ids(lens), {what: np.full((2, len(seen.scene)), np.nan) for what in removals}
    for start in range(0, len(seen.scene), CHUNK):
        rows = np.arange(start, min(start + CHUNK, len(seen.scene)))
        some = [drawn[n] for n in seen.scene[rows]]
        batch = captioned(lens, some)
        trace = lens.run(batch, [rule.reads[0], "logits"])
        plain = trace.logits.log_softmax(-1)
        places = [{name: (before(batch, r, ids[name]), ids[name]) for name in s.names} for r, s in enumerate(some)]
        named = [
            {n: p for n, p in mine.items() if int(plain[r, p[0]].argmax()) == p[1]} for r, mine in enumerate(places)
        ]
        given = _given(one, rule.inputs(trace["resid_pre", rule.layer]), batch)
        for what, removal in removals.items():
            change = _change(removal, rows, given, one.cfg.n_ov, batch.mask.shape)
            edits = lorsa.replace_attention(one, rule, batch.mask, change=change, error=removal.error)
            gain = lens.run(batch, "logits", edits=edits).logits.log_softmax(-1) - plain
            for r, n in enumerate(rows):
                own = str(seen.name[n])
                found[what][0, n] = gain[r, places[r][own][0], places[r][own][1]]
                rest = [float(gain[r, c, i]) for name, (c, i) in named[r].items() if name != own]
                if rest:
                    found[what][1, n] = np.mean(rest)
    return found


def _given(one: lorsa.Lorsa, x: Tensor, batch: Batch) -> tuple[lorsa.Fired, Tensor]:
    """The heads that fire at text tokens, and what each image token gives to them."""
    image = batch.span("image")
    fired = lorsa.fired(one, x, real=batch.mask)
    fired = fired.at(~image[fired.sample, fired.query])
    keys = torch.stack([row.nonzero()[:, 0] for row in image])
    return fired, lorsa.z_patterns(one, x, fired, real=batch.mask).gather(1, keys[fired.sample])


def _change(removal: Removal, rows: np.ndarray, given: tuple[lorsa.Fired, Tensor], n_ov: int, shape: torch.Size):
    """What is done to the latents of a pass; None for nothing."""
    if removal.heads is None:
        return None
    heads = torch.from_numpy(removal.heads[rows])
    if removal.tokens is None:
        return lambda latents: latents.masked_fill(heads[:, None], 0)
    fired, given_by = given
    mine = heads[fired.sample, fired.head]
    tokens = torch.from_numpy(removal.tokens[rows])
    lost = torch.zeros(*shape, n_ov)
    lost[fired.sample[mine], fired.query[mine], fired.head[mine]] = (given_by * tokens[fired.sample]).sum(1)[mine]
    return lambda latents: (latents - lost).clamp_min(0)


def by_scene(values: np.ndarray, scene: np.ndarray) -> np.ndarray:
    """Means of the scenes that have a number [..., scene]."""
    there = (scene[:, None] == np.unique(scene)) & ~np.isnan(values.reshape(-1, len(scene))[0])[:, None]
    there = there[:, there.any(0)].astype(float)
    return np.nan_to_num(values) @ there / there.sum(0)


def weights(seen: Mentions, resamples: int, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each mention counts in resamples of the scenes, [draw, n], in pieces."""
    _, index = np.unique(seen.scene, return_inverse=True)
    for drawn in evaluation.intervals.draws([np.arange(index.max() + 1)], resamples, seed):
        yield drawn[:, index]
