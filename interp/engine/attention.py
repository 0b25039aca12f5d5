"""Reading and editing attention under the model's own kernel.

transformers sends attention through one table of functions. During a run, and only then, the entry that the model
uses is replaced by a dispatcher that knows the tapped modules by identity and passes every other call on. The model's
configuration keeps its own implementation name, so masks, variable-length paths and literal comparisons stay as they
are, and an untouched call returns the very bits that the kernel made.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.errors import UnsupportedError

# Keyword arguments of attention functions: those that enter the formula, and those that do not change it.
USED = frozenset({"scaling", "softcap", "s_aux", "position_bias", "is_causal", "sliding_window", "dropout"})
HARMLESS = frozenset(
    "position_ids use_cache cache_position output_attentions output_hidden_states output_router_logits return_dict "
    "num_items_in_batch cache cu_seq_lens_q cu_seq_lens_k cu_seqlens max_length_q max_length_k max_seqlen "
    "deterministic target_dtype past_key_values past_key_value layer_idx tensor position_embeddings seq_idx "
    "mm_token_type_ids token_type_ids cross_attention_states head_mask block_indices logits_to_keep "
    "return_legacy_cache input_shape pixel_values image_grid_thw".split()
)
_KNOWN = USED | HARMLESS


@dataclass(eq=False, slots=True)
class AttentionCall:
    """What an attention function was given and what it returned.

    Attributes:
        module: the attention module.
        query: queries [batch, head, query, d_head], after rotation.
        key: keys [batch, kv_head, key, d_head], after rotation and the cache.
        value: values [batch, kv_head, key, d_head].
        mask: bool (True attends), additive float, 2-D padding mask of flash attention, or None.
        options: the keyword arguments (scaling, softcap, ...).
        out: the kernel's result [batch, query, head, d_head].
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    options: dict[str, Any]
    out: Tensor | None = None
    values: dict[str, Any] = field(default_factory=dict)
    caller: Any = None


Handler = Callable[[AttentionCall, Callable[[AttentionCall], tuple]], tuple]


class _Dispatcher:
    """Stands in the table of attention functions while at least one module is tapped."""

    def __init__(self, original: Callable | None) -> None:
        self.original = original
        self.handlers: dict[int, list[Handler]] = {}

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
    ) -> tuple:
        kernel = self.original or _eager_function(module)
        stack = self.handlers.get(id(module))
        if not stack:
            return kernel(module, query, key, value, attention_mask, **options)

        def delegate(c: AttentionCall) -> tuple:
            return kernel(c.module, c.query, c.key, c.value, c.mask, **c.options)

        return stack[-1](AttentionCall(module, query, key, value, attention_mask, options), delegate)


_LOCK = threading.Lock()


def _eager_function(module: nn.Module) -> Callable:
    """The family's own eager function, which transformers keeps beside the attention class."""
    for cls in type(module).__mro__:
        forward = cls.__dict__.get("forward")
        if forward is None:
            continue
        plain = inspect.unwrap(forward)
        names = [n for n in plain.__code__.co_names if "eager" in n and callable(plain.__globals__.get(n))]
        if names:
            return plain.__globals__[names[0]]
        found = vars(sys.modules[cls.__module__]).get("eager_attention_forward")
        if found is not None:
            return found
    raise UnsupportedError(
        f"{type(module).__name__} uses eager attention, but its file has no eager function that could be tapped; "
        "load the model with attn_implementation='sdpa'."
    )


def _tables(module: nn.Module, key: Any) -> Iterator[dict]:
    """The dicts in which `module` may look its attention function up."""
    from transformers.modeling_utils import AttentionInterface

    yield AttentionInterface._global_mapping
    for cls in type(module).__mro__:
        registry = getattr(sys.modules.get(cls.__module__), "ALL_ATTENTION_FUNCTIONS", None)
        local = getattr(registry, "_local_mapping", {})
        if key in local:
            yield local


def implementation_of(module: nn.Module) -> Any:
    """Name of the attention implementation that a module will look up, e.g. `sdpa`."""
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


