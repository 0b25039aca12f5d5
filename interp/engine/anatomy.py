"""What a model is made of: towers, layers, branches, attention parts. Plain data, found by `discover`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.engine.linear import LinearBlock, linear_block
from interp.engine.norms import FittedNorm
from interp.engine.placed import parameter
from interp.engine.shards import Shards
from interp.engine.trail import Replay
from interp.errors import UnknownNameError, UnsupportedError, unknown

Until = Literal["attn", "mid", "post"]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One term of what a block adds to the stream: a module's output times constants.

    Attributes:
        module: the module.
        name: its path in the model.
        path: where the term stands in its output.
        scales: constants that the output is multiplied with before it is added.
        copy: whether the model later changes the output in place, so that a read must copy it.
    """

    module: nn.Module
    name: str
    path: tuple
    scales: tuple[Replay, ...] = ()
    copy: bool = False

    def scale(self, arguments: Mapping[Any, Any]) -> Tensor | float | None:
        """The product of the constants, or None when there are none."""
        out: Any = None
        for s in self.scales:
            out = s(arguments) if out is None else out * s(arguments)
        return out


@dataclass(frozen=True, slots=True, eq=False)
class AttentionPart:
    """One attention module of a layer and its way out to the stream.

    Attributes:
        module: the module that calls the attention function.
        name: its path in the model.
        n_heads: query heads.
        n_kv_heads: key/value heads.
        d_head: width of a query or key head.
        d_value: width of a value head.
        out_proj: the output projection, or None if it was not found.
        out_name: its path.
        chain: what lies between the projection and the stream: fitted norms and constant factors, in order.
        cross: whether keys come from another stream.
        refused: sites that this part cannot give, with the reason.
        shards: the processes of which each computes some of the heads; None where one computes all.
    """

    module: nn.Module
    name: str
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_value: int
    out_proj: nn.Module | None
    out_name: str
    chain: tuple[FittedNorm | Replay, ...]
    cross: bool
    refused: Mapping[str, str] = field(default_factory=dict)
    shards: Shards | None = None

    def heads(self, given: Tensor, lead: Sequence[int]) -> Float[Tensor, "... head d_value"]:
        """What the output projection is given, by head: axes of sizes `lead`, then those of z."""
        heads = given.reshape(*lead, -1, self.d_value)
        return heads if self.shards is None else self.shards.whole(heads, -2)

    def given(self, heads: Float[Tensor, "... head d_value"], shape: torch.Size) -> Tensor:
        """The output projection's input of some shape, from the heads' outputs."""
        return (heads if self.shards is None else self.shards.own(heads, -2)).reshape(shape)

    def weight(self) -> Float[Tensor, "head d_value d_model"]:
        """The output projection per head, W_O.

        Raises:
            UnsupportedError: the projection's weight is not an ordinary floating-point matrix.
        """
        if self.out_proj is None:
            raise UnsupportedError(f"the output projection of {self.name} was not found.")
        matrix = projection_matrix(self.out_proj, self.out_name)
        return matrix.reshape(self.n_heads, self.d_value, -1)

    def bias(self) -> Float[Tensor, " d_model"] | None:
        """The output projection's bias, b_O."""
        return parameter(self.out_proj, "bias", self.out_name)


