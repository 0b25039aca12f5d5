"""How faithful a dictionary is, and how much of the model's prediction survives when it stands in for a site.

Sources: Bricken et al. 2023 (Towards Monosemanticity) for the loss recovered; Karvonen et al. 2025, "SAEBench"
(arXiv 2503.09532), and SAELens for the scores and their names. With CE the mean loss of the next token, KL the mean of
KL(original || other), and "reconstruction", "zero", "mean" the runs in which the site is replaced by that,

    ce_recovered_zero = (CE_zero - CE_reconstruction) / (CE_zero - CE_original)
    kl_recovered_zero = 1 - KL_reconstruction / KL_zero                             (the same with mean)

What is replaced: the tokens that the stream hands out (no special tokens, and by choice not the first position, whose
norm is often a thousand times that of others); the rest stays as it is, or is replaced too (`everywhere`). What counts:
positions from the first replaced one on that are no special tokens and whose next token is a token of text.

Only the layers above the site run again: once each for the model as it is, the reconstruction and every ablation. The
mean is that of the same tokens, from a pass of the layers below before.

Departures from SAELens and SAEBench. Recovered shares are ratios of sums over all tokens, not means of ratios over
batches, with bootstrap intervals over contexts. Explained variance is the right one, with the legacy one beside it.
The mean ablation, which SAELens lacks, is there because zero is far from anything that the layers above have seen: a
share recovered against it is flattering.

What to know. A share near 1 says little where ablating the site costs little, or against an ablation that costs very
much; compare dictionaries by ce_reconstruction - ce_original. Text that the dictionary was trained on flatters it.
Contexts that were cut from one document are not independent of each other, so intervals are too narrow then.
Neither fidelity nor recovered loss says that latents mean something: see `sparse_probing` and `feature_absorption`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from interp.bootstrap import check_options
from interp.data import Corpus
from interp.data import corpus as corpus_of
from interp.dictionaries.activations import ActivationStream, Contexts
from interp.dictionaries.base import Dictionary
from interp.dictionaries.evaluation.applied import in_use, reconstructions, site_of
from interp.dictionaries.evaluation.scores import SUMS, DictionaryScores
from interp.dictionaries.evaluation.spliced import Runs, Spliced, divergence, log_probabilities, replaced
from interp.dictionaries.fidelity import Fidelity
from interp.dictionaries.placing import placed
from interp.errors import InputError, SettingsError, unknown
from interp.lens import Lens
from interp.reads import Read

if TYPE_CHECKING:
    from interp.dictionaries.lorsa.lorsa import Lorsa
    from interp.dictionaries.lorsa.placed import PlacedLorsa

ABLATIONS = ("zero", "mean")


def evaluate(
    dictionary: Dictionary | Lorsa | PlacedLorsa,
    lens: Lens,
    corpus: Corpus | Sequence[str],
    *,
    read: str | None = None,
    target: str | None = None,
    contexts: int = 64,
    batch: int = 8,
    context: int = 256,
    ablation: Sequence[str] = ABLATIONS,
    everywhere: bool = False,
    packed: bool = True,
    special: str = "tokenizer",
    separator: str = "eos",
    tokens: str = "all",
    drop_first: bool = True,
    seed: int = 0,
    resamples: int = 1000,
    progress: bool = False,
) -> DictionaryScores:
    """Fidelity of a dictionary, and the model's loss and KL with it in place of its site.

    Args:
        dictionary: an SAE, a transcoder or a Lorsa, which stands for the attention of its layer.
        lens: the model that it is for.
        corpus: text that it was not trained on, or pictures with prompts.
        read: what it reads, such as `resid_post.10`; None for what its metadata says.
        target: what it reconstructs; None for what its metadata says, or for `read`.
        contexts: how many contexts (fewer where the corpus ends).
        batch: contexts in one run.
        context: tokens of a context.
        ablation: what it is compared with: `zero`, `mean`. Empty: fidelity alone, without any loss.
        everywhere: replace special tokens and first positions too, which by default stay as they are.
        packed: fill contexts with one document after the other (see `Packing` for this and the next four).
        special: tokens around each context.
        separator: token behind each document of packed contexts.
        tokens: `all`, `text` or `image` tokens; those that the dictionary was trained on.
        drop_first: leave out the first position of each context.
        seed: of the bootstrap.
        resamples: how often contexts are drawn anew for an interval.
        progress: whether to show a progress bar.

    Returns:
        Scores whose `summary()` has every number with its interval over contexts, losses in nats.

    Raises:
        SettingsError: the site is known nowhere, the target lies below what is read, or an option is out of its range.
        UnknownNameError: a site, layer or kind of ablation does not exist.
        InputError: the site has another width than the dictionary, the corpus holds no token to use or to predict.
        UnsupportedError: the model has no loss of a next token (`ablation=()` does without), or cannot give the site.
        NonFiniteError: an activation or reconstruction is NaN or infinite.
    """
    for name in ablation:
        if name not in ABLATIONS:
            raise unknown("ablation", name, ABLATIONS)
    check_options(0.95, resamples, seed)
    if contexts < 1 or batch < 1:
        raise SettingsError(f"contexts and batch are at least 1, found {contexts} and {batch}.")
    text = corpus_of(corpus)
    at = placed(dictionary, lens, text, read=read, target=target)
    source, aim = site_of(at, read, target)
    source, aim = str(Read.of(source)), str(Read.of(aim))
    _check_order(source, aim)
    spliced = Spliced(lens, Read.of(aim))
    options: dict[str, Any] = {"context": context, "packed": packed, "special": special, "separator": separator}
    options |= {"tokens": tokens, "drop_first": drop_first}
    with _bar(contexts * (1 + ("mean" in ablation)), progress) as advance, in_use(at):
        reads = list(dict.fromkeys([source, aim, *(spliced.needs if ablation else ())]))
        main = ActivationStream(lens, text, reads, batch=batch, **options)
        _check_width(at, main.d_in, source, aim)
        held = _Collected(at, source, aim)
        fill: dict[str, Tensor] = {}
        if "zero" in ablation:
            fill["zero"] = torch.zeros(at.cfg.width_out, dtype=torch.float64)
        if "mean" in ablation:
            start = main.state()
            fill["mean"] = _mean(main, aim, contexts, advance)
            main.restore(start)
        error_term = None
        for found in _taken(main, contexts, advance):
            y = held.add(found)
            if not ablation:
                continue
            assert main.inputs is not None
            if error_term is None:
                spliced.check_causal(main.inputs)
            where = found.real if everywhere else found.mask
            if everywhere:
                y = _reconstructed(at, found, source, where)
            runs = spliced.runs(main.inputs, found)
            chosen = _counted(main, where, spliced.target.tower in (None, lens.anatomy.main))
            original = runs.logits()
            if error_term is None:
                error_term = _error_term(runs, found[aim], where, y, original, chosen)
            values = {"reconstruction": y, **fill}
            ids = main.inputs.inputs["input_ids"]
            held.add_losses(_losses(runs, found[aim], where, values, ids, original, chosen))
    settings = {"method": "evaluate", "model": lens.name, "read": source, "target": None if aim == source else aim}
    settings |= {"dictionary": at.cfg.to_dict(), "corpus": text.identity, "contexts": contexts, "batch": batch}
    settings |= {"ablation": list(ablation), "everywhere": everywhere, **options, "seed": seed, "resamples": resamples}
    return held.scores(error_term, settings)


class _Collected:
    """Sums of every context."""

    def __init__(self, dictionary: Dictionary, source: str, aim: str) -> None:
        self.dictionary, self.source, self.aim = dictionary, source, aim
        cfg = dictionary.cfg
        self.whole = Fidelity(cfg.width_out, cfg.d_sae, device=dictionary.W_dec.device)
        self.parts: list[tuple[dict[str, Tensor], Tensor]] = []
        self.losses: list[dict[str, Tensor]] = []

    def add(self, contexts: Contexts) -> Tensor:
        """The reconstructions of the tokens to use [token, d_out], after their fidelity was noted."""
        cfg, device = self.dictionary.cfg, self.dictionary.W_dec.device
        row = contexts.mask.nonzero()[:, 0].to(device)
        aim = contexts[self.aim][contexts.mask].to(device)
        own = [Fidelity(cfg.width_out, cfg.d_sae, device=device) for _ in range(len(contexts.mask))]
        made = torch.empty(len(aim), cfg.width_out, dtype=self.dictionary.W_dec.dtype, device=device)
        for where, latents, y in reconstructions(self.dictionary, contexts, self.source, contexts.mask):
            made[where] = y
            self.whole.update(aim[where], made[where], latents)
            for i in row[where].unique().tolist():
                mine = row[where] == i
                own[i].update(aim[where][mine], made[where][mine], latents[mine])
        for one in own:
            sums = {"tokens": one.tokens, "spread": one.spread, "active": one.active.sum(), **one.sums}
            self.parts.append(({name: sums[name].cpu() for name in SUMS}, one.mean.cpu()))
        return made

    def add_losses(self, losses: dict[str, Tensor]) -> None:
        """Note the sums [context] of the runs of the contexts that were added last."""
        self.losses.append(losses)

    def scores(self, error_term: float | None, settings: dict[str, Any]) -> DictionaryScores:
        """The result."""
        found = self.whole.result()
        centre = self.whole.mean.cpu()
        rows = [
            torch.stack(
                [sums[n] + (sums["tokens"] * (mean - centre).square().sum() if n == "spread" else 0) for n in SUMS]
            )
            for sums, mean in self.parts
        ]
        table, columns = torch.stack(rows), list(SUMS)
        if self.losses:
            names = list(self.losses[0])
            more = torch.cat([torch.stack([one[n] for n in names], 1) for one in self.losses])
            if not bool(more[:, names.index("predictions")].sum() > 0):
                raise InputError("the corpus holds no token to predict: every context ends with its first one.")
            table, columns = torch.cat([table, more], 1), columns + names
        fixed = {"explained_variance_legacy": found.explained_variance_legacy, "dead": float(found.dead)}
        kept = table[table[:, 0] > 0]
        return DictionaryScores(tuple(columns), kept, found.density, fixed, error_term, settings)


def _losses(
    runs: Runs, clean: Tensor, where: Tensor, values: dict[str, Tensor], ids: Tensor, original: Tensor, counted: Tensor
) -> dict[str, Tensor]:
    """Sums over the counted positions of each context, float64 [context], by name."""
    answers = [row[1:][here[:-1]][:, None] for row, here in zip(ids, counted, strict=True)]
    out = {"predictions": counted.sum(1).double().cpu()}
    for name, value in {"original": None, **values}.items():
        other = original if value is None else runs.logits(replaced(clean, where, value))
        ce, kl = [], []
        for i, here in enumerate(counted):  # one at a time: log-probabilities of a whole batch are many
            q = log_probabilities(other[i], here)
            ce.append(-q.gather(1, answers[i]).double().sum())
            if value is not None:
                kl.append(divergence(log_probabilities(original[i], here), q).double().sum())
        out[f"ce_{name}"] = torch.stack(ce).cpu()
        if kl:
            out[f"kl_{name}"] = torch.stack(kl).cpu()
    return out


def _error_term(runs: Runs, clean: Tensor, where: Tensor, y: Tensor, original: Tensor, counted: Tensor) -> float:
    """The largest change of a log-probability when reconstruction and error stand together in place of the site."""
    kept = y + (clean[where].to(y) - y)
    same = runs.logits(replaced(clean, where, kept))
    largest = 0.0
    for i, here in enumerate(counted):
        if bool(here.any()):
            p, q = (log_probabilities(logits[i], here) for logits in (original, same))
            largest = max(largest, float((p - q).abs().masked_fill(p == -torch.inf, 0.0).max()))
    return largest


def _counted(stream: ActivationStream, where: Tensor, main: bool) -> Tensor:
    """The positions [batch, pos] whose prediction counts."""
    batch = stream.inputs
    assert batch is not None
    ids = batch.inputs["input_ids"]
    plain = batch.mask & ~torch.isin(ids, torch.tensor(stream.special, device=ids.device))
    image = torch.zeros_like(plain) if batch.image_mask is None else batch.image_mask
    follows = torch.zeros_like(plain)
    follows[:, :-1] = (plain & ~image)[:, 1:]
    # A replaced site of another tower reaches the whole text; one of the stream, what stands at and behind it.
    reached = where.int().cummax(1).values.bool() if main else torch.ones_like(plain)
    return plain & follows & reached.to(plain.device)


def _reconstructed(dictionary: Dictionary, contexts: Contexts, source: str, where: Tensor) -> Tensor:
    return torch.cat([y for _, _, y in reconstructions(dictionary, contexts, source, where)])


def _mean(stream: ActivationStream, aim: str, contexts: int, advance: Any) -> Tensor:
    """The mean of the tokens to use, float64."""
    total, count = torch.zeros(stream.d_in[aim], dtype=torch.float64), 0
    for found in _taken(stream, contexts, advance):
        rows = found[aim][found.mask]
        total += rows.double().sum(0).cpu()
        count += len(rows)
    return total / max(count, 1)


def _taken(stream: ActivationStream, contexts: int, advance: Any) -> Iterator[Contexts]:
    """The first so many contexts of a stream."""
    left, batch = contexts, stream.batch
    while left > 0:
        stream.batch = min(batch, left)
        found = next(stream, None)
        if found is None:
            break
        size = len(found.number.unique())
        left -= size
        yield found
        advance(size)
    stream.batch = batch


def _check_order(source: str, aim: str) -> None:
    one, two = Read.of(source), Read.of(aim)
    if one.layers and two.layers and one.tower == two.tower and two.layers[0] < one.layers[0]:
        raise SettingsError(f"{aim} lies below {source}: what stands in for it cannot be computed from a later layer.")


def _check_width(dictionary: Dictionary, widths: dict[str, int], source: str, aim: str) -> None:
    cfg = dictionary.cfg
    for name, width, what in ((source, cfg.d_in, "d_in"), (aim, cfg.width_out, "d_out")):
        if name not in widths:
            raise SettingsError(f"{name} is no single site: name one layer, such as 'resid_post.10'.")
        if widths[name] != width:
            raise InputError(f"{name} is {widths[name]} wide, but the dictionary has {what}={width}.")


class _bar:
    """A progress bar over contexts, or none; hands out the function that advances it."""

    def __init__(self, total: int, show: bool) -> None:
        self._total, self._show = total, show
        self._bar: Any = None

    def __enter__(self) -> Any:
        if not self._show:
            return lambda count: None
        from rich.progress import Progress

        self._bar = Progress()
        self._bar.start()
        task = self._bar.add_task("contexts", total=self._total)
        return lambda count: self._bar.advance(task, count)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
