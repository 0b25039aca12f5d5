"""Remote reads beside a local lens on the same weights: in nnsight's simulation, and in a process without interp."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import interp
from interp import edits
from interp.backends import taps, twin
from interp.errors import InputError, RemoteError, SettingsError, UnknownNameError, UnsupportedError
from interp.sites import SITES
from tests.others import hooked, nnsighted, tokenizer_of
from tests.zoo import build

nnsight = pytest.importorskip("nnsight")

MODELS = ("gpt2", "llama")
IDS = [[70, 80, 90, 100, 110, 75], [71, 81, 91, 101], [72, 82, 92, 102, 112]]
INSIDE = ["q", "k", "v", "scores", "pattern", "result"]
READS = [
    "embed",
    "resid_pre",
    "resid_mid",
    "resid_post.0,-1",
    "attn_out.1@last",
    "mlp_out@1:3",
    "mlp_act|mean",
    "z",
    "z.0,2/1,3@-2:",
    "z.1/0,2|head_mean",
    "z.2@last|head_max",
    "z.0|head_min",
    "resid_post@0|norm",
    "resid_mid@1:|norm",
    "resid_post@1:|max",
    "resid_post|sum",
    "resid_pre.1@0,2",
    "logits",
    "logits@last",
    "logits@2:|mean",
    "logits|mean",
]


def same(one, two):
    """Two traces hold the same reads, of the same values where both say that they are real."""
    assert set(one.keys()) == set(two.keys())
    for (read, layer), wanted in two.values.items():
        found = one.values[read, layer]
        assert found.shape == wanted.shape, read
        assert found.dtype == wanted.dtype
        assert not found.requires_grad
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5, msg=f"{read} of layer {layer}")
    assert set(one.valid) == set(two.valid)
    assert all(torch.equal(one.valid[r], two.valid[r]) for r in two.valid)
    assert (one.main, one.depth) == (two.main, two.depth)
    assert torch.equal(one.mask(), two.mask())


def simulated(name):
    return interp.wrap(nnsighted(name), remote="local")


def local(name):
    return interp.wrap(build(name), tokenizer_of(name))


@pytest.fixture(scope="module", params=MODELS)
def both(request):
    return simulated(request.param), local(request.param)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_same_reads(both, side):
    """Every kind of read of a padded batch, positions and reductions in the trace; the weights are the model's."""
    remote, lens = both
    batch, other = (x.prepare(input_ids=IDS, padding_side=side) for x in both)
    found, wanted = remote.run(batch, READS), lens.run(other, READS)
    same(found, wanted)
    assert float(wanted["resid_post.0,-1", 2].abs().max()) > 0.1
    # The random model of the same structure has other weights.
    assert float((remote._twin.run(batch, "logits@last").logits - wanted["logits@last", -1]).abs().max()) > 1e-2
    assert torch.equal(found["resid_post.0,-1", -1], found["resid_post.0,-1", 2])


BY_SAMPLE = interp.Read("mlp_out", positions=torch.tensor([[0], [-1], [2]]))


@pytest.mark.parametrize("reads", [["resid_post.1"], "z.0/3@last", BY_SAMPLE, ["embed"]])
def test_a_run_that_stops_early(both, reads):
    remote, lens = both
    same(*(x.run(x.prepare(input_ids=IDS), reads) for x in (remote, lens)))


def test_prompts(both):
    remote, lens = both
    batch, other = (x.prepare(["a b 7", "c"]) for x in both)
    assert torch.equal(batch.inputs["input_ids"], other.inputs["input_ids"])
    assert batch.tokens == other.tokens
    same(remote.run(batch, "logits@last"), lens.run(other, "logits@last"))


def test_positions_do_not_hang_on_the_tokenizer_s_side():
    """nnsight counts positions from the first token where its tokenizer pads on the left; a batch brings its own."""
    model = nnsighted("gpt2")
    model.tokenizer.padding_side = "right"
    remote, lens = interp.wrap(model, remote="local"), local("gpt2")
    batch, other = (x.prepare(input_ids=IDS, padding_side="left") for x in (remote, lens))
    same(remote.run(batch, "resid_post"), lens.run(other, "resid_post"))


