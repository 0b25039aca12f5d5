"""Pictures as a corpus: a folder of them, with or without prompts, and the bundled scenes with their captions."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from interp.data.corpora.corpus import Corpus, Document, check_seed
from interp.data.prompts import read_prompts
from interp.errors import FileError, InputError, SettingsError, unknown

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class PictureCorpus(Corpus):
    """Pictures of a folder: each with the prompt that a file gives it, or alone, for models that read no text.

    Args:
        folder: the pictures; without prompts all of them, by path.
        prompts: a prompt file (see [`read_prompts`][interp.data.prompts.read_prompts]) whose paths of images are
            relative to the folder; its texts may hold the model's image placeholder.
        seed: of the order; None to keep it.

    Raises:
        FileError: the folder, the file or a picture is missing.
        InputError: there are no pictures, or a prompt has none.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        prompts: str | os.PathLike[str] | None = None,
        seed: int | None = None,
    ) -> None:
        self.seed = check_seed(seed)
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileError(f"there is no folder {self.folder} with pictures.")
        rows: list[tuple[str | None, Path]] = []
        if prompts is None:
            found = sorted(p for p in self.folder.rglob("*") if p.suffix.lower() in ENDINGS)
            rows = [(None, p) for p in found]
        else:
            for i, prompt in enumerate(read_prompts(prompts, images=self.folder)):
                if prompt.image is None:
                    raise InputError(f"{prompts}: prompt {i} has no image; a corpus of pictures has one in each.")
                rows.append((prompt.text, prompt.image))
        if not rows:
            raise InputError(f"the folder {self.folder} holds no picture ({' '.join(ENDINGS)}).")
        self._rows = rows
        digest = hashlib.sha256()
        for text, path in rows:
            place = os.path.relpath(path, self.folder)
            digest.update(f"{len(text or '')} {text} {place} {path.stat().st_size}\n".encode())
        self._digest = digest.hexdigest()

    def __len__(self) -> int:
        """How many pictures (with their prompts) there are."""
        return len(self._rows)

    def document(self, index: int) -> Document:
        """The document of that number.

        Raises:
            FileError: the picture cannot be read.
        """
        from PIL import Image

        text, path = self._rows[index]
        try:
            with Image.open(path) as opened:
                return Document(index, text, (opened.convert("RGB"),))
        except OSError as error:  # PIL's own errors are of this kind too
            raise FileError(f"{path} cannot be read as a picture ({error}).") from error

    @property
    def identity(self) -> dict[str, Any]:
        """Kind, number, texts with names and sizes of the pictures, and order."""
        return {"kind": "pictures", "documents": len(self), "sha256": self._digest, "seed": self.seed}


class SceneCorpus(Corpus):
    """The bundled scenes: each picture with the prompt that asks for a caption, and its true caption.

    Args:
        split: of the scenes.
        n: how many.
        start: number of the first scene.
        seed: of the order; None to keep it. (The scenes are those of seed 0.)

    Raises:
        UnknownNameError: no such split.
        SettingsError: `n` is not positive, or `start` negative.
    """

    def __init__(self, split: str = "train", n: int = 10_000, *, start: int = 0, seed: int | None = None) -> None:
        from interp.data.scenes import SPLITS

        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        if n < 1 or start < 0:
            raise SettingsError(f"n is at least 1 and start at least 0; found n={n}, start={start}.")
        self.split, self.n, self.start, self.seed = split, n, start, check_seed(seed)

    def __len__(self) -> int:
        """How many scenes there are."""
        return self.n

    def document(self, index: int) -> Document:
        """The document of that number."""
        from interp.data.scenes import CAPTION_PROMPT, caption, scene

        one = scene(self.split, self.start + index)  # type: ignore[arg-type]
        return Document(index, f"{CAPTION_PROMPT} {caption(one.names)}", (one.image,))

    @property
    def identity(self) -> dict[str, Any]:
        """Kind, split, range and order."""
        return {"kind": "scenes", "split": self.split, "n": self.n, "start": self.start, "seed": self.seed}
