"""Draw the sprites of interp.data.scenes from the Noto Color Emoji font (SIL Open Font License 1.1).

    python -m experiments.scenes.sprites /path/to/NotoColorEmoji.ttf

Needed once: the small pictures are checked in, so that making scenes needs no font.
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

TARGET = Path(__file__).parents[2] / "interp" / "data" / "scenes" / "sprites"
SIDE = 40
STRIKE = 109  # the one size in which the font holds its pictures

CODEPOINTS = {
    "balloon": 0x1F388, "bear": 0x1F43B, "bed": 0x1F6CF, "bicycle": 0x1F6B2, "bird": 0x1F426, "boat": 0x26F5,
    "book": 0x1F4D5, "bread": 0x1F35E, "bus": 0x1F68C, "cake": 0x1F382, "car": 0x1F697, "cat": 0x1F408,
    "chair": 0x1FA91, "cheese": 0x1F9C0, "chicken": 0x1F414, "clock": 0x23F0, "corn": 0x1F33D, "cow": 0x1F404,
    "crab": 0x1F980, "dog": 0x1F415, "drum": 0x1F941, "fish": 0x1F41F, "fox": 0x1F98A, "gift": 0x1F381,
    "guitar": 0x1F3B8, "kite": 0x1FA81, "knife": 0x1F52A, "moon": 0x1F319, "mushroom": 0x1F344, "pig": 0x1F416,
    "pizza": 0x1F355, "rocket": 0x1F680, "shell": 0x1F41A, "star": 0x2B50, "tent": 0x26FA, "tomato": 0x1F345,
    "tractor": 0x1F69C, "tree": 0x1F333, "truck": 0x1F69A, "umbrella": 0x2602,
}  # fmt: skip


def draw(font: ImageFont.FreeTypeFont, codepoint: int) -> Image.Image:
    """One sprite, cut to what is visible, its longer side SIDE pixels."""
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((10, 10), chr(codepoint), font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise SystemExit(f"The font has no picture for U+{codepoint:X}.")
    picture = canvas.crop(box).convert("RGBa")
    scale = SIDE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS).convert("RGBA")


def main() -> None:
    font = ImageFont.truetype(sys.argv[1], STRIKE)
    for name, codepoint in CODEPOINTS.items():
        draw(font, codepoint).save(TARGET / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
