"""(d) Whisper: how much of the input's saliency does cross-attention explain?

    python -m experiments.attribution.speech --audio DIR

DIR holds 16 kHz .wav files (Debian's pocketsphinx-testdata has five sentences of LibriVox; `dpkg -L` says where). The
model transcribes each clip; every text token of the transcript is a target. Three maps over the sound's time: the
cross-attention, layer by layer, heads averaged or single; the saliency at the input, by taking away a quarter of a
second at a time (its frames become the quietest value of the clip) and by the gradient at the encoder's input; and the
gradient times the encoder's output. Pearson's and Spearman's correlation of the flattened token x time maps, on
windows of a quarter of a second, mean over clips. Beside it: attention of another token of the same clip (what any
token would give), and how far two saliencies agree (what can be reached).
"""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

import interp
from experiments.records import Row, record, show
from interp import attribution
from interp.batch import Batch
from interp.evaluation import rank_correlation
from interp.reads import Read

RATE, FRAMES = 16_000, 50  # samples, and positions of the encoder, in a second
WINDOW = 12  # positions of the encoder: about a quarter of a second


def sound(path: Path) -> np.ndarray:
    """A mono clip of 16 kHz as floats."""
    with wave.open(str(path)) as file:
        if (file.getframerate(), file.getnchannels(), file.getsampwidth()) != (RATE, 1, 2):
            raise SystemExit(f"{path} is not mono, 16 bits, {RATE} Hz.")
        return np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").astype(np.float32) / 2**15


class Clip:
    """A clip, its transcript as decoder input, and its maps over windows of time [token, window]."""

    def __init__(self, lens: interp.Lens, path: Path) -> None:
        audio = sound(path)
        features = lens.processor(audio, sampling_rate=RATE, return_tensors="pt")["input_features"]
        plain = lens.prepare(input_features=features)
        ids = lens.generate(plain, max_new_tokens=100).sequences[0].tolist()
        special = set(lens.processor.tokenizer.all_special_ids)
        while ids and ids[-1] in special:
            ids.pop()
        self.lens, self.features = lens, features
        self.ids = torch.tensor([ids])
        self.text = lens.processor.tokenizer.decode(ids, skip_special_tokens=True)
        # A position explains the token behind it; those in front of a text token are targets.
        self.targets = [i for i in range(len(ids) - 1) if ids[i + 1] not in special]
        self.answers = [[ids[i + 1] for i in self.targets]]
        self.windows = int(np.ceil(len(audio) / RATE * FRAMES / WINDOW))

    def batch(self, features: Tensor) -> Batch:
        """The transcript over some features, once for each."""
        return self.lens.prepare(input_features=features, decoder_input_ids=self.ids.repeat(len(features), 1))

    def pooled(self, maps: Tensor) -> Tensor:
        """The sum over each window [..., window]."""
        return maps[..., : self.windows * WINDOW].unflatten(-1, (self.windows, WINDOW)).sum(-1)

    def attention(self, layer: int) -> Tensor:
        """Cross-attention of every head [head, token, window]."""
        read = Read("pattern", layers=(layer,), positions=self.targets, tower="cross")
        return self.pooled(self.lens.run(self.batch(self.features), read).values[read, layer][0])

    def occlusion(self, size: int = 4) -> Tensor:
        """What each answer's log-probability loses without a window."""
        with torch.no_grad():
            whole = self._values(self.features)
            parts = []
            for first in range(0, self.windows, size):
                some = range(first, min(first + size, self.windows))
                quiet = self.features.repeat(len(some), 1, 1)
                for row, w in enumerate(some):
                    quiet[row, :, 2 * w * WINDOW : 2 * (w + 1) * WINDOW] = self.features.min()
                parts.append(whole - self._values(quiet))
        return torch.cat(parts).T

    def _values(self, features: Tensor) -> Tensor:
        """Log-probability of each answer [row, token]."""
        logits = self.lens.run(self.batch(features), "logits").logits[:, self.targets].float()
        answers = torch.tensor(self.answers).expand(len(logits), -1)
        return logits.log_softmax(-1).gather(2, answers[..., None])[..., 0]

    def gradients(self) -> dict[str, Tensor]:
        """The gradient's size at the encoder's input, and gradient times value at its output."""
        batch = self.batch(self.features)
        asked = {"target": self.targets, "answers": self.answers, "measure": "logprob"}
        found = attribution.input_gradient(self.lens, batch, tower="encoder", **asked)  # type: ignore[arg-type]
        top = len(self.lens.anatomy.towers["encoder"].layers) - 1
        read = Read("resid_post", layers=(top,), tower="encoder")
        rows = []
        for t, position in enumerate(self.targets):

            def metric(logits: Tensor, t: int = t, position: int = position) -> Tensor:
                return logits[:, position].float().log_softmax(-1)[:, self.answers[0][t]]

            trace = self.lens.run(batch, [read], gradients=[read], metric=metric)
            rows.append((trace.values[read, top] * trace.gradients[read, top]).sum(-1)[0])
        return {"input_gradient": self.pooled(found.scores[0]), "output_gradient": self.pooled(torch.stack(rows).abs())}


