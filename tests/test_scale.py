"""Models whose weights are put away: read, edited and swept as they are where everything lies in memory."""

import copy
import gc

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn
from transformers import AutoModelForCausalLM

import interp
from experiments.benchmarks.rounds import peak_bytes
from interp import testing
from interp.errors import InputError, SettingsError, UnsupportedError
from interp.estimate import capture
from tests.scale import CLEAN, findings
from tests.zoo import build, inputs

HERE = torch.device("cpu")


@pytest.fixture(scope="module")
def whole():
    return findings(interp.wrap(build("llama")))


def mapped(folder):
    """Loaded with a map that puts some layers and the head on the disk, as transformers does it."""
    build("llama").save_pretrained(folder / "model")
    layers = {f"model.layers.{i}": "disk" if i != 1 else "cpu" for i in range(3)}
    place = {"model.embed_tokens": "disk", **layers, "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    return AutoModelForCausalLM.from_pretrained(folder / "model", device_map=place, offload_folder=folder / "away")


WAYS = {
    "cpu": lambda folder: cpu_offload(copy.deepcopy(build("llama")), execution_device=HERE),
    "disk": lambda folder: disk_offload(copy.deepcopy(build("llama")), folder, execution_device=HERE),
    "map": mapped,
}


@pytest.mark.parametrize("way", WAYS)
def test_offloaded_weights(whole, way, tmp_path):
    """Reads, edits, generation and methods give what they give without offload, and the weights are away afterwards."""
    model = WAYS[way](tmp_path)
    away = {name for name, p in model.named_parameters() if p.is_meta}
    assert (0 < len(away) < len(list(model.parameters()))) == (way == "map")
    lens = interp.wrap(model)
    assert lens.input_device == HERE
    found = findings(lens)
    assert set(found) == set(whole)
    for name, value in whole.items():
        torch.testing.assert_close(
            found[name], value, atol=1e-5, rtol=0, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert {name for name, p in model.named_parameters() if p.is_meta} == away


def test_gradients_and_the_battery():
    """Every check of the battery; parameters ask for gradients again although they are other tensors by then."""
    model = cpu_offload(copy.deepcopy(build("llama")), execution_device=HERE)
    lens, plain = interp.wrap(model), interp.wrap(build("llama"))
    asked = {"gradients": ["resid_pre", "z"], "metric": lambda logits: logits[:, -1, 7]}
    batch = lens.prepare(input_ids=CLEAN, padding_side="left")
    one, two = (x.run(batch, ["logits"], **asked) for x in (lens, plain))
    for site in ("resid_pre", "z"):
        assert torch.equal(one.gradient(site, 1), two.gradient(site, 1))
    assert all(p.requires_grad for p in model.parameters())
    for check in (testing.check_removed, testing.check_memory, testing.check_padding):
        check(lens, batch)


@pytest.mark.parametrize("name", ["dinov2", "gpt2", "whisper", "qwen2_vl", "gemma2", "gpt_oss"])
def test_offloaded_families(name):
    """Factors, sinks and biases that are parameters of their own are found where they are put away too."""
    given = inputs(name)
    model = cpu_offload(copy.deepcopy(build(name)), execution_device=HERE)
    lens, plain = (interp.wrap(m, sample=given) for m in (model, build(name)))
    for tower, found in plain.anatomy.towers.items():
        for layer in found.layers:
            for site in ("resid_mid", "attn_out", "mlp_act", "pattern", "z", "result"):
                said = plain.refusal(site, layer.index, tower=tower)
                assert lens.refusal(site, layer.index, tower=tower) == said
                if said is None:
                    read = interp.Read(site, layers=(layer.index,), tower=tower)
                    one, two = (x.run(x.prepare(**given), [read])[read, layer.index] for x in (lens, plain))
                    assert torch.equal(one, two), (tower, layer.index, site)


class Counted:
    """A module's weights; each time that one is fetched, it counts the numbers of all matrices that live."""

    most, fetched = 0, 0

    def __init__(self, weights):
        self.weights = weights

    def __getitem__(self, name):
        Counted.most, Counted.fetched = max(Counted.most, living()), Counted.fetched + 1
        return self.weights[name].detach().clone()

    def get(self, name, default=None):
        return self[name] if name in self.weights else default

    def __contains__(self, name):
        return name in self.weights


def living():
    """How many numbers the parameters that are matrices hold."""
    found = (x for x in gc.get_objects() if type(x) is nn.Parameter and x.ndim > 1 and not x.is_meta)
    return sum(x.numel() for x in found)


def test_wrapping_never_holds_the_whole_model():
    """Finding and proving the parts brings matrices in one after the other: a model may be larger than the memory."""
    model = cpu_offload(copy.deepcopy(build("llama")), execution_device=HERE)
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [] if hook is None else [hook]):
            if getattr(one, "weights_map", None) is not None:
                one.weights_map = Counted(one.weights_map)
    gc.collect()
    before = living()
    lens = interp.wrap(model)
    lens.run(lens.prepare(input_ids=CLEAN, padding_side="left"), ["resid_post", "result", "logits"])
    sizes = [p.numel() for p in model.parameters() if p.ndim > 1]
    assert Counted.fetched > 3 * len(sizes)
    assert Counted.most - before <= max(sizes) < sum(sizes) / 4, (Counted.most - before, max(sizes), sum(sizes))


def test_weights_that_nobody_has():
    """A module on the meta device without a hook cannot be asked for its weights."""
    lens = interp.wrap(build("llama"))
    part = lens.anatomy.attention(None, 0, "z")
    lost = copy.copy(part)
    object.__setattr__(lost, "out_proj", nn.Linear(32, 32, device="meta"))
    with pytest.raises(UnsupportedError, match="no hook of accelerate on it says where"):
        lost.weight()


def test_wrapping_leaves_the_model_as_it_was():
    """Parameters, configuration, attention implementation and hooks, with the lens in use and after it is gone."""
    model = copy.deepcopy(build("llama"))
    held = {name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()}
    config, kind, forward = model.config.to_dict(), model.config._attn_implementation, type(model).forward
    hooks = testing.hooks_of(model)
    lens = interp.wrap(model)
    findings(lens)
    for _ in range(2):
        assert {name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()} == held
        assert (model.config.to_dict(), model.config._attn_implementation) == (config, kind)
        assert (testing.hooks_of(model), type(model).forward) == (hooks, forward)
        assert not any(m.training for m in model.modules())
        lens = None
        gc.collect()


READS = ["resid_post", "resid_post@last", "k", "pattern", "pattern@last", "scores.1/0,2@1:3", "result.0", "logits"]
READS += ["logits@last", "mlp_act|norm", "resid_pre|mean", "pattern|head_mean", "embed", "z@0,2,3|max"]


READS_OF = {
    "t5": ["encoder:resid_post", "decoder:z", "cross:pattern", "decoder:pattern@last", "embed"],
    "whisper": ["encoder:resid_post", "encoder:resid_pre.0", "cross:pattern.1", "logits"],
    "llava": ["vision:resid_post", "resid_post@image", "text:pattern@text", "vision:pattern", "embed"],
    "vit": ["resid_post", "pattern", "z@0", "resid_pre.0", "logits"],
}
PACKED = [
    "embed",
    "resid_pre.0",
    "resid_post",
    "resid_post@image",
    "vision:resid_pre.0",
    "vision:z|norm",
    "vision:pattern.1",
]
PACKED += ["vision:mlp_act|mean", "logits@last"]
SEEN = ["resid_post", "k", "pattern", "logits", "embed", "embed@last", "resid_pre.0", "q.0", "logits@last", READS[:4]]


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", *READS_OF, *["qwen2_vl", "qwen2_5_vl", "mistral3", "internvl", "mllama"]]
)
def test_estimated_bytes_are_those_that_come_back(name):
    """Exactly, for every form of a read; the peak is an upper bound, no wild one: only what is run is counted."""
    given = inputs(name, batch=3) if name not in ("llama", "gpt2") else {}
    lens = interp.wrap(build(name), sample=given or None)
    if name in ("llama", "gpt2"):
        rows = [list(range(70, 130)), list(range(75, 116)), [80] * 50]
        batch, reads = lens.prepare(input_ids=rows, padding_side="left"), [*READS, *SEEN]
    else:
        batch, reads = lens.prepare(**given), READS_OF.get(name, PACKED)
    for read in reads:
        if name == "mllama" and read == "resid_post@image":
            continue
        found = lens.estimate(batch, read)
        assert found.returned == lens.run(batch, read).nbytes, read
        assert found.rows == found.check() == len(batch)
        if read in SEEN or given:
            peak = peak_bytes(lambda read=read: lens.run(batch, read))
            most = 6 if name == "internvl" else 5  # one sample has most of the tiles, and each is taken to be as large
            assert 0.8 * peak <= found.peak <= most * peak, (read, peak, found.peak)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_are_estimated(name):
    """What all layers make is held, and what a metric makes of the logits."""
    lens = interp.wrap(build(name))
    batch = lens.prepare(input_ids=[list(range(70, 130)), [80] * 50], padding_side="left")

    def run(read):
        return lens.run(batch, gradients=[read], metric=lambda logits: logits.log_softmax(-1)[:, -1, 7])

    for read in ("embed", "pattern", "resid_post.2"):
        found, peak = lens.estimate(batch, read, gradients=True), peak_bytes(lambda read=read: run(read))
        assert found.returned == run(read).nbytes
        assert 0.8 * peak <= found.peak <= 5 * peak, (read, peak, found.peak)


