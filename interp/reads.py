"""`Read`: which site, layers, heads and positions to read, and its string form."""

import re
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch

from interp.errors import SettingsError, UnknownNameError, unknown
from interp.sites import SITES, TOWERS, Site, from_transformer_lens, site

NAMED_POSITIONS = ("all", "last", "image", "text", "generated")
Reduce = Literal["mean", "sum", "max", "norm", "head_mean", "head_max", "head_min"]
Positions = str | int | slice | tuple[int, ...] | list[int] | torch.Tensor

_FORM = re.compile(
    r"(?:(?P<tower>[A-Za-z_][\w]*):)?(?P<site>[a-z_]+)"
    r"(?:\.(?P<layers>[^.@|/]*(?:\.\.[^.@|/]*)?))?(?:/(?P<heads>[^@|]*))?(?:@(?P<positions>[^|]*))?(?:\|(?P<reduce>\w+))?"
)


def check_positions(positions: Positions) -> Positions:
    """A position selection in its normal form.

    A string is one of `all last image text generated`; an int or a slice counts a sample's own tokens, so that 0 is
    the first real token and -1 the last, whatever the padding; a tuple or list of ints selects several; a tensor
    [batch, n] of ints selects per sample (-1 and below count from the sample's end); a bool tensor [batch, pos], as
    `batch.find` and `batch.span` return it, marks columns of the padded batch.

    Raises:
        UnknownNameError: an unknown name.
        SettingsError: an empty selection, a slice with a step, a tensor that is not 2-dimensional or not of ints.
    """
    if isinstance(positions, str):
        if positions not in NAMED_POSITIONS:
            raise unknown("position", positions, [*NAMED_POSITIONS, "ints", "slices", "index tensors [batch, n]"])
        return positions
    if isinstance(positions, bool):
        raise SettingsError(f"positions={positions!r}: a bool selects nothing; give a name, ints, a slice or a tensor.")
    if isinstance(positions, int):
        return positions
    if isinstance(positions, slice):
        if positions.step not in (None, 1):
            raise SettingsError(f"positions={positions!r}: a step is not supported; list the positions instead.")
        return slice(positions.start, positions.stop)
    if isinstance(positions, torch.Tensor):
        if positions.ndim != 2 or positions.dtype not in (torch.int32, torch.int64, torch.bool):
            raise SettingsError(
                "a positions tensor is of ints [batch, n] or of bools [batch, pos], "
                f"got {positions.dtype} {tuple(positions.shape)}."
            )
        return positions
    if isinstance(positions, (tuple, list)) and all(type(p) is int for p in positions):
        if not positions:
            raise SettingsError("positions=(): an empty selection reads nothing.")
        return tuple(positions)
    raise SettingsError(f"positions={positions!r} is no name, int, slice, list of ints or integer tensor.")


