"""Cross-modal tracing: groups that are a partition, the invariants, the plain loop, corruptions, bad input."""

import numpy as np
import pytest
import torch

import interp
from interp import edits, evaluation
from interp.data import scenes
from interp.errors import InputError, SettingsError, UnknownNameError
from interp.tracing import cross_modal_trace
from interp.tracing.cross_modal_trace import COMPONENTS, corrupted, token_groups


@pytest.fixture(scope="module")
def lens():
    return interp.load("scenes", device="cpu")


class Asked:
    """Questions after the first object of some scenes, their pictures with it and without it."""

    def __init__(self, lens, count):
        self.drawn = [(s, s.names[0]) for s in scenes.scenes("test", count)]
        texts = [evaluation.image_prompt(lens, scenes.exists(s, n).text) for s, n in self.drawn]
        self.clean = lens.prepare(texts, [s.image for s, _ in self.drawn], padding_side="left")
        self.corrupt = lens.prepare(texts, [s.without(n).image for s, n in self.drawn], padding_side="left")
        self.objects = [s.mask(n) for s, n in self.drawn]
        self.names = [n for _, n in self.drawn]
        self.answers = {"answers": ["yes"] * count, "wrong": ["no"] * count}
        self.options = {"objects": self.objects, "names": self.names, **self.answers}


@pytest.fixture(scope="module")
def asked(lens):
    return Asked(lens, 4)


def test_groups_are_a_partition_in_the_order_of_the_text(lens, asked):
    groups = token_groups(lens, asked.clean, asked.objects, asked.names)
    total = sum(mask.long() for mask in groups.values())
    assert torch.equal(total, asked.clean.mask.long())
    for i, (scene, name) in enumerate(asked.drawn):
        image = asked.clean.span("image")[i]
        column = {g: mask[i].nonzero()[:, 0] for g, mask in groups.items()}
        assert int(column["prefix"].max()) < int(image.nonzero().min())
        assert int(column["last"]) == int(asked.clean.mask[i].nonzero().max())
        # The object's tokens by hand: 8 pixels a patch, half of them on the object, or any.
        mask = scene.mask(name)
        side = mask.shape[0] // 8
        share = mask.reshape(8, side, 8, side).mean((1, 3)).ravel()
        wanted = (share >= 0.5) if (share >= 0.5).any() else share > 0
        on = torch.isin(image.nonzero()[:, 0], column["image, object"]).numpy()
        assert np.array_equal(on, wanted)
        rank = image.nonzero()[:, 0].tolist()
        low, high = (rank.index(int(f(column["image, object"]))) for f in (min, max))
        assert len(column["image, early"]) == low
        assert len(column["image, late"]) == len(rank) - 1 - high
        tokens = lens.processor.tokenizer.convert_ids_to_tokens(asked.clean.inputs["input_ids"][i])
        assert "".join(tokens[c] for c in column["text, object"].tolist()).strip("▁Ġ ") == name


def test_invariants(lens, asked):
    found = cross_modal_trace(lens, asked.clean, asked.corrupt, **asked.options)
    assert found.sites == COMPONENTS
    for site in found.sites:
        assert float(found.grid(site)["prefix"].abs().max()) == 0  # nothing in front of the picture can change
    stream, depth = found.grid("resid_post"), 5
    assert stream.loc[depth, "last"] == pytest.approx(1.0, abs=1e-4)
    for group in stream.columns.drop("last"):
        assert stream.loc[depth, group] == 0  # only the last token is read above the last layer
    whole = interp.tracing.patch_sweep(
        lens, asked.clean, asked.corrupt, sites="resid_post", positions="all", layers=[0, 3], **asked.answers
    )
    assert torch.allclose(whole.effects, torch.ones(2, dtype=torch.float64), atol=1e-4)
    same = cross_modal_trace(lens, asked.corrupt, asked.clean, direction="noise", layers=[2], **asked.options)
    mine = found.grid("attn_out").loc[2]
    assert np.allclose(same.grid("attn_out").loc[2], mine, atol=1e-4)  # noising is denoising the other way round


def test_cells_are_those_of_whole_runs(lens, asked):
    found = cross_modal_trace(
        lens, asked.clean, asked.corrupt, components=["attn_out", "resid_post"], layers=[1, 4], **asked.options
    )
    groups = token_groups(lens, asked.clean, asked.objects, asked.names)
    ids = [lens.processor.tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in ("yes", "no")]
    for (site, layer, _, group), values in zip(found.cells.tolist(), found.values, strict=True):
        name = found.sites[site]
        clean = lens.run(asked.clean, [f"{name}.{layer}"])[name, layer]
        mask = groups[found.groups[group]]

        def change(value, clean=clean, mask=mask):
            return torch.where(mask[..., None], clean, value)

        logits = lens.run(asked.corrupt, ["logits@last"], edits.splice(change, site=name, layers=layer)).logits[:, -1]
        there = mask.any(1)
        assert torch.equal(there, found.exists[group])
        wanted = logits[:, ids[0]] - logits[:, ids[1]]
        assert torch.allclose(values[there], wanted[there], atol=1e-4), found.groups[group]