@contextmanager
def tapped(handlers: Mapping[nn.Module, Handler]) -> Iterator[None]:
    """While open, the attention calls of these modules go to their handlers, and to nobody else."""
    entered: list[tuple[dict, Any, _Dispatcher, int]] = []
    try:
        known: dict[Any, tuple[Any, list[dict]]] = {}  # asked once: configurations answer slowly
        with _LOCK:
            for module, handler in handlers.items():
                kind = type(module), id(getattr(module, "config", None))
                if kind not in known:
                    key = implementation_of(module)
                    known[kind] = key, list({id(t): t for t in _tables(module, key)}.values())
                key, tables = known[kind]
                for table in tables:
                    present = table.get(key)
                    if not isinstance(present, _Dispatcher):
                        present = _Dispatcher(present)
                        table[key] = present
                    present.handlers.setdefault(id(module), []).append(handler)
                    entered.append((table, key, present, id(module)))
        yield
    finally:
        with _LOCK:
            for table, key, dispatcher, ident in reversed(entered):
                dispatcher.handlers[ident].pop()
                if not dispatcher.handlers[ident]:
                    del dispatcher.handlers[ident]
                if not dispatcher.handlers and table.get(key) is dispatcher:
                    if dispatcher.original is None:
                        del table[key]
                    else:
                        table[key] = dispatcher.original


@contextmanager
def record_attention(model: nn.Module, seen: Callable[[AttentionCall], None]) -> Iterator[None]:
    """While open, every attention call of any module of `model` is passed to `seen` after it ran."""

    def handler(call: AttentionCall, delegate: Callable[[AttentionCall], tuple]) -> tuple:
        result = delegate(call)
        call.out = result[0]
        seen(call)
        return result

    holders = {m: handler for m in model.modules() if getattr(m, "config", None) is not None}
    with ExitStack() as stack:
        stack.enter_context(tapped(holders))
        yield


def check_options(options: Mapping[str, Any], module: nn.Module) -> None:
    """Refuse to recompute attention when an option is unknown.

    Raises:
        UnsupportedError: names the option.
    """
    strange = [k for k, v in options.items() if k not in _KNOWN and v is not None and v is not False]
    if strange:
        raise UnsupportedError(
            f"{type(module).__name__} passes {strange} to its attention function, which the recomputed attention does "
            "not know; `scores` and `pattern` are refused for this model (every other site can be read)."
        )


def attention_scores(
    call: AttentionCall, heads: Int[Tensor, " h"] | None = None, rows: Int[Tensor, "batch n"] | slice | None = None
) -> Float[Tensor, "batch h n key"]:
    """Attention logits (float32, mask added) of the chosen heads and query rows.

    Args:
        call: the attention call.
        heads: query heads; None for all.
        rows: query rows per sample, or a slice of them for all samples; None for all.

    Raises:
        UnsupportedError: the call holds an option or a mask that is not known.
    """
    check_options(call.options, call.module)
    q, k = call.query, call.key
    n_heads, n_kv = q.shape[1], k.shape[1]
    q = _pick(q, None, rows)
    if heads is not None:
        q, k = q[:, heads], k[:, heads * n_kv // n_heads]
    size, n_chosen, n_rows, width = q.shape
    if heads is None and n_kv != n_heads:
        # The queries that share a key are put behind one another, so that no key is copied.
        q = q.reshape(size, n_kv, -1, width)
    scores = (widened(q) @ widened(k).transpose(-1, -2)).view(size, n_chosen, n_rows, -1)
    return finished(scores, call, heads, rows)


def finished(
    scores: Float[Tensor, "batch h n key"],
    call: AttentionCall,
    heads: Int[Tensor, " h"] | None = None,
    rows: Int[Tensor, "batch n"] | slice | None = None,
) -> Float[Tensor, "batch h n key"]:
    """Attention logits from the products of queries and keys, which it changes: scale, soft cap, bias and mask."""
    width, scaling = call.query.shape[-1], call.options.get("scaling")
    scores *= width**-0.5 if scaling is None else scaling
    cap = call.options.get("softcap")
    # Releases of transformers that let Gemma 2 run under sdpa leave the cap out there; later ones refuse.
    if cap and implementation_of(call.module) != "sdpa":
        scores = torch.tanh(scores / cap) * cap
    bias = call.options.get("position_bias")
    if bias is not None:
        scores = scores + _pick(bias, heads, rows)[..., : scores.shape[-1]].to(scores.dtype)
    return _masked(scores, call, heads, rows)


def widened(x: Tensor) -> Tensor:
    """The tensor in float32, or as it is if it is wider."""
    return x if x.dtype == torch.float64 else x.float()


def _pick(x: Tensor, heads: Tensor | None, rows: Tensor | slice | None) -> Tensor:
    """The part of a [batch|1, head|1, query|1, n] tensor that belongs to these heads and rows."""
    if heads is not None and x.shape[1] > 1:
        x = x[:, heads]
    if rows is None or x.shape[2] == 1:
        return x
    if isinstance(rows, slice):
        return x[:, :, rows]
    x = x.expand(rows.shape[0], -1, -1, -1)
    return x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1]))


