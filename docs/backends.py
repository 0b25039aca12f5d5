"""The tables of docs/backends.md: what each back end gives, and what it refuses, found by trying."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

MODELS = {"gpt2": "GPT-2", "llama": "Llama"}


def gives() -> str:
    """The battery of `interp.testing`, the sites and the memory, for each back end."""
    from tests.others import BACKENDS

    found = {backend: {title: _rows(backend, name) for name, title in MODELS.items()} for backend in BACKENDS}
    lines = ["| | " + " | ".join(BACKENDS) + " |", "|---" * (len(BACKENDS) + 1) + "|"]
    for row in next(iter(found["transformers"].values())):
        cells = []
        for backend in BACKENDS:
            answers = {title: rows[row] for title, rows in found[backend].items()}
            same = len(set(answers.values())) == 1
            cells.append(next(iter(answers.values())) if same else "; ".join(f"{t}: {a}" for t, a in answers.items()))
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rows(backend: str, name: str) -> dict[str, str]:
    import interp
    from interp import testing
    from interp.sites import SITES
    from tests.others import made, tokenizer_of

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = made(backend, name)
        lens = interp.wrap(model, tokenizer_of(name))
        sites = [s for s, row in SITES.items() if row.per_layer and s != "mixer_out"]
        refused = [s for s in sites if lens.refusal(s, 1) is not None]
        named = [f"`{s}`" for s in (*refused, *lens.anatomy.refused)]
        rows = {"sites refused": ", ".join(named) or "none", "weights copied": _copied(model, lens)}
        batch = lens.prepare(input_ids=[[70, 80, 90, 100], [71, 81, 91, 101]])
        checks = testing.contract(lens, batch)
        for check, answer in checks.items():
            what = (testing.CHECKS[check].__doc__ or "").partition("\n")[0].rstrip(".")
            rows[what[0].lower() + what[1:]] = answer if isinstance(answer, str) else "yes"
        rows["generates, under edits too"] = "yes" if len(_generated(lens, batch)) == 2 else "no"
    return rows


def _copied(model: Any, lens: Any) -> str:
    root = getattr(model, "_module", model)
    spans = [(p.data_ptr(), p.data_ptr() + p.nbytes) for p in root.parameters()]
    own = [n for n, p in lens.model.named_parameters() if not any(a <= p.data_ptr() < b for a, b in spans)]
    return ", ".join(own) or "none"


def _generated(lens: Any, batch: Any) -> set[tuple[int, ...]]:
    from interp import edits

    change = edits.ablate(site="z", layers=0, heads=0)
    found = [lens.generate(batch, max_new_tokens=6, edits=e).tokens for e in ([], [change])]
    return {tuple(tokens.flatten().tolist()) for tokens in found}


def refuses() -> str:
    """What each back end refuses, in the words of the error."""
    import interp
    from interp.errors import InterpError

    lines = ["| back end | what was given | the error |", "|---|---|---|"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for backend, cases in _cases().items():
            for what, make in cases.items():
                try:
                    interp.wrap(make())
                    told = "none: it is taken"
                except InterpError as error:
                    told = str(error)
                lines.append(f"| {backend} | {what} | {_plain(told)} |")
    return "\n".join(lines)


def _plain(message: str) -> str:
    """A message without its numbers, which differ between machines."""
    before, by, rest = message.partition(" by ")
    message = before + " (by so much)" + rest.partition(" relative")[2] if by and " relative" in rest else message
    return message.replace("|", "\\|")


def _cases() -> Mapping[str, Mapping[str, Callable[[], Any]]]:
    from torch import nn

    from tests.others import bridged, hooked, nnsighted, random_hooked
    from tests.test_backends import REFUSED

    def changed(model: Any) -> Any:
        model.add_hook("blocks.1.hook_resid_post", lambda x, hook: 0.5 * x)
        return model

    def placed() -> Any:
        from accelerate.hooks import ModelHook, add_hook_to_module

        bridge = bridged("llama")
        add_hook_to_module(bridge.original_model.lm_head, ModelHook())
        return bridge

    def encoder() -> Any:
        from transformer_lens import HookedEncoder, HookedTransformerConfig

        sizes = {"n_layers": 1, "d_model": 8, "n_ctx": 8, "d_head": 4, "n_heads": 2, "d_mlp": 8, "d_vocab": 9}
        return HookedEncoder(HookedTransformerConfig(**sizes, act_fn="gelu", device="cpu"))

    def edited() -> Any:
        model = nnsighted("gpt2")
        with model.edit(inplace=True):
            model.lm_head.output[:] = 0
        return model

    def bare() -> Any:
        import nnsight

        return nnsight.NNsight(nn.Linear(2, 2))

    settings = {f"`{name}`": lambda s=s: random_hooked(**s) for name, s in REFUSED.items()}
    return {
        "HookedTransformer": {**settings, "a hook that changes something": lambda: changed(hooked("gpt2"))},
        "TransformerBridge": {
            "a hook that changes something": lambda: changed(bridged("gpt2")),
            "modules with hooks of accelerate": placed,
        },
        "TransformerLens": {"a `HookedEncoder`": encoder},
        "nnsight": {"a model with edits of its own": edited, "a module that is no transformers model": bare},
    }
