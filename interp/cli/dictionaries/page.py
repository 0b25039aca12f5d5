"""The page of `interp evaluate sae`: numbers with intervals, how often latents are active, how to read them."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.figures import ranked_bars
from interp.report import Figure, KeyValues, Provenance, Section, Table, Text, write_report

if TYPE_CHECKING:
    import pandas as pd

    from interp.dictionaries.evaluation import DictionaryScores

FIDELITY = (
    "Fidelity compares reconstructions y with activations x. fvu is the share of the variance about the mean of all "
    "tokens that is not explained; explained_variance_legacy is the form of SAEBench's tables and Neuronpedia, which "
    "depends on the batches and is often far from it. l0 is the mean number of active latents: dictionaries are to be "
    "compared at equal l0. relative_reconstruction_bias below 1 says that reconstructions are too short.\n\n"
    "dead counts latents that were never active in these tokens, which is a bound for rare ones: a latent that is "
    "active once in 100,000 tokens looks dead in 10,000."
)
LOSSES = (
    "The model runs again with the site replaced: by the reconstruction, by zeros, by the mean of all tokens. "
    "ce is the loss of the next token, kl the divergence from the model as it is, both in nats a token. A recovered "
    "share is 1 where the reconstruction does no harm and 0 where it does as much as the ablation.\n\n"
    "What they do not say: zeros are far from anything that the layers above have seen, so a share against zero is "
    "flattering; where ablating costs little, a share says little. Special tokens and first positions stay as they are "
    "unless `everywhere` is set. Text that the dictionary was trained on flatters it. None of these numbers says that "
    "latents mean something: see sparse_probing, feature_absorption and separation_scores."
)


def write_page(folder: Path, record: Mapping[str, Any], scores: "DictionaryScores") -> Path:
    """Write `report.html`."""
    frame = numbers(scores)
    fidelity: Any = frame[~frame["metric"].str.startswith(("ce_", "kl_"))]
    losses: Any = frame[frame["metric"].str.startswith(("ce_", "kl_"))]
    caption = f"low and high: 95% bootstrap interval over contexts ({scores.settings['resamples']:,} resamples)."
    sections = []
    if len(losses):
        blocks: list[Any] = [Text(_first(scores)), Table(losses, caption)]
        drawn = [n for n in ("ce_recovered_zero", "ce_recovered_mean", "kl_recovered_zero", "kl_recovered_mean")
                 if n in set(losses["metric"]) and n not in scores.undefined]  # fmt: skip
        if drawn:
            blocks.append(Figure(scores.plot(tuple(drawn), title=""), "Recovered shares with 95% bootstrap intervals."))
        blocks += [Text(LOSSES), Text(_check(scores))]
        sections.append(Section("Loss of the model", blocks))
    sections.append(Section("Fidelity", [Table(fidelity, caption), Text(FIDELITY)]))
    sections.append(_latents(scores))
    sections.append(Section("Dictionary", [KeyValues(record["about"])]))
    source = Provenance(**{**record["provenance"], "settings": {**record["settings"], **scores.settings}})
    site = scores.settings["read"]
    site = f"{site} to {scores.settings['target']}" if scores.settings["target"] else site
    title = f"{record['about']['kind']} of {scores.settings['model']}, {site}"
    subtitle = f"Evaluated on {scores.tokens:,} tokens in {len(scores)} contexts"
    return write_report(folder, title=title, subtitle=subtitle, sections=sections, provenance=source)


def numbers(scores: "DictionaryScores") -> "pd.DataFrame":
    """Every number with its interval and what it means."""
    from interp.dictionaries.evaluation.scores import MEANINGS

    frame = scores.summary()
    meaning = [MEANINGS[name] for name in frame["metric"]]
    frame["meaning"] = [
        text if fine else f"{text} (undefined here: the ablation costs nothing)"
        for text, fine in zip(meaning, frame["defined"], strict=True)
    ]
    return frame.drop(columns=["part", "defined"])


def _first(scores: "DictionaryScores") -> str:
    parts = [
        f"The loss of a token is {scores.value('ce_original'):.3f} nats as the model is and "
        f"{scores.value('ce_reconstruction'):.3f} with the reconstruction in place"
    ]
    for name in scores.settings["ablation"]:
        what = {"zero": "zeros", "mean": "the mean"}[name]
        parts.append(f"{scores.value(f'ce_{name}'):.3f} with {what}")
    return ", ".join(parts) + "."


def _check(scores: "DictionaryScores") -> str:
    return (
        "A check: with the reconstruction and its error together in place of the site, no log-probability of the first "
        f"batch changes by more than {scores.error_term:.1e}. More than rounding would mean that the site was not "
        "replaced as it should be."
    )


def _latents(scores: "DictionaryScores") -> Section:
    import pandas as pd

    from interp.dictionaries.evaluation import density_classes

    classes = density_classes(scores.density)
    figure = ranked_bars(list(classes), list(classes.values()), unit="latents")
    frame = pd.DataFrame({"active in this share of tokens": classes.keys(), "latents": classes.values()})
    text = "Latents by the share of tokens in which they are active (their density); each is in latents.parquet."
    return Section(
        "How often latents are active", [Figure(figure, text), Table(frame, f"{len(scores.density):,} latents.")]
    )