def _ints(name: str, value: object) -> tuple[int, ...] | None:
    if value is None:
        return None
    if type(value) is int:
        return (value,)
    if isinstance(value, (list, tuple, range)) and all(type(v) is int for v in value):
        if not value:
            raise SettingsError(f"{name}=(): an empty selection reads nothing; leave it out to take all.")
        if len(set(value)) != len(value):
            raise SettingsError(f"{name}={tuple(value)} names one of them twice.")
        return tuple(value)
    raise SettingsError(f"{name}={value!r} must be an int, a list of ints, or None for all.")


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """What to read during a run.

    The string form is `[tower:]site[.layers][/heads][@positions][|reduce]`: `resid_post`, `z.0,3/1,2@last`,
    `vision:pattern.2..5@all`, `resid_post@image|mean`. Layers and heads are lists of ints or `a..b` (both ends
    included); negative ones count from the end.

    Attributes:
        site: a name of `interp.sites.SITES`, or a TransformerLens hook name.
        layers: which layers; None for all.
        heads: which heads (query heads; for `k` and `v` key/value heads); None for all.
        positions: which positions (see `check_positions`); for `scores` and `pattern` the query rows.
        tower: `text vision encoder decoder cross` or another tower of the model; None for the main one.
        reduce: `mean`, `sum` or `max` over the selected positions; `norm` (L2 norm over the last axis); or `head_mean`,
            `head_max` or `head_min` over the selected heads, which for a pattern never holds all heads at once.
    """

    site: str
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    positions: Positions = "all"
    tower: str | None = None
    reduce: Reduce | None = None
    _compared: tuple[int, tuple] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Normalise and check every field."""
        set_ = object.__setattr__
        name, layers = self.site, _ints("layers", self.layers)
        legacy = from_transformer_lens(name) if isinstance(name, str) else None
        if legacy is not None:
            name, layer = legacy
            if layer is not None and layers not in (None, (layer,)):
                raise SettingsError(f"{self.site!r} is of layer {layer}, but layers={layers} was asked.")
            layers = (layer,) if layer is not None else layers
        row = site(name)
        if layers is not None and not row.per_layer:
            raise SettingsError(f"{name!r} exists once, not per layer; layers={layers} cannot be chosen.")
        heads = _ints("heads", self.heads)
        if heads is not None and row.head_axis is None:
            raise SettingsError(f"{name!r} has no head axis; heads={heads} cannot be chosen.")
        if self.reduce is not None and self.reduce not in get_args(Reduce):
            raise unknown("reduce", self.reduce, get_args(Reduce))
        if self.over_heads and row.head_axis is None:
            raise SettingsError(f"{name!r} has no head axis; reduce={self.reduce!r} cannot be chosen.")
        if self.tower is not None and not re.fullmatch(r"[A-Za-z_]\w*", self.tower):
            raise unknown("tower", self.tower, TOWERS)
        set_(self, "site", name)
        set_(self, "layers", layers)
        set_(self, "heads", heads)
        set_(self, "positions", check_positions(self.positions))

    @property
    def over_heads(self) -> bool:
        """Whether it is reduced over heads."""
        return self.reduce is not None and self.reduce.startswith("head_")

    @property
    def row(self) -> Site:
        """The row of the table of sites."""
        return SITES[self.site]

    @staticmethod
    def of(what: "str | Read") -> "Read":
        """A `Read` from itself or from its string form.

        Raises:
            UnknownNameError: the string cannot be read, or names what does not exist.
        """
        if isinstance(what, Read):
            return what
        if not isinstance(what, str):
            raise UnknownNameError(f"a read is a string or an interp.Read, got {type(what).__name__}.")
        legacy, *rest = re.split(r"(?=[@|/])", what, maxsplit=1)
        if from_transformer_lens(legacy) is not None:
            found, layer = from_transformer_lens(legacy)  # type: ignore[misc]
            what = found + (f".{layer}" if layer is not None else "") + "".join(rest)
        match = _FORM.fullmatch(what)
        if match is None:
            raise UnknownNameError(
                f"read {what!r} does not have the form [tower:]site[.layers][/heads][@positions][|reduce]."
            )
        part = match.groupdict()
        return Read(
            part["site"],
            layers=_parse_ints("layers", part["layers"], what),
            heads=_parse_ints("heads", part["heads"], what),
            positions=_parse_positions(part["positions"], what),
            tower=part["tower"],
            reduce=part["reduce"],  # type: ignore[arg-type]
        )

    def __str__(self) -> str:
        """The string form; `Read.of(str(read))` gives the read back (index tensors have no string form)."""
        text = f"{self.tower}:{self.site}" if self.tower else self.site
        if self.layers is not None:
            text += "." + ",".join(map(str, self.layers))
        if self.heads is not None:
            text += "/" + ",".join(map(str, self.heads))
        p = self.positions
        if isinstance(p, torch.Tensor):
            text += f"@<tensor {tuple(p.shape)}>"
        elif isinstance(p, slice):
            text += f"@{'' if p.start is None else p.start}:{'' if p.stop is None else p.stop}"
        elif isinstance(p, tuple):
            text += "@" + ",".join(map(str, p)) + ("," if len(p) == 1 else "")
        elif p != "all":
            text += f"@{p}"
        return text + (f"|{self.reduce}" if self.reduce else "")

    def _known(self) -> tuple[int, tuple]:
        """What it is compared by and that one's hash: made once, since a tensor of positions takes long."""
        if self._compared is None:
            p = self.positions
            if isinstance(p, slice):
                p = ("slice", p.start, p.stop)
            elif isinstance(p, torch.Tensor):
                p = ("tensor", tuple(map(tuple, p.tolist())))
            key = self.site, self.layers, self.heads, p, self.tower, self.reduce
            object.__setattr__(self, "_compared", (hash(key), key))
        return self._compared  # type: ignore[return-value]

    def __eq__(self, other: object) -> bool:
        """Equal when every field selects the same."""
        return isinstance(other, Read) and self._known() == other._known()

    def __hash__(self) -> int:
        """Agrees with equality."""
        return self._known()[0]

    def but(self, **changes: object) -> "Read":
        """A copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


def _parse_ints(name: str, text: str | None, whole: str) -> tuple[int, ...] | None:
    if text is None or text == "*":
        return None
    out: list[int] = []
    for piece in text.split(","):
        span = re.fullmatch(r"(-?\d+)(?:\.\.(-?\d+))?", piece)
        if span is None:
            raise UnknownNameError(f"{name} {piece!r} in read {whole!r} is neither an int nor a range a..b.")
        low, high = int(span[1]), int(span[2] or span[1])
        if high < low or (low < 0) != (high < 0):
            raise UnknownNameError(f"{name} range {piece!r} in read {whole!r} is empty or crosses zero.")
        out.extend(range(low, high + 1))
    return tuple(out)


def _parse_positions(text: str | None, whole: str) -> Positions:
    if text is None:
        return "all"
    if text in NAMED_POSITIONS:
        return text
    span = re.fullmatch(r"(-?\d*):(-?\d*)", text)
    if span is not None and text.count("-") <= 2 and "-" not in (span[1], span[2]):
        return slice(int(span[1]) if span[1] else None, int(span[2]) if span[2] else None)
    pieces = text.split(",")
    if pieces[-1] == "" and len(pieces) > 1:
        pieces = pieces[:-1]
    elif len(pieces) == 1 and re.fullmatch(r"-?\d+", text):
        return int(text)
    if not all(re.fullmatch(r"-?\d+", p) for p in pieces):
        raise unknown("position", text, [*NAMED_POSITIONS, "ints", "a:b"], where=f"read {whole!r}")
    return tuple(map(int, pieces))
