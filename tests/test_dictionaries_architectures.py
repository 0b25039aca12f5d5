"""Every architecture: losses and gradients against plain formulas and against SAELens, folding, recovery, bad input."""

import pytest
import torch
from torch import nn

from interp.dictionaries import (
    SAE,
    Architecture,
    DictionaryConfig,
    Sparse,
    Transcoder,
    fold_activation_scale,
    fold_batchtopk,
    fold_decoder_norms,
    register,
)
from interp.errors import InputError, NonFiniteError, SettingsError, UnknownNameError

D, F, N, K = 12, 40, 30, 4
KINDS = ("standard", "gated", "topk", "abstopk", "batchtopk", "jumprelu", "matryoshka_batchtopk")
EXTRA = {
    "matryoshka_batchtopk": {"matryoshka_widths": (8, 20, F)},
    "jumprelu": {"jumprelu_bandwidth": 0.6, "pre_act_loss_coefficient": 0.3, "l0_coefficient": 0.7},
    "standard": {"l1_coefficient": 0.4},
    "gated": {"l1_coefficient": 0.4},
}


def built(kind, make=SAE, *, seed=0, **settings):
    """A dictionary in float64 whose every parameter is random."""
    sae = make(
        **{"d_in": D, "d_sae": F, "architecture": kind, "k": K, "dtype": "float64"} | EXTRA.get(kind, {}) | settings
    )
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            size = 0.35 if name == "W_enc" else 0.2
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * size)
        if kind == "jumprelu":
            sae.threshold.copy_(sae.threshold.abs().float())  # as SAELens holds them
    return sae


def data(seed=1, width=D, n=N):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3


def some_dead(count, seed=2):
    dead = torch.zeros(F, dtype=torch.bool)
    dead[torch.randperm(F, generator=torch.Generator().manual_seed(seed))[:count]] = True
    return dead


