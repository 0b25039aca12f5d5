"""What an intervention is estimated on: the first prompts of the data, and questions about pictures with and without.

Sink dimensions and the ranking of heads come from the first prompts; they use no labels. Recovery rates need answers:
for scenes they come from another split, and the second picture is the scene without the object; for other data from the
first images themselves, whose labels they see, and the second picture is its own mean colour.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from interp.cli.evaluation.settings import EvaluateSettings
from interp.errors import InputError
from interp.evaluation import Recovery, image_prompt, recovery_rates
from interp.evaluation.answering import checked_image
from interp.without_image import without_image

if TYPE_CHECKING:
    from interp.batch import Batch
    from interp.cli.evaluation.data import Data
    from interp.lens import Lens

PROBED = 8  # prompts for sink dimensions and rankings
ASKED = 24  # questions for recovery rates


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """The data of a run, as far as an intervention may look at it."""

    settings: EvaluateSettings
    data: "Data"
    _rates: list[Recovery] = field(default_factory=list)  # estimated once

    def prompts(self, lens: "Lens") -> "Batch":
        """The first prompts of the data: of its questions, or the one for captions."""
        images = self.data.images
        assert images is not None  # the settings see to it
        asked = self.data.questions[:PROBED]
        rows = [(self.data.prompt.replace("{question}", q.text), q.image) for q in asked]
        rows = rows or [(self.data.prompt, one) for one in list(images)[:PROBED]]
        texts = [image_prompt(lens, text, chat=self.settings.chat) for text, _ in rows]
        return lens.prepare(texts, [checked_image(lens, images[one], one) for _, one in rows], padding_side="left")

    @property
    def source(self) -> str:
        """What recovery rates are estimated on, in words."""
        if self.settings.source == "scenes":
            return f"{ASKED} scenes of the {self._split()} split, with an object and without it"
        return f"the first {ASKED} objects of the data itself, with the picture and with its mean colour"

    def rates(self, lens: "Lens") -> Recovery:
        """Recovery rates of every layer.

        Raises:
            InputError: no image of the data has a known object.
        """
        if not self._rates:
            self._rates.append(recovery_rates(lens, [self._pair(lens)]))
        return self._rates[0]

    def _pair(self, lens: "Lens") -> "tuple[Batch, Batch]":
        if self.settings.source == "scenes":
            return self._scenes(lens)
        images = self.data.images
        assert images is not None
        rows = [(q.text, q.image) for q in self.data.questions if q.answer == "yes"]
        if not rows:
            from interp.cli.evaluation.data import IS_THERE

            known = {one: names[0] for one, names in self.data.objects.items() if names and one in images}
            rows = [(IS_THERE.format(name=name), one) for one, name in known.items()]
        if not rows:
            raise InputError("iri needs images with a known object to estimate its rates on; there are none.")
        texts = [image_prompt(lens, text, chat=self.settings.chat) for text, _ in rows[:ASKED]]
        pictures = [checked_image(lens, images[one], one) for _, one in rows[:ASKED]]
        clean = lens.prepare(texts, pictures, padding_side="left")
        return clean, without_image(lens, clean, "mean").batch

    def _split(self) -> str:
        return "train" if self.settings.split == "validation" else "validation"

    def _scenes(self, lens: "Lens") -> "tuple[Batch, Batch]":
        from interp.data import scenes

        drawn = list(scenes.scenes(self._split(), ASKED))  # pyright: ignore[reportArgumentType]
        texts = [image_prompt(lens, scenes.existence(s.names[0]), chat=self.settings.chat) for s in drawn]
        with_it = lens.prepare(texts, [s.image for s in drawn], padding_side="left")
        return with_it, lens.prepare(texts, [s.without(s.names[0]).image for s in drawn], padding_side="left")


def probe_of(settings: EvaluateSettings, data: "Data") -> Probe:
    """The probe of a run; that of a comparison is the same for all of its parts."""
    return Probe(replace(settings, intervention=None, strength=None, control=None, doses=None), data)
