"""GlobEnc: by hand, against the 5-D computation from the models' own modules, the sum over sources, invariants."""

from functools import cache

import pytest
import torch
from torch import nn

import interp
from experiments.benchmarks.rounds import peak_bytes
from interp.attribution import globenc, rollout
from interp.attribution.globenc import BRANCHES, PLACES, gram, mixed_norms, norm_rows
from interp.errors import InputError, SettingsError, UnknownNameError, UnsupportedError
from tests import zoo
from tests.conftest import packaged

IDS = [[70, 80, 90, 100, 110, 75], [71, 81, 91, 101], [72, 82, 92, 102, 112]]
POST, PRE = ["bert", "roberta", "distilbert"], ["llama", "gpt2", "olmo2", "granite", "phi"]


@cache
def lens_of(name):
    return interp.wrap(zoo.build(name), zoo.processor(name), sample=zoo.inputs(name), name=name)


def close(found, wanted, tolerance=1e-5):
    """Equal relative to the largest number, which is not zero."""
    wanted = wanted.double()
    size = wanted.abs().max()
    assert size > 0
    torch.testing.assert_close(found.double() / size, wanted / size, atol=tolerance, rtol=0)


def layer_parts(name, model):
    """For each layer: values of a stream, the projection, norms of the stream, the MLP, what attention's output meets.

    Written from the families' own files; nothing of it comes from the anatomy.
    """

    def same(x):
        return x

    if name in ("bert", "roberta"):
        for layer in getattr(model, name).encoder.layer:
            own, out = layer.attention.self, layer.attention.output

            def mlp(x, layer=layer):
                return layer.output.dense(layer.intermediate(x))

            yield own.value, out.dense, [out.LayerNorm, layer.output.LayerNorm], mlp, same
    elif name == "distilbert":
        for layer in model.distilbert.transformer.layer:
            a = layer.attention
            yield a.v_lin, a.out_lin, [layer.sa_layer_norm, layer.output_layer_norm], layer.ffn, same
    elif name == "gpt2":
        for layer in model.transformer.h:

            def values(x, layer=layer):
                return layer.attn.c_attn(layer.ln_1(x)).split(32, -1)[2]

            yield values, layer.attn.c_proj, [], None, same
    else:
        for layer in model.model.layers:
            a = layer.self_attn
            before = same if name == "olmo2" else layer.input_layernorm
            after = layer.post_attention_layernorm if name == "olmo2" else same
            if name == "granite":
                after = lambda f: 0.5 * f  # noqa: E731

            def values(x, a=a, before=before):
                return a.v_proj(before(x))

            yield values, getattr(a, "o_proj", None) or a.dense, [], None, after


def distributed(norm, parts, whole):
    """A LayerNorm (RMSNorm) of parts of a vector, with the vector's own statistics and without bias."""
    if isinstance(norm, nn.LayerNorm):
        scale = (whole.var(-1, unbiased=False) + norm.eps).rsqrt()
        return (parts - parts.mean(-1, keepdim=True)) * scale[:, :, None, None] * norm.weight
    scale = (whole.pow(2).mean(-1) + norm.variance_epsilon).rsqrt()
    return parts * scale[:, :, None, None] * norm.weight


