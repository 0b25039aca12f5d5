"""The page of an evaluation: numbers with intervals, images with right and wrong words marked, how to read them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.cli.evaluation.folder import EvaluationFolder
from interp.evaluation import ChairScores, PopeScores, pieces
from interp.report import Figure, KeyValues, Picture, Pictures, Provenance, Section, Table, Text, write_report

if TYPE_CHECKING:
    import pandas as pd

Found = ChairScores | PopeScores

CHAIR_TEXT = (
    "CHAIR (Rohrbach et al. 2018) looks up which objects a caption mentions. chair_i is the share of mentions, "
    "counted with repetition over all captions, that are of objects not in the image; chair_s is the share of "
    "captions with at least one such mention; recall is the share of the images' objects that are mentioned. Lower is "
    "better for the first two, higher for recall. length is the mean number of words, repetition the share of runs of "
    "four words that a caption has already said.\n\n"
    "What it does not say: a model that says less hallucinates less, so chair_i and chair_s are to be read together "
    "with recall and length. Only words of the vocabulary count. Numbers are comparable only with the same prompt, "
    "token limit, images and vocabulary (its sha256 is among the settings)."
)
POPE_TEXT = (
    "POPE (Li et al. 2023) asks after objects that are in the image and after as many that are not: random ones, "
    "popular ones (in most images), and adversarial ones (most often in one image with the object just asked after). "
    "Positive is yes. auroc is the chance that p(yes) is higher for a present object than for an absent one, whatever "
    "the threshold. unparsed is the share of answers that are neither yes nor no; they count as wrong. disagreement "
    "is the share that POPE's original parser reads otherwise; it takes all that it does not recognise for a yes.\n\n"
    "What it does not say: half of the right answers are yes, so a yes_ratio far from 0.5 is a bias, and a change of "
    "it alone moves accuracy and F1. Compare auroc before crediting a method."
)


def write_page(folder: EvaluationFolder) -> Path:
    """Write `report.html` from what the folder holds.

    Raises:
        FileError: the scores are missing or damaged.
    """
    settings = folder.settings
    if settings.compares:
        from interp.cli.evaluation.comparison_page import write_comparison

        return write_comparison(folder)
    scores = folder.scores()
    task = settings.task.upper()
    what = settings.model or Path(str(settings.texts)).name
    if settings.acts:
        control = f" ({settings.control} control)" if settings.control else ""
        what = f"{what}, {settings.intervention}{control} at strength {settings.force:g}"
    sections = [
        Section("Numbers", [Text(_first(scores)), Table(_numbers(scores), _caption(scores)), _figure(scores)]),
        Section("How to read them", [Text(CHAIR_TEXT if isinstance(scores, ChairScores) else POPE_TEXT)]),
    ]
    shown = _pictures(folder, scores)
    if shown is not None:
        sections.append(Section("Examples", [shown]))
    if isinstance(scores, ChairScores):
        sections.append(
            Section("Objects", [Table(_objects(scores), "What is mentioned most often although it is not there.")])
        )
    sections.append(
        Section("Everything", [Table(_rows(scores), "Each image." if task == "CHAIR" else "Each question.")])
    )
    sections.append(Section("Settings", [KeyValues(dict(scores.settings))]))
    known = {**folder.record["settings"], **folder.record.get("model", {})}
    source = Provenance(**{**folder.record.get("provenance", {}), "settings": known})
    return write_report(
        folder.path, title=f"{task} of {what}", subtitle=_subtitle(scores), sections=sections, provenance=source
    )


def examples(scores: Found, most: int) -> list[str]:
    """Images to show: in turn one where something is wrong and one where nothing is, in the order of the data."""
    if isinstance(scores, ChairScores):
        wrong = {one: bool(count) for one, count in zip(scores.ids, scores.counts[:, 1].tolist(), strict=True)}
    else:
        wrong = {}
        for row in scores.frame().to_dict("records"):
            wrong[row["image"]] = wrong.get(row["image"], False) or not row["right"]
    bad, good = ([one for one, flag in wrong.items() if flag is kind] for kind in (True, False))
    mixed = []
    while (bad or good) and len(mixed) < most:
        mixed += [kind.pop(0) for kind in (bad, good) if kind]
    return mixed[:most]


def _pictures(folder: EvaluationFolder, scores: Found) -> Pictures | None:
    items = []
    for number, one in enumerate(examples(scores, folder.settings.examples)):
        path = folder.path / "examples" / f"{number}.png"
        if path.is_file():
            items.append(Picture(path.read_bytes(), one, _text(scores, one)))
    if not items:
        return None
    hint = "Blue: right. Red-orange, with a double line: wrong. Wrong and right ones in turn: not a fair sample."
    return Pictures(items, hint)


def _text(scores: Found, one: str) -> list[tuple[str, str]]:
    if isinstance(scores, ChairScores):
        i = scores.ids.index(one)
        marked = [
            (piece.text, str(piece.mark)) for piece in pieces(scores.captions[i], scores.mentions[i], scores.objects[i])
        ]
        return [*marked, (f"\nin the image: {', '.join(scores.objects[i]) or 'nothing'}", "")]
    found: list[tuple[str, str]] = []
    for row in scores.frame().to_dict("records"):
        if row["image"] != one:
            continue
        chance = f" (p(yes) {row['p_yes']:.2f})" if "p_yes" in row else ""
        said = row["said"] or "(nothing)"
        found += [(f"{row['text']} ", ""), (said, "right" if row["right"] else "wrong")]
        found.append((f"{chance}, {row['kind']}\n", ""))
    return found


def _first(scores: Found) -> str:
    if isinstance(scores, ChairScores):
        return (
            f"Of the objects that {len(scores.ids)} captions mention, {scores.chair_i:.1%} are not in the image; "
            f"{scores.recall:.1%} of the objects that are there are mentioned."
        )
    parts = [f"{part} {scores.value('accuracy', part):.1%}" for part in scores.parts]
    return f"Right answers to {len(scores.questions)} questions: {', '.join(parts)}. Yes-ratio: {scores.yes_ratio:.1%}."


def _numbers(scores: Found) -> "pd.DataFrame":
    frame = scores.summary()
    frame["note"] = ["" if defined else "nothing to divide by" for defined in frame["defined"]]
    return frame.drop(columns=["defined", *(["part"] if len(set(frame["part"])) == 1 else [])])


def _caption(scores: Found) -> str:
    return f"low and high: 95% bootstrap interval over images ({scores.settings['resamples']:,} resamples)."


def _figure(scores: Found) -> Figure:
    metrics = None if isinstance(scores, ChairScores) else ("accuracy", "f1", "yes_ratio")
    return Figure(scores.plot(metrics, title=""), "With 95% bootstrap intervals over images.")


def _objects(scores: ChairScores) -> "pd.DataFrame":
    import pandas as pd

    counts: dict[str, list[int]] = {}
    for mentions, there in zip(scores.mentions, scores.objects, strict=True):
        for mention in mentions:
            row = counts.setdefault(mention.name, [0, 0])
            row[0] += 1
            row[1] += mention.name not in there
    rows = [{"object": name, "mentions": n, "hallucinated": bad, "share": bad / n} for name, (n, bad) in counts.items()]
    frame = pd.DataFrame(rows, columns=["object", "mentions", "hallucinated", "share"])
    return frame.sort_values(["hallucinated", "object"], ascending=[False, True])


def _rows(scores: Found) -> "pd.DataFrame":
    frame: Any = scores.frame()
    for name in ("objects", "mentioned", "hallucinated", "missed"):
        if name in frame:
            frame[name] = [", ".join(cell) for cell in frame[name]]
    return frame


def _subtitle(scores: Found) -> str:
    many = f"{len(scores.ids)} captions" if isinstance(scores, ChairScores) else f"{len(scores.questions)} questions"
    return f"{many}, data: {scores.settings['data']}"
