"""`Trace`: what a run returned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.errors import UnknownNameError, UnsupportedError
from interp.reads import Read

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Activations of one run, by read and layer.

    `trace["resid_post", 3]` is one layer; `trace["resid_post"]` a dict of all layers that were read; `trace.logits`
    the logits. A read that names more than its site is looked up by its whole string: `trace["pattern@last", 3]`
    (just `trace["pattern", 3]` does as well, as long as only one read of the site was made).

    Attributes:
        values: tensors by read and layer (layer -1 for sites outside the layers).
        gradients: the same for gradients, when some were asked for.
        valid: for reads at positions that differ in number between samples, which entries are real [batch, n].
        masks: real positions of each tower's stream [batch, pos]; None where all are real.
        main: name of the main tower.
        depth: number of layers of each tower.
        cache: the key/value cache, when it was asked for.
        metric: the metric's values [batch] or scalar, when gradients were asked for.
        exporter: what `to_transformer_lens` calls, from the lens that made the trace.
    """

    values: Mapping[tuple[Read, int], Tensor]
    gradients: Mapping[tuple[Read, int], Tensor] = field(default_factory=dict)
    valid: Mapping[Read, Bool[Tensor, "batch n"]] = field(default_factory=dict)
    masks: Mapping[str, Tensor | None] = field(default_factory=dict)
    main: str = "text"
    depth: Mapping[str, int] = field(default_factory=dict)
    cache: Any = None
    metric: Tensor | None = None
    exporter: Callable[[Trace], Any] | None = None

    def __getitem__(self, key: Any) -> Any:
        """The tensor of (read, layer), or the dict of all layers of a read."""
        return _lookup(self.values, key, "read", self.main, self.depth)

    def gradient(self, site: str | Read, layer: int | None = None) -> Any:
        """The gradient of the metric with respect to a site, in the site's shape."""
        return _lookup(self.gradients, site if layer is None else (site, layer), "gradient", self.main, self.depth)

    @property
    def logits(self) -> Float[Tensor, "batch pos d_vocab"]:
        """The logits, if the read `logits` was made."""
        return self["logits", -1]

    def mask(self, tower: str | None = None) -> Bool[Tensor, "batch pos"] | None:
        """The real positions of a tower's stream; None where all are real."""
        return self.masks.get(tower or self.main)

    def keys(self) -> Iterator[tuple[Read, int]]:
        """(read, layer) of every tensor."""
        return iter(self.values)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in [*self.values.values(), *self.gradients.values()])

    def frame(self, read: str | Read) -> pd.DataFrame:
        """One read as a tidy pandas frame: a row for each number, padding left out.

        Columns: `layer` (of sites that have one), the read's axes by the names of `interp.sites` (`batch`, `pos`,
        `head`, `d_model`, ...), and `value`. A position is a column of the padded batch, or where positions were chosen
        its number among them; a head has the number that the read names it by. All columns but the last are an index:
        `frame.set_index(list(frame.columns[:-1]))["value"].to_xarray()` is the labelled array of xarray.

        Args:
            read: as in `trace[read]`.

        Raises:
            UnknownNameError: it was not read, or the name is that of several reads.
            UnsupportedError: norms at positions whose number may differ between samples.
        """
        import pandas

        found = self[read]
        wanted = list(found.values()) if isinstance(found, dict) else [found]
        parts = [_rows(self, r, n, t) for (r, n), t in self.values.items() if any(t is w for w in wanted)]
        return pandas.concat([pandas.DataFrame(part) for part in parts], ignore_index=True)

    def to_transformer_lens(self) -> Any:
        """What was read as a `transformer_lens.ActivationCache`, which its own functions accept.

        `cache.model` is a stand-in made from the model's parts: sizes, W_O, W_U with the final norm's gain folded in,
        as TransformerLens does, and the tokenizer. `logit_attrs` and `stack_head_results` work with it; `apply_ln`
        works before the unembedding only, and where the last layer's `resid_post` was read.

        Raises:
            MissingPackageError: TransformerLens is not installed.
            SettingsError: a read is of some positions or heads only, or reduced.
            UnsupportedError: a generation's trace, a site that TransformerLens has no hook for, or another tower.
            InputError: nothing but logits was read.
        """
        if self.exporter is None:
            raise UnsupportedError("only the traces of lens.run go out as a TransformerLens cache.")
        return self.exporter(self)

    def __repr__(self) -> str:
        """Reads and sizes."""
        reads: dict[str, list[int]] = {}
        for read, layer in self.values:
            reads.setdefault(str(read), []).append(layer)
        inner = ", ".join(f"{r} x{len(ls)}" for r, ls in reads.items())
        return f"Trace({inner}; {self.nbytes / 2**20:.1f} MiB)"