@cache
def five_d(name):
    """The four matrices of every layer and the sums over sources, in float64, through the tensor [head, T, T, d]."""
    model = zoo.build(name, attn_implementation="eager").double()
    ids = torch.tensor([IDS[0], IDS[0][::-1]])
    with torch.no_grad():
        out = model(ids, output_attentions=True, output_hidden_states=True)
        matrices = {m: [] for m in PLACES}
        for n, (values, projection, norms, mlp, after) in enumerate(layer_parts(name, model)):
            x, pattern = out.hidden_states[n], out.attentions[n].double()
            heads, width = pattern.shape[1], x.shape[-1]
            weight = projection.weight if type(projection).__name__ == "Conv1D" else projection.weight.T
            weight = weight.reshape(heads, -1, width)
            v = values(x).reshape(*x.shape[:2], -1, weight.shape[1])
            v = v.repeat_interleave(heads // v.shape[2], 2)
            f = torch.zeros(heads, *pattern.shape[2:], *pattern.shape[:1], width, dtype=torch.float64)
            for h in range(heads):
                for j in range(x.shape[1]):
                    f[h, :, j] = (pattern[:, h, :, j, None] * (v[:, None, j, h] @ weight[h])).transpose(0, 1)
            f = f.sum(0).permute(2, 0, 1, 3)
            bias = 0 if projection.bias is None else projection.bias
            full = f.sum(2) + bias
            if isinstance(after, nn.Module):
                f, full = distributed(after, f, full), after(full)
            else:
                f, full = after(f), after(full)
            matrices["N"].append(f.norm(dim=-1))
            f[:, range(x.shape[1]), range(x.shape[1])] += x
            stream = x + full
            matrices["N-Res"].append(f.norm(dim=-1))
            if norms:
                f, stream = distributed(norms[0], f, stream), norms[0](stream)
            matrices["N-ResLN"].append(f.norm(dim=-1))
            if norms:
                whole = stream + mlp(stream)
                f = distributed(norms[1], f, whole)
                close(norms[1](whole), out.hidden_states[n + 1])  # the reference follows the model
            matrices["N-Enc"].append(f.norm(dim=-1))
    return ids, matrices


def product(matrices, normalise=True):
    whole = None
    for m in matrices:
        m = m / m.sum(-1, keepdim=True) if normalise else m
        whole = m if whole is None else m @ whole
    return whole / whole.sum(-1, keepdim=True)


def whole_matrix(lens, batch, layer, **options):
    parts = list(norm_rows(lens, batch, layer, batch.mask.cpu(), **options))
    out = torch.zeros(len(batch), batch.mask.shape[1], batch.mask.shape[1])
    for part in parts:
        for b in range(len(batch)):
            out[b, part.columns[b, part.valid[b]]] = part.norms[b, part.valid[b]]
    return out


def test_gram_form_by_hand():
    """Two heads, vectors of two numbers; the second source's heads cancel."""
    values = torch.tensor([[[[1.0], [2.0]], [[1.0], [1.0]]]])
    weight = torch.tensor([[[3.0, 0.0]], [[0.0, 2.0]]])
    same = torch.tensor([[[3.0, 0.0]], [[-3.0, 0.0]]])
    pattern = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]], [[0.25, 0.5], [0.0, 0.0]]]])
    # U = [3, 0], [0, 4] and [3, 0], [0, 2]; attention of row 0: .5, .25 and .5, .5.
    for step in (1, 2):
        found = mixed_norms(pattern, gram(values, weight, step))
        size = (1.5**2 + 1.0**2) ** 0.5
        torch.testing.assert_close(found[0], torch.tensor([[size, size], [3.0, 0.0]]))
    found = mixed_norms(pattern, gram(values, same, 5))
    torch.testing.assert_close(found[0], torch.tensor([[0.0, 0.0], [3.0, 0.0]]))


@pytest.mark.parametrize("name", [*POST, *PRE])
def test_matrices_are_those_of_the_five_d_computation(name):
    ids, wanted = five_d(name)
    lens = lens_of(name)
    batch = lens.prepare(input_ids=ids)
    for matrix, layers in wanted.items():
        for n, reference in enumerate(layers):
            for memory in (2**26, 1):
                close(whole_matrix(lens, batch, n, matrix=matrix, memory=memory), reference)
    differ = [not wanted["N-Enc"][0].allclose(wanted[m][0], rtol=1e-2) for m in ("N-ResLN", "N-Res", "N")]
    assert differ == ([True] * 3 if name in POST else [False, False, True])