FAMILIES = {
    "gpt_neox": "parallel blocks",
    "gemma2": "norms behind the branches",
    "granite": "branches times a number of the configuration",
    "deepseek_v3": "experts, and values of another width than queries",
    "mamba": "mixers",
    "phi3": "fused projections",
    "opt": "positions counted by the model",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_more_families(name):
    """Every site that a local lens gives is read or refused by name, and what is read is the same."""
    remote, lens = simulated(name), local(name)
    reads = ["embed", "logits"]
    for site, row in SITES.items():
        for layer in range(lens.anatomy.depth["text"] if row.per_layer else 0):
            reason = remote.refusal(site, layer)
            if lens.refusal(site, layer) is not None:
                assert reason == lens.refusal(site, layer)
            elif site in INSIDE:
                assert reason is not None
                assert repr(site) in reason
            else:
                assert reason is None
                reads.append(f"{site}.{layer}")
    batch, other = (x.prepare(input_ids=IDS) for x in (remote, lens))
    same(remote.run(batch, reads), lens.run(other, reads))


@pytest.mark.parametrize("name", [*MODELS, "gemma2", "gpt_neox", "opt"])
def test_a_narrower_twin(name, monkeypatch):
    """What stands for a large model is narrower, and reads are the large model's all the same: every head of it."""
    monkeypatch.setattr(twin, "SMALL", 0)
    remote, lens = simulated(name), local(name)
    config, small = remote.model._module.config, remote._twin.model.config
    assert small.num_attention_heads == 2 < config.num_attention_heads == 4
    assert twin._size(remote._twin.model) < twin._size(remote.model._module)
    reads = ["resid_pre", "resid_post", "attn_out", "mlp_out", "mlp_act", "z", "z.1/3,-4", "z.0|head_mean", "logits"]
    batch, other = (x.prepare(input_ids=IDS) for x in (remote, lens))
    same(remote.run(batch, reads), lens.run(other, reads))
    with pytest.raises(UnknownNameError, match="4 heads"):
        remote.run(batch, "z.0/4")


def test_what_a_twin_leaves_alone():
    """The model, its configuration and the random state."""
    model = build("llama")
    before, state = copy.deepcopy(model.config.to_dict()), torch.get_rng_state()
    made = twin.twin_of(model)
    assert model.config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), made.parameters(), strict=True) if p.ndim > 1)


def test_no_twin(monkeypatch):
    with pytest.raises(UnsupportedError, match="T5ForConditionalGeneration is refused: models with one tower"):
        twin.twin_of(build("t5"))
    with pytest.raises(UnsupportedError, match="LlavaForConditionalGeneration is refused"):
        twin.twin_of(build("llava"))
    changed = build("gpt2")
    changed.transformer.h[0].extra = torch.nn.Identity()
    with pytest.raises(UnsupportedError, match=r"1 of its modules are others, 'transformer\.h\.0\.extra' among them"):
        twin.twin_of(changed)
    monkeypatch.setattr(twin, "LARGEST", 1000)
    with pytest.raises(UnsupportedError, match=r"parameters, more than 1,000\. Trace it with nnsight"):
        twin.twin_of(build("gpt2"))


def test_a_factor_that_is_not_known():
    """A branch that is multiplied by something that the configuration does not hold is not guessed at."""
    remote = simulated("granite")
    assert remote.refusal("attn_out", 0) is None
    remote._constants = set()
    assert "multiplied by weights, or by a number that is not in the configuration" in remote.refusal("attn_out", 0)
    with pytest.raises(UnsupportedError, match="Read resid_pre and resid_post"):
        remote.run(remote.prepare(input_ids=IDS), "mlp_out.1")
    weight = taps.Replay(torch.mul, (taps.Replay(None, (torch.ones(4),), {}), 0.5), {})
    assert not taps._plain(weight)
    assert taps._plain(taps.Replay(torch.reciprocal, (taps.Replay(None, (4.0,), {}),), {}))


@pytest.mark.parametrize("site", INSIDE)
def test_the_inside_of_attention_is_refused(both, site):
    remote, _ = both
    with pytest.raises(UnsupportedError, match=f"'{site}' is refused: the weights are not here"):
        remote.run(remote.prepare(input_ids=IDS), f"{site}.1")


def test_what_needs_weights_is_refused(both):
    remote, _ = both
    batch = remote.prepare(input_ids=IDS)
    with pytest.raises(UnsupportedError, match="edits of a run are refused"):
        remote.run(batch, "logits", edits.ablate(site="z", layers=0, heads=0))
    with pytest.raises(UnsupportedError, match="gradients, metric of a run are refused"):
        remote.run(batch, (), gradients=["resid_pre"], metric=lambda logits: logits.sum())
    for name in ("generate", "unembed", "anatomy", "stepper"):
        with pytest.raises(UnsupportedError, match=f"lens.{name} is refused"):
            getattr(remote, name)
    with pytest.raises(UnsupportedError, match=r"lens\.anatomy is refused"):
        interp.attribution.rollout(remote, batch)
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        _ = remote.colour


def test_bad_input(both):
    remote, _ = both
    batch = remote.prepare(input_ids=IDS)
    for read, error in [
        ("resid_post.3", "layer 3 does not exist"),
        ("z.0/9", "head 9"),
        ("vision:resid_pre", "tower 'vision'"),
        ("resid_pst", "Did you mean"),
    ]:
        with pytest.raises(UnknownNameError, match=error):
            remote.run(batch, read)
    with pytest.raises(InputError, match="position 5 does not exist in sample 1"):
        remote.run(batch, "resid_post.0@5")
    with pytest.raises(SettingsError, match="give reads"):
        remote.run(batch, ())
    with pytest.raises(SettingsError, match="exists once"):
        remote.refusal("logits", 0)
    with pytest.raises(InputError, match="Batch from prepare"):
        remote.run(batch.inputs, "logits")
    with pytest.raises(InputError, match="vocabulary"):
        remote.prepare(input_ids=[[10**6]])


