"""`interp features`: the latents of a dictionary on a corpus, as a page and tables."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from interp.errors import FileError, SettingsError

if TYPE_CHECKING:
    from interp.dictionaries import Dictionary
    from interp.dictionaries.features import Chat, FeatureContexts
    from interp.dictionaries.lorsa import PlacedLorsa

TOP = 20
KEY = "INTERP_API_KEY"


def features(
    path: Annotated[Path, typer.Argument(help="The folder of a dictionary: an SAE, a transcoder or a Lorsa.")],
    data: Annotated[str, typer.Option("--data", "-d", help="Texts: a file, a folder, hf:NAME, or `scenes`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder that is written.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Default: what the file says.")] = None,
    latents: Annotated[str | None, typer.Option("--latents", "-l", help="Numbers with commas: 3,17,200.")] = None,
    top: Annotated[
        int | None, typer.Option("--top", min=1, help=f"The N latents that write most at their peak. Default: {TOP}.")
    ] = None,
    read: Annotated[str | None, typer.Option("--read", help="The site. Default: what the file says.")] = None,
    target: Annotated[str | None, typer.Option("--target", help="The site that a transcoder writes.")] = None,
    images: Annotated[Path | None, typer.Option("--images", help="Pictures; --data is then a prompt file.")] = None,
    column: Annotated[str | None, typer.Option("--column", help="The column of a table with the text.")] = None,
    split: Annotated[str | None, typer.Option("--split", help="Of a data set or of the scenes.")] = None,
    contexts: Annotated[int | None, typer.Option("--contexts", min=1, help="At most so many contexts.")] = None,
    context: Annotated[
        int, typer.Option("--context", min=2, help="Tokens of a context, at most those that a Lorsa knows.")
    ] = 256,
    tokens: Annotated[str, typer.Option("--tokens", help="Use all, text or image tokens.")] = "all",
    window: Annotated[int, typer.Option("--window", min=0, help="Tokens shown on each side of the middle one.")] = 16,
    examples: Annotated[int, typer.Option("--examples", min=1, help="Contexts of each latent.")] = 8,
    chat_url: Annotated[
        str | None, typer.Option("--chat-url", help=f"An endpoint of OpenAI's form that explains; its key in ${KEY}.")
    ] = None,
    chat_model: Annotated[
        str | None, typer.Option("--chat-model", help="The model at --chat-url; without one, a model on this machine.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Contexts in a pass of the model.")] = 8,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of what is drawn.")] = 0,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="Of the model: float32, bfloat16, ...")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")] = False,
) -> None:
    """Show where latents of the dictionary in PATH are active, and what they write.

    Writes report.html, latents.parquet, windows.parquet, neighbours.parquet, logits.parquet (for sites of the residual
    stream) and the folder contexts/, which `interp.scores.load` reads. With --chat-url or --chat-model latents are
    explained by a chat model and the explanations scored.

    Of the heads of a Lorsa the page shows where they fire with the tokens that fed them, what they do (induction,
    previous token, successor, ...), and which of the layer's heads they draw on: behaviours.parquet, relations.parquet.
    """
    if latents is not None and top is not None:
        raise SettingsError("give either --latents or --top.")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not overwrite):
        raise FileError(f"{out} is not empty: give another --out, or --overwrite.")
    from interp.cli.console import load as load_model
    from interp.cli.dictionaries.opened import context_of, opened
    from interp.cli.named import check_model
    from interp.data import corpus
    from interp.dictionaries.features import top_contexts
    from interp.dictionaries.lorsa import head_contexts
    from interp.dictionaries.placing import placed

    dictionary = opened(path)
    name = model or dictionary.metadata.get("model_name")
    if not name:
        raise SettingsError(f"{path} does not say which model it is of: give --model.")
    check_model(name)
    asked = _numbers(latents, dictionary.cfg.d_sae)
    options: dict[str, Any] = {"column": column, "split": split, "images": images}
    texts = corpus(data, **options)
    chat = _chat(chat_url, chat_model)
    typer.echo(f"loading {name} ...")
    lens = load_model(name, device=device, dtype=dtype)
    dictionary.to(lens.input_device)
    dictionary = placed(dictionary, lens, texts, read=read, target=target)
    asking: dict[str, Any] = {"k": examples, "window": window, "contexts": contexts, "batch": batch_size}
    asking |= {"context": context_of(dictionary, context), "tokens": tokens, "seed": seed}
    most = None if asked is not None else TOP if top is None else top
    if dictionary.sequences:
        found = head_contexts(dictionary, lens, texts, heads=asked, most=most, **asking)
    else:
        found = top_contexts(dictionary, lens, texts, read=read, latents=asked, **asking)
        found = found if most is None else found.select(_strongest(dictionary, found, most))
    page = _write(out, dictionary, lens, texts, found, read, target, chat, examples)
    typer.echo(found.frame().to_string(index=False, float_format=lambda x: f"{x:.4g}"))
    typer.echo(f"report: {page}")


def _numbers(latents: str | None, size: int) -> list[int] | None:
    if latents is None:
        return None
    try:
        return [int(part) for part in latents.split(",")]
    except ValueError as error:
        raise SettingsError(f"--latents are numbers from 0 to {size - 1} with commas, found {latents!r}.") from error


def _strongest(dictionary: "Dictionary", found: "FeatureContexts", count: int) -> list[int]:
    """The latents whose largest activation writes the longest vector, of those that are active at all."""
    from interp.dictionaries.features.common import latent_rows

    written = found.maximum.abs() * latent_rows(dictionary, found.latents).norm(dim=1).cpu()
    order = written.argsort(descending=True, stable=True)[:count]
    return found.latents[order[written[order] > 0] if bool((written > 0).any()) else order].tolist()


def _chat(url: str | None, name: str | None) -> "Chat | None":
    from interp.dictionaries.features import LocalChat, OpenAIChat

    if url is not None:
        if name is None:
            raise SettingsError("--chat-url needs --chat-model, the name of the model there.")
        return OpenAIChat(url, name, api_key=os.environ.get(KEY))
    return None if name is None else LocalChat(name)


def _write(
    out: Path,
    dictionary: "Dictionary | PlacedLorsa",
    lens: Any,
    texts: Any,
    found: "FeatureContexts",
    read: str | None,
    target: str | None,
    chat: "Chat | None",
    examples: int,
) -> Path:
    from interp.dictionaries.features import detection_score, explain, fuzzing_score, logit_effects, neighbours
    from interp.errors import InputError, UnsupportedError
    from interp.files import write_parquet
    from interp.report import write_feature_page, write_lorsa_page

    latents = found.latents
    near = neighbours(dictionary, latents, 8) if dictionary.cfg.d_sae > 1 else None
    try:
        effects = logit_effects(dictionary, lens, latents, 8, read=read, target=target)
    except UnsupportedError as error:
        effects = None
        typer.echo(f"no logit effects: {error}", err=True)
    lines, scores = None, []
    if chat is not None:
        lines = explain(found, chat)
        for score in (detection_score, fuzzing_score):
            try:
                scores.append(score(found, lines, chat))
            except InputError as error:
                typer.echo(f"no score: {error}", err=True)
    found.save(out / "contexts")
    frame = found.frame()
    for score in scores:
        columns = score.frame().set_index("latent").add_prefix(f"{score.kind}_")
        frame = frame.join(columns, on="latent")
    if lines is not None:
        frame["explanation"] = [lines.get(n, "") for n in latents.tolist()]
    write_parquet(out / "latents.parquet", frame)
    write_parquet(out / "windows.parquet", found.windows())
    if near is not None:
        write_parquet(out / "neighbours.parquet", near.frame())
    if effects is not None:
        write_parquet(out / "logits.parquet", effects.frame())
    shown: dict[str, Any] = {"effects": effects, "neighbours": near, "explanations": lines, "scores": scores}
    shown |= {"corpus": texts, "examples": examples}
    if not dictionary.sequences:
        return write_feature_page(out, found, **shown)
    return write_lorsa_page(out, found, **shown, **_of_heads(out, dictionary, lens, texts, found))  # type: ignore[arg-type]


def _of_heads(out: Path, at: "PlacedLorsa", lens: Any, texts: Any, found: "FeatureContexts") -> dict[str, Any]:
    """What the heads of a Lorsa do, and whose work; written as tables, too."""
    from interp.dictionaries.lorsa import head_behaviours, head_relations
    from interp.errors import UnsupportedError
    from interp.files import write_parquet

    settings = found.settings
    names = ("contexts", "context", "packed", "special", "separator", "tokens", "drop_first")
    relations = head_relations(at, lens, texts, **{name: settings[name] for name in names})
    write_parquet(out / "relations.parquet", relations.frame())
    try:
        behaviours = head_behaviours(at, lens)
    except UnsupportedError as error:
        typer.echo(f"no behaviours: {error}", err=True)
        return {"relations": relations}
    write_parquet(out / "behaviours.parquet", behaviours.frame())
    return {"relations": relations, "behaviours": behaviours}
