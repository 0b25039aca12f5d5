"""Find the processor of a model: text, image, audio or all of them; None where a folder holds none."""

from pathlib import Path
from typing import Any

from interp.errors import FileError, MissingPackageError

_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)


def load_processor(source: str | Path, config: Any, *, trust_remote_code: bool, revision: str | None) -> Any | None:
    """The processor that belongs to a model, by transformers' own choice, else its tokenizer or image processor.

    Args:
        source: a local folder or a hub id.
        config: the model's configuration.
        trust_remote_code: as in transformers.
        revision: as in transformers.

    Returns:
        A processor, tokenizer, image processor or feature extractor, or None for a folder without any such file.

    Raises:
        MissingPackageError: the processor needs a package that is not installed.
        FileError: the files of a processor are there but none of transformers' classes can read them.
    """
    if isinstance(source, Path) and not any((source / file).is_file() for file in _FILES):
        return None
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoTokenizer

    failures = []
    for auto in (AutoProcessor, AutoTokenizer, AutoImageProcessor, AutoFeatureExtractor):
        try:
            return auto.from_pretrained(source, config=config, trust_remote_code=trust_remote_code, revision=revision)
        except ImportError as error:
            raise MissingPackageError(f"The processor of {str(source)!r} needs another package: {error}") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            failures.append((auto.__name__, error))
    if not isinstance(source, Path) and all(isinstance(error, OSError | ValueError) for _, error in failures):
        return None
    reasons = "; ".join(
        f"{name}: {str(error).strip().splitlines()[0] if str(error) else error!r}" for name, error in failures
    )
    raise FileError(f"{source} holds processor files that could not be read. {reasons}") from failures[0][1]