def plain(sae, x, target, dead):
    """The losses, dense and naive, with nothing left to the package but its parameters."""
    c = sae.cfg
    p = dict(sae.named_parameters())
    raw, scale, shift = x, 1.0, 0.0
    if c.normalize_activations == "layer_norm":
        shift, scale = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        x = (x - shift) / (scale + 1e-5)
    if c.normalize_activations == "constant_norm_rescale":
        scale = x.norm(dim=1, keepdim=True) / D**0.5
        x = x / scale
    if isinstance(sae, Transcoder):
        scale, shift = 1.0, 0.0
    centred = x - p["b_dec"] if c.apply_b_dec_to_input else x
    norm = p["W_dec"].pow(2).sum(1).sqrt()

    def finish(y):
        return y * scale + shift + (raw @ p["W_skip"].T if c.skip else 0)

    def error(y):
        return (y - target).pow(2).sum(1).mean()

    def aux(pre, y):
        r, enough, n_dead = (target - y).detach(), c.width_out // 2, int(dead.sum())
        if not n_dead:
            return torch.tensor(0.0)
        ranks = (pre.abs() if c.architecture == "abstopk" else pre).masked_fill(~dead, -torch.inf)
        place = ranks.topk(min(enough, n_dead), dim=1).indices
        acts = torch.zeros_like(pre).scatter(1, place, pre.gather(1, place))
        if c.aux_loss == "paper" and c.architecture != "abstopk":
            acts = acts.relu()
        guess = (acts / (norm if c.rescale_acts_by_decoder_norm else 1)) @ p["W_dec"] * scale
        loss = (r - guess).pow(2).sum(1).mean() * min(n_dead / enough, 1)
        return loss / 32 / (r - r.mean(0)).pow(2).sum(1).mean() if c.aux_loss == "paper" else loss

    if c.architecture == "gated":
        gate = centred @ p["W_enc"] + p["b_gate"]
        f = (gate > 0) * (centred @ (p["W_enc"] * p["r_mag"].exp()) + p["b_mag"]).relu()
        w, b = (p["W_dec"].detach(), p["b_dec"].detach()) if c.aux_loss == "paper" else (p["W_dec"], p["b_dec"])
        y = finish(f @ p["W_dec"] + p["b_dec"])
        return (
            f,
            y,
            {
                "mse_loss": error(y),
                "l1_loss": c.l1_coefficient * (gate.relu() * norm).sum(1).mean(),
                "auxiliary_reconstruction_loss": error(finish(gate.relu() @ w + b)),
            },
        )
    pre = centred @ p["W_enc"] + p["b_enc"]
    if c.architecture == "standard":
        f = pre.relu()
        y = finish(f @ p["W_dec"] + p["b_dec"])
        size = (f * norm).norm(p=c.lp_norm, dim=1).mean()
        return f, y, {"mse_loss": error(y), "l1_loss": c.l1_coefficient * size}
    if c.architecture == "jumprelu":
        t, e = p["threshold"], c.jumprelu_bandwidth
        window = ((pre - t).abs() < e / 2).double() / e
        straight = t - t.detach() - ((pre - pre.detach()) if c.jumprelu_ste_to_input else 0)
        f = pre * (pre > t) - (t * window).detach() * straight
        gate = (pre > t).double() - window.detach() * straight
        y = finish(f @ p["W_dec"] + p["b_dec"])
        size = gate.sum(1)
        if c.jumprelu_sparsity_loss_mode == "tanh":
            size = torch.tanh(c.jumprelu_tanh_scale * f * norm).sum(1)
        if c.jumprelu_sparsity_loss_mode == "quadratic":
            size = 2 * (size - c.target_l0) ** 2 / c.target_l0
        pull = ((t - pre).relu() * dead * norm).sum(1).mean() * c.pre_act_loss_coefficient
        return f, y, {"mse_loss": error(y), "l0_loss": c.l0_coefficient * size.mean(), "pre_act_loss": pull}
    pre = pre * norm if c.rescale_acts_by_decoder_norm else pre
    if c.architecture in ("topk", "abstopk"):
        ranks = pre.abs() if c.architecture == "abstopk" else pre
        keep = torch.zeros_like(pre).scatter(1, ranks.topk(int(c.k), dim=1).indices, 1.0)
        f = keep * (pre if c.architecture == "abstopk" else pre.relu())
    else:
        flat = pre.relu().flatten()
        keep = torch.zeros_like(flat).scatter(0, flat.topk(int(c.k * len(x))).indices, 1.0)
        f = (keep * flat).view_as(pre)
    inner = f / norm if c.rescale_acts_by_decoder_norm else f
    parts = {}
    for width in c.matryoshka_widths[:-1]:
        y = finish(inner[:, :width] @ p["W_dec"][:width] + p["b_dec"])
        parts[f"inner_mse_loss_{width}"] = error(y)
    y = finish(inner @ p["W_dec"] + p["b_dec"])
    return f, y, {"mse_loss": error(y), "auxiliary_reconstruction_loss": aux(pre, y), **parts}


CASES = [
    *[(kind, SAE, {}) for kind in KINDS],
    *[(kind, SAE, {"aux_loss": "saelens"}) for kind in KINDS if kind != "jumprelu"],
    *[(kind, SAE, {"normalize_activations": "layer_norm"}) for kind in KINDS],
    *[(kind, SAE, {"normalize_activations": "constant_norm_rescale"}) for kind in ("gated", "topk", "batchtopk")],
    *[(kind, SAE, {"apply_b_dec_to_input": False}) for kind in ("standard", "topk", "batchtopk")],
    *[(kind, SAE, {"rescale_acts_by_decoder_norm": False}) for kind in ("topk", "abstopk", "batchtopk")],
    *[(kind, Transcoder, {"d_out": 9}) for kind in KINDS],
    *[(kind, Transcoder, {"d_out": 9, "skip": True}) for kind in KINDS],
    ("standard", SAE, {"lp_norm": 2.0}),
    ("jumprelu", SAE, {"jumprelu_ste_to_input": True}),
    ("jumprelu", SAE, {"jumprelu_sparsity_loss_mode": "tanh"}),
    ("jumprelu", SAE, {"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_ste_to_input": True}),
    ("jumprelu", SAE, {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 6.0}),
    ("batchtopk", SAE, {"k": 2.5}),
]


