"""Every place in a transformer that can be read or edited: one table of names, shapes and meanings.

The table drives `Read` strings, refusals, the documentation page of sites and the tests.
"""

from dataclasses import dataclass
from typing import Literal

from interp.errors import UnknownNameError, UnsupportedError, unknown

Scope = Literal["stream", "branch", "attention", "model"]


@dataclass(frozen=True, slots=True)
class Site:
    """One row of the table of sites.

    Attributes:
        name: the one name of the site.
        axes: the axes of what a read returns, in order.
        scope: `stream` (the residual stream), `branch` (what a block adds to it), `attention` (inside one attention
            call) or `model` (outside the layers).
        editable: whether an edit may change it.
        meaning: what the tensor is.
        lens_name: the TransformerLens name below `blocks.{i}.`, or the whole name for the model scope.
    """

    name: str
    axes: tuple[str, ...]
    scope: Scope
    editable: bool
    meaning: str
    lens_name: str | None

    @property
    def per_layer(self) -> bool:
        """Whether the site exists once for each layer."""
        return self.scope != "model"

    @property
    def head_axis(self) -> int | None:
        """Index of the head axis in `axes`, or None."""
        for i, a in enumerate(self.axes):
            if a in ("head", "kv_head"):
                return i
        return None

    @property
    def position_axis(self) -> int | None:
        """Index of the axis that a position selection applies to (the query axis of a pattern)."""
        for name in ("pos", "query"):
            if name in self.axes:
                return self.axes.index(name)
        return None


_D = ("batch", "pos", "d_model")
_H = ("batch", "pos", "head", "d_head")
_KV = ("batch", "pos", "kv_head", "d_head")
_QK = ("batch", "head", "query", "key")

_ROWS = (
    Site("embed", _D, "model", True, "token embeddings, as the embedding module returns them", "hook_embed"),
    Site("resid_pre", _D, "stream", True, "residual stream that enters the layer", "hook_resid_pre"),
    Site("resid_mid", _D, "stream", True, "residual stream between attention and MLP", "hook_resid_mid"),
    Site("resid_post", _D, "stream", True, "residual stream that leaves the layer", "hook_resid_post"),
    Site("attn_out", _D, "branch", True, "what attention adds to the residual stream", "hook_attn_out"),
    Site("mlp_out", _D, "branch", True, "what the MLP (or mixture of experts) adds to the stream", "hook_mlp_out"),
    Site("mixer_out", _D, "branch", True, "what a state-space or recurrent mixer adds to the stream", None),
    Site("mlp_act", ("batch", "pos", "d_mlp"), "branch", True, "input of the MLP's last projection", "mlp.hook_post"),
    Site("q", _H, "attention", True, "queries as the attention kernel sees them (rotated)", "attn.hook_rot_q"),
    Site("k", _KV, "attention", True, "keys as the attention kernel sees them (rotated, cached ones in front)", None),
    Site("v", _KV, "attention", True, "values as the attention kernel sees them", "attn.hook_v"),
    Site("scores", _QK, "attention", True, "attention logits before the softmax, mask added", "attn.hook_attn_scores"),
    Site("pattern", _QK, "attention", True, "attention probabilities", "attn.hook_pattern"),
    Site("z", _H, "attention", True, "each head's input to the output projection", "attn.hook_z"),
    Site(
        "result",
        ("batch", "pos", "head", "d_model"),
        "attention",
        False,
        "each head's contribution to attn_out; the heads sum with the bias to attn_out",
        "attn.hook_result",
    ),
    Site("logits", ("batch", "pos", "d_vocab"), "model", False, "the model's output logits", None),
)

SITES: dict[str, Site] = {row.name: row for row in _ROWS}
TOWERS = ("text", "vision", "encoder", "decoder", "cross")

# TransformerLens names whose tensor is another one than ours in some or all families, and why.
_OTHER_TENSOR = {
    "attn.hook_q": "it is taken before the rotation; `q` is what the kernel sees (`attn.hook_rot_q`)",
    "attn.hook_k": "it is taken before the rotation and without cached keys; `k` is what the kernel sees",
    "attn.hook_rot_k": "it holds no cached keys; ask for `k`",
    "mlp.hook_pre": "gated MLPs have two such tensors; `mlp_act` is the input of the last projection",
    "ln1.hook_normalized": "normalised streams are no site; read `resid_pre`",
    "ln2.hook_normalized": "normalised streams are no site; read `resid_mid`",
    "ln_final.hook_normalized": "normalised streams are no site; read the last `resid_post`",
    "hook_pos_embed": "position embeddings are no site; `resid_pre` of layer 0 holds their sum",
}
_FROM_LENS = {row.lens_name: row.name for row in _ROWS if row.lens_name}


def site(name: str) -> Site:
    """The row of a site by its name.

    Raises:
        UnknownNameError: no such site; names the nearest.
    """
    if name not in SITES:
        raise unknown("site", name, SITES)
    return SITES[name]


def from_transformer_lens(name: str) -> tuple[str, int | None] | None:
    """Site and layer of a TransformerLens hook name, or None if `name` does not look like one.

    Raises:
        UnsupportedError: the hook would be another tensor than ours.
        UnknownNameError: it looks like a hook name, but no such hook is known.
    """
    parts = name.split(".")
    layer = None
    if parts[0] == "blocks" and len(parts) > 2 and parts[1].isdigit():
        layer, rest = int(parts[1]), ".".join(parts[2:])
    elif name.startswith(("hook_", "ln_final.")):
        rest = name
    else:
        return None
    if rest in _OTHER_TENSOR:
        raise UnsupportedError(f"the TransformerLens hook {name!r} is refused: {_OTHER_TENSOR[rest]}.")
    found = _FROM_LENS.get(rest)
    if found is None or SITES[found].per_layer != (layer is not None):
        known = [f"blocks.{{i}}.{n}" if SITES[s].per_layer else n for n, s in _FROM_LENS.items()]
        raise UnknownNameError(f"TransformerLens hook {name!r} is not known here. Known: {', '.join(known)}.")
    return found, layer


def to_transformer_lens(name: str, layer: int | None = None) -> str:
    """The TransformerLens hook name of a site.

    Raises:
        UnsupportedError: TransformerLens has no hook for the same tensor.
    """
    row = site(name)
    if row.lens_name is None:
        raise UnsupportedError(f"TransformerLens has no hook for the tensor that {name!r} names here.")
    return f"blocks.{layer}.{row.lens_name}" if row.per_layer else row.lens_name


def markdown_table() -> str:
    """The table of sites as Markdown, for the documentation."""
    lines = ["| site | shape | meaning | TransformerLens |", "|---|---|---|---|"]
    for row in _ROWS:
        lens = f"`{row.lens_name}`" if row.lens_name else "-"
        lines.append(f"| `{row.name}` | [{', '.join(row.axes)}] | {row.meaning} | {lens} |")
    return "\n".join(lines)
