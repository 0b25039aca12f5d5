"""The same contract on a GPU, where there is one."""

import pytest
import torch

import interp
from interp import heads, testing
from interp.data.prompts import repeated_tokens
from tests.conftest import packaged
from tests.zoo import build, inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma2", "gpt_oss", "bert", "dinov2", "t5", "llava", "qwen2_5_vl", "mllama"]
)
def test_contract_on_the_gpu(name):
    given = {k: v.cuda() for k, v in inputs(name).items()}
    lens = interp.wrap(build(name).cuda(), sample=given)
    batch = lens.prepare(**given)
    only = ("unchanged", "proof", "rows", "no_op", "ablation", "stop", "removed", "memory")
    found = testing.contract(lens, batch, only=only)
    assert set(found) == set(only)


def test_a_gpu_is_used_by_default_and_agrees_with_the_cpu():
    lens = packaged("smollm2-135m")
    assert next(lens.model.parameters()).is_cuda
    host = interp.load("smollm2-135m", device="cpu")
    ids = repeated_tokens(2, 16, vocab_size=40000, seed=0)
    ours = lens.run(lens.prepare(input_ids=ids), ["resid_post.29", "pattern.18"], to="cpu")
    theirs = host.run(host.prepare(input_ids=ids), ["resid_post.29", "pattern.18"])
    assert not ours["pattern", 18].is_cuda
    torch.testing.assert_close(ours["pattern", 18], theirs["pattern", 18], atol=1e-3, rtol=1e-2)
    scores = heads.patterns(lens, lens.prepare(input_ids=ids))
    assert float(scores.scores.max()) > 0.5
