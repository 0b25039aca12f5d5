"""What a lens gives, site by site and method by method, to be compared between ways of keeping one model's weights."""

import torch

import interp
from interp import edits
from interp.attribution import rollout
from interp.heads import direct_effect, pursuit
from interp.tracing import patch_sweep

CLEAN = [[70, 80, 90, 100, 110, 75], [71, 81, 91, 101]]
CORRUPT = [[70, 85, 90, 100, 110, 75], [71, 81, 99, 101]]
SITES = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_act")
SITES += ("q", "k", "v", "scores", "pattern", "z", "result", "logits")


def changes():
    """Edits of a stream, of a branch, of heads and of neurons."""
    return [
        edits.scale_heads([(0, 0), (1, 3)], 2.0),
        edits.ablate(layers=1, heads=2, positions="last"),
        edits.ablate(site="mlp_act", layers=1),
        edits.steer(torch.linspace(-1, 1, 32), layers=1, scale=0.5),
        edits.ablate(site="k", layers=2, heads=1),
    ]


def findings(lens: interp.Lens) -> dict[str, torch.Tensor]:
    """All reads, a run with edits, a generation with edits, and methods that need the weights or single layers."""
    batch = lens.prepare(input_ids=CLEAN, padding_side="left")
    other = lens.prepare(input_ids=CORRUPT, padding_side="left")
    found = {}
    for site in SITES:
        for (_, layer), value in lens.run(batch, [site]).values.items():
            found[f"{site}.{layer}"] = value
    found["edited"] = lens.run(batch, ["logits"], changes()).logits
    made = lens.generate(batch, changes(), reads=["z"], max_new_tokens=4)
    found["generated"] = made.tokens
    found["generated z"] = made.trace["z", 1]
    found["rollout"] = rollout(lens, batch).scores
    keywords = torch.arange(70, 90).tolist()
    found["pursuit"] = pursuit(lens, batch, keywords, random_lists=5, positions="last").scores
    answers, wrong = torch.tensor([33, 44]), torch.tensor([55, 66])
    found["direct_effect"] = direct_effect(lens, batch, answers=answers, wrong=wrong).scores
    for site in ("resid_pre", "z", "mlp_out"):
        swept = patch_sweep(lens, batch, other, sites=[site], answers=answers, wrong=wrong, min_gap=0.0)
        found[f"patch_sweep {site}"] = swept.values
    head = lens.anatomy.unembed
    found["columns"] = head.columns(lens.run(batch, ["resid_post.2"])["resid_post", 2], answers)
    found["direction"] = head.direction(answers)
    return {name: value.detach().double() for name, value in found.items()}
