"""Dictionaries of other projects: files as they write them, planted, against their formulas written out."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from interp.dictionaries import SAE, Transcoder, from_saelens, load
from interp.errors import FileError, InputError, UnknownNameError, UnsupportedError

D, F, K = 6, 20, 3
relu = torch.relu


def rand(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.fixture(scope="module")
def x():
    return rand(40, D, seed=9) + 0.5


W = {"W_enc": rand(D, F, seed=1), "b_enc": rand(F, seed=2, scale=0.3)}
W |= {"W_dec": rand(F, D, seed=3), "b_dec": rand(D, seed=4)}
THRESHOLD = rand(F, seed=5).abs()


def topk(pre):
    """The K largest of each row after a ReLU, the others zero."""
    kept = torch.zeros_like(pre)
    for row, values in zip(kept, relu(pre), strict=True):
        for j in sorted(range(F), key=lambda j: -float(values[j]))[:K]:
            row[j] = values[j]
    return kept


def written(folder, dict_class, state, **trainer):
    """A folder of dictionary_learning."""
    about = {"dict_class": dict_class, "lm_name": "some/model", "layer": 4, "submodule_name": "resid_post_layer_4"}
    (folder / "config.json").write_text(json.dumps({"trainer": about | trainer, "buffer": {}}))
    torch.save(state, folder / "ae.pt")
    return folder


LINEAR = {"encoder.weight": W["W_enc"].t(), "encoder.bias": W["b_enc"], "decoder.weight": W["W_dec"].t()}


def check(found, x, latents, reconstruction, kind=SAE):
    assert isinstance(found, kind)
    assert not found.training
    with torch.no_grad():
        torch.testing.assert_close(found.encode(x), latents, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found(x), reconstruction, atol=1e-5, rtol=1e-5)


def pre(x, centred=True):
    return (x - W["b_dec"] * centred) @ W["W_enc"] + W["b_enc"]


@pytest.mark.parametrize("single", [True, False])
def test_gemma_scope(x, tmp_path, single):
    np.savez(tmp_path / "params.npz", threshold=THRESHOLD.numpy(), **{k: v.numpy() for k, v in W.items()})
    p = pre(x, centred=False)
    f = p * (p > THRESHOLD)
    assert 0 < (f > 0).float().mean() < 0.5
    check(load(tmp_path / "params.npz" if single else tmp_path), x, f, f @ W["W_dec"] + W["b_dec"])


def test_gemma_scope_transcoder_of_another_width(x, tmp_path):
    dec, b_dec = rand(F, 9, seed=6), rand(9, seed=7)
    tensors = {**W, "W_dec": dec, "b_dec": b_dec, "threshold": THRESHOLD}
    np.savez(tmp_path / "params.npz", **{k: v.numpy() for k, v in tensors.items()})
    p = pre(x, centred=False)
    f = p * (p > THRESHOLD)
    check(load(tmp_path), x, f, f @ dec + b_dec, Transcoder)


def test_dictionary_learning_autoencoder_has_rows_of_length_one(x, tmp_path):
    found = load(written(tmp_path, "AutoEncoder", LINEAR | {"bias": W["b_dec"]}))
    f = relu(pre(x))
    norms = W["W_dec"].norm(dim=1)
    check(found, x, f * norms, f @ W["W_dec"] + W["b_dec"])
    torch.testing.assert_close(found.W_dec.norm(dim=1), torch.ones(F))
    assert found.metadata["model_name"] == "some/model"
    assert found.metadata["layer"] == 4


def test_dictionary_learning_new_autoencoder(x, tmp_path):
    found = load(written(tmp_path, "AutoEncoderNew", LINEAR | {"decoder.bias": W["b_dec"]}))
    f = relu(pre(x, centred=False))
    check(found, x, f, f @ W["W_dec"] + W["b_dec"])


def test_dictionary_learning_gated(x, tmp_path):
    r_mag, gate, mag = rand(F, seed=11, scale=0.2), rand(F, seed=12), rand(F, seed=13)
    state = {k: v for k, v in LINEAR.items() if k != "encoder.bias"} | {"decoder_bias": W["b_dec"]}
    found = load(written(tmp_path, "GatedAutoEncoder", state | {"r_mag": r_mag, "gate_bias": gate, "mag_bias": mag}))
    p = (x - W["b_dec"]) @ W["W_enc"]
    f = (p + gate > 0) * relu(r_mag.exp() * p + mag)
    check(found, x, f, f @ W["W_dec"] + W["b_dec"])


def test_dictionary_learning_jumprelu(x, tmp_path):
    found = load(written(tmp_path, "JumpReluAutoEncoder", W | {"threshold": THRESHOLD}))
    p = pre(x, centred=False)
    f = relu(p * (p > THRESHOLD))
    check(found, x, f, f @ W["W_dec"] + W["b_dec"])


def test_dictionary_learning_topk(x, tmp_path):
    extra = {"b_dec": W["b_dec"], "k": torch.tensor(K), "threshold": torch.tensor(-1.0)}
    found = load(written(tmp_path, "AutoEncoderTopK", LINEAR | extra, k=K))
    f = topk(pre(x))
    check(found, x, f, f @ W["W_dec"] + W["b_dec"])


@pytest.mark.parametrize("threshold", [0.8, -1.0])
@pytest.mark.parametrize("matryoshka", [False, True])
def test_dictionary_learning_batchtopk_has_a_threshold(x, tmp_path, threshold, matryoshka):
    extra = {"k": torch.tensor(K), "threshold": torch.tensor(threshold)}
    if matryoshka:
        state = W | extra | {"group_sizes": torch.tensor([5, 15])}
        found = load(written(tmp_path, "MatryoshkaBatchTopKSAE", state, k=K))
    else:
        found = load(written(tmp_path, "BatchTopKSAE", LINEAR | extra | {"b_dec": W["b_dec"]}, k=K))
    f = relu(pre(x))
    f = f * (f > threshold)
    check(found, x, f, f @ W["W_dec"] + W["b_dec"])


@pytest.mark.parametrize(("transcode", "skip"), [(False, False), (True, False), (True, True), (False, True)])
def test_sparsify(x, tmp_path, transcode, skip):
    folder = tmp_path / "layers.4"
    folder.mkdir()
    cfg = {"activation": "topk", "expansion_factor": 4, "normalize_decoder": True, "num_latents": F, "k": K}
    cfg |= {"multi_topk": False, "skip_connection": skip, "transcode": transcode, "d_in": D}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    state = {"encoder.weight": W["W_enc"].t(), "encoder.bias": W["b_enc"], "W_dec": W["W_dec"], "b_dec": W["b_dec"]}
    if skip:
        state["W_skip"] = rand(D, D, seed=8)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "sae.safetensors")
    f = topk(pre(x, centred=not transcode))
    y = f @ W["W_dec"] + W["b_dec"] + (x @ state["W_skip"].t() if skip else 0)
    found = load(folder)
    check(found, x, f, y, Transcoder if transcode or skip else SAE)
    assert found.metadata["hook_name"] == "layers.4"


def test_saelens_objects(x):
    sae_lens = pytest.importorskip("sae_lens")
    theirs = sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(d_in=D, d_sae=F))
    theirs.load_state_dict(W | {"threshold": THRESHOLD})
    theirs.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    found = from_saelens(theirs)
    with torch.no_grad():
        check(found, x, theirs.encode(x), theirs(x))
    assert found.metadata["hook_name"] == "blocks.1.hook_resid_post"
    with pytest.raises(InputError, match="sae_id"):
        from_saelens("gemma-scope-2b-pt-res-canonical")
    with pytest.raises(InputError, match=r"sae_lens\.SAE"):
        from_saelens(3)


def test_bad_files(tmp_path):
    np.savez(tmp_path / "params.npz", W_enc=np.zeros((2, 3)))
    with pytest.raises(FileError, match="lacks W_dec, b_dec, b_enc, threshold"):
        load(tmp_path)
    (tmp_path / "params.npz").write_bytes(b"nothing")
    with pytest.raises(FileError, match="npz of numbers"):
        load(tmp_path)
    np.savez(tmp_path / "params.npz", a=np.array([{}], dtype=object))
    with pytest.raises(FileError, match="npz of numbers"):
        load(tmp_path)
    folder = tmp_path / "dl"
    folder.mkdir()
    with pytest.raises(UnknownNameError, match="dict_class"):
        load(written(folder, "Unheard", LINEAR))
    with pytest.raises(FileError, match="lacks 'bias'"):
        load(written(folder, "AutoEncoder", LINEAR))
    with pytest.raises(FileError, match="W_dec"):
        load(written(folder, "AutoEncoder", LINEAR | {"bias": W["b_dec"], "decoder.weight": rand(D, 3)}))


class Evil:
    def __reduce__(self):
        return print, ("a pickle ran",)


def test_a_pickle_runs_nothing(tmp_path, capsys):
    written(tmp_path, "AutoEncoder", {"bias": Evil()})
    with pytest.raises(FileError, match="tensors and nothing else"):
        load(tmp_path)
    assert "a pickle ran" not in capsys.readouterr().out


def test_groupmax_is_refused(tmp_path):
    (tmp_path / "cfg.json").write_text(json.dumps({"activation": "groupmax", "k": K, "d_in": D}))
    save_file({"b_dec": W["b_dec"]}, tmp_path / "sae.safetensors")
    with pytest.raises(UnsupportedError, match="groupmax"):
        load(tmp_path)