@pytest.mark.parametrize("count", [0, 3, 20])
@pytest.mark.parametrize(("kind", "make", "settings"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_losses_and_gradients_are_those_of_the_plain_formula(kind, make, settings, count):
    sae, dead = built(kind, make, **settings), some_dead(count)
    x = data()
    target = data(3, 9) if make is Transcoder else x
    loss = sae.loss(x, target, dead=dead)
    loss.total.backward()
    ours = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    f, y, parts = plain(sae, x, target, dead)
    sum(parts.values()).backward()
    assert set(loss.parts) == set(parts)
    for name, part in parts.items():
        torch.testing.assert_close(loss.parts[name].double(), part.double(), rtol=1e-10, atol=1e-12, msg=name)
    torch.testing.assert_close(loss.total, sum(loss.parts.values()))
    torch.testing.assert_close(loss.dense(), f, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss.reconstruction, y, rtol=1e-10, atol=1e-12)
    assert torch.equal(loss.counts(), (f != 0).sum(0))
    for name, p in sae.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(ours[name], expected, rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def lens_module(kind, sae):
    sae_lens = pytest.importorskip("sae_lens")
    names = {
        "standard": "Standard",
        "gated": "Gated",
        "topk": "TopK",
        "abstopk": "AbsTopK",
        "batchtopk": "BatchTopK",
        "jumprelu": "JumpReLU",
        "matryoshka_batchtopk": "MatryoshkaBatchTopK",
    }
    cfg = getattr(sae_lens, f"{names[kind]}TrainingSAEConfig")
    own = sae.cfg.to_dict()
    taken = {name: own[name] for name in cfg.__dataclass_fields__ if name in own and name != "metadata"}
    taken["aux_loss_coefficient"] = sae.cfg.aux_weight
    taken = {name: value for name, value in taken.items() if name in cfg.__dataclass_fields__}
    module = getattr(sae_lens, f"{names[kind]}TrainingSAE")(cfg(**taken))
    module.load_state_dict(sae.state_dict())
    return module


@pytest.mark.parametrize("count", [0, 3, 20])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *[(kind, {}) for kind in KINDS],
        ("topk", {"rescale_acts_by_decoder_norm": False}),
        ("jumprelu", {"jumprelu_sparsity_loss_mode": "tanh"}),
        ("jumprelu", {"jumprelu_ste_to_input": True}),
        ("jumprelu", {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 6.0}),
        ("standard", {"normalize_activations": "layer_norm"}),
        ("jumprelu", {"normalize_activations": "constant_norm_rescale"}),
    ],
)
def test_training_loss_and_gradient_equal_saelens(kind, settings, count):
    sae = built(kind, aux_loss="saelens", **settings)
    module, x, dead = lens_module(kind, sae), data(), some_dead(count)
    from sae_lens.saes.sae import TrainStepInput

    coefficients = {"l1": 0.5 * sae.cfg.l1_coefficient, "l0": 0.5 * sae.cfg.l0_coefficient}
    theirs = module.training_forward_pass(TrainStepInput(x, coefficients, dead, 0, False))
    theirs.loss.backward()
    loss = sae.loss(x, dead=dead, sparsity=0.5)
    loss.total.backward()
    assert set(loss.parts) == set(theirs.losses)
    for name, part in theirs.losses.items():
        torch.testing.assert_close(loss.parts[name].double(), part.double(), rtol=1e-9, atol=1e-12, msg=name)
    torch.testing.assert_close(loss.dense(), theirs.feature_acts, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss.reconstruction, theirs.sae_out, rtol=1e-9, atol=1e-12)
    own = dict(sae.named_parameters())
    for name, p in module.named_parameters():
        tight = (
            {"rtol": 1e-5, "atol": 1e-6} if name == "threshold" else {"rtol": 1e-8, "atol": 1e-11}
        )  # theirs: float32
        torch.testing.assert_close(own[name].grad.double(), p.grad.double(), **tight, msg=lambda m, n=name: f"{n}: {m}")
    if "batchtopk" in kind:
        torch.testing.assert_close(sae.topk_threshold, module.topk_threshold, rtol=1e-9, atol=1e-12)
        assert sae.topk_threshold > 0


def test_first_weights():
    sae = SAE(d_in=D, d_sae=F, k=K)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.tensor(0.1))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()
    assert torch.equal(SAE(d_in=D, d_sae=F, k=K).W_dec, sae.W_dec)
    assert not torch.equal(SAE(d_in=D, d_sae=F, k=K, seed=1).W_dec, sae.W_dec)
    bound = (6 / D) ** 0.5
    drawn = SAE(d_in=D, d_sae=4000, k=K, decoder_init_norm=None).W_dec
    assert 0.99 * bound < drawn.abs().max() <= bound
    state = torch.get_rng_state()
    SAE(d_in=D, d_sae=F, k=K)
    assert torch.equal(torch.get_rng_state(), state)
    transcoder = Transcoder(d_in=D, d_sae=F, d_out=5, k=K, skip=True)
    assert transcoder.W_dec.shape == (F, 5)
    assert not transcoder.W_skip.any()
    assert not torch.equal(Transcoder(d_in=D, d_sae=F, k=K).W_enc, Transcoder(d_in=D, d_sae=F, k=K).W_dec.T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["none", "layer_norm"])
