"""Join the packaged vision transformer and SmolLM2 by a trained projector: the larger scenes model, `scenes-smol`.

    python -m experiments.scenes.smol --out runs/scenes-smol --steps 3000     # resumes where it stopped

Both models stay frozen; only the projector (0.55 M parameters) learns, and only it is written. A step of 16 scenes
takes a minute or more on 2 CPU cores: this wants a GPU.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

import interp.models
from experiments.scenes.checkpoint import load_state, save_state
from experiments.scenes.model import IMAGE
from experiments.scenes.pool import Pool, draw
from experiments.scenes.stages import answer_logits, task_losses
from experiments.scenes.texts import all_turns, pack
from interp.files import save_tensors

SIDE = 224
PATCH = 14
PATCHES = (SIDE // PATCH) ** 2
SPARE = "<empty_output>"
"""A token of SmolLM2 that no text contains: it becomes the image token, so that no row is added to the vocabulary."""

LAYER = -2
"""The vision layer that is projected: it tells the classes of objects apart better than the last one does."""

KEEP_EVERY = 50


def assemble(*, seed: int = 0) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The two packaged models in one LLaVA, with a projector of random weights, and its processor."""
    eye, mouth = interp.models.folder("dinov2-s"), interp.models.folder("smollm2-135m")
    words = AutoTokenizer.from_pretrained(mouth)
    spare = words.convert_tokens_to_ids(SPARE)
    renamed = json.loads(words.backend_tokenizer.to_str().replace(json.dumps(SPARE), json.dumps(IMAGE)))
    words._tokenizer = type(words.backend_tokenizer).from_str(json.dumps(renamed))
    words.padding_side = "left"
    config = LlavaConfig(
        vision_config=AutoConfig.from_pretrained(eye),
        text_config=AutoConfig.from_pretrained(mouth),
        image_token_id=spare,
        image_seq_length=PATCHES,
        vision_feature_layer=LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    text = AutoModelForCausalLM.from_pretrained(mouth, dtype=torch.float32)
    model.model.vision_tower.load_state_dict(AutoModel.from_pretrained(eye, dtype=torch.float32).state_dict())
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    pixels = AutoImageProcessor.from_pretrained(
        eye, size={"height": SIDE, "width": SIDE}, do_center_crop=False, do_resize=True
    )
    processor = LlavaProcessor(
        pixels,
        words,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
    )
    return model.eval(), processor


def to_input(pixels: Tensor) -> Tensor:
    """Pixels uint8 [batch, h, w, 3] as the image processor gives them: float32 [batch, 3, SIDE, SIDE]."""
    large = interpolate(pixels.movedim(-1, 1).float(), (SIDE, SIDE), mode="bicubic", antialias=True).clamp(0, 255) / 255
    mean = torch.tensor([0.485, 0.456, 0.406], device=pixels.device)[:, None, None]
    return (large - mean) / torch.tensor([0.229, 0.224, 0.225], device=pixels.device)[:, None, None]


def losses(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, pool: Pool, batch: int, random: np.random.Generator
) -> dict[str, Tensor]:
    """The loss of every task on some scenes of the pool."""
    words, device = processor.tokenizer, model.device
    chosen = random.integers(len(pool.scenes), size=batch).tolist()
    with torch.no_grad():
        tower = model.model.vision_tower(to_input(pool.pixels[chosen].to(device)), output_hidden_states=True)
    prefix = model.model.multi_modal_projector(tower.hidden_states[LAYER][:, 1:])
    packed = pack([all_turns(pool.scenes[i], random) for i in chosen], words, prefix=PATCHES).to(device)
    return task_losses(answer_logits(model, prefix, packed), packed, words.eos_token_id)


def train(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pool: Pool,
    *,
    steps: int,
    batch: int,
    rate: float = 1e-3,
    seed: int = 0,
    state: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Train the projector and give the numbers of each step; goes on from the file `state` if it exists."""
    projector = model.model.multi_modal_projector
    adam = torch.optim.AdamW(projector.parameters(), lr=rate, weight_decay=0.01)
    first = load_state(state, projector, adam)["step"] if state is not None and state.exists() else 0
    for step in range(first, steps):
        for group in adam.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 50) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        result = losses(model, processor, pool, batch, np.random.default_rng([seed, step]))
        adam.zero_grad(set_to_none=True)
        result["loss"].backward()
        torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        adam.step()
        if state is not None and ((step + 1) % KEEP_EVERY == 0 or step + 1 == steps):
            save_state(state, projector, adam, {"step": step + 1})
        yield {"step": step, **{name: round(float(value.detach()), 5) for name, value in result.items()}}


def main(
    out: Annotated[Path, typer.Option(help="where the state and the curve are kept")] = Path("runs/scenes-smol"),
    steps: int = 3000,
    batch: int = 16,
    pool: Annotated[int, typer.Option(help="how many scenes to draw")] = 20_000,
    seed: int = 0,
) -> None:
    """Train the projector of scenes-smol, or go on with it, and write it in float16."""
    model, processor = assemble(seed=seed)
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # pyright: ignore[reportArgumentType]
    out.mkdir(parents=True, exist_ok=True)
    drawn = draw("train", pool)
    with (out / "curve.jsonl").open("a", encoding="utf-8") as curve:
        for numbers in train(
            model, processor, drawn, steps=steps, batch=batch, seed=seed, state=out / "state.safetensors"
        ):
            curve.write(json.dumps(numbers) + "\n")
            curve.flush()
            if numbers["step"] % 10 == 0:
                print(" ".join(f"{k} {v}" for k, v in numbers.items()), flush=True)
    weights = model.model.multi_modal_projector.state_dict()
    save_tensors(out / "projector.safetensors", {name: value.half() for name, value in weights.items()})


if __name__ == "__main__":
    typer.run(main)