def correlations(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Pearson's and Spearman's, of flattened maps."""
    flat = [x.double().flatten() for x in (one, other)]
    return float(torch.corrcoef(torch.stack(flat))[0, 1]), float(rank_correlation(*flat))


def clip_rows(clip: Clip, depth: int) -> list[Row]:
    """Every pair of one clip."""
    references = {"occlusion": clip.occlusion().clamp_min(0), **clip.gradients()}
    heads = {layer: clip.attention(layer) for layer in range(depth)}
    maps = {f"layer {i}, heads averaged": x.mean(0) for i, x in heads.items()}
    maps["all layers and heads averaged"] = torch.stack([x.mean(0) for x in heads.values()]).mean(0)
    rolled = {f"{name}, of the token before": x.roll(1, 0) for name, x in maps.items() if name.startswith("all")}
    rows: list[Row] = []
    for name, reference in references.items():
        for label, one in {**maps, **rolled, **{k: v for k, v in references.items() if k != name}}.items():
            pearson, rank = correlations(one, reference)
            rows.append({"map": label, "against": name, "pearson": pearson, "spearman": rank})
        for layer, patterns in heads.items():
            for head, one in enumerate(patterns):
                pearson, rank = correlations(one, reference)
                rows.append({"map": f"head {layer}.{head}", "against": name, "pearson": pearson, "spearman": rank})
    return rows


def main(audio: Annotated[Path, typer.Option(help="folder of 16 kHz .wav files")], limit: int = 20) -> None:
    """Run the experiment, print its table, and write it into the page."""
    import pandas as pd

    lens = interp.load("whisper-tiny-en", device="cpu")
    depth = len(lens.anatomy.towers["decoder"].layers)
    paths = sorted(audio.rglob("*.wav"))[:limit]
    if not paths:
        raise SystemExit(f"no .wav file in {audio}.")
    parts, texts = [], []
    for path in paths:
        clip = Clip(lens, path)
        print(f"{path.name}: {len(clip.targets)} tokens, {clip.windows} windows: {clip.text}", flush=True)
        texts.append({"clip": path.stem, "tokens": len(clip.targets), "transcript": clip.text})
        parts += [{**row, "clip": path.stem} for row in clip_rows(clip, depth)]
    frame = pd.DataFrame(parts)
    mean = frame.groupby(["map", "against"], sort=False)[["pearson", "spearman"]].mean().unstack()
    single = mean[mean.index.str.startswith("head ")]
    mean = mean.drop(single.index)
    mean.loc["median of single heads"] = single.median()
    for against in frame["against"].unique():  # chosen by its mean over the clips that it is scored on
        best = single["pearson", against].idxmax()
        mean.loc[f"{best}, the best against {against}"] = single.loc[best]
    rows: list[Row] = []
    for label, values in mean.iterrows():
        row: Row = {"map": str(label)}
        for against in frame["against"].unique():
            pair = [values[kind, against] for kind in ("pearson", "spearman")]
            row[f"{against}: Pearson / Spearman"] = "" if np.isnan(pair[0]) else f"{pair[0]:.2f} / {pair[1]:.2f}"
        rows.append(row)
    show("speech", rows)
    settings = {"clips": len(paths), "window_seconds": WINDOW / FRAMES}
    record("attribution", "speech", settings, {"speech": rows, "speech, clips": texts})


if __name__ == "__main__":
    typer.run(main)