def test_encode_decode_and_forward_agree_on_any_leading_axes(kind, mode):
    sae = built(kind, normalize_activations=mode)
    x = data(n=12).view(3, 4, D)
    with torch.no_grad():
        f = sae.encode(x)
        torch.testing.assert_close(sae.decode(f, x), sae(x))
        torch.testing.assert_close(sae(x).view(12, D), sae.loss(x.view(12, D)).reconstruction)
        torch.testing.assert_close(f.view(12, F), sae.loss(x.view(12, D)).dense())
        if "batch" not in kind:
            torch.testing.assert_close(sae.encode(x[1, 2]), f[1, 2])
    if mode == "layer_norm":
        with pytest.raises(SettingsError, match=r"decode\(latents, x\)"):
            sae.decode(f)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens(kind):
    sae = built(kind)
    assert sae.encode(data(n=0)).shape == (0, F)
    assert sae(data(n=0).view(0, 3, D)).shape == (0, 3, D)


def test_gradients_reach_the_input():
    for kind in KINDS:
        sae, x = built(kind), data().requires_grad_()
        given = torch.autograd.grad(sae(x).pow(3).sum(), x)[0]
        f, y, _ = plain(sae, x, x, some_dead(0))
        if kind == "jumprelu":
            y = (f * (f.detach() > 0)) @ sae.W_dec + sae.b_dec
        torch.testing.assert_close(given, torch.autograd.grad(y.pow(3).sum(), x)[0], rtol=1e-8, atol=1e-10)


def test_batch_kinds_use_their_threshold_in_evaluation():
    sae, x = built("batchtopk"), data()
    assert torch.equal(sae.eval().encode(x), sae.train().encode(x))  # no step was made: no threshold is known
    least = []
    for seed in range(5):
        dense = sae.loss(data(seed)).dense()
        least.append(dense[dense > 0].min().item())
    expected = 0.0
    for value in least:
        expected = 0.99 * expected + 0.01 * value
    assert sae.topk_threshold.item() == pytest.approx(expected, rel=1e-12)
    assert sae.topk_threshold.dtype == torch.float64
    sae.topk_threshold.fill_(0.3)
    sae.eval()
    pre = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc) * sae.W_dec.norm(dim=1)
    torch.testing.assert_close(sae.encode(x), pre * (pre > 0.3))
    torch.testing.assert_close(sae.encode(x[3:4]), sae.encode(x)[3:4])  # tokens no longer depend on each other


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [SAE, Transcoder])
def test_folding_norms_changes_no_reconstruction(kind, make):
    sae, x = built(kind, make).eval(), data()
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold.fill_(0.2)
    folded = fold_decoder_norms(sae)
    torch.testing.assert_close(folded(x), sae(x), rtol=1e-9, atol=1e-11)
    assert torch.allclose(folded.W_dec.norm(dim=1), torch.ones((), dtype=torch.float64))
    norm = sae.W_dec.norm(dim=1)
    times = 1 if "topk" in kind else norm
    torch.testing.assert_close(folded.encode(x), sae.encode(x) * times, rtol=1e-9, atol=1e-11)
    if "topk" in kind:
        with pytest.raises(SettingsError, match="once"):
            fold_decoder_norms(folded)