@pytest.mark.parametrize("name", [*POST, *PRE])
def test_rows_are_those_of_the_product(name):
    ids, matrices = five_d(name)
    lens = lens_of(name)
    batch = lens.prepare(input_ids=ids)
    for matrix in PLACES:
        for normalise in (True, False):
            options = {"matrix": matrix, "normalise": normalise, "target": "all"}
            wanted = product(matrices[matrix], normalise)
            for memory in (2**26, 1):
                close(globenc(lens, batch, **options, memory=memory).scores, wanted)
    some = globenc(lens, batch, layers=[0, 1], target=[0, 2])
    close(some.scores, product(matrices["N-Enc"][:2])[:, [0, 2]])
    assert globenc(lens, batch, layers=1, target=[0, 2]).scores.equal(some.scores)
    one = globenc(lens, batch, layers=[1], target=3)
    close(one.scores[:, 0], product(matrices["N-Enc"][1:2])[:, 3])


def contributions(lens, batch, index, tower, until):
    """What each source gives each position [batch, pos, source, d_model], what is left, and the streams of the run."""
    layer = lens.anatomy.towers[tower].layers[index]
    sites = {s: interp.Read(s, layers=index, tower=tower) for s in ("pattern", "v", "resid_pre", "resid_post")}
    sites |= {"mid": interp.Read("resid_mid", layers=index, tower=tower)} if "resid_mid" not in layer.refused else {}
    sites |= {
        k: interp.Read(BRANCHES[k], layers=index, tower="cross" if k == "cross" else tower) for k in layer.branches
    }
    trace = lens.run(batch, sites.values())
    got = {name: trace.values[read, index] for name, read in sites.items()}
    pattern = got["pattern"]
    v = got["v"].repeat_interleave(pattern.shape[1] // got["v"].shape[2], 2)
    z = torch.einsum("bhij,bjhv->bihv", pattern, v)
    linear = layer.linear(z, got["resid_pre"], {k: got[k] for k in layer.branches}, until=until)
    parts = torch.einsum("bhij,bjhv,hvd->bijd", pattern, v, linear.weight) * linear.scale[:, :, None]
    places = range(pattern.shape[2])
    parts[:, places, places] += linear.residual
    return parts, linear.bias, got


SUMS = [
    *("llama", "gpt2", "gemma2", "gemma3", "phi", "gpt_neox", "olmo2", "cohere", "granite", "glm4", "opt"),
    *("deepseek_v3", "gpt_oss", "stablelm", "modernbert", "vit", "beit", "dinov2", "whisper", "t5", "clip"),
    *("qwen2_5_vl", "mllama", "llava"),
]


@pytest.mark.parametrize("name", SUMS)
def test_contributions_sum_to_the_true_stream(name):
    """With the norm before the block: resid_mid, or where MLP and attention are parallel what attention makes of it."""
    lens = lens_of(name)
    batch = lens.prepare(**zoo.inputs(name))
    seen = 0
    for tower in lens.anatomy.towers:
        for layer in lens.anatomy.towers[tower].layers:
            if "attn" not in layer.attention or layer.attention["attn"].refused:
                continue
            parts, bias, got = contributions(lens, batch, layer.index, tower, "post")
            wanted = got["resid_pre"] + got["attn"]
            close(parts.sum(2) + bias, wanted)
            if "mid" in got and "cross" not in got:
                close(parts.sum(2) + bias, got["mid"])
            seen += 1
    assert seen >= 2


@pytest.mark.parametrize(("name", "tower"), [(n, "text") for n in POST] + [("bart", "encoder"), ("bart", "decoder")])
def test_contributions_sum_to_the_true_normed_stream(name, tower):
    """With the norm behind the sum. Past the first norm what is missing is the later branches' own part."""
    lens = lens_of(name)
    batch = lens.prepare(**zoo.inputs(name))
    for layer in lens.anatomy.towers[tower].layers:
        norms = [m for m in layer.module.modules() if isinstance(m, nn.LayerNorm)]
        parts, bias, got = contributions(lens, batch, layer.index, tower, "mid")
        stream = norms[0](got["resid_pre"] + got["attn"])
        close(parts.sum(2) + bias, stream)
        missing = torch.zeros_like(stream)
        for kind, norm in zip([k for k in layer.branches if k != "attn"], norms[1:], strict=True):
            whole, missing = stream + got[kind], missing + got[kind]
            missing = distributed(norm, missing[:, :, None], whole)[:, :, 0]
            stream = norm(whole)
        parts, bias, _ = contributions(lens, batch, layer.index, tower, "post")
        close(parts.sum(2) + bias + missing, got["resid_post"])
        assert missing.abs().max() > 0.1


def test_the_future_has_exactly_zero():
    for name in ("llama", "gpt_oss", "gemma2"):
        lens = lens_of(name)
        scores = globenc(lens, lens.prepare(input_ids=[IDS[0]]), target="all")
        assert (scores.scores[0].triu(1) == 0).all()
        assert (scores.scores[0].tril().diagonal() > 0).all()
        torch.testing.assert_close(scores.scores.sum(-1), torch.ones(1, 6))


@pytest.mark.parametrize(
    ("name", "side"), [("llama", "left"), ("llama", "right"), ("bert", "right"), ("gemma2", "left")]
)
def test_batched_equals_single_and_padding_changes_nothing(name, side):
    lens = lens_of(name)
    batch = lens.prepare(input_ids=IDS, padding_side=side)
    for options in ({}, {"memory": 1}, {"matrix": "N-ResLN", "normalise": False}):
        together = globenc(lens, batch, target=[-1, 0, 2], **options)
        for i, row in enumerate(IDS):
            alone = globenc(lens, lens.prepare(input_ids=[row]), target=[-1, 0, 2], **options)
            close(together.select(i).scores, alone.scores, 2e-6)
            mine, theirs = together.select(i).frame(), alone.frame()
            assert mine.drop(columns="score").equals(theirs.drop(columns="score"))


def test_uneven_targets():
    lens = lens_of("llama")
    batch = lens.prepare(["one two three", "a b"], padding_side="left")
    everyone = globenc(lens, batch, target="all")
    uneven = torch.zeros_like(batch.mask)
    uneven[0, [2, 5, 9]] = uneven[1, 11] = True
    some = globenc(lens, batch, target=uneven)
    assert some.targets.tolist() == [[2, 5, 9], [11, -1, -1]]
    close(some.scores[0], everyone.scores[0, [2, 5, 9]])
    close(some.select(1).scores[0, 0], everyone.scores[1, 11, 10:])
    assert some.scores[1, 1:].isnan().all()
    word = globenc(lens, lens.prepare(["one two three"]), target=lens.prepare(["one two three"]).find("two"))
    assert word.target_tokens == [["t", "w", "o"]]


def test_what_a_result_says():
    lens = lens_of("gpt2")
    scores = globenc(lens, lens.prepare(input_ids=[IDS[0]]))
    assert (scores.name, scores.unit, scores.caveat) == ("globenc", "share", "")
    assert scores.settings["layers"] == [0, 1, 2]
    assert scores.settings["post_norm"] is False
    assert scores.settings["gap"] < 1e-5
    assert all(0.01 < share < 1 for share in scores.settings["bias"])
    llama = lens_of("llama")
    assert globenc(llama, llama.prepare(input_ids=[IDS[0]])).settings["bias"] == [0, 0, 0]  # it has no biases
    bert = lens_of("bert")
    assert globenc(bert, bert.prepare(input_ids=[IDS[0]])).settings["post_norm"] is True


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_encoder_decoders(name):
    """T5 cannot be entered at a layer and is run from its input; decoders say that cross-attention is left out."""
    lens = lens_of(name)
    batch = lens.prepare(**zoo.inputs(name))
    encoder = globenc(lens, batch, tower="encoder", target=0)
    decoder = globenc(lens, batch, tower="decoder", target="all")
    assert encoder.caveat == ""
    assert "cross-attention" in decoder.caveat
    assert (decoder.scores.triu(1) == 0).all()
    matrices = [whole_matrix(lens, batch, i, tower="decoder") for i in range(2)]
    close(decoder.scores, product(matrices))
    with pytest.raises(UnsupportedError, match="not defined for cross-attention"):
        globenc(lens, batch, tower="cross")


def test_image_tokens_and_vision_towers():
    lens = lens_of("llava")
    batch = lens.prepare(**zoo.inputs("llava"))
    scores = globenc(lens, batch)
    torch.testing.assert_close(scores.scores.nansum(-1), torch.ones(2, 1))
    assert scores.spans["image"].equal(batch.image_mask)
    close(globenc(lens, batch, memory=1).scores, scores.scores)
    tower = globenc(lens, batch, tower="vision", target=0)
    assert tower.image_map().shape == batch.inputs["pixel_values"].shape[-2:]
    packed = lens_of("qwen2_5_vl")
    batch = packed.prepare(**zoo.inputs("qwen2_5_vl"))
    scores = globenc(packed, batch, tower="vision", target="all").scores[0]
    pattern = packed.run(batch, ["vision:pattern"])
    reach = torch.eye(len(scores))
    for layer in range(3):
        reach = ((pattern["vision:pattern", layer][0].sum(0) > 0) | torch.eye(len(scores)).bool()).float() @ reach
    assert (reach == 0).any()
    assert ((scores > 0) == (reach > 0)).all()


def test_memory_is_bounded():
    """120 tokens: beside a plain run some rows and the Gram matrices; [head, T, T, d_model] would be 32 patterns."""
    lens = lens_of("llama")
    batch = lens.prepare(input_ids=torch.randint(5, 100, (1, 120), generator=torch.Generator().manual_seed(0)))
    globenc(lens, batch)
    plain = peak_bytes(lambda: lens.run(batch, "resid_post"))
    pattern = 4 * 4 * 120**2
    small = peak_bytes(lambda: globenc(lens, batch, memory=2**16)) - plain
    assert small < 3 * pattern
    assert peak_bytes(lambda: globenc(lens, batch)) - plain > 2 * pattern  # the measure sees a whole pattern


def test_layers_that_cannot_give_it_are_refused():
    for name, message in [("falcon_h1", "recurrent mixer"), ("jamba", "refused"), ("mamba", "refused")]:
        lens = lens_of(name)
        with pytest.raises(UnsupportedError, match=message):
            globenc(lens, lens.prepare(input_ids=[IDS[0]]))
    swin = lens_of("swin")
    batch = swin.prepare(**zoo.inputs("swin"))
    with pytest.raises(UnsupportedError, match="output projection was not found"):
        globenc(swin, batch, target=0)
    with pytest.raises(UnsupportedError, match=r"within windows: its values are \[8, 16, 2, 8\], not \[2, 64"):
        next(norm_rows(swin, batch, 0, torch.ones(2, 64, dtype=torch.bool)))
    gated = lens_of("qwen3_next")
    with pytest.raises(UnsupportedError, match=r"layer 3 of tower 'text'.*no plain sum over sources"):
        globenc(gated, gated.prepare(input_ids=[IDS[0]]), layers=[3])


def test_projections_that_are_no_matrix_are_refused():
    lens = interp.wrap(zoo.build("llama"), zoo.processor("llama"), name="llama")
    batch = lens.prepare(input_ids=[IDS[0]])
    layer = lens.anatomy.towers["text"].layers[1]
    part = layer.attention["attn"]
    object.__setattr__(part, "out_proj", nn.Identity())
    with pytest.raises(UnsupportedError, match="no plain floating-point weight"):
        globenc(lens, batch)
    object.__setattr__(part, "refused", {"result": "the output projection was not found"})
    with pytest.raises(UnsupportedError, match="output projection was not found"):
        globenc(lens, batch)
    with pytest.raises(UnsupportedError, match="not linear in its heads: the output projection was not found"):
        layer.linear(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 32), {})


