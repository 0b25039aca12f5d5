"""The experiments on dictionaries: texts, jobs, recovery, AUROC and the edit that takes a latent away."""

import json

import numpy as np
import pytest
import torch

import interp
from experiments.dictionaries import frontier, texts, toy
from experiments.dictionaries import scenes as objects
from interp import dictionaries
from interp.data import scenes


def test_texts_are_mixed_and_a_twentieth_is_held_out(tmp_path):
    (tmp_path / "kjv.txt").write_text("\n".join(f"verse {i}" for i in range(3000)))
    (tmp_path / "sources" / "library").mkdir(parents=True)
    for i in range(20):
        (tmp_path / "sources" / "library" / f"{i}.rst.txt").write_text(f"page {i}")
    texts.main(tmp_path / "kjv.txt", tmp_path / "sources", tmp_path / "out")
    parts = {}
    for name in ("train", "test"):
        parts[name] = [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
    assert len(parts["test"]) == 6
    rows = parts["train"] + parts["test"]
    assert len({row["text"] for row in rows}) == len(rows) == 120
    assert {row["source"] for row in rows[:40]} == {"bible", "python"}
    assert max(row["text"].count("verse") for row in rows) == texts.VERSES


def test_jobs_of_the_frontier_can_be_made():
    made = frontier.jobs(24)
    assert len({job.dictionary.cfg.architecture for job in made.values()}) == 6
    assert {job.target for job in made.values()} == {None, frontier.OUT}
    for name, job in made.items():
        job.check(name, dict.fromkeys((frontier.READ, frontier.MID, frontier.OUT), 24))


def test_recovery_is_the_mean_largest_cosine():
    true = torch.eye(3)
    assert toy.recovery(true, torch.tensor([[2.0, 0, 0], [0, 3.0, 0], [0, 0, 0.1]])) == pytest.approx(1)
    assert toy.recovery(true, torch.tensor([[1.0, 1.0, 0.0]])) == pytest.approx(2 / 3 * 2**-0.5)
    make, directions = toy.superposition()
    x = make(torch.Generator().manual_seed(0))
    assert x.shape == (toy.BATCH, toy.WIDTH)
    assert torch.equal(x, make(torch.Generator().manual_seed(0)))
    assert directions.norm(dim=1) == pytest.approx(torch.ones(toy.FEATURES).numpy())
    make, used = toy.program("tracr-hist", "abc")
    assert used.sum(1).eq(1).all()
    assert (make(torch.Generator().manual_seed(0)) @ (torch.eye(used.shape[1]) - used.T @ used)).std(0).max() < 1e-3


def test_auroc_counts_pairs():
    random = np.random.default_rng(0)
    scores, positive = random.integers(0, 5, (40, 3)), random.random(40) < 0.3
    for column, found in enumerate(objects.auroc(scores, positive)):
        one, two = scores[positive, column][:, None], scores[~positive, column][None]
        assert found == pytest.approx(((one > two) + 0.5 * (one == two)).mean())


def test_taking_a_latent_away_leaves_the_rest():
    lens = interp.load("scenes", device="cpu")
    some = list(scenes.scenes("test", 2))
    values, marks = objects.looked_at(lens, some)
    assert values.shape[:2] == (2, 64)
    for one, held in zip(some, marks, strict=True):
        assert set(held) == set(one.names)
    sae = dictionaries.SAE(d_in=values.shape[-1], d_sae=64, k=4).eval()
    stream = torch.from_numpy(values)
    with torch.no_grad():
        f = sae.encode(stream)
    latent = int(f.sum((0, 1)).argmax())
    batch = objects.prepared(lens, some)
    read = f"resid_post.{objects.LAYER}"
    plain, cut = (
        lens.run(batch, read, list(edits))["resid_post", objects.LAYER]
        for edits in ((), [objects.without(sae, latent)])
    )
    image = batch.span("image")
    assert torch.equal(plain[~image], cut[~image])
    expected = (sae.decode(f) - sae.decode(f * (torch.arange(64) != latent))).detach()
    torch.testing.assert_close((plain - cut)[image].view_as(expected), expected, atol=1e-5, rtol=0)
    assert float(expected.abs().max()) > 0
