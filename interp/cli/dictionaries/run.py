"""Carry out a run of `interp evaluate sae`: load, evaluate, write the scores, the tables and the page."""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from interp.cli.console import load, table
from interp.cli.dictionaries.opened import context_of, files_of, opened
from interp.cli.dictionaries.settings import SaeSettings
from interp.cli.folders import Kind, write_settings
from interp.errors import SettingsError
from interp.files import sha256, write_json, write_parquet
from interp.reads import Read

if TYPE_CHECKING:
    from interp.dictionaries import Dictionary
    from interp.dictionaries.evaluation import DictionaryScores
    from interp.dictionaries.lorsa import Lorsa

KIND = Kind(
    "interp-evaluate-sae-run",
    "interp evaluate sae",
    frozenset({"fingerprint", "settings", "complete"}),
    ("settings.yaml", "numbers.parquet", "contexts.parquet", "latents.parquet", "report.html"),
    ("scores",),
)


def run_sae(settings: SaeSettings, out: str | os.PathLike[str], *, overwrite: bool = False) -> "DictionaryScores":
    """Evaluate a dictionary into a run folder; a run that is complete there with the same settings is not repeated.

    Args:
        settings: what is asked.
        out: the run folder.
        overwrite: replace a run that is there.

    Raises:
        InterpError: something asked for does not fit the dictionary, the model, the data or the folder.
    """
    from interp.cli.named import check_model
    from interp.data import corpus
    from interp.dictionaries import evaluate
    from interp.dictionaries.evaluation import DictionaryScores
    from interp.report import Provenance

    dictionary = opened(settings.path)
    read, target = sites_of(dictionary, settings.read, settings.target)
    model = model_of(settings, dictionary)
    check_model(model)
    text = corpus(settings.data, **settings.data_options())
    path = Path(out)
    asked = {**settings.hashed(), "model": model, "read": read, "target": target, "corpus": text.identity}
    asked |= {f"{name}_sha256": sha256(Path(settings.path) / name) for name in files_of(settings.path)}
    record = {"complete": False, **KIND.open(path, asked, overwrite=overwrite)}
    if record["complete"]:
        typer.echo(f"sae: complete in {path} with the same settings; not computed again.")
        return DictionaryScores.load(path / "scores")
    kept: dict[str, Any] = {**asdict(settings), "ablation": list(settings.ablation), "model": model}
    for name in ("path", "images", "data"):
        if kept[name] is not None and os.path.exists(kept[name]):
            kept[name] = os.path.abspath(kept[name])
    record["settings"] = kept
    write_settings(path, kept, "interp evaluate sae")
    write_json(path / "run.json", record)
    typer.echo(f"loading {model} ...")
    lens = load(model, device=settings.device, dtype=settings.dtype)
    dictionary = dictionary.to(lens.input_device)
    options: dict[str, Any] = settings.options() | {"context": context_of(dictionary, settings.context)}
    scores = evaluate(dictionary, lens, text, **options, progress=sys.stderr.isatty())
    scores.save(path / "scores")
    record["about"] = about(dictionary)
    record["provenance"] = asdict(Provenance.here({}, seed=settings.seed))
    write_tables(path, scores)
    from interp.cli.dictionaries.page import write_page

    write_page(path, record, scores)
    record["complete"] = True
    write_json(path / "run.json", record)
    return scores


def sites_of(dictionary: "Dictionary | Lorsa", read: str | None, target: str | None) -> tuple[str, str]:
    """What a dictionary reads and what it stands for, before the model is there.

    Raises:
        SettingsError: they are neither given nor in the file.
    """
    from interp.dictionaries.evaluation.applied import site_of

    if not dictionary.sequences:
        return site_of(dictionary, read, target)  # type: ignore[arg-type]
    layer, tower = dictionary.metadata.get("layer"), dictionary.metadata.get("tower")
    if read is None and layer is None:
        raise SettingsError("which layer the Lorsa is of is neither given nor in its metadata: --read resid_pre.8.")
    own = [
        str(Read(site, layers=None if layer is None else (layer,), tower=tower)) for site in ("resid_pre", "attn_out")
    ]
    return read or own[0], target or own[1]


def model_of(settings: SaeSettings, dictionary: "Dictionary | Lorsa") -> str:
    """The model's name, from the dictionary's metadata where none is given.

    Raises:
        SettingsError: the file names none either.
    """
    model = settings.model or dictionary.metadata.get("model_name")
    if not model:
        raise SettingsError(f"{settings.path} does not say which model it is for: give --model.")
    return str(model)


def about(dictionary: "Dictionary | Lorsa") -> dict[str, Any]:
    """What the page says of the dictionary."""
    cfg = dictionary.cfg
    kind = "Lorsa" if dictionary.sequences else "transcoder" if dictionary.transcodes else "SAE"
    return {
        "kind": f"{cfg.architecture} {kind}",
        "latents": cfg.d_sae,
        "d_in": cfg.d_in,
        "d_out": cfg.width_out,
        "metadata": {k: v for k, v in dictionary.metadata.items() if isinstance(v, str | int | float | bool | None)},
    }


def write_tables(path: Path, scores: "DictionaryScores") -> None:
    """`numbers.parquet`, every number with its interval; `contexts.parquet`, by context; `latents.parquet`, density."""
    import pandas as pd

    write_parquet(path / "numbers.parquet", scores.summary())
    write_parquet(path / "contexts.parquet", scores.frame())
    density = scores.density.numpy()
    write_parquet(path / "latents.parquet", pd.DataFrame({"latent": range(len(density)), "density": density}))


def show_scores(scores: "DictionaryScores") -> None:
    """Print every number with its interval."""
    from interp.dictionaries.evaluation.scores import MEANINGS

    rows = []
    for row in scores.summary().to_dict("records"):
        span = "" if row["low"] != row["low"] else f"{row['low']:.4g} to {row['high']:.4g}"
        value = f"{row['value']:.4g}" if row["defined"] else "undefined: the ablation costs nothing"
        rows.append([row["metric"], value, span, MEANINGS[row["metric"]]])
    columns = ["metric", "value", "95% interval over contexts", "meaning"]
    table(scores._title(), columns, rows, right=("value", "95% interval over contexts"))