def test_corruptions(lens, asked):
    pixels = asked.clean.inputs["pixel_values"]
    noisy = corrupted(lens, asked.clean, "noise", noise=0.5, seed=3)
    off = noisy.inputs["pixel_values"] - pixels
    assert float(off.std()) == pytest.approx(0.5 * float(pixels.std()), rel=0.02)
    assert torch.equal(
        noisy.inputs["pixel_values"], corrupted(lens, asked.clean, "noise", noise=0.5, seed=3).inputs["pixel_values"]
    )
    swapped = corrupted(lens, asked.clean, "swap").inputs["pixel_values"]
    assert torch.equal(swapped[0], pixels[1])
    assert torch.equal(swapped[-1], pixels[0])
    plain = corrupted(lens, asked.clean, "mean").inputs["pixel_values"]
    assert float(plain.flatten(2).std(-1).max()) < 1e-6
    for how in ("noise", "mean", "swap"):
        found = cross_modal_trace(lens, asked.clean, how, layers=[5], components="resid_post", **asked.options)
        assert found.settings["corruption"] == how
        assert found.grid().loc[5, "last"] == pytest.approx(1.0, abs=1e-3)
    assert found.settings["tokens"]["last"] == 1.0


def test_noise_on_the_embeddings(lens, asked):
    """The image tokens' first streams, spoilt by hand; a prompt alone gets the same noise."""
    stream = lens.run(asked.clean, "resid_pre.0")["resid_pre", 0]
    image = asked.clean.span("image")
    generator, spoilt = torch.Generator().manual_seed(7), stream.clone()
    drawn = torch.stack([torch.randn(stream.shape[2], generator=generator) for _ in range(int(image[0].sum()))])
    for i in range(len(stream)):
        spoilt[i, image[i]] += 0.5 * stream[i, image[i]].std(correction=0) * drawn
    options = {"noise": 0.5, "seed": 7, "components": ["attn_out", "resid_post"], "layers": [1, 5]}
    found = cross_modal_trace(lens, asked.clean, "embedding_noise", **options, **asked.options)
    assert (found.settings["corruption"], found.settings["noise"]) == ("embedding_noise", 0.5)
    assert found.settings["way"] == "carried"
    ids = [lens.processor.tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in ("yes", "no")]
    groups = token_groups(lens, asked.clean, asked.objects, asked.names)
    entering = edits.splice(lambda x: spoilt, site="resid_pre", layers=0)
    logits = lens.run(asked.clean, ["logits@last"], entering).logits[:, -1]
    assert torch.allclose(found.corrupt, logits[:, ids[0]] - logits[:, ids[1]], atol=1e-4)
    for (site, layer, _, group), values in zip(found.cells.tolist(), found.values, strict=True):
        name, mask = found.sites[site], groups[found.groups[group]]
        clean = lens.run(asked.clean, [f"{name}.{layer}"])[name, layer]
        patch = edits.splice(
            lambda x, clean=clean, mask=mask: torch.where(mask[..., None], clean, x), site=name, layers=layer
        )
        logits = lens.run(asked.clean, ["logits@last"], [entering, patch]).logits[:, -1]
        there = mask.any(1)
        wanted = logits[:, ids[0]] - logits[:, ids[1]]
        assert torch.allclose(values[there], wanted[there], atol=1e-4), found.groups[group]
    alone = Asked(lens, 1)
    single = cross_modal_trace(lens, alone.clean, "embedding_noise", **options, **alone.options)
    assert torch.allclose(single.corrupt, found.corrupt[:1], atol=1e-4)
    with pytest.raises(SettingsError, match="noise is a finite number"):
        cross_modal_trace(lens, asked.clean, "embedding_noise", noise=0.0, **asked.options)


def test_bad_input(lens, asked):
    options = asked.options
    with pytest.raises(InputError, match="prompt 0"):
        cross_modal_trace(lens, asked.clean, asked.corrupt, **{**options, "names": ["zebra"] * 4})
    with pytest.raises(InputError, match="3 names were given for 4 prompts"):
        cross_modal_trace(lens, asked.clean, asked.corrupt, **{**options, "names": asked.names[:3]})
    none = [np.zeros_like(mask) for mask in asked.objects]
    with pytest.raises(InputError, match="its mask is empty"):
        cross_modal_trace(lens, asked.clean, asked.corrupt, **{**options, "objects": none})
    with pytest.raises(InputError):
        cross_modal_trace(lens, asked.clean, asked.clean, **options)
    with pytest.raises(SettingsError, match="noise is a finite number"):
        cross_modal_trace(lens, asked.clean, "noise", noise=0.0, **options)
    with pytest.raises(UnknownNameError, match="corruption"):
        corrupted(lens, asked.clean, "blur")
    alone = Asked(lens, 1)
    with pytest.raises(SettingsError, match="at least two prompts"):
        cross_modal_trace(lens, alone.clean, "swap", **alone.options)
