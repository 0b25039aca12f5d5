"""Every kind of bad input gives a specific error that names what was found and what is allowed, and leaves no trace."""

import pytest
import torch
from PIL import Image

import interp
from interp import edits
from interp.engine.entry import Entry
from interp.errors import (
    AnatomyError,
    EditError,
    FileError,
    HookError,
    InputError,
    InterpError,
    NonFiniteError,
    SettingsError,
    UnknownNameError,
    UnsupportedError,
)
from interp.testing import hooks_of, plain_output
from tests.zoo import build, inputs, processor


@pytest.fixture(scope="module")
def lens():
    return interp.wrap(build("llama"), processor("llama"), name="tiny-llama")


@pytest.fixture(scope="module")
def batch(lens):
    return lens.prepare(["The cat sat.", "A dog."])


NAN = float("nan")
RUNS = {
    "unknown site": ({"reads": ["resid_posst"]}, UnknownNameError, "resid_post"),
    "unknown layer": ({"reads": ["resid_post.9"]}, UnknownNameError, r"layer 9 does not exist.*3 layers \(0 to 2\)"),
    "unknown head": ({"reads": ["z.1/9"]}, UnknownNameError, r"head 9 of layer 1.*4 heads \(0 to 3\)"),
    "unknown kv head": ({"reads": ["k.1/3"]}, UnknownNameError, r"2 key/value heads"),
    "unknown tower": ({"reads": ["vision:z"]}, UnknownNameError, "'vision'.*text"),
    "position outside": (
        {"reads": ["resid_post@50"]},
        InputError,
        r"position 50 does not exist in sample 0, which has \d+",
    ),
    "ragged position": ({"reads": ["resid_post@8"]}, InputError, "sample 1, which has 6 tokens"),
    "image positions of a text batch": ({"reads": ["resid_post@image"]}, InputError, "no image tokens"),
    "generated positions in a run": ({"reads": ["resid_post@generated"]}, InputError, "lens.generate"),
    "layer twice": ({"reads": ["z.0,-3"]}, SettingsError, "twice"),
    "nothing asked": ({"reads": []}, SettingsError, "nothing to do"),
    "no edit": ({"reads": ["z"], "edits": ["ablate"]}, EditError, "str"),
    "wrong shape": (
        {"reads": ["z"], "edits": edits.splice(lambda x: x[:, :1], site="resid_pre", layers=0)},
        EditError,
        "instead of a tensor of shape",
    ),
    "no tensor": ({"reads": ["z"], "edits": edits.splice(lambda x: 3, site="resid_pre")}, EditError, "int"),  # type: ignore
    "nan edit": (
        {"reads": ["z"], "edits": edits.splice(lambda x: x * NAN, site="z", layers=1)},
        EditError,
        "first at index",
    ),
    "patch of another shape": (
        {"reads": ["z"], "edits": edits.patch("resid_pre", torch.zeros(2, 3, 32), layer=1)},
        EditError,
        r"\(2, 3, 32\)",
    ),
    "edit of an unknown head": ({"reads": ["z"], "edits": edits.ablate(pairs=[(1, 7)])}, UnknownNameError, "head 7"),
    "edit that never happens": (
        {"reads": ["resid_post.0"], "edits": edits.ablate(layers=5)},
        UnknownNameError,
        "layer 5",
    ),
    "gradient without metric": ({"reads": [], "gradients": ["z"]}, SettingsError, "metric"),
    "gradient of the logits": (
        {"reads": [], "gradients": ["logits"], "metric": lambda x: x[:, -1, 0]},
        UnsupportedError,
        "the metric's own",
    ),
    "metric without graph": (
        {"reads": [], "gradients": ["z"], "metric": lambda x: torch.zeros(2)},
        SettingsError,
        "depends on the logits",
    ),
    "entry of another width": (
        {"reads": ["resid_post"], "entry": Entry(1, torch.zeros(2, 3, 32))},
        InputError,
        "3 positions",
    ),
    "entry without prefix": (
        {"reads": ["resid_post.2"], "entry": Entry(1, torch.zeros(2, 3, 32), start=9)},
        InputError,
        "prefix",
    ),
    "read below the entry": (
        {"reads": ["z.0"], "entry": Entry(1, torch.zeros(2, 12, 32))},
        InputError,
        "below layer 1",
    ),
}


