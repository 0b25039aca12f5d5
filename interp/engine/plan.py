"""From reads and edits to what has to happen at each site: resolved once, before a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from interp.edits import Edit
from interp.engine.anatomy import Anatomy, Layer
from interp.errors import SettingsError, UnknownNameError, UnsupportedError
from interp.reads import Read

ATTENTION_CALL = frozenset({"q", "k", "v", "scores", "pattern"})

_REMEMBERED = 64

Place = tuple[str, str, int, str]
"""Tower, attention kind (`attn` or `cross`), layer, site."""


@dataclass(slots=True, eq=False)
class ReadAt:
    """A read at one layer. It is hashed by identity: the hash of a `Read` is too slow for every hook.

    Attributes:
        read: the read.
        layer: the layer's index; -1 outside the layers.
        heads: head indices from zero; None for all.
        whole: whether the value is kept as it is: all positions, all heads, not reduced.
        spread: whether a NaN in it is in the stream above, and the other way round (see `recorder.check_all`).
    """

    read: Read
    layer: int
    heads: tuple[int, ...] | None
    whole: bool = field(init=False)
    spread: bool = field(init=False)

    def __post_init__(self) -> None:
        """Look once, not in every run."""
        read = self.read
        every = isinstance(read.positions, str) and read.positions == "all"
        self.whole = every and self.heads is None and read.reduce is None
        along = read.row.scope in ("stream", "branch") or read.site in ("q", "z")
        self.spread = self.whole and along and read.tower != "cross"


@dataclass(slots=True)
class Work:
    """What happens at one place: edits in order, then gradient probes, then reads."""

    edits: list[tuple[Edit, tuple[int, ...] | None]] = field(default_factory=list)
    probe: bool = False
    reads: list[ReadAt] = field(default_factory=list)


@dataclass(slots=True)
class Plan:
    """All work of a run, by place. It may serve several runs, and is not changed by them.

    Attributes:
        work: what happens at each place.
        logits: reads of the logits.
        layers: attention kind and site of all work in a layer, by tower and layer.
    """

    work: dict[Place, Work] = field(default_factory=dict)
    logits: list[Read] = field(default_factory=list)
    layers: dict[tuple[str, int], set[tuple[str, str]]] = field(default_factory=dict)

    def wants(self, tower: str, kind: str, layer: int, *sites: str) -> bool:
        """Whether any of these sites has work."""
        return any((tower, kind, layer, s) in self.work for s in sites)


def layers_of(anatomy: Anatomy, read: Read) -> list[int]:
    """The layers that a read means; layers that cannot give the site are left out when none was named.

    Raises:
        UnknownNameError: a layer or tower does not exist.
        UnsupportedError: no layer, or not a named one, can give the site.
    """
    tower, kind = anatomy.tower(read.tower)
    if not read.row.per_layer:
        return [-1]
    if read.layers is not None:
        found = [tower.layer(i).index for i in read.layers]
        if len(set(found)) != len(found):
            raise SettingsError(f"{read} names a layer twice.")
        for i in found:
            refuse(anatomy, read, i, kind)
        return found
    reasons: list[UnsupportedError] = []
    able: list[int] = []
    for layer in tower.layers:
        try:
            refuse(anatomy, read, layer.index, kind)
            able.append(layer.index)
        except UnsupportedError as error:
            reasons.append(error)
    if not able:
        raise reasons[0]
    return able


def refuse(anatomy: Anatomy, read: Read, index: int, kind: str) -> None:
    """Raise UnsupportedError if a layer cannot give a site."""
    tower, _ = anatomy.tower(read.tower)
    layer = tower.layer(index)
    name = read.site
    if read.row.scope == "attention":
        anatomy.attention(read.tower, index, name)
    elif name == "attn_out" and kind == "cross":
        if "cross" not in layer.branches:
            raise UnsupportedError(
                f"'attn_out' is refused: layer {index} of tower {tower.name!r} has no cross-attention."
            )
    elif kind == "cross":
        raise UnsupportedError(f"{name!r} does not belong to tower 'cross'; read it from tower {tower.name!r}.")
    elif name in layer.refused:
        raise UnsupportedError(f"{name!r} of layer {index} in tower {tower.name!r} is refused: {layer.refused[name]}.")


def heads_of(anatomy: Anatomy, read: Read, index: int) -> tuple[int, ...] | None:
    """Head indices from zero, or None for all.

    Raises:
        UnknownNameError: a head does not exist.
    """
    if read.heads is None or read.row.head_axis is None:
        return None
    part = anatomy.attention(read.tower, index, read.site)
    count = part.n_kv_heads if "kv_head" in read.row.axes else part.n_heads
    for h in read.heads:
        if not -count <= h < count:
            what = "key/value heads" if "kv_head" in read.row.axes else "heads"
            raise UnknownNameError(
                f"head {h} of layer {index} does not exist: the layer has {count} {what} (0 to {count - 1})."
            )
    found = tuple(h % count for h in read.heads)
    if len(set(found)) != len(found):
        raise SettingsError(f"{read} names a head twice.")
    return found


def make_plan(
    anatomy: Anatomy, reads: Sequence[Read], edits: Sequence[Edit] = (), gradients: Sequence[Read] = ()
) -> Plan:
    """Resolve towers, layers and heads of everything that a run was asked for.

    Raises:
        UnknownNameError: a tower, layer or head does not exist.
        UnsupportedError: the model cannot give a site.
    """
    plan = Plan()

    def work(read: Read, index: int) -> Work:
        tower, kind = anatomy.tower(read.tower)
        if not read.row.per_layer:
            kind = "model"
            if read.site in anatomy.refused:
                raise UnsupportedError(f"{read.site!r} is refused: {anatomy.refused[read.site]}.")
        place = (tower.name if read.row.per_layer else "model", kind, index, read.site)
        plan.layers.setdefault((place[0], index), set()).add((kind, read.site))
        return plan.work.setdefault(place, Work())

    for edit in edits:
        for index in layers_of(anatomy, edit.read):
            work(edit.read, index).edits.append((edit, heads_of(anatomy, edit.read, index)))
    for read in gradients:
        if read.site == "logits":
            raise UnsupportedError(
                "the gradient with respect to 'logits' is the metric's own; differentiate it directly."
            )
        if read.site == "result":
            raise UnsupportedError("the gradient of 'result' is that of 'attn_out' for every head; ask for that.")
        for index in layers_of(anatomy, read):
            work(read, index).probe = True
            heads_of(anatomy, read, index)
    for read in reads:
        if read.site == "logits":
            if "logits" in anatomy.refused:
                raise UnsupportedError(f"'logits' is refused: {anatomy.refused['logits']}.")
            plan.logits.append(read)
            continue
        for index in layers_of(anatomy, read):
            work(read, index).reads.append(ReadAt(read, index, heads_of(anatomy, read, index)))
    return plan


def plan_for(
    anatomy: Anatomy, reads: Sequence[Read], edits: Sequence[Edit] = (), gradients: Sequence[Read] = ()
) -> Plan:
    """`make_plan`, which remembers the plans of runs that only read."""
    if edits or gradients or any(isinstance(r.positions, Tensor) for r in reads):
        return make_plan(anatomy, reads, edits, gradients)
    key = tuple(reads)
    plan = anatomy.plans.get(key)
    if plan is None:
        plan = make_plan(anatomy, reads)
        if len(anatomy.plans) >= _REMEMBERED:
            anatomy.plans.clear()
        anatomy.plans[key] = plan
    return plan


def middle_branches(layer: Layer) -> list[str]:
    """The branches that are added before resid_mid."""
    return [k for k in layer.branches if k != "mlp"]