def test_an_estimate_runs_one_prompt_once(monkeypatch):
    """However many reads; where pictures have towers of their own, these are begun once more for their sizes alone."""
    runs = []
    run = interp.Lens.run

    def counted(self, batch, reads=(), *args, **options):
        runs.append((len(batch), [str(r) for r in interp.lens._reads(reads)]))
        return run(self, batch, reads, *args, **options)

    lens = interp.wrap(build("llama"))
    batch = lens.prepare(input_ids=[[70, 80, 90]] * 5)
    monkeypatch.setattr(interp.Lens, "run", counted)
    lens.estimate(batch, ["resid_post", "pattern", "logits", "z@last"])
    assert [size for size, _ in runs] == [1]
    given = inputs("qwen2_vl", batch=3)
    lens = interp.wrap(build("qwen2_vl"), sample=given)
    batch = lens.prepare(**given)
    runs.clear()
    lens.estimate(batch, ["resid_post", "vision:z"])
    assert [reads for size, reads in runs if size == 1][1:] == [["vision:resid_pre.0"]] * 3


SPLIT = ["resid_post", "pattern@last", "resid_post@image", "pattern.1@text", "logits", "z|head_mean", "embed"]


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "name", ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "mistral3"]
)
def test_pictures_go_with_their_prompts(name, rows):
    """In pieces the same comes back as at once, whatever the pictures are packed into."""
    given = inputs(name, batch=3)
    lens = interp.wrap(build(name), sample=given)
    batch = lens.prepare(**given)
    reads = [*SPLIT, "vision:resid_post", "vision:z|norm"]
    whole, pieces = lens.run(batch, reads), capture(lens, batch, reads, rows=rows)
    assert set(pieces.values) == set(whole.values)
    for key, value in whole.values.items():
        found, wanted = pieces.values[key], value
        if key[0] in whole.valid:
            assert torch.equal(pieces.valid[key[0]], whole.valid[key[0]])
            axis = 2 if key[0].site == "pattern" else 1
            found, wanted = (x.movedim(axis, 1)[whole.valid[key[0]]] for x in (found, value))
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4, msg=lambda m, key=key: f"{key}: {m}")
    assert torch.equal(pieces.mask(), whole.mask())
    if name.startswith("qwen"):
        with pytest.raises(
            UnsupportedError, match="vision:pattern is not split: the pictures of all prompts lie in one"
        ):
            capture(lens, batch, "vision:pattern", rows=rows)