@pytest.mark.parametrize("case", RUNS)
def test_bad_runs(lens, batch, case):
    given, error, words = RUNS[case]
    before, wanted = hooks_of(lens.model), plain_output(lens, batch)
    with pytest.raises(error, match=words):
        lens.run(batch, **given)
    assert issubclass(error, InterpError)
    assert hooks_of(lens.model) == before
    assert torch.equal(plain_output(lens, batch)["logits"], wanted["logits"])


EDITS = {
    "nan vector": (lambda: edits.steer(torch.tensor([1.0, NAN])), EditError, r"index \[1\]"),
    "nan patch": (lambda: edits.patch("resid_pre", torch.full((1, 2, 3), NAN), layer=0), EditError, "NaN"),
    "infinite factor": (lambda: edits.scale_heads(float("inf")), EditError, "infinity"),
    "negative weight": (lambda: edits.reweight_attention(-1.0), EditError, "negative"),
    "pairs and heads": (lambda: edits.scale_heads(0.0, pairs=[(0, 1)], heads=2), SettingsError, "either"),
    "patch without a layer": (lambda: edits.patch("resid_pre", torch.zeros(1, 1, 1)), EditError, "which layer"),
    "reference with zero": (lambda: edits.ablate(reference=object()), SettingsError, "takes no"),  # type: ignore[arg-type]
    "unknown option": (lambda: edits.ablate(head=3), TypeError, "head"),  # type: ignore[call-arg]
}


@pytest.mark.parametrize("case", EDITS)
def test_bad_edits(case):
    make, error, words = EDITS[case]
    with pytest.raises(error, match=words):
        make()


PREPARED = {
    "empty prompt": ({"texts": ["a", "  "]}, "prompt 1 is empty"),
    "no prompts": ({"texts": []}, "no prompts"),
    "not text": ({"texts": [3]}, "prompt 0 is a int"),
    "nothing": ({}, "nothing to prepare"),
    "images for a text model": ({"texts": ["a"], "images": [Image.new("RGB", (8, 8))]}, "takes no images"),
    "targets for a decoder": ({"texts": ["a"], "targets": ["b"]}, "encoder-decoders"),
    "texts and tensors": ({"texts": ["a"], "input_ids": torch.ones(1, 2)}, "not both"),
    "unknown tensor": ({"input_idz": torch.ones(1, 2)}, "input_ids"),
    "ids outside": ({"input_ids": torch.tensor([[5, 5000]])}, r"input_ids\[0, 1\] is 5000; the vocabulary has 320"),
    "ids of one axis": ({"input_ids": torch.tensor([5, 6])}, r"\[batch, pos\]"),
    "float ids": ({"input_ids": torch.tensor([[5.0]])}, "integers"),
    "empty row": ({"input_ids": [[5], []]}, "prompt 1 has no tokens"),
    "mask of another shape": (
        {"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.ones(1, 2)},
        "does not fit",
    ),
    "mask of zeros": (
        {"input_ids": torch.ones(2, 2).long(), "attention_mask": torch.tensor([[1, 1], [0, 0]])},
        "sample 1 is empty",
    ),
    "too long": ({"texts": ["x" * 400]}, r"400 positions, but the model can take 128"),
}


@pytest.mark.parametrize("case", PREPARED)
def test_bad_prompts(lens, case):
    given, words = PREPARED[case]
    with pytest.raises((InputError, UnknownNameError), match=words):
        lens.prepare(**given)


def test_bad_padding_side(lens):
    with pytest.raises(SettingsError, match="'left' or 'right'"):
        lens.prepare(["a"], padding_side="top")


def test_text_without_its_image_token():
    lens = interp.wrap(build("llava"), processor("llava"))
    image = Image.new("RGB", (32, 32))
    with pytest.raises(InputError, match="0 times, but has 1 images"):
        lens.prepare(["What is this?"], images=[image])
    with pytest.raises(InputError, match="2 prompts"):
        lens.prepare(["<image> a", "<image> b"], images=[image])
    with pytest.raises(InputError, match="int"):
        lens.prepare(["<image> a"], images=[3])


def test_tower_without_its_input_is_a_hook_that_never_fired():
    given = inputs("llava")
    lens = interp.wrap(build("llava"), sample=given)
    text_only = lens.prepare(input_ids=torch.full((1, 5), 70), attention_mask=torch.ones(1, 5).long())
    with pytest.raises(HookError, match=r"never reached.*images"):
        lens.run(text_only, ["vision:resid_post.0", "logits"])
    with pytest.raises(HookError, match="never reached"):
        lens.run(text_only, ["logits"], edits.ablate(tower="vision", layers=0))


def test_nan_in_the_model_is_named_by_its_first_place():
    model = build("llama")
    lens = interp.wrap(model)
    batch = lens.prepare(input_ids=torch.full((1, 4), 70))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3] = NAN
    with pytest.raises(NonFiniteError, match=r"resid_post of layer 1 holds NaN, first at index \[0, 0, 3\]"):
        lens.run(batch, ["resid_post"])