def _rows(trace: Trace, read: Read, layer: int, tensor: Tensor) -> dict[str, np.ndarray]:
    """The columns of one layer of a read."""
    row = read.row
    alike = isinstance(read.positions, int | tuple) or str(read.positions) in ("all", "last")
    if read.reduce == "norm" and not alike:
        raise UnsupportedError(f"a trace does not say which numbers of {str(read)!r} are real: read it without |norm.")
    names = [*row.axes]
    if read.over_heads:
        names.remove(names[row.head_axis or 0])
    elif read.reduce == "norm":
        names.pop()
    elif read.reduce is not None:
        names.remove(names[row.position_axis or 0])
    keep = np.ones(tensor.shape, dtype=bool)
    mask = trace.masks.get(trace.main if read.tower in (None, "cross") else read.tower)
    every = isinstance(read.positions, str) and read.positions == "all"
    chosen = trace.valid.get(read, mask if every else None)
    for name, real in (("pos", chosen), ("query", chosen), ("key", mask)):
        if real is None or name not in names or (name == "key" and read.tower == "cross"):
            continue
        axis = names.index(name)
        if tensor.shape[axis] == real.shape[1]:  # else there are cached positions in front
            shape = [len(real), *(real.shape[1] if i == axis else 1 for i in range(1, tensor.ndim))]
            keep &= real.cpu().numpy().reshape(shape)
    places = dict(zip(names, keep.nonzero(), strict=True))
    for name in ("head", "kv_head"):
        if name in places and read.heads is not None:
            places[name] = np.array(read.heads)[places[name]]
    wide = tensor.detach().cpu()
    wide = wide.float() if wide.dtype in (torch.float16, torch.bfloat16) else wide
    first = {"layer": np.full(int(keep.sum()), layer)} if row.per_layer else {}
    return {**first, **places, "value": wide.numpy()[keep]}


def _lookup(table: Mapping[tuple[Read, int], Tensor], key: Any, what: str, main: str, depth: Mapping[str, int]) -> Any:
    site, layer = key if isinstance(key, tuple) else (key, None)
    wanted = Read.of(site)
    if not wanted.row.per_layer:
        layer = -1
    elif layer is None and wanted.layers is not None and len(wanted.layers) == 1:
        layer = wanted.layers[0]
    if layer is not None and layer < 0 and wanted.row.per_layer:
        layer += depth.get(main if wanted.tower in (None, "cross") else wanted.tower, 0)
    if layer is not None and (wanted, layer) in table:
        return table[wanted, layer]
    reads: dict[Read, dict[int, Tensor]] = {}
    for (read, n), tensor in table.items():
        reads.setdefault(read, {})[n] = tensor
    found = [wanted] if wanted in reads else []
    if not found:
        bare = wanted.positions == "all" if isinstance(wanted.positions, str) else False
        same = [r for r in reads if r.site == wanted.site and (r.tower or main) == (wanted.tower or main)]
        plain = [r for r in same if r.but(layers=None, tower=None) == wanted.but(layers=None, tower=None)]
        found = plain or (same if bare and wanted.heads is None and wanted.reduce is None else [])
    if not found:
        made = ", ".join(dict.fromkeys(map(str, reads))) or "none"
        raise UnknownNameError(f"{what} {str(site)!r} is not in this trace. It holds: {made}.")
    hits = found if layer is None else [r for r in found if layer in reads[r]]
    if not hits:
        layers = sorted({n for r in found for n in reads[r]})
        raise UnknownNameError(f"layer {layer} of {str(site)!r} was not read; read were: {layers}.")
    if len(hits) > 1:
        raise UnknownNameError(f"{what} {str(site)!r} is ambiguous here; name one of: {', '.join(map(str, found))}.")
    return dict(reads[hits[0]]) if layer is None else reads[hits[0]][layer]
