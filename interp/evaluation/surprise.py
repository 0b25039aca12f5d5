"""How surprised a model is by a generated text: what its tokens cost, behind their prompt, in nats."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.batch import Batch
from interp.inputs import tokenizer_of
from interp.lens import Lens
from interp.reads import Read


def caption_surprise(lens: Lens, batch: Batch, tokens: Int[Tensor, "batch new"]) -> Float[Tensor, "batch 2"]:
    """Nats of generated tokens under the model as it is, each text up to its end and with it, and how many they are.

    Perplexity is the exponential of the nats over the tokens, both summed over texts. A text that was said with edits
    or another decoding has a larger one than what the model would have said by itself.

    Args:
        lens: the model; nothing acts on it.
        batch: the prompts that the texts were generated from.
        tokens: `Generation.tokens`: what stands behind an end is padding.

    Returns:
        Nats and counts, float64.
    """
    stop = torch.isin(tokens, torch.tensor(_ends(lens), dtype=tokens.dtype, device=tokens.device))
    real = stop.long().cumsum(1) - stop.long() == 0
    inputs: dict[str, Any] = {}
    for name, value in batch.inputs.items():
        if isinstance(value, Tensor) and value.shape == batch.mask.shape and name != "position_ids":
            more = {"input_ids": tokens, "attention_mask": real}.get(name, torch.zeros_like(tokens))
            value = torch.cat([value, more.to(value)], 1)
        if name != "position_ids":
            inputs[name] = value
    width = batch.mask.shape[1]
    inputs["attention_mask"] = torch.cat([batch.mask, real], 1).long()
    new = tokens.shape[1]
    behind = torch.zeros(len(batch), width + new, dtype=torch.bool, device=tokens.device)
    behind[:, width - 1 : -1] = True
    read = Read("logits", positions=behind)
    logits = lens.run(lens.prepare(**inputs), read)[read, -1].double()
    each = -logits.log_softmax(-1).gather(2, tokens[:, :, None])[..., 0].masked_fill(~real, 0)
    return torch.stack([each.sum(1), real.sum(1).double()], 1).cpu()


def _ends(lens: Lens) -> list[int]:
    """The tokens that end a text."""
    given = getattr(getattr(lens.model, "generation_config", None), "eos_token_id", None)
    given = getattr(tokenizer_of(lens.processor), "eos_token_id", None) if given is None else given
    return [] if given is None else [given] if isinstance(given, int) else list(given)