@pytest.mark.parametrize("kind", KINDS)
def test_folding_the_activation_scale(kind):
    sae, x, s = built(kind, normalize_activations="expected_average_only_in").eval(), data(), 2.7
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold.fill_(0.2)
    folded = fold_activation_scale(sae, s)
    torch.testing.assert_close(folded(x), sae(x * s) / s, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(folded.encode(x) != 0, sae.encode(x * s) != 0)
    assert folded.cfg.normalize_activations == "none"
    transcoder = built(kind, Transcoder, d_out=9, skip=True).eval()
    if hasattr(transcoder, "topk_threshold"):
        transcoder.topk_threshold.fill_(0.2)
    folded = fold_activation_scale(transcoder, s, 0.6)
    torch.testing.assert_close(folded(x), transcoder(x * s) / 0.6, rtol=1e-9, atol=1e-11)
    with pytest.raises(SettingsError, match="depends on the token"):
        fold_activation_scale(built(kind, normalize_activations="layer_norm"), s)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka_batchtopk"])
def test_folding_batchtopk_into_jumprelu(kind, rescale):
    for make, extra in ((SAE, {}), (Transcoder, {"d_out": 9, "skip": True})):
        sae = built(kind, make, rescale_acts_by_decoder_norm=rescale, **extra).eval()
        with pytest.raises(SettingsError, match="no training step"):
            fold_batchtopk(sae)
        sae.topk_threshold.fill_(0.2)
        folded, x = fold_batchtopk(sae), data()
        assert folded.cfg.architecture == "jumprelu"
        torch.testing.assert_close(folded.encode(x), sae.encode(x), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(folded(x), sae(x), rtol=1e-9, atol=1e-11)
    with pytest.raises(SettingsError, match="no running threshold"):
        fold_batchtopk(built("topk"))


def test_threshold_of_a_trained_batchtopk_gives_about_k():
    g = torch.Generator().manual_seed(0)
    sae = SAE(d_in=16, d_sae=64, architecture="batchtopk", k=5, topk_threshold_lr=0.1)
    optimiser = torch.optim.Adam(sae.parameters(), lr=1e-3)
    for step in range(200):
        loss = sae.loss(torch.randn(512, 16, generator=g))
        if step < 150:  # then the threshold catches up
            loss.total.backward()
            optimiser.step()
            optimiser.zero_grad()
    active = (fold_batchtopk(sae).encode(torch.randn(4096, 16, generator=g)) != 0).sum(1).float().mean()
    assert 4.8 < active < 5.2


@pytest.mark.parametrize(
    "settings",
    [
        {"k": K, "rescale_acts_by_decoder_norm": False, "unit_norm_decoder": True},
        {"architecture": "gated"},
    ],
)
def test_unit_norm_decoder_stays_so(settings):
    sae = SAE(d_in=D, d_sae=F, **settings)
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(()))
    optimiser = torch.optim.SGD(sae.parameters(), lr=0.1)
    for seed in range(3):
        sae.loss(data(seed).float()).total.backward()
        sae.before_step()
        along = (sae.W_dec.grad * sae.W_dec).sum(1)
        assert along.abs().max() < 1e-5 * sae.W_dec.grad.norm()
        assert sae.W_dec.grad.abs().max() > 0
        optimiser.step()
        sae.after_step()
        optimiser.zero_grad()
        assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(()))


