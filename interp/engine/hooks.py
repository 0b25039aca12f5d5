"""Attaching a plan to a model: module hooks and attention taps, all of which are gone afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from interp.engine.anatomy import AttentionPart, Layer, Part, Tower, stream_of, with_stream
from interp.engine.attention import (
    AttentionCall,
    attention_pattern,
    attention_scores,
    mix_values,
    tapped,
)
from interp.engine.norms import through_chain
from interp.engine.plan import ATTENTION_CALL, Place, middle_branches
from interp.engine.recorder import Recorder, fuse_heads
from interp.errors import EditError, UnsupportedError
from interp.reads import Read

_BRANCH_SITE = {"attn": "attn_out", "cross": "attn_out", "mlp": "mlp_out", "mixer": "mixer_out"}


@dataclass(eq=False, slots=True)
class LayerState:
    """What is known of the layer that a tower's forward call is in.

    One state serves all layers of a tower, so that no tensor is held longer than its layer lasts.
    """

    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    stream: Tensor | None = None
    sums: dict[str, Tensor] = field(default_factory=dict)
    fired: dict[str, int] = field(default_factory=dict)
    calls: list[AttentionCall] = field(default_factory=list)

    @property
    def arguments(self) -> dict[Any, Any]:
        """What the layer was called with, by position or name."""
        return {**dict(enumerate(self.args)), **self.kwargs}


@contextmanager
def attached(recorder: Recorder) -> Iterator[None]:
    """While open, the recorder's plan is carried out by the model's forward calls."""
    hooks: list[RemovableHandle] = []
    handlers: dict[nn.Module, Any] = {}
    towers, states = recorder.anatomy.towers, {name: LayerState() for name in recorder.anatomy.towers}
    try:
        for (name, index), wanted in recorder.plan.layers.items():
            if index >= 0:
                tower = towers[name]
                attach_layer(_LayerHooks(recorder, tower, tower.layers[index], states[name]), wanted, hooks, handlers)
        embed = recorder.anatomy.embed
        if embed is not None and recorder.plan.wants("model", "model", -1, "embed"):

            def on_embed(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
                return recorder.visit(("model", "model", -1, "embed"), out)

            hooks.append(embed[0].register_forward_hook(on_embed))
        with tapped(handlers):
            yield
    finally:
        for hook in reversed(hooks):
            hook.remove()


def attach_layer(
    hooks: _LayerHooks, wanted: set[tuple[str, str]], handles: list[RemovableHandle], handlers: dict[nn.Module, Any]
) -> None:
    """Attach what the plan wants of one layer; `wanted` holds the kind of attention and the site."""
    tower, layer = hooks.tower, hooks.layer
    if tower.packed or any(site not in ATTENTION_CALL for _, site in wanted):
        handles.append(layer.module.register_forward_pre_hook(hooks.enter, with_kwargs=True))
    inputs: dict[str, Callable] = {}
    for kind, part in layer.attention.items():
        sites = {s for k, s in wanted if k == kind}
        if sites & ATTENTION_CALL:
            handlers[part.module] = hooks.tap(kind, part, sites)
        if part.out_proj is None:
            continue
        if "z" in sites or (tower.packed and sites & ATTENTION_CALL):
            terms = layer.branches.get(kind, ())
            # A packed tower may come here for its attention sites alone: then no work on z is planned.
            read = not tower.packed and (kind, _BRANCH_SITE[kind]) in wanted and hooks.only_read(kind, "z")
            if read and [t.module for t in terms] == [part.out_proj]:
                inputs[kind] = hooks.z(kind, part)  # one hook of the module serves both
            else:
                handles.append(part.out_proj.register_forward_pre_hook(hooks.z(kind, part)))
        if "result" in sites:
            handles.append(part.out_proj.register_forward_hook(hooks.result(kind, part)))
    if ("attn", "mlp_act") in wanted and layer.down_proj is not None:
        handles.append(layer.down_proj.register_forward_pre_hook(hooks.mlp_act))
    middle = ("attn", "resid_mid") in wanted
    summed = middle and hooks.middle_by_sum
    for kind, parts in layer.branches.items():
        site = (("cross" if kind == "cross" else "attn"), _BRANCH_SITE[kind])
        if site in wanted or (summed and kind in middle_branches(layer)):
            for part in parts:
                hook = hooks.branch(kind, part, len(parts), summed, inputs.get(kind))
                handles.append(part.module.register_forward_hook(hook))
    if middle and not summed:
        assert layer.mid is not None
        module, side, key = layer.mid
        if side == "in":
            handles.append(module.register_forward_pre_hook(hooks.middle_in(key), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(hooks.middle_out(key)))
    if ("attn", "resid_post") in wanted:
        handles.append(layer.module.register_forward_hook(hooks.leave))


@dataclass(eq=False, slots=True)
class _LayerHooks:
    """The hook functions of one layer."""

    recorder: Recorder
    tower: Tower
    layer: Layer
    state: LayerState

    def _place(self, kind: str, site: str) -> Place:
        return self.tower.name, kind, self.layer.index, site

    def _visit(self, kind: str, site: str, value: Tensor, copy: bool = False) -> Tensor:
        """Visit with a value whose first axes are [batch, pos]."""
        if not self.tower.packed:
            return self.recorder.visit(self._place(kind, site), value, copy)
        wrapped = value[None]
        new = self.recorder.visit(self._place(kind, site), wrapped, copy)
        return value if new is wrapped else new[0]

    def only_read(self, kind: str, site: str) -> bool:
        """Whether nothing changes a site."""
        work = self.recorder.plan.work[self._place(kind, site)]
        return not work.edits and not work.probe

    @property
    def middle_by_sum(self) -> bool:
        """Whether resid_mid has to be added up: nothing reads it, or it is to be edited where it is only read."""
        if self.layer.mid is None:
            return True
        work = self.recorder.plan.work[self._place("attn", "resid_mid")]
        changes = self.layer.mid[1] == "in" and (bool(work.edits) or work.probe)
        if changes and self.layer.post_norm:
            raise UnsupportedError(
                f"resid_mid of {self.layer.name} is a normed stream that no module makes: read only."
            )
        return changes

    def enter(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Layer begins: note its arguments, serve resid_pre."""
        key = self.layer.in_key
        if isinstance(key, int) and key >= len(args):
            key = "hidden_states"
        stream = args[key] if isinstance(key, int) else kwargs[key]
        state = self.state
        state.args, state.kwargs = args, kwargs
        state.sums.clear()
        state.fired.clear()
        state.calls.clear()
        state.stream = new = self._visit("attn", "resid_pre", stream, self.layer.in_place)
        if new is stream:
            return None
        if isinstance(key, int):
            return (*args[:key], new, *args[key + 1 :]), kwargs
        return args, {**kwargs, key: new}

    def leave(self, module: nn.Module, args: tuple, out: Any) -> Any:
        """Layer ends: serve resid_post."""
        stream = stream_of(out, self.layer.out_path)
        new = self._visit("attn", "resid_post", stream, self.layer.in_place)
        return None if new is stream else with_stream(out, self.layer.out_path, new)

    def branch(self, kind: str, part: Part, count: int, summed: bool, first: Callable | None) -> Callable:
        """A term of a branch was made: serve attn_out, mlp_out, mixer_out, and resid_mid where it is added up.

        `first` is a pre-hook of the same module that only reads, to be served before.
        """

        alone = count == 1 and not summed
        site_kind, site = "cross" if kind == "cross" else "attn", _BRANCH_SITE[kind]

        def hook(module: nn.Module, args: tuple, out: Any) -> Any:
            if first is not None:
                first(module, args)
            state, raw = self.state, stream_of(out, part.path)
            assert state.stream is not None
            factor = part.scale(state.arguments) if part.scales else None
            term = raw if raw.shape == state.stream.shape else raw.reshape(state.stream.shape)
            if factor is not None:
                term = term * factor
            if alone:
                total = term
                new = self._visit(site_kind, site, total, part.copy)
            else:
                state.fired[kind] = state.fired.get(kind, 0) + 1
                new = total = term if kind not in state.sums else state.sums[kind] + term
                if state.fired[kind] == count:
                    new = self._visit(site_kind, site, total, part.copy)
                    if summed and kind in middle_branches(self.layer):
                        new = self._middle(kind, new)
                state.sums[kind] = new
            if new is total:
                return None
            return with_stream(out, part.path, _edited(raw, term, total, new, factor, self._place("attn", kind)))

        return hook

    def _middle(self, kind: str, branch: Tensor) -> Tensor:
        """Serve resid_mid once its last branch is there; an edit of it becomes an edit of that branch."""
        before = middle_branches(self.layer)
        done = {k: self.state.fired.get(k, 0) for k in before}
        if any(done[k] < len(self.layer.branches[k]) for k in before):
            return branch
        assert self.state.stream is not None
        middle = self.state.stream
        for k in before:
            middle = middle + (branch if k == kind else self.state.sums[k])
        new = self._visit("attn", "resid_mid", middle)
        return branch if new is middle else branch + (new - middle)

    def middle_in(self, key: Any) -> Callable:
        """Serve resid_mid where a module takes it."""

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            assert self.state.stream is not None
            value = args[key] if isinstance(key, int) else kwargs[key]
            self._visit("attn", "resid_mid", value.reshape(self.state.stream.shape), self.layer.in_place)

        return hook

    def middle_out(self, path: tuple) -> Callable:
        """Serve resid_mid where a module makes it."""

        def hook(module: nn.Module, args: tuple, out: Any) -> Any:
            value = stream_of(out, path)
            new = self._visit("attn", "resid_mid", value, self.layer.in_place)
            return None if new is value else with_stream(out, path, new)

        return hook

    def mlp_act(self, module: nn.Module, args: tuple) -> Any:
        """Serve mlp_act before the MLP's last projection."""
        value = args[0]
        assert self.state.stream is not None
        neurons = self.layer.neurons
        shaped = value.reshape(*self.state.stream.shape[:-1], value.shape[-1])
        shaped = shaped if neurons is None else neurons.whole(shaped, -1)
        new = self._visit("attn", "mlp_act", shaped)
        if new is shaped:
            return None
        return ((new if neurons is None else neurons.own(new, -1)).reshape(value.shape), *args[1:])

    def z(self, kind: str, part: AttentionPart) -> Callable:
        """Serve z before the output projection."""

        def hook(module: nn.Module, args: tuple) -> Any:
            self._flush(kind, part)
            value = args[0]
            assert self.state.stream is not None
            heads = part.heads(value, self.state.stream.shape[:-1])
            new = self._visit(kind, "z", heads)
            return None if new is heads else (part.given(new, value.shape), *args[1:])

        return hook

    def result(self, kind: str, part: AttentionPart) -> Callable:
        """Serve result: each head's share of attn_out, for the chosen heads and positions only."""

        def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
            recorder, place = self.recorder, self._place(kind, "result")
            assert self.state.stream is not None
            lead = self.state.stream.shape[:-1]
            z = part.heads(args[0].detach(), lead)
            full = out.detach().reshape(*lead, 1, -1)
            if self.tower.packed:
                z, full = z[None], full[None]
            weight = part.weight()
            for at in recorder.plan.work[place].reads:
                read, heads = at.read, at.heads
                some, _ = recorder.take(place, read.positions, heads, z)
                whole, _ = recorder.take(place, read.positions, None, full)
                w = weight if heads is None else weight[list(heads)]
                shares = torch.einsum("bphd,hdm->bphm", some.float(), w.float())
                shares = through_chain(shares, whole.float(), part.chain, self.state.arguments, bias=False)
                # Positions and heads are chosen already: keep only pads, reduces and stores.
                chosen = recorder.selection(read.positions, self.tower.name, z.shape[0], z.shape[1], z.device)
                recorder.keep_part(at, place, shares, chosen)
            recorder.done(place)

        return hook

    def tap(self, kind: str, part: AttentionPart, sites: set[str]) -> Callable:
        """The handler of the layer's attention calls: q, k, v, scores, pattern."""
        work = self.recorder.plan.work
        places = {s: self._place(kind, s) for s in sites & ATTENTION_CALL}
        changing = {s for s, p in places.items() if work[p].edits or work[p].probe}
        shards = part.shards

        def handler(call: AttentionCall, delegate: Callable[[AttentionCall], tuple]) -> tuple:
            if self.tower.packed:
                if changing:
                    raise UnsupportedError(
                        f"edits and gradients of {sorted(changing)} are refused in tower {self.tower.name!r}, whose "
                        "attention runs image by image or window by window; edit `z` or `attn_out` there."
                    )
                self.state.calls.append(call)
                return delegate(call)
            for site, name in (("q", "query"), ("k", "key"), ("v", "value")):
                if site in places:
                    here = getattr(call, name).transpose(1, 2)
                    old = here if shards is None else shards.whole(here, 2)
                    new = self.recorder.visit(places[site], old)
                    if new is not old:
                        setattr(call, name, (new if shards is None else shards.own(new, 2)).transpose(1, 2))
            if not sites & {"scores", "pattern"}:
                return delegate(call)
            if changing & {"scores", "pattern"}:
                if shards is not None:
                    raise UnsupportedError(
                        f"edits of {sorted(changing & {'scores', 'pattern'})} are refused in a tensor-parallel model, "
                        "whose kernels see some of the heads; edit `q`, `k`, `v` or `z` there."
                    )
                return self._changed(call, places, delegate)
            self._read_only(call if shards is None else shards.call(call), places)
            return delegate(call)

        return handler

    def _read_only(self, call: AttentionCall, places: Mapping[str, Place]) -> None:
        """Compute just the heads and query rows that are read, beside the kernel."""
        recorder = self.recorder
        size, width = call.query.shape[0], call.query.shape[2]
        for site in ("scores", "pattern"):
            if site not in places:
                continue
            for at in recorder.plan.work[places[site]].reads:
                chosen = recorder.selection(at.read.positions, self.tower.name, size, width, call.query.device)
                rows = None if chosen is None else chosen.index if chosen.span is None else chosen.span
                if at.read.over_heads:
                    value = fused_attention(call, site, at.heads, rows, at.read)
                else:
                    value = selected_attention(call, site, at.heads, rows)
                value = recorder.all_keys(places[site], width, value)
                recorder.keep_part(at, places[site], value, chosen)
            recorder.done(places[site])

    def _changed(self, call: AttentionCall, places: Mapping[str, Place], delegate: Callable) -> tuple:
        """Attention with edited scores or pattern; the kernel's own result where the edits changed nothing."""
        sites = [site for site in ("scores", "pattern") if site in places]
        size, width = call.query.shape[0], call.query.shape[2]
        rows = [self.recorder.rows(places[site], size, width, call.query.device) for site in sites]
        if all(r is not None for r in rows):
            chosen = torch.stack(rows).any(0)  # pyright: ignore[reportArgumentType]
            if not bool(chosen.all()):
                return self._some_rows(call, places, delegate, chosen)
        before = attention_scores(call)
        scores = self.recorder.visit(places["scores"], before) if "scores" in places else before
        plain = attention_pattern(scores, call, closed=call.mask is not None or scores is not before)
        pattern = self.recorder.visit(places["pattern"], plain) if "pattern" in places else plain
        if scores is before and pattern is plain:
            return delegate(call)
        return mix_values(pattern, call), pattern.to(call.query.dtype)

    def _some_rows(
        self, call: AttentionCall, places: Mapping[str, Place], delegate: Callable, chosen: Bool[Tensor, "batch query"]
    ) -> tuple[Tensor, Any]:
        """The kernel's attention, but for some query rows, whose scores or pattern are edited."""
        out, weights = delegate(call)
        columns = chosen.any(0).nonzero()[:, 0]
        if not len(columns):
            for site in ("scores", "pattern"):
                if site in places:
                    self.recorder.done(places[site])
            return out, weights
        rows = slice(int(columns[0]), int(columns[-1]) + 1)
        before = attention_scores(call, None, rows)
        with self.recorder.narrowed(rows):
            scores = self.recorder.visit(places["scores"], before) if "scores" in places else before
            plain = attention_pattern(scores, call, closed=call.mask is not None or scores is not before)
            pattern = self.recorder.visit(places["pattern"], plain) if "pattern" in places else plain
        if scores is before and pattern is plain:
            return out, weights
        mixed = torch.where(chosen[:, rows, None, None], mix_values(pattern, call).to(out.dtype), out[:, rows])
        return torch.cat([out[:, : rows.start], mixed, out[:, rows.stop :]], dim=1), weights

    def _flush(self, kind: str, part: AttentionPart) -> None:
        """Join the attention calls of a packed tower into one and serve its sites."""
        calls, recorder = self.state.calls, self.recorder
        if not calls:
            return
        for site, name in (("q", "query"), ("k", "key"), ("v", "value")):
            place = self._place(kind, site)
            if place in recorder.plan.work:
                recorder.visit(place, torch.cat([getattr(c, name).transpose(1, 2) for c in calls], dim=1))
        for site in ("scores", "pattern"):
            place = self._place(kind, site)
            if place not in recorder.plan.work:
                continue
            blocks = [selected_attention(c, site, None, None) for c in calls]
            total = sum(b.shape[2] for b in blocks)
            fill = 0.0 if site == "pattern" else -torch.inf
            whole = blocks[0].new_full((1, blocks[0].shape[1], total, total), fill)
            row = 0
            for b in blocks:
                whole[:, :, row : row + b.shape[2], row : row + b.shape[3]] = b
                row += b.shape[2]
            recorder.visit(place, whole)
        calls.clear()


