"""Activation patching over a grid: every site, layer, head and group of positions, recomputing only what changes.

Sources: Meng, Bau, Andonian, Belinkov 2022, "Locating and Editing Factual Associations in GPT", arXiv 2202.05262
(restoring states of the clean run in a corrupted one); Zhang, Nanda 2023, "Towards Best Practices of Activation
Patching", arXiv 2309.16042 (direction and metrics); Heimersheim, Nanda 2024, arXiv 2404.15255.

    denoise:  value = metric(corrupt run with cell <- clean),     effect = (value - corrupt) / (clean - corrupt)
    noise:    value = metric(clean run with cell <- corrupt),     effect = (value - clean) / (corrupt - clean)

The published loops make one whole run for each cell. Here a cell is the base run up to the layer in which it is patched
and up to its first changed position, so that the base run's streams, keys and values stand in for both; the rest of all
cells travels together, each joining at its own layer. The numbers are those of the loop but for rounding.

What it does not see: denoising finds what suffices, noising what is needed, and where two components can do each
other's work the two differ; a probability saturates where a logit difference does not; keys and values are patched as
the kernel sees them, after the rotation.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor

from interp.batch import Batch
from interp.errors import SettingsError, UnsupportedError
from interp.heads.common import Answers
from interp.lens import Lens
from interp.reads import Positions
from interp.tracing import plain
from interp.tracing.carried import Carried
from interp.tracing.causal_map import CausalMap
from interp.tracing.checkpoint import Checkpoint, fingerprint, held_memory
from interp.tracing.grid import Groups, Heads
from interp.tracing.grid_run import Direction, GridRun
from interp.tracing.metrics import Metric
from interp.tracing.pair import Found, Pair
from interp.tracing.planning import Limits, limits_of
from interp.tracing.progress import Bar
from interp.tracing.prompts import Edits


def patch_sweep(
    lens: Lens,
    clean: Batch | Sequence[Batch],
    corrupt: Batch | Sequence[Batch],
    *,
    sites: str | Sequence[str] = ("resid_pre",),
    layers: int | Sequence[int] | None = None,
    positions: Groups = "each",
    heads: Heads = "each",
    window: int = 1,
    metric: Metric | None = None,
    answers: Answers | None = None,
    wrong: Answers | None = None,
    at: Positions = "last",
    direction: Direction = "denoise",
    clean_edits: Edits = (),
    corrupt_edits: Edits = (),
    severed: str | None = None,
    min_gap: float = 0.1,
    memory: int | None = None,
    rows: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> CausalMap:
    """Patch every cell of a grid from one run into the other, and measure what that does at the logits.

    Args:
        lens: a language model (decoder or encoder-decoder), with or without images.
        clean: the prompts on which the model does what is studied, in one batch or several.
        corrupt: the same prompts changed, prepared alike: as many columns, the same padding.
        sites: `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out`, `z`, `q`, `k`, `v`, `pattern`, ...; with
            `cross:` in front those of cross-attention. For `pattern` the positions are query rows.
        layers: which; None for all that can give a site.
        positions: `each` (every position by itself; a shorter prompt does without the last ones), an int or a list of
            ints (each by itself; counted from a sample's own first token), `last`, `all`, `image` or `text` (together),
            or a mapping from names to positions of any form (see `interp.reads.check_positions`), each a group that is
            patched together. For `cross:k` and `cross:v` they are the encoder's: `all` or masks [batch, source].
        heads: `each` by itself, `all` together, or some, for sites that have heads (for `k` and `v` key/value heads).
        window: how many layers are patched together, around the layer that is named.
        metric: `logit_difference`, `logit`, `probability` or `log_probability` of the answers at the last position;
            `kl`, the divergence from the source run; `loss`, the negative log-likelihood of the answers, or without
            answers of the clean prompt's own next tokens; or a function of logits [row, n, d_vocab] that gives one
            number for each row, whose rows are whole copies of the batch, one after the other. None takes the logit
            difference, the logit (without `wrong`) or the divergence (without answers).
        answers: right next tokens of all prompts in order.
        wrong: wrong ones.
        at: where a function or the divergence gets its logits.
        direction: `denoise` patches the clean run into the corrupt one, `noise` the corrupt run into the clean one.
        clean_edits: edits of `embed`, or of `resid_pre` of the first layer, in the clean run.
        corrupt_edits: the same in the corrupt run, such as noise on some tokens.
        severed: `attn_out`, `mlp_out` or `mixer_out` (with `cross:` in front that of cross-attention): what is held at
            its value in the base run at the patched positions, in all layers, where it is not patched itself. What
            then comes through does so without these modules.
        min_gap: see `CausalMap`.
        memory: bytes that a pass may take; None for a part of what is free.
        rows: the most rows (copies of a prompt) in a pass.
        checkpoint: a folder in which finished passes are kept, so that a sweep that was stopped goes on where it was.
        progress: whether to show a progress bar.

    Returns:
        The metric of every cell and prompt, with those of both runs. `settings["computed"]` says how many (cell,
        prompt) had to be computed, and `settings["way"]` how.

    Raises:
        InputError: prompts that do not match, equal prompts, a metric that is the same in both runs, positions that do
            not exist, answers that do not fit.
        UnknownNameError: a site, layer, head, metric or direction does not exist.
        SettingsError: options that contradict each other or lie outside their range; a checkpoint of another sweep.
        UnsupportedError: the model has no logits, or cannot give a site.
        NonFiniteError: a run or the metric gives NaN.
    """
    for name, number in {"memory": memory, "rows": rows}.items():
        if number is not None and (type(number) is not int or number < 1):
            raise SettingsError(f"{name} is a whole number from 1, got {number!r}.")
    run = GridRun.of(
        lens,
        clean,
        corrupt,
        sites=sites,
        layers=layers,
        positions=positions,
        heads=heads,
        window=window,
        metric=metric,
        answers=answers,
        wrong=wrong,
        at=at,
        direction=direction,
        clean_edits=clean_edits,
        corrupt_edits=corrupt_edits,
        severed=severed,
    )
    limits = limits_of(lens, rows, memory or held_memory(checkpoint))
    settings = run.settings(method="patch_sweep", window=window)
    settings |= {} if severed is None else {"severed": severed}
    chosen = [g.positions for g in run.groups]
    plan = settings | {"sites": [str(p) for p in run.places], "groups": [g.name for g in run.groups]}
    plan["positions"] = ["" if isinstance(p, Tensor) else str(p) for p in chosen]
    plan |= {"metric": run.name, "direction": direction, "rows": rows, "memory": limits.memory}
    plan |= {"cells": [[c.place, c.layer, c.head, c.group] for c in run.cells]}
    masks = [p for p in chosen if isinstance(p, Tensor)]
    plan["inputs"] = fingerprint([b for pair in run.batches for b in pair], [run.answers, run.wrong, *masks])
    kept, found = Checkpoint(checkpoint, plan), []
    with Bar(len(run.cells) * len(run), progress) as bar:
        for number, pair in enumerate(run.pairs()):
            kept.part = f"{number:04d}"
            found.append(_swept(pair, limits, kept, bar))
    settings |= {"computed": sum(f.computed for f in found), "way": "; ".join(dict.fromkeys(f.way for f in found))}
    return run.result(found, min_gap, settings)


def _swept(pair: Pair, limits: Limits, checkpoint: Checkpoint, bar: Bar) -> Found:
    try:
        carried = Carried(pair, limits)
    except UnsupportedError as error:
        return plain.sweep(pair, limits, str(error), checkpoint, bar)
    return carried.sweep(checkpoint, bar)