@pytest.mark.parametrize("settings", [{"k": K}, {"architecture": "gated", "aux_loss": "saelens"}])
def test_other_decoders_are_left_free(settings):
    free = SAE(d_in=D, d_sae=F, **settings)
    free.loss(data().float()).total.backward()
    before, rows = free.W_dec.grad.clone(), free.W_dec.detach().clone()
    free.before_step()
    free.after_step()
    assert torch.equal(free.W_dec.grad, before)
    assert torch.equal(free.W_dec, rows)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_stay_in_float32_under_autocast(kind):
    sae, x = built(kind, dtype="float32"), data().float()
    exact = sae.loss(x, dead=some_dead(3))
    exact.total.backward()
    reference = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = sae.loss(x, dead=some_dead(3))
        f, y = sae.encode(x), sae(x)
    loss.total.backward()
    assert {part.dtype for part in loss.parts.values()} == {loss.total.dtype, f.dtype, y.dtype} == {torch.float32}
    assert loss.total.item() == pytest.approx(exact.total.item(), rel=0.05)
    for name, p in sae.named_parameters():
        if name != "threshold":  # its window is too narrow for bfloat16
            assert torch.cosine_similarity(p.grad.flatten(), reference[name].flatten(), dim=0) > 0.9, name


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_weights(kind):
    sae, wide = built(kind, dtype="bfloat16"), built(kind, dtype="float32")
    wide.load_state_dict(sae.state_dict())
    loss, exact = sae.loss(data(), dead=some_dead(20)), wide.loss(data(), dead=some_dead(20))
    loss.total.backward()
    assert loss.total.dtype == torch.float32
    assert loss.total.item() == pytest.approx(exact.total.item(), rel=0.1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in sae.parameters())


@pytest.mark.slow
def test_toy_superposition_is_recovered():
    """64 known directions in 32 dimensions, few at a time: the decoder finds them (mean-max-cosine)."""
    g = torch.Generator().manual_seed(0)
    truth = nn.functional.normalize(torch.randn(64, 32, generator=g), dim=1)

    def batch(n):
        active = torch.rand(n, 64, generator=g) < 0.03
        return (active * (0.5 + torch.rand(n, 64, generator=g))) @ truth

    def cosine(sae):
        rows = nn.functional.normalize(sae.W_dec.detach(), dim=1)
        return (truth @ rows.T).max(1).values.mean().item()

    settings = {"topk": {"k": 3}, "batchtopk": {"k": 2}, "standard": {"l1_coefficient": 0.15}}
    for kind, own in settings.items():
        sae = SAE(d_in=32, d_sae=128, architecture=kind, **own)
        first = cosine(sae)
        optimiser = torch.optim.Adam(sae.parameters(), lr=1e-2)
        since = torch.zeros(128, dtype=torch.long)
        for _ in range(250):
            loss = sae.loss(batch(256), dead=since > 100)
            since = torch.where(loss.counts() > 0, 0, since + 1)
            loss.total.backward()
            optimiser.step()
            optimiser.zero_grad()
        assert first < 0.5, kind
        assert cosine(sae) > 0.95, (kind, cosine(sae))