@pytest.mark.parametrize(
    "make", [lambda: build("gpt2"), lambda: hooked("gpt2"), lambda: nnsight.NNsight(build("gpt2"))]
)
def test_other_models_are_refused(make):
    with pytest.raises(InputError, match="an nnsight TransformersModel or LanguageModel, got"):
        interp.wrap(make(), remote=True)


def test_a_model_with_edits_of_its_own():
    model = nnsighted("gpt2")
    with model.edit(inplace=True):
        model.transformer.h[1].output[0][:] = 0
    with pytest.raises(UnsupportedError, match="edits of its own"):
        interp.wrap(model, remote=True)


def test_a_nan_is_told():
    model = nnsighted("gpt2")
    with torch.no_grad():
        model._module.transformer.h[1].mlp.c_proj.bias[0] = torch.nan
    remote = interp.wrap(model, remote="local")
    batch = remote.prepare(input_ids=IDS[:1])
    remote.run(batch, "resid_post.0")
    with pytest.raises(interp.errors.NonFiniteError, match=r"resid_post\.1 of layer 1 holds NaN"):
        remote.run(batch, "resid_post.1")


def test_failures_say_what_nnsight_says(monkeypatch):
    from nnsight.modeling import huggingface

    remote = interp.wrap(nnsighted("gpt2"), remote=True)
    batch = remote.prepare(input_ids=IDS[:1])
    with pytest.raises(RemoteError, match=r"was not run remotely: HFValidationError: .+set_default_api_key"):
        remote.run(batch, "logits")  # it has no name on the hub
    monkeypatch.setitem(huggingface._ID_CACHE, remote.model.repo_id, "tiny")
    nobody = interp.wrap(remote.model, remote="http://127.0.0.1:9")  # no server listens there
    with pytest.raises(RemoteError, match="ConnectionRefusedError") as info:
        nobody.run(batch, "logits")
    assert isinstance(info.value.__cause__, ConnectionRefusedError)


class Server:
    """tests/remote_server.py with a model, and what it was sent and sent back."""

    def __init__(self, name, folder):
        self.folder = folder
        build(name).save_pretrained(folder / "model")
        tokenizer_of(name).save_pretrained(folder / "model")
        script = Path(__file__).parent / "remote_server.py"
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(folder / "model")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=folder,
        )
        assert self.process.stdout.readline().strip() == "ready"

    def answer(self, backend, request, tracer):
        """In place of `RemoteBackend.request`, which goes over the network."""
        files = self.folder / "request", self.folder / "response"
        files[0].write_bytes(backend._serialize(tracer))
        self.process.stdin.write(" ".join(map(str, files)) + "\n")
        self.process.stdin.flush()
        self.named = self.process.stdout.readline().split()
        content = files[1].read_bytes()
        self.sizes = files[0].stat().st_size, len(content)
        self.key = request.model_key
        return backend.finalize(content)


@pytest.fixture(scope="module", params=MODELS)
def server(request, tmp_path_factory):
    made = Server(request.param, tmp_path_factory.mktemp("server"))
    made.name = request.param
    yield made
    made.process.stdin.close()
    made.process.wait(timeout=20)


def test_weights_in_another_process(server, monkeypatch):
    """The whole way but the network: no weight here, no interp there, and only what was read comes back."""
    from nnsight.intervention.backends.remote import RemoteBackend
    from nnsight.modeling import huggingface

    where = str(server.folder / "model")
    monkeypatch.setitem(huggingface._ID_CACHE, where, "tiny/tiny")
    monkeypatch.setattr(RemoteBackend, "request", lambda *args: server.answer(*args))
    model = nnsight.TransformersModel(where, task="text-generation", tokenizer=copy.deepcopy(tokenizer_of(server.name)))
    remote, lens = interp.wrap(model, remote=True), local(server.name)
    for side in ("left", "right"):
        batch, other = (x.prepare(input_ids=IDS, padding_side=side) for x in (remote, lens))
        same(remote.run(batch, READS), lens.run(other, READS))
    assert '"repo_id": "tiny/tiny"' in server.key
    allowed = ("torch", "nnsight", "cloudpickle", "collections")
    assert {m.split(".")[0] for m in server.named} <= set(allowed), server.named
    assert all(p.is_meta for p in model._module.parameters())
    assert not model.dispatched

    long, other = (x.prepare(input_ids=[[70, 80, 90, 100] * 5] * 4) for x in (remote, lens))
    same(remote.run(long, "resid_post"), lens.run(other, "resid_post"))
    whole = server.sizes[1]
    same(remote.run(long, "resid_post|mean"), lens.run(other, "resid_post|mean"))
    assert server.sizes[1] < whole / 5
    assert server.sizes[0] < 8000


def test_a_padded_mean_of_logits_is_over_real_positions():
    lens = local("gpt2")
    batch = lens.prepare(input_ids=IDS)
    logits, mean = lens.run(batch, "logits").logits, lens.run(batch, "logits|mean")["logits|mean"]
    for row in range(3):
        torch.testing.assert_close(mean[row], logits[row, batch.mask[row]].mean(0))