def selected_attention(
    call: AttentionCall, site: str, heads: tuple[int, ...] | None, rows: Tensor | slice | None
) -> Tensor:
    """Scores or pattern of some heads and query rows."""
    index = None if heads is None else torch.tensor(heads, device=call.query.device)
    scores = attention_scores(call, index, rows)
    # Only a mask can close a row to every key.
    return scores if site == "scores" else attention_pattern(scores, call, index, closed=call.mask is not None)


def fused_attention(
    call: AttentionCall, site: str, heads: tuple[int, ...] | None, rows: Tensor | slice | None, read: Read
) -> Tensor:
    """Scores or pattern [batch, query, key] of some query rows, reduced over heads a few rows at a time.

    Beside the result it holds less than half as many numbers.
    """
    size, n_heads, width, _ = call.query.shape
    n_keys = call.key.shape[2]
    rows = slice(0, width) if rows is None else rows
    first, stop = (rows.start, rows.stop) if isinstance(rows, slice) else (0, rows.shape[1])
    step = max((stop - first) // (8 * n_heads), 2**16 // (size * n_heads * n_keys), 1)
    out: Tensor | None = None
    for a in range(first, stop, step):
        b = min(a + step, stop)
        some = slice(a, b) if isinstance(rows, slice) else rows[:, a:b]
        part = fuse_heads(selected_attention(call, site, heads, some), read)
        if out is None:
            if b == stop:
                return part
            out = part.new_empty(part.shape[0], stop - first, part.shape[2])
        out[:, a - first : b - first] = part
    assert out is not None
    return out


def _edited(raw: Tensor, term: Tensor, total: Tensor, new: Tensor, factor: Any, place: Place) -> Tensor:
    """What a module has to return so that its branch becomes `new`."""
    if factor is None and term is total:
        return new if new.shape == raw.shape else new.reshape(raw.shape)
    change = new - total
    if factor is not None:
        f = torch.as_tensor(factor, device=change.device, dtype=change.dtype)
        closed = f == 0
        if bool((closed & (change != 0)).any()):
            raise EditError(
                f"the {place[3]} branch of layer {place[2]} in tower {place[0]!r} is multiplied by a gate that is "
                "zero; it cannot be edited there. Edit resid_post instead."
            )
        change = change / torch.where(closed, torch.ones_like(f), f)
    return raw + change.reshape(raw.shape)
