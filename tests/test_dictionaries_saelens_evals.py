"""The same dictionary, model and contexts, evaluated here and by SAELens: what goes out and what comes in."""

import pytest
import torch

from interp import wrap
from interp.data import corpus
from interp.dictionaries import SAE, evaluate, load, save
from interp.dictionaries.activations import ActivationStream
from tests.others import hooked, tokenizer_of
from tests.zoo import build

sae_lens = pytest.importorskip("sae_lens")

FAMILY, LAYER, CONTEXT, COUNT, BATCH = "gpt2", 1, 12, 24, 8
HOOK = f"blocks.{LAYER}.hook_resid_post"
PACKING = {"context": CONTEXT, "special": "none", "separator": "none", "drop_first": False}
TEXTS = [
    "the cat sat on the mat and saw a red box near the old tree " * 3,
    "a dog ran to the park with one blue ball " * 8,
] * 12


@pytest.fixture(scope="module")
def model():
    return wrap(build(FAMILY), tokenizer_of(FAMILY))


@pytest.fixture(scope="module")
def contexts(model):
    stream = ActivationStream(model, corpus(TEXTS), f"resid_post.{LAYER}", batch=BATCH, **PACKING)
    return torch.cat([next(stream).ids for _ in range(COUNT // BATCH)])


@pytest.fixture(scope="module")
def activations(model, contexts):
    return model.run(model.prepare(input_ids=contexts), f"resid_post.{LAYER}")["resid_post", LAYER].flatten(0, 1)


def theirs(sae, contexts):
    """SAELens's own metrics, from its store on these contexts and TransformerLens's copy of the model."""
    from datasets import Dataset
    from sae_lens import evals
    from sae_lens.training.activation_scaler import ActivationScaler
    from sae_lens.training.activations_store import ActivationsStore

    model = hooked(FAMILY)
    common = {"model": model, "activation_scaler": ActivationScaler(), "n_batches": COUNT // BATCH}
    common |= {"eval_batch_size_prompts": BATCH, "model_kwargs": {}}

    def store():
        return ActivationsStore(
            model=model,
            dataset=Dataset.from_dict({"tokens": contexts.tolist()}),
            streaming=False,
            hook_name=HOOK,
            hook_head_index=None,
            context_size=CONTEXT,
            d_in=sae.cfg.d_in,
            n_batches_in_buffer=4,
            total_training_tokens=10**6,
            store_batch_size_prompts=BATCH,
            train_batch_size_tokens=BATCH * CONTEXT,
            prepend_bos=False,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
        )

    sums = {"compute_l2_norms": True, "compute_sparsity_metrics": True, "compute_variance_metrics": True}
    found, features = evals.get_sparsity_and_variance_metrics(
        sae, activation_store=store(), compute_featurewise_density_statistics=True, **sums, **common
    )
    losses = evals.get_downstream_reconstruction_metrics(
        sae, activation_store=store(), compute_kl=True, compute_ce_loss=True, **common
    )
    return found | losses, torch.tensor(features["feature_density"])


def ours(dictionary, model):
    found = evaluate(
        dictionary, model, TEXTS, read=f"resid_post.{LAYER}", contexts=COUNT, batch=BATCH, everywhere=True,
        ablation=("zero",), resamples=10, **PACKING,
    )  # fmt: skip
    assert found.tokens == COUNT * CONTEXT
    return {row["metric"]: row["value"] for row in found.summary().reset_index().to_dict("records")}, found.density


def agree(mine, other, mine_density, other_density):
    pairs = {
        "explained_variance": "explained_variance",
        "l0": "l0",
        "cosine": "cossim",
        "ce_original": "ce_loss_without_sae",
        "ce_reconstruction": "ce_loss_with_sae",
        "ce_zero": "ce_loss_with_ablation",
        "ce_recovered_zero": "ce_loss_score",
    }
    for name, peer in pairs.items():
        assert mine[name] == pytest.approx(other[peer], rel=1e-4, abs=1e-5), (name, mine[name], other[peer])
    assert mine["fvu"] == pytest.approx(1 - other["explained_variance"], abs=1e-5)
    torch.testing.assert_close(mine_density.float(), other_density, atol=1e-6, rtol=0)


def trained(kind, activations, **more):
    """A dictionary after some steps on the activations: neither random nor perfect."""
    torch.manual_seed(0)
    sae = SAE(d_in=activations.shape[1], d_sae=48, architecture=kind, **more)
    optimiser = torch.optim.Adam(sae.parameters(), lr=3e-3)
    for _ in range(60):
        sae.loss(activations).total.backward()
        optimiser.step()
        optimiser.zero_grad()
    return sae.eval()


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("topk", {"k": 4}),
        ("batchtopk", {"k": 4, "topk_threshold_lr": 0.3}),
        ("standard", {"l1_coefficient": 1e-3}),
        ("jumprelu", {}),
    ],
)
def test_one_made_here_is_worth_the_same_there(kind, more, model, contexts, activations, tmp_path):
    save(trained(kind, activations, **more), tmp_path / "sae", metadata={"read": f"resid_post.{LAYER}"})
    sae = sae_lens.SAE.load_from_disk(str(tmp_path / "sae"))
    sae.cfg.metadata.hook_name = HOOK
    other, density = theirs(sae, contexts)
    # What was saved, not what was trained: batch-top-k is a threshold in a file.
    mine, mine_density = ours(load(tmp_path / "sae"), model)
    assert 0.02 < mine["fvu"] < 0.9
    agree(mine, other, mine_density, density)


def test_one_made_there_is_worth_the_same_here(model, contexts, activations, tmp_path):
    torch.manual_seed(1)
    width = activations.shape[1]
    training = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(d_in=width, d_sae=48, k=4))
    optimiser = torch.optim.Adam(training.parameters(), lr=3e-3)
    for _ in range(60):
        (training.decode(training.encode(activations)) - activations).square().sum(-1).mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    training.cfg.metadata.hook_name = HOOK
    training.save_inference_model(str(tmp_path / "sae"))
    other, density = theirs(sae_lens.SAE.load_from_disk(str(tmp_path / "sae")), contexts)
    mine, mine_density = ours(load(tmp_path / "sae"), model)
    assert 0.02 < mine["fvu"] < 0.9
    agree(mine, other, mine_density, density)
