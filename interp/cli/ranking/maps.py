"""Where the top heads look in a picture: their attention from the last position, drawn over the prompt's image."""

from typing import TYPE_CHECKING, Any

from interp.cli.pictures import keep_picture, picture_of
from interp.cli.prompts import images_of, prepared
from interp.cli.ranking.folder import RunFolder
from interp.errors import InterpError
from interp.files import read_json, write_bytes, write_json
from interp.report import Panel, Scale, overlay

if TYPE_CHECKING:
    import pandas as pd

    from interp.lens import Lens

HEADS = 3


def keep_maps(folder: RunFolder, lens: "Lens", method: str, topics: "pd.DataFrame") -> str | None:
    """Draw the attention of the first heads of a ranking over the picture that each is strongest for.

    Args:
        folder: the run; pictures go into the method's folder.
        lens: the model.
        method: which ranking.
        topics: its top heads with their strongest prompts (`interp.cli.ranking.evidence`).

    Returns:
        Why nothing was drawn where there are pictures; None otherwise.
    """
    from interp.attribution import raw_attention

    made: list[dict[str, Any]] = []
    for row in topics.head(HEADS).to_dict("records"):
        i = int(row["prompts"][0])
        prompt = folder.prompts[i]
        if prompt.image is None:
            continue
        try:
            batch = prepared(lens, [prompt])
            scores = raw_attention(lens, batch, layer=row["layer"], heads=[row["head"]])
            keep_picture(folder.path / "pictures", i, scores, 0, batch, (images_of([prompt]) or [None])[0])
            grid = scores.image_map(target=0)
        except InterpError as error:
            return str(error)
        png, scale = overlay(grid.numpy(), picture_of(folder.path / "pictures", i, scores), signed=False)
        name = f"L{row['layer']}H{row['head']}.png"
        write_bytes(folder.path / method / "maps" / name, png)
        share = float(scores.scores[0, 0][scores.spans["image"][0]].sum())
        about = {"layer": row["layer"], "head": row["head"], "prompt": i, "png": name, "on_image": share}
        made.append(about | {"colours": list(scale.colours), "low": scale.low, "high": scale.high})
    if made:
        write_json(folder.path / method / "maps.json", made)
    return None


def map_panels(folder: RunFolder, method: str) -> list[Panel]:
    """What `keep_maps` drew for a method; nothing where it drew nothing.

    Raises:
        FileError: a picture is missing.
    """
    path = folder.path / method / "maps.json"
    panels = []
    for row in read_json(path) if path.is_file() else []:
        scale = Scale(row["colours"], row["low"], row["high"])
        png = (folder.path / method / "maps" / row["png"]).read_bytes()
        note = f"Prompt {row['prompt'] + 1}; {row['on_image']:.0%} of the attention lies on the image."
        panels.append(Panel(f"L{row['layer']} H{row['head']}", png=png, png_scale=scale, note=note))
    return panels