def test_what_does_not_fit_is_refused_or_split(monkeypatch):
    """The refusal says how much is asked and free; a batch that does not fit at once gives the same in pieces."""
    lens = interp.wrap(build("llama"))
    batch = lens.prepare(input_ids=[[70 + i] * (6 + i % 3) for i in range(7)], padding_side="left")
    whole = lens.run(batch, ["resid_post", "pattern@last"])
    found = lens.estimate(batch, ["resid_post", "pattern@last"])
    monkeypatch.setattr(interp.estimate, "free_bytes", lambda device: int((found.returned + 2.5 * found.each) / 0.9))
    assert lens.estimate(batch, ["resid_post", "pattern@last"]).rows == 2
    calls = []
    run = interp.Lens.run
    monkeypatch.setattr(interp.Lens, "run", lambda self, b, *a, **k: (calls.append(len(b)), run(self, b, *a, **k))[1])
    pieces = capture(lens, batch, ["resid_post", "pattern@last"])
    assert calls[-4:] == [2, 2, 2, 1]
    for key, value in whole.values.items():
        torch.testing.assert_close(pieces.values[key], value, atol=1e-6, rtol=0)
    assert torch.equal(pieces.mask(), whole.mask())
    monkeypatch.setattr(interp.estimate, "free_bytes", lambda device: int((found.returned + 0.5 * found.each) / 0.9))
    with pytest.raises(InputError, match=r"one prompt takes about .* kB on cpu beside"):
        capture(lens, batch, ["resid_post", "pattern@last"])
    monkeypatch.setattr(interp.estimate, "free_bytes", lambda device: found.returned)
    with pytest.raises(InputError, match=r"what is asked for is .* kB, and .* kB are free"):
        lens.estimate(batch, ["resid_post", "pattern@last"]).check()
    assert "it does not fit" in str(lens.estimate((7, 8), ["resid_post"]))
    with pytest.raises(SettingsError, match="rows"):
        capture(lens, batch, "resid_post", rows=0)


