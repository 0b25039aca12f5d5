"""What stands beside a ranking: what its heads write and for which prompts, and what removing them does."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from interp.cli.ranking.settings import HeadsSettings
from interp.errors import InputError, InterpError, UnsupportedError
from interp.heads import effect_of, extremes, pursuit_interval, topics

if TYPE_CHECKING:
    import pandas as pd

    from interp.cli.ranking.batches import Chunk
    from interp.heads import HeadEffects, HeadTopic
    from interp.lens import Lens
    from interp.scores import HeadScores

STRONGEST = 3  # prompts that are named for each head
SPREAD = 50  # heads whose concept score gets an interval
SIGNED = ("direct_effect", "ablation", "logit_lens")


def leading(method: str, scores: "HeadScores") -> str:
    """What a method's top heads are by: the size of scores that have a sign, or the score.

    For pursuit it is how far the score lies above its floor: by the score alone those heads come first that write along
    what all rows of the unembedding share, whatever the keywords.
    """
    if method == "pursuit" and "above_floor" in scores.extra:
        return "above_floor"
    return "abs" if method in SIGNED else "score"


@dataclass(slots=True)
class Evidence:
    """Finds what stands beside the rankings of one model.

    Attributes:
        lens: the model.
        settings: what is asked.
        chunks: the prompts, in batches.
        some: those on which heads are removed.
        reasons: why something was left out, by what it is.
    """

    lens: "Lens"
    settings: HeadsSettings
    chunks: "Sequence[Chunk]"
    some: "Sequence[Chunk]"
    reasons: dict[str, str] = field(default_factory=dict)
    _topics: "dict[tuple[int, int], HeadTopic]" = field(default_factory=dict)

    def effects(self, method: str, scores: "HeadScores", inputs: "Sequence[Chunk]") -> "HeadEffects | None":
        """What scaling the heads at both ends of a ranking does, beside random heads; None where it cannot be had.

        Args:
            method: which ranking.
            scores: the ranking.
            inputs: what it was computed on, for runs without prompts.
        """
        total = int(scores.scores.isfinite().sum())
        k = min(self.settings.effect_heads, total // 2)
        if not k:
            return None
        by = leading(method, scores)
        by = "score" if by == "abs" else by  # the two ends of a ranking with a sign are its two signs
        chunks = self.some or inputs
        answers, wrong = ([one for c in chunks for one in getattr(c, name) or ()] for name in ("answers", "wrong"))
        try:
            return effect_of(
                self.lens,
                [c.batch for c in chunks],
                dict(extremes(scores, k, by)),
                scale=self.settings.effect_scale,
                answers=answers or None,
                wrong=wrong or None,
                controls=self.settings.controls,
                seed=self.settings.seed,
                max_tokens=1024,
            )
        except (UnsupportedError, InputError) as error:
            self.reasons["effects"] = str(error)
            return None

    def topics(self, method: str, scores: "HeadScores") -> "pd.DataFrame":
        """The topic of each top head and the prompts that it is strongest for.

        Columns: `rank`, `layer`, `head`, `tokens` (a list), `explained` (share of the head's variance over the prompts
        that they explain), `prompts` (a list of indices, the strongest first).
        """
        import pandas as pd

        rows: list[dict[str, Any]] = []
        count = self.settings.topic_heads
        if count and self.chunks and self.lens.anatomy.main == scores.tower:
            top = scores.top(count, by=leading(method, scores)).to_dict("records")
            heads = [(int(row["layer"]), int(row["head"])) for row in top]
            self._find(heads)
            for row, head in zip(top, heads, strict=True):
                topic = self._topics.get(head)
                if topic is None:
                    continue
                found = {"rank": int(row["rank"]), "layer": head[0], "head": head[1], "tokens": list(topic.tokens)}
                found |= {"explained": float(topic.explained[-1]), "prompts": self._strongest(method, scores, topic)}
                rows.append(found)
        return pd.DataFrame(rows, columns=["rank", "layer", "head", "tokens", "explained", "prompts"])

    def intervals(self, method: str, scores: "HeadScores") -> "pd.DataFrame | None":
        """Bootstrap intervals of the highest concept scores; None for methods that have scores of single prompts."""
        if method != "pursuit" or scores.settings["prompts"] < 2:
            return None
        batches = [c.batch for c in self.chunks]
        return pursuit_interval(
            self.lens, batches, scores, scores.top(SPREAD, leading(method, scores)), seed=self.settings.seed
        )

    def _find(self, heads: Sequence[tuple[int, int]]) -> None:
        """Topics of heads that are not known yet, in one pass over the prompts; one by one where a head has none."""
        new = [head for head in heads if head not in self._topics]
        if not new:
            return
        settings: Any = self.settings
        options = {"k": settings.topic_tokens, "positions": settings.positions}
        options |= {"apply_final_norm": settings.apply_final_norm}
        try:
            found = topics(self.lens, [c.batch for c in self.chunks], new, **options)
        except InterpError as error:
            if len(new) == 1:
                self.reasons["topics"] = str(error)
            else:
                for head in new:
                    self._find([head])
            return
        self._topics.update(zip(new, found, strict=True))

    def _strongest(self, method: str, scores: "HeadScores", topic: "HeadTopic") -> list[int]:
        if scores.per_prompt is None or (method == "patterns" and self.settings.repeated):
            size = topic.coefficients.norm(dim=1)  # how much each prompt's output holds of the topic
            index = list(range(len(size)))
        else:
            size = scores.per_prompt[:, topic.layer, topic.head].abs()
            index = scores.settings.get("prompt_index", list(range(len(size))))
        order = torch.argsort(size, descending=True, stable=True)[:STRONGEST]
        return [int(index[i]) for i in order.tolist()]
