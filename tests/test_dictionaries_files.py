"""Files: round trips here and with SAELens in both directions, older files, damaged files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from interp.dictionaries import SAE, Transcoder, fold_activation_scale, load, save
from interp.errors import FileError, SettingsError, UnknownNameError, UnsupportedError

D, F, N, K = 12, 40, 30, 4
KINDS = ("standard", "gated", "topk", "abstopk", "batchtopk", "jumprelu", "matryoshka_batchtopk")
WIDTHS = {"matryoshka_batchtopk": {"matryoshka_widths": (8, 20, F)}}


def built(kind, make=SAE, *, seed=0, **settings):
    """A dictionary whose every parameter is random, with a threshold where the kind has one."""
    sae = make(**{"d_in": D, "d_sae": F, "architecture": kind, "k": K} | WIDTHS.get(kind, {}) | settings)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (0.35 if name == "W_enc" else 0.2))
        if kind == "jumprelu":
            sae.threshold.abs_()
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold.fill_(0.2)
    return sae.eval()


def data(seed=1, n=N):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) + 0.3


def same(a, b, x, exact=False):
    tight = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-5}
    with torch.no_grad():
        torch.testing.assert_close(a.encode(x), b.encode(x), **tight)
        torch.testing.assert_close(a(x), b(x), **tight)


MAKES = [(SAE, {}), (Transcoder, {"d_out": 9}), (Transcoder, {"d_out": 9, "skip": True})]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("make", "settings"), MAKES)
@pytest.mark.parametrize("training", [False, True])
def test_round_trip_here(tmp_path, kind, make, settings, training):
    sae = built(kind, make, aux_loss="saelens", l1_coefficient=0.3, **settings)
    again = load(save(sae, tmp_path / "new" / "folder", training=training))
    assert type(again) is make
    assert not again.training
    same(sae, again, data(), exact=training)
    if training:
        assert again.cfg == sae.cfg
        assert again.state_dict().keys() == sae.state_dict().keys()
    elif "batchtopk" in kind:
        assert again.cfg.architecture == "jumprelu"
    third = load(save(again, tmp_path / "again", training=training))
    same(again, third, data(), exact=True)  # folding once more changes nothing


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["none", "layer_norm", "constant_norm_rescale"])
def test_saelens_opens_our_files(tmp_path, kind, mode):
    sae_lens = pytest.importorskip("sae_lens")
    sae, x = built(kind, normalize_activations=mode), data()
    save(sae, tmp_path, metadata={"model_name": "smollm2-135m", "hook_name": "blocks.3.hook_resid_post", "layer": 3})
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    same(sae, theirs, x)
    assert theirs.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    # What they write again comes back here with settings and metadata.
    theirs.save_model(tmp_path / "theirs")
    again = load(tmp_path / "theirs")
    same(again, theirs, x)
    assert again.metadata["layer"] == 3


@pytest.mark.parametrize(
    ("kind", "skip"), [(kind, skip) for kind in ("standard", "jumprelu", "batchtopk") for skip in (False, True)]
)
def test_saelens_opens_our_transcoders(tmp_path, kind, skip):
    sae_lens = pytest.importorskip("sae_lens")
    sae = built(kind, Transcoder, d_out=9, skip=skip)
    save(sae, tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    names = {
        (0, 0): "Transcoder",
        (0, 1): "SkipTranscoder",
        (1, 0): "JumpReLUTranscoder",
        (1, 1): "JumpReLUSkipTranscoder",
    }
    assert type(theirs).__name__ == names[kind != "standard", skip]
    same(sae, theirs, data())


@pytest.mark.parametrize("kind", KINDS)
def test_saelens_goes_on_training_our_files(tmp_path, kind):
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.saes.sae import TrainStepInput

    sae = built(kind, aux_loss="saelens", l1_coefficient=0.3, l0_coefficient=0.7, lp_norm=1.0).train()
    save(sae, tmp_path, training=True)
    theirs = sae_lens.TrainingSAE.load_from_disk(tmp_path)
    assert theirs.cfg.architecture() == kind
    x, dead = data(), torch.arange(F) < 5
    out = theirs.training_forward_pass(TrainStepInput(x, {"l1": 0.3, "l0": 0.7}, dead, 0, False))
    torch.testing.assert_close(sae.loss(x, dead=dead).total, out.loss, rtol=1e-5, atol=1e-5)


THEIRS = {
    "standard": ("Standard", {}),
    "gated": ("Gated", {}),
    "topk": ("TopK", {"k": K}),
    "abstopk": ("AbsTopK", {"k": K}),
    "jumprelu": ("JumpReLU", {}),
    "batchtopk": ("BatchTopK", {"k": K}),
    "matryoshka_batchtopk": ("MatryoshkaBatchTopK", {"k": K, "matryoshka_widths": [8, 20, F]}),
}


def random_weights(module, seed=5):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)
            if name == "threshold":
                p.abs_()
        if hasattr(module, "topk_threshold"):
            module.topk_threshold.fill_(0.2)
    return module


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("settings", [{}, {"apply_b_dec_to_input": False, "normalize_activations": "layer_norm"}])
def test_we_open_files_of_saelens(tmp_path, kind, settings):
    sae_lens = pytest.importorskip("sae_lens")
    name, own = THEIRS[kind]
    own = {"d_in": D, "d_sae": F, **own, **settings}
    trained = random_weights(
        getattr(sae_lens, f"{name}TrainingSAE")(getattr(sae_lens, f"{name}TrainingSAEConfig")(**own))
    )
    trained.cfg.metadata.model_name = "gpt2"
    trained.save_inference_model(tmp_path / "used")
    used, ours = sae_lens.SAE.load_from_disk(tmp_path / "used"), load(tmp_path / "used")
    same(ours, used, data())
    assert ours.metadata["model_name"] == "gpt2"
    trained.save_model(tmp_path / "trained")
    ours = load(tmp_path / "trained").train()
    assert ours.cfg.architecture == kind
    assert ours.cfg.aux_loss == "saelens"
    same(ours, trained, data())
    if hasattr(sae_lens, f"{name}SAE"):
        other = random_weights(getattr(sae_lens, f"{name}SAE")(getattr(sae_lens, f"{name}SAEConfig")(**own)))
        other.save_model(tmp_path / "plain")
        same(load(tmp_path / "plain"), other, data())


@pytest.mark.parametrize("name", ["Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder"])
def test_we_open_transcoders_of_saelens(tmp_path, name):
    sae_lens = pytest.importorskip("sae_lens")
    own = {"d_in": D, "d_sae": F, "d_out": 9, "apply_b_dec_to_input": False}
    theirs = random_weights(getattr(sae_lens, name)(getattr(sae_lens, f"{name}Config")(**own)))
    theirs.save_model(tmp_path)
    ours = load(tmp_path)
    assert isinstance(ours, Transcoder)
    assert ours.cfg.skip == ("Skip" in name)
    same(ours, theirs, data())


def test_metadata_and_settings_survive(tmp_path):
    sae = built("batchtopk", seed=3, aux_loss_coefficient=0.5)
    sae.metadata = {"site": "resid_post", "layer": 10, "tower": "text", "model": "smollm2-135m"}
    again = load(save(sae, tmp_path, metadata={"layer": 11, "data": {"name": "kjv", "tokens": 10**6}}))
    assert again.metadata == sae.metadata | {"layer": 11, "data": {"name": "kjv", "tokens": 10**6}}
    content = json.loads((tmp_path / "cfg.json").read_text())
    assert content["architecture"] == "jumprelu"
    assert content["metadata"]["training_architecture"] == "batchtopk"
    assert content["metadata"]["interp"]["trained_with"]["aux_loss_coefficient"] == 0.5


def test_weights_for_scaled_activations_are_not_saved_for_use(tmp_path):
    sae = built("topk", normalize_activations="expected_average_only_in")
    with pytest.raises(SettingsError, match="fold_activation_scale"):
        save(sae, tmp_path)
    folded = load(save(fold_activation_scale(sae, 3.0), tmp_path))
    torch.testing.assert_close(folded(data()), sae(3 * data()) / 3, rtol=1e-5, atol=1e-5)
    assert load(save(sae, tmp_path, training=True)).cfg == sae.cfg


def test_dtype_and_device(tmp_path):
    sae = built("jumprelu", dtype="bfloat16")
    again = load(save(sae, tmp_path))
    assert again.W_enc.dtype == torch.bfloat16
    assert load_file(tmp_path / "sae_weights.safetensors")["threshold"].dtype == torch.bfloat16
    wide = load(tmp_path, dtype="float64", device="cpu")
    assert wide.W_enc.dtype == torch.float64
    assert torch.equal(wide.W_enc, again.W_enc.double())
    with pytest.raises(UnknownNameError, match="float9"):
        load(tmp_path, dtype="float9")


def test_files_of_saelens_before_6(tmp_path):
    sae = built("topk", rescale_acts_by_decoder_norm=False)
    save_file(dict(sae.state_dict()), tmp_path / "sae_weights.safetensors")
    old = {
        "d_in": D,
        "d_sae": F,
        "dtype": "torch.float32",
        "hook_point": "blocks.0.hook_z",
        "normalize_activations": False,
    }
    old |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "model_name": "gpt2", "device": "cuda"}
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    again = load(tmp_path)
    same(sae, again, data(), exact=True)
    assert again.metadata == {"hook_name": "blocks.0.hook_z", "model_name": "gpt2"}
    jump = built("jumprelu")
    weights = {n: t for n, t in jump.state_dict().items() if n != "threshold"}
    save_file(weights | {"log_threshold": jump.threshold.detach().log()}, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": F, "architecture": "jumprelu"}))
    same(jump, load(tmp_path), data())
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": F, "finetuning_scaling_factor": True}))
    with pytest.raises(UnsupportedError, match="finetuning"):
        load(tmp_path)


def test_damaged_and_unknown_files(tmp_path):
    folder = save(built("standard"), tmp_path / "sae")
    cfg, weights = folder / "cfg.json", folder / "sae_weights.safetensors"
    content, tensors = json.loads(cfg.read_text()), load_file(weights)

    def wrong(error, says, **changes):
        cfg.write_text(json.dumps(content | changes))
        with pytest.raises(error, match=says):
            load(folder)
        cfg.write_text(json.dumps(content))

    wrong(UnknownNameError, "architecture 'standart' does not exist.*standard", architecture="standart")
    wrong(UnsupportedError, "'temporal'.*sae_lens", architecture="temporal")
    wrong(UnknownNameError, "covariance_whitening", normalize_activations="covariance_whitening")
    wrong(FileError, "lacks tensors.*threshold", architecture="jumprelu")
    wrong(FileError, r"of shape \[.*40.*\], by cfg.json it is \[.*41.*\]", d_sae=F + 1)
    cfg.write_text("[]")
    with pytest.raises(FileError, match="no d_in"):
        load(folder)
    cfg.write_text("{")
    with pytest.raises(FileError, match="damaged"):
        load(folder)
    cfg.write_text(json.dumps(content))
    save_file(tensors | {"W_new": torch.zeros(2)}, weights)
    with pytest.raises(FileError, match=r"has unknown tensors.*W_new"):
        load(folder)
    save_file(tensors, weights)
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(FileError, match="damaged"):
        load(folder)
    weights.unlink()
    with pytest.raises(FileError, match="no such file"):
        load(folder)
    with pytest.raises(FileError, match="cannot read"):
        load(tmp_path / "nowhere")


def test_a_save_that_fails_leaves_the_old_files(tmp_path, monkeypatch):
    sae = built("standard")
    save(sae, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(SettingsError, match="json"):
        save(built("standard", seed=1), tmp_path, metadata={"what": object()})
    with pytest.raises(SettingsError, match="'interp'"):
        save(sae, tmp_path, metadata={"interp": 1})
    with pytest.raises(SettingsError, match="no training step"):
        save(SAE(d_in=D, d_sae=F, architecture="batchtopk", k=K), tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("interp.dictionaries.files.save_file", full)
    with pytest.raises(FileError, match="No space left"):
        save(built("standard", seed=1), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