@pytest.mark.filterwarnings("ignore")
def test_quantised_layers():
    """Sites that need no weights are read; those that do are refused in words (torch's own dynamic quantisation)."""
    quantisation = pytest.importorskip("torch.ao.quantization")
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no kernels for it here")
    model = quantisation.quantize_dynamic(copy.deepcopy(build("llama")), {nn.Linear}, dtype=torch.qint8)
    lens = interp.wrap(model)
    batch = lens.prepare(input_ids=[[70, 80, 90, 100, 110]])
    trace = lens.run(
        batch, ["resid_pre", "attn_out", "mlp_out", "resid_post", "q", "pattern", "z", "mlp_act", "logits"]
    )
    added = trace["resid_pre", 1] + trace["attn_out", 1] + trace["mlp_out", 1]
    torch.testing.assert_close(trace["resid_post", 1], added, atol=1e-5, rtol=0)
    torch.testing.assert_close(lens.unembed(trace["resid_post", 2]), trace.logits, atol=1e-5, rtol=0)
    with torch.no_grad():
        assert torch.equal(model(**batch.inputs).logits, trace.logits)
    with pytest.raises(UnsupportedError, match=r"no plain floating-point weight matrix \(quantised"):
        lens.run(batch, "result.0")
    with pytest.raises(UnsupportedError, match=r"no plain floating-point weight matrix \(quantised"):
        lens.anatomy.unembed.columns(trace["resid_post", 2], torch.tensor([3]))