def test_norms_and_factors_that_are_not_linear_are_refused():
    lens = interp.wrap(zoo.build("bert"), zoo.processor("bert"), name="bert")
    layer = lens.anatomy.towers["text"].layers[1]
    z, x = torch.zeros(1, 2, 4, 8), torch.randn(1, 2, 32)
    both = {"attn": x, "mlp": x}
    (add, _, second, norm), recipe = layer.recipe, layer.recipe
    assert layer.before_norms() == ("attn", "mlp")
    assert layer.before_norms("mid") == ("attn",)
    assert layer.before_norms("attn") == ()

    class Softer(nn.Module):
        def forward(self, x):
            return torch.tanh(x)

    for step, message in [
        (("norm", Softer()), "Softer.* is no LayerNorm"),
        (("scale", lambda given: given["mask"]), "depends on what the layer is called with"),
        (("scale", lambda given: torch.ones(1, 2, 1)), "differs between positions"),
    ]:
        object.__setattr__(layer, "recipe", (add, step, second, norm))
        with pytest.raises(UnsupportedError, match=message):
            layer.linear(z, x, both)
    object.__setattr__(layer, "recipe", recipe[1:])
    with pytest.raises(UnsupportedError, match="does not add its attention"):
        layer.linear(z, x, both)


def test_clear_errors():
    lens = lens_of("llama")
    batch = lens.prepare(["one two"])
    with pytest.raises(UnknownNameError, match=r"matrix of GlobEnc 'N-enc' does not exist.*'N-Enc'"):
        globenc(lens, batch, matrix="N-enc")
    with pytest.raises(UnknownNameError, match=r"position 'middle' does not exist.*last"):
        globenc(lens, batch, target="middle")
    with pytest.raises(InputError, match="position 30 does not exist in sample 0, which has 7 tokens"):
        globenc(lens, batch, target=30)
    with pytest.raises(InputError, match="'three' 0 times"):
        globenc(lens, batch, target=batch.find("three"))
    with pytest.raises(UnknownNameError, match="layer 9 does not exist"):
        globenc(lens, batch, layers=9)
    with pytest.raises(SettingsError, match="names a layer twice"):
        globenc(lens, batch, layers=[1, -2])
    with pytest.raises(UnknownNameError, match=r"tower 'visoin'.*text"):
        globenc(lens, batch, tower="visoin")
    with pytest.raises(TypeError):
        globenc(lens, batch, layer=3)