def test_a_third_party_adds_an_architecture():
    class Softplus(Architecture):
        def latents(self, sae, batch):
            return nn.functional.softplus(sae.pre_activations(batch))

        def losses(self, sae, batch):
            f = self.latents(sae, batch)
            y = sae.finish(f @ sae.W_dec + sae.b_dec, batch)
            return {"mse_loss": (y - batch.target).square().sum(1).mean()}, f, y

    from interp.dictionaries import registry

    register("softplus", Softplus())
    try:
        sae, x = SAE(d_in=D, d_sae=F, architecture="softplus"), data().float()
        sae.loss(x).total.backward()
        torch.testing.assert_close(sae.encode(x), nn.functional.softplus((x - sae.b_dec) @ sae.W_enc + sae.b_enc))
        torch.testing.assert_close(fold_decoder_norms(sae).W_dec.norm(dim=1), torch.ones(F))
        with pytest.raises(SettingsError, match="registered already"):
            register("softplus", Softplus())
    finally:
        registry._KNOWN.pop("softplus")
    with pytest.raises(SettingsError, match="registered already"):
        register("topk", Softplus())


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"architecture": "topq"}, UnknownNameError, "topk"),
        ({"kk": 3}, UnknownNameError, "setting 'kk'"),
        ({"d_in": 0}, SettingsError, "d_in"),
        ({"d_sae": 2.5}, SettingsError, "d_sae"),
        ({"k": F + 1}, SettingsError, "k is a whole number from 1 to d_sae=40, not 41"),
        ({"k": 2.5}, SettingsError, "whole number"),
        ({"architecture": "batchtopk", "k": 0}, SettingsError, "above 0"),
        ({"architecture": "matryoshka_batchtopk"}, SettingsError, "matryoshka_widths"),
        ({"matryoshka_widths": (8, 8)}, SettingsError, "rise"),
        ({"normalize_activations": "covariance_whitening"}, UnknownNameError, "layer_norm"),
        ({"dtype": "int8"}, UnknownNameError, "float32"),
        ({"l1_coefficient": -1.0}, SettingsError, "l1_coefficient"),
        ({"l1_coefficient": float("nan")}, SettingsError, "l1_coefficient"),
        ({"jumprelu_bandwidth": 0.0}, SettingsError, "jumprelu_bandwidth"),
        ({"topk_threshold_lr": 0.0}, SettingsError, "topk_threshold_lr"),
        ({"jumprelu_sparsity_loss_mode": "quadratic"}, SettingsError, "target_l0"),
        ({"unit_norm_decoder": True}, SettingsError, "rescale"),
        ({"d_out": 7}, SettingsError, "use Transcoder"),
        ({"skip": True}, SettingsError, "use Transcoder"),
    ],
)
def test_bad_settings(settings, error, says):
    with pytest.raises(error, match=says):
        SAE(**{"d_in": D, "d_sae": F, "k": K} | settings)


def test_bad_use():
    with pytest.raises(SettingsError, match="needs d_in and d_sae"):
        SAE()
    with pytest.raises(SettingsError, match="not both"):
        SAE(DictionaryConfig(d_in=D, d_sae=F, k=K), k=3)
    with pytest.raises(SettingsError, match="must be False"):
        Transcoder(d_in=D, d_sae=F, k=K, apply_b_dec_to_input=True)
    sae, x = SAE(d_in=D, d_sae=F, k=K), data().float()
    for call in (sae.encode, sae.loss, sae):
        with pytest.raises(InputError, match=r"x is floats \[\.\.\., 12\], found torch.float32 of shape \[30, 11\]"):
            call(x[:, :-1])
        with pytest.raises(InputError, match="int64"):
            call(x.long())
        broken = x.clone()
        broken[7, 3], broken[9, 1] = torch.nan, torch.inf
        with pytest.raises(NonFiniteError, match=r"x holds nan, first at index \[7, 3\]"):
            call(broken)
    huge = torch.full((4, D), 3e37)
    assert sae.encode(huge).isfinite().all()  # the sum overflows, no number does
    with pytest.raises(InputError, match="latents are"):
        sae.decode(torch.zeros(3, F - 1))
    with pytest.raises(InputError, match="dead is 40 bools"):
        sae.loss(x, dead=torch.zeros(F))
    with pytest.raises(InputError, match="needs a target"):
        Transcoder(d_in=D, d_sae=F, k=K).loss(x)
    with pytest.raises(InputError, match="tokens"):
        Transcoder(d_in=D, d_sae=F, k=K).loss(x, x[:-1])
    with pytest.raises(NonFiniteError, match=r"target holds inf, first at index \[2, 0\]"):
        Transcoder(d_in=D, d_sae=F, k=K).loss(x, x.index_fill(0, torch.tensor([2]), torch.inf))
    assert isinstance(sae.loss(x).latents, Sparse)