def test_nan_in_the_unembedding_is_named_by_its_first_place():
    model = build("llama")
    lens = interp.wrap(model)
    batch = lens.prepare(input_ids=torch.full((1, 4), 70))
    with torch.no_grad():
        model.lm_head.weight[9] = NAN
    with pytest.raises(NonFiniteError, match=r"logits of layer -1 holds NaN, first at index \[0, 0, 9\]"):
        lens.run(batch, ["logits"])


def test_wrap_of_something_else():
    with pytest.raises(InputError, match="PreTrainedModel"):
        interp.wrap(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="str"):
        interp.wrap("gpt2")  # type: ignore[arg-type]


def test_unknown_model_names_near_ones():
    with pytest.raises(UnknownNameError, match="smollm2-135m"):
        interp.load("smolm2-135m")


def test_corrupt_weights(tmp_path):
    build("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(FileError, match=r"model\.safetensors"):
        interp.load(str(tmp_path))


def test_a_failed_proof_shows_its_numbers():
    from interp.engine.discover import discover
    from interp.engine.proof import prove
    from interp.inputs import batch_of

    model = build("llama")
    given = inputs("llama")
    anatomy = discover(model, given)
    # The proof has to notice a branch that is not what it was found to be.
    layer = anatomy.towers["text"].layers[1]
    object.__setattr__(layer.branches["mlp"][0], "module", layer.module.mlp.gate_proj)
    with pytest.raises((AnatomyError, RuntimeError)):
        prove(model, anatomy, batch_of(given, model.config))
    anatomy = discover(model, given)
    part = anatomy.towers["text"].layers[1].attention["attn"]
    object.__setattr__(part, "n_heads", 8)
    object.__setattr__(part, "d_value", part.d_value // 2)
    assert prove(model, anatomy, batch_of(given, model.config)).towers["text"].proof["heads"] < 1e-5
    layer = anatomy.towers["text"].layers[0]
    object.__setattr__(layer, "recipe", layer.recipe[:1])
    with pytest.raises(AnatomyError, match=r"residual is off by \d"):
        prove(model, anatomy, batch_of(given, model.config))


def test_generation_refuses_what_it_cannot_do(lens, batch):
    right = lens.prepare(["The cat sat.", "A dog."], padding_side="right")
    with pytest.raises(InputError, match="left"):
        lens.generate(right)
    with pytest.raises(SettingsError, match="do_sample"):
        lens.generate(batch, temperature=0.5)
    with pytest.raises(SettingsError, match="seed"):
        lens.generate(batch, do_sample=True)
    with pytest.raises(SettingsError, match="num_beams"):
        lens.generate(batch, num_beams=0)
    with pytest.raises(SettingsError, match="beams"):
        lens.generate(batch, num_beams=3, reads="z.0")
    encoder = interp.wrap(build("bert"))
    with pytest.raises(UnsupportedError, match="does not generate"):
        encoder.generate(encoder.prepare(input_ids=torch.full((1, 4), 70)))