def projection_matrix(module: nn.Module, name: str) -> Float[Tensor, "d_in d_out"]:
    """A projection's weight as [d_in, d_out], whichever way the module stores it.

    Raises:
        UnsupportedError: the weight is packed (quantised) or absent.
    """
    weight = parameter(module, "weight", name)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise UnsupportedError(
            f"{name} ({type(module).__name__}) has no plain floating-point weight matrix (quantised?); sites that need "
            "it (`result`, direct effects) are refused."
        )
    return weight if type(module).__name__ == "Conv1D" else weight.T


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One layer of a tower.

    Attributes:
        index: place in the tower.
        module: the layer module.
        name: its path in the model.
        in_key: position or name of the argument that is the stream.
        out_path: where the stream stands in the layer's output.
        branches: what is added to the stream, by kind (`attn`, `cross`, `mlp`, `mixer`), in the order of addition.
        attention: attention parts by kind (`attn`, `cross`).
        parallel: whether attention and MLP read the same stream.
        mid: module whose input (`in`) or output (`out`) is resid_mid, with the key or path; None to add it up.
        down_proj: the MLP's last projection, whose input is mlp_act.
        post_norm: whether a norm is applied to the stream itself (post-LN).
        in_place: whether the stream is changed in place, so that reads must copy.
        out_form: length of the layer's output tuple; None for a bare tensor.
        skippable: whether the stream is all that the layer's output holds, so that a run may enter above it.
        adjusted: whether something is written into the stream between the layer below and this one.
        recipe: how the stream is put together, for the proof: ("add", kinds), ("norm", module) or ("scale", factor).
        refused: sites that this layer cannot give, with the reason.
        neurons: the processes of which each computes some of mlp_act; None where one computes all.
    """

    index: int
    module: nn.Module
    name: str
    in_key: Any
    out_path: tuple
    branches: Mapping[str, tuple[Part, ...]]
    attention: Mapping[str, AttentionPart]
    parallel: bool
    mid: tuple[nn.Module, str, Any] | None
    down_proj: nn.Module | None
    post_norm: bool
    in_place: bool
    out_form: int | None
    skippable: bool
    adjusted: bool
    recipe: tuple[tuple[str, Any], ...]
    refused: Mapping[str, str]
    neurons: Shards | None = None

    def steps(self, until: Until = "post") -> tuple[tuple[str, Any], ...]:
        """The recipe up to a place.

        Args:
            until: `attn` (attention has been added), `mid` (also the norms and factors behind it, up to the next
                addition) or `post` (everything).
        """
        adds = [i for i, (what, _) in enumerate(self.recipe) if what == "add"]
        first = next((i for i in adds if "attn" in self.recipe[i][1]), len(self.recipe))
        if until == "attn":
            return self.recipe[: first + 1]
        return self.recipe if until == "post" else self.recipe[: next((i for i in adds if i > first), None)]

    def before_norms(self, until: Until = "post") -> tuple[str, ...]:
        """The branches that norms of the stream up to a place see: their statistics depend on them."""
        steps = self.steps(until)
        last = max((i for i, (what, _) in enumerate(steps) if what == "norm"), default=0)
        return tuple(kind for what, kinds in steps[:last] if what == "add" for kind in kinds)

    def linear(
        self,
        z: Float[Tensor, "batch pos head d_value"],
        stream: Float[Tensor, "batch pos d_model"],
        branches: Mapping[str, Float[Tensor, "batch pos d_model"]],
        *,
        until: Until = "post",
    ) -> LinearBlock:
        """The layer up to a place as a linear map of its heads and its stream, norms frozen at their statistics.

        Args:
            z: the heads' outputs (site `z`), at some positions.
            stream: `resid_pre` there.
            branches: what the branches of `before_norms` add there, by kind.
            until: see `steps`.

        Raises:
            UnsupportedError: there is no self-attention with an ordinary output projection, a norm is neither
                LayerNorm nor RMSNorm, or a factor differs between positions.
        """
        part = self.attention.get("attn")
        if part is None or "result" in part.refused:
            reason = "it has no self-attention" if part is None else part.refused["result"]
            raise UnsupportedError(f"{self.name} is not linear in its heads: {reason}.")
        steps = self.steps(until)
        return linear_block(part.weight(), part.bias(), part.chain, steps, z, stream, branches, self.name)


@dataclass(frozen=True, slots=True, eq=False)
class Tower:
    """A stack of layers on one residual stream.

    Attributes:
        name: `text`, `vision`, `encoder`, `decoder`, or the name of the container for a further stack.
        layers: its layers.
        d_model: width of the stream.
        packed: whether the stream is [pos, d_model] with all samples in one row (Qwen-VL vision towers).
        container: path of the list that holds the layers.
        proof: largest relative errors found by the proof, by what was proved.
    """

    name: str
    layers: tuple[Layer, ...]
    d_model: int
    packed: bool
    container: str
    proof: Mapping[str, float]

    def layer(self, index: int) -> Layer:
        """The layer at an index (negative from the end).

        Raises:
            UnknownNameError: there is no such layer.
        """
        n = len(self.layers)
        if not -n <= index < n:
            raise UnknownNameError(f"layer {index} does not exist: tower {self.name!r} has {n} layers (0 to {n - 1}).")
        return self.layers[index % n]


@dataclass(frozen=True, slots=True, eq=False)
class Unembedding:
    """From the last layer's stream to the logits: `after(linear(norm(stream)))`.

    Attributes:
        norm_modules: modules applied to the stream first (usually one final norm), each fitted where it could be.
        fitted: the fitted form of each, or None.
        scales: constant factors applied before the projection.
        module: the projection.
        name: its path.
        after: elementwise functions applied to the projection's output (scaling, soft-capping), in order.
    """

    norm_modules: tuple[nn.Module, ...]
    fitted: tuple[FittedNorm | None, ...]
    scales: tuple[Replay, ...]
    module: nn.Module
    name: str
    after: tuple[Replay, ...]

    def __call__(self, stream: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
        """Logits of a residual stream."""
        for norm in self.norm_modules:
            stream = norm(stream)
        for scale in self.scales:
            stream = stream * scale({})
        weight = getattr(self.module, "weight", stream)
        # Models with a float32 stream and half-precision weights cast before the projection.
        plain = isinstance(weight, Tensor) and weight.is_floating_point()
        logits = self.module(stream.to(weight.dtype) if plain else stream)
        for step in self.after:
            logits = step({"logits": logits})
        return logits

    def columns(self, stream: Float[Tensor, "... d_model"], ids: Int[Tensor, " n"]) -> Float[Tensor, "... n"]:
        """Logits of a few tokens in float32, without those of the rest of the vocabulary.

        Raises:
            UnsupportedError: the projection has no plain weight, or what follows it is not the same for every token.
        """
        for norm in self.norm_modules:
            stream = norm(stream)
        for scale in self.scales:
            stream = stream * scale({})
        matrix, bias = projection_matrix(self.module, self.name).T, parameter(self.module, "bias", self.name)
        ids = ids.to(matrix.device)
        logits = stream.to(matrix).float() @ matrix[ids].float().T
        logits = logits if bias is None else logits + bias[ids].float()
        for step in self.after:
            try:
                found = step({"logits": logits})
            except RuntimeError:  # a constant as wide as the vocabulary
                found = None
            if found is None or found.shape != logits.shape:
                raise UnsupportedError(f"what follows {self.name} is not the same for every token.")
            logits = found
        return logits

    def direction(self, ids: Int[Tensor, " batch"]) -> Float[Tensor, "batch d_model"]:
        """What each token's logit reads from the normed stream: its column of the unembedding, times later scalings.

        A soft cap is not linear and left out: the direction is that of the logit before the cap.

        Raises:
            UnsupportedError: the projection has no plain weight.
        """
        matrix = projection_matrix(self.module, self.name).float().T
        columns = matrix[ids.to(matrix.device)]
        for scale in self.scales:
            columns = columns * scale({})
        probe = torch.tensor([0.0, 1.0, 2.0], device=columns.device)
        for step in self.after:
            value = step({"logits": probe})
            if torch.allclose(value[2], 2 * value[1]) and float(value[0]) == 0.0:
                columns = columns * value[1]
        return columns

    def linear(
        self, parts: Float[Tensor, "batch n d_model"], stream: Float[Tensor, "batch d_model"]
    ) -> Float[Tensor, "batch n d_model"]:
        """Parts of the last stream through the final norm, with its scale frozen at the full stream's.

        Raises:
            UnsupportedError: the norm is neither LayerNorm nor RMSNorm.
        """
        full = stream[:, None].float()
        for norm in self.fitted:
            if norm is None:
                raise UnsupportedError(f"the final norm before {self.name} is neither LayerNorm nor RMSNorm.")
            scale = norm.scale(full)
            parts, full = norm.linear(parts, scale), norm.linear(full, scale) + norm.bias.to(full.device)
        return parts


@dataclass(frozen=True, slots=True, eq=False)
class Anatomy:
    """All towers of a model, its embedding and its unembedding.

    Attributes:
        towers: by name.
        main: name of the tower that a read means when it names none.
        embed: the token embedding module and its path.
        unembed: the way from the main tower's stream to the logits; None where there is none.
        refused: model-scope sites that cannot be given, with the reason.
        plans: plans of earlier runs, by their reads (see `plan.plan_for`); a changed copy begins without any.
    """

    towers: Mapping[str, Tower]
    main: str
    embed: tuple[nn.Module, str] | None
    unembed: Unembedding | None
    refused: Mapping[str, str]
    plans: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def depth(self) -> dict[str, int]:
        """Number of layers of each tower."""
        return {name: len(tower.layers) for name, tower in self.towers.items()}

    def tower(self, name: str | None) -> tuple[Tower, str]:
        """A tower and the kind of attention that its name means (`attn`; `cross` for the tower `cross`).

        Raises:
            UnknownNameError: there is no such tower.
        """
        if name is None:
            return self.towers[self.main], "attn"
        if name == "cross":
            main = self.towers[self.main]
            if any("cross" in layer.attention for layer in main.layers):
                return main, "cross"
        if name not in self.towers:
            known = [*self.towers]
            if any("cross" in layer.attention for layer in self.towers[self.main].layers):
                known.append("cross")
            raise unknown("tower", name, known)
        return self.towers[name], "attn"

    def attention(self, tower: str | None, layer: int, site: str = "pattern") -> AttentionPart:
        """The attention part of a layer.

        Raises:
            UnsupportedError: the layer has none of that kind, or it cannot give `site`.
        """
        t, kind = self.tower(tower)
        found = t.layer(layer)
        if site in found.refused:
            raise UnsupportedError(f"{site!r} of layer {layer} in tower {t.name!r} is refused: {found.refused[site]}.")
        part = found.attention.get(kind)
        if part is None:
            other = f"; it has {', '.join(found.attention)} attention" if found.attention else ""
            hint = " (tower 'cross')" if "cross" in found.attention and kind == "attn" else ""
            raise UnsupportedError(
                f"{site!r} is refused: layer {found.index} of tower {t.name!r} ({type(found.module).__name__}) "
                f"makes no {'self-' if kind == 'attn' else 'cross-'}attention call through transformers' attention "
                f"table{other}{hint}."
            )
        if site in part.refused:
            raise UnsupportedError(f"{site!r} of layer {layer} in tower {t.name!r} is refused: {part.refused[site]}.")
        return part


def stream_of(out: Any, path: tuple) -> Tensor:
    """The tensor at a path of a module's output."""
    for key in path:
        out = out[key]
    return out


def with_stream(out: Any, path: tuple, new: Tensor) -> Any:
    """A module's output with the tensor at `path` replaced."""
    if path == ():
        return new
    if isinstance(out, tuple):
        key = path[0]
        fields = [*out]
        fields[key] = new
        return type(out)(*fields) if hasattr(out, "_fields") else type(out)(fields)
    out = type(out)(out) if isinstance(out, (list, dict)) else out
    out[path[0]] = new
    return out


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of `wanted`, in float64."""
    if found.shape != wanted.shape:
        return float("inf")
    size = float(wanted.detach().double().abs().max()) if wanted.numel() else 0.0
    gap = float((found.detach().double() - wanted.detach().double()).abs().max()) if wanted.numel() else 0.0
    return gap / max(size, torch.finfo(torch.float32).tiny)