@pytest.mark.slow
def test_smollm2(smollm):
    texts = ["The cat sat on the mat because it was", "Paris is"]
    together = globenc(smollm, smollm.prepare(texts))
    for i, text in enumerate(texts):
        alone = globenc(smollm, smollm.prepare([text]))
        torch.testing.assert_close(together.select(i).scores, alone.scores, atol=1e-5, rtol=1e-3)
    assert together.settings["gap"] < 1e-4
    # Less than in rollout, but the first token, whose stream is by far the longest, has most of it here too.
    assert 0.8 < together.scores[0, 0, 0] < rollout(smollm, smollm.prepare(texts)).scores[0, 0, 0] - 0.02


@pytest.mark.slow
def test_minilm_against_the_five_d_computation():
    lens = packaged("minilm-l6")
    batch = lens.prepare(["A cat sits on the mat and waits for the rain to end."])
    model = lens.model
    scores = globenc(lens, batch, target=0)
    matrices = []
    with torch.no_grad():
        for i, layer in enumerate(model.encoder.layer):
            got = lens.run(batch, [f"pattern.{i}", f"resid_pre.{i}"])
            x, pattern = got["resid_pre", i], got["pattern", i]
            own, out = layer.attention.self, layer.attention.output
            v = own.value(x).reshape(*x.shape[:2], 12, 32)
            weight = out.dense.weight.T.reshape(12, 32, 384)
            f = (pattern[..., None] * torch.einsum("bjhv,hvd->bhjd", v, weight)[:, :, None]).sum(1)
            places = range(x.shape[1])
            stream = x + f.sum(2) + out.dense.bias
            f[:, places, places] += x
            f, stream = distributed(out.LayerNorm, f, stream), out.LayerNorm(stream)
            f = distributed(layer.output.LayerNorm, f, stream + layer.output.dense(layer.intermediate(stream)))
            matrices.append(f.norm(dim=-1).double())
    close(scores.scores[:, 0], product(matrices)[:, 0])
    assert scores.frame()["kind"].tolist().count("special") == 2