def _masked(scores: Tensor, call: AttentionCall, heads: Tensor | None, rows: Tensor | slice | None) -> Tensor:
    mask, n_keys, n_queries = call.mask, call.key.shape[2], call.query.shape[2]
    if isinstance(mask, Tensor) and mask.ndim == 4:
        mask = _pick(mask, heads, rows)[..., :n_keys]
        if mask.dtype == torch.bool:
            return scores.masked_fill(~mask, -torch.inf)
        # Additive masks hold the lowest number of their dtype: what is that low is masked out.
        lowest = torch.finfo(mask.dtype).min
        return (scores + mask.to(scores.dtype)).masked_fill(mask <= lowest / 2, -torch.inf)
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UnsupportedError(f"a mask of form {shape} is not known to the recomputed attention; use sdpa or eager.")
    causal = call.options.get("is_causal")
    causal = getattr(call.module, "is_causal", True) if causal is None else causal
    # A single query is the newest position; otherwise queries and keys start together unless flash aligned their ends.
    start = n_keys - n_queries if isinstance(mask, Tensor) or n_queries == 1 else 0
    causal = causal and (n_queries > 1 or isinstance(mask, Tensor))
    window = call.options.get("sliding_window")
    window = window if window and implementation_is_flash(call.module) else None
    lengths = call.options.get("cu_seq_lens_q")
    first, stop = (rows.start, rows.stop) if isinstance(rows, slice) else (0, n_queries)
    if mask is None and not window and lengths is None and (not causal or first + start >= n_keys - 1):
        return scores  # every row sees every key
    key = torch.arange(n_keys, device=scores.device)
    place = rows if isinstance(rows, Tensor) else torch.arange(first, stop, device=scores.device)[None]
    place = (place + start)[:, None, :, None]
    allowed = torch.ones(1, 1, 1, n_keys, dtype=torch.bool, device=scores.device)
    if causal:
        allowed = allowed & (key <= place)
    if window:
        allowed = allowed & (key > place - window)
    if isinstance(lengths, Tensor):
        segment = torch.bucketize(key, lengths.to(key.device), right=True)
        allowed = allowed & (segment[place] == segment)
    if isinstance(mask, Tensor):
        allowed = allowed & mask[:, None, None, :n_keys].bool()
    return scores.masked_fill(~allowed, -torch.inf)


def implementation_is_flash(module: nn.Module) -> bool:
    """Whether the module runs a flash kernel, where windows and causality are options rather than masks."""
    return "flash" in str(implementation_of(module))


def attention_pattern(
    scores: Float[Tensor, "batch h n key"],
    call: AttentionCall,
    heads: Int[Tensor, " h"] | None = None,
    *,
    closed: bool = True,
) -> Float[Tensor, "batch h n key"]:
    """Probabilities from logits: softmax in float32, with the sink column where the family has one.

    A row in which everything is masked (padding) is all zero; there is none if `closed` is False.
    """
    sinks = call.options.get("s_aux")
    if sinks is not None:
        s = (sinks if heads is None else sinks[heads]).to(scores.dtype).reshape(1, -1, 1, 1)
        wide = torch.cat([scores, s.expand(*scores.shape[:-1], 1)], dim=-1)
        return torch.softmax(wide, dim=-1)[..., :-1]
    if not closed:
        return torch.softmax(scores, dim=-1)
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    # The softmax of a row of -inf is NaN; give it finite numbers first so that gradients stay finite too.
    return torch.softmax(scores.masked_fill(dead, 0.0), dim=-1).masked_fill(dead, 0.0)


def mix_values(pattern: Float[Tensor, "batch head n key"], call: AttentionCall) -> Float[Tensor, "batch n head d"]:
    """`pattern @ v` in the form in which attention functions return it."""
    v, shape = call.value, pattern.shape
    if shape[1] != v.shape[1]:
        # The heads that share values are put behind one another, so that no value is copied.
        pattern = pattern.reshape(shape[0], v.shape[1], -1, shape[-1])
    return (pattern.to(v.dtype) @ v).view(*shape[:3], -1).transpose(1, 2).contiguous()
