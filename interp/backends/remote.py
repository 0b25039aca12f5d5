"""Reads of a model whose weights are on NDIF (nnsight's `remote=True`), or behind nnsight's simulation of it.

Where a model's parts are is found on a small random model of the same class and depth (`interp.backends.twin`). A read
is then what modules are given or give, named by their paths, and a run is one nnsight trace: positions are chosen and
reductions taken where the weights are, so that only what was asked for comes back. The trace's block names nothing but
the model, tensors and plain data: no code of interp goes along, and none has to be installed there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from interp.backends.envoys import check_unedited
from interp.backends.taps import Tap, fetch, reached, taps_of
from interp.batch import Batch, select
from interp.edits import Edit, flatten
from interp.engine.anatomy import Anatomy
from interp.engine.plan import make_plan
from interp.engine.recorder import check_no_nan
from interp.errors import InputError, RemoteError, SettingsError, UnsupportedError
from interp.reads import Read
from interp.trace import Trace

if TYPE_CHECKING:
    from interp.lens import Lens


def hosted(model: Any) -> tuple[nn.Module, Any]:
    """The module of an nnsight model, with its weights or without, and its tokenizer.

    Raises:
        InputError: it is no nnsight model of transformers that can be traced remotely.
        UnsupportedError: it has edits of its own.
    """
    module = getattr(model, "_module", None)
    vllm = any("vllm" in cls.__module__ for cls in type(model).__mro__)
    if vllm or not hasattr(model, "to_model_key") or not hasattr(module, "config"):
        raise InputError(
            f"remote reads are of an nnsight TransformersModel or LanguageModel, got {type(model).__name__}."
        )
    check_unedited(model)
    return module, getattr(model, "tokenizer", None)  # pyright: ignore[reportReturnType]


class Remote:
    """A model whose weights are elsewhere: `prepare` makes batches, `run` reads.

    Made by `interp.wrap(model, remote=True)`. Sites that modules are given or give are read: streams, branches,
    `mlp_act`, `z`, `embed` and `logits`. What needs weights here, or the inside of the attention function, is refused.

    Attributes:
        model: the nnsight model.
        processor: its tokenizer, if there is one.
        name: what it is called in results.
    """

    def __init__(self, model: Any, twin: Lens, remote: bool | str = True) -> None:
        self.model, self.processor, self.name = model, twin.processor, twin.name
        self._twin, self._remote = twin, remote
        config: Any = model._module.config
        self._constants = {float(v) for v in config.to_dict().values() if isinstance(v, (int, float))}
        self._anatomy = _with_heads(twin.anatomy, twin.model.config, config)
        self._names = {module: name for name, module in twin.model.named_modules()}
        self._order = reached(twin.model, twin.prepare(input_ids=[[0, 1]]).inputs)
        self._envoys = {envoy.path.removeprefix(model.path).lstrip("."): envoy for envoy in model.modules()}

    def __repr__(self) -> str:
        """Name, class and layers."""
        layers = ", ".join(f"{name}: {n} layers" for name, n in self._anatomy.depth.items())
        return f"Remote({self.name}, {type(self._twin.model).__name__}, {layers})"

    def __getattr__(self, name: str) -> Any:
        """Refuse by name what a lens has and this has not."""
        if not name.startswith("_") and hasattr(type(self._twin), name):
            raise UnsupportedError(
                f"lens.{name} is refused for {self.name}, whose weights are not here: a remote model has prepare, run "
                "and refusal. Load it, or a smaller model of its family, with interp.load."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def prepare(self, texts: Any = None, **options: Any) -> Batch:
        """Make a batch from prompts, or from ready tensors, as `Lens.prepare` does.

        Args:
            texts: prompts.
            options: `padding_side`, `add_special_tokens`, or `input_ids` and `attention_mask`.

        Raises:
            InputError: as `Lens.prepare`.
        """
        return self._twin.prepare(texts, **options)

    def refusal(self, site: str, layer: int, *, tower: str | None = None) -> str | None:
        """Why a layer cannot give a site, in the words of the error that reading it there raises; None if it can.

        Raises:
            UnknownNameError: no such site, layer or tower.
            SettingsError: the site does not belong to a layer.
        """
        found = self._twin.refusal(site, layer, tower=tower)
        if found is not None:
            return found
        try:
            self._taps(site, layer)
        except UnsupportedError as error:
            return str(error)
        return None

    def run(
        self,
        batch: Batch,
        reads: Iterable[str | Read] | str | Read,
        edits: Iterable[Edit | Iterable[Edit]] = (),
        **others: Any,
    ) -> Trace:
        """Run the model once where it is, and bring back what was read: on the CPU, in the dtype that it runs in there.

        Args:
            batch: from `prepare`.
            reads: strings or `Read`s, e.g. `["resid_post.5@last", "mlp_out|mean", "logits@last"]`.
            edits: refused: they are functions, which are not sent.
            others: refused: no further option of `Lens.run` is there.

        Raises:
            UnknownNameError: a site, tower, layer, head or position does not exist.
            UnsupportedError: a site, edits, or an option that is not there.
            RemoteError: nnsight or NDIF failed; the message holds what they say.
            NonFiniteError: the model made NaN at a site that was read.
        """
        if others or flatten(edits):
            raise UnsupportedError(
                f"{', '.join(others) or 'edits'} of a run are refused for {self.name}, whose weights are not here: "
                "remote runs read. Trace it with nnsight, or load the model."
            )
        if not isinstance(batch, Batch):
            raise InputError(f"run takes a Batch from prepare, got {type(batch).__name__}.")
        given = [Read.of(r) for r in ([reads] if isinstance(reads, (str, Read)) else reads)]
        if not given:
            raise SettingsError("nothing to do: give reads.")
        self._twin._ready(batch)
        batch = self._twin._positioned(batch)
        plan = make_plan(self._anatomy, list(dict.fromkeys(given)))
        wanted = [(at.read, at.layer, at.heads) for work in plan.work.values() for at in work.reads]
        wanted += [(read, -1, None) for read in plan.logits]
        valid: dict[Read, Tensor] = {}
        jobs = [self._job(batch, read, layer, heads, valid) for read, layer, heads in wanted]
        steps = self._steps([self._taps(read.site, layer) for read, layer, _ in wanted])
        try:
            found = fetch(self.model, dict(batch.inputs), steps, jobs, not plan.logits, self._remote)
        except Exception as error:
            raise RemoteError(
                f"{self.name} was not run remotely: {type(error).__name__}: {error} (nnsight.status() says what is "
                "hosted; nnsight.CONFIG.set_default_api_key(...) sets the key)."
            ) from error
        if len(found) != len(jobs) or not all(isinstance(t, Tensor) for t in found):
            raise RemoteError(f"{self.name}: the remote run ended without its results.")
        values = {(read, layer): tensor for (read, layer, _), tensor in zip(wanted, found, strict=True)}
        for (read, layer), tensor in values.items():
            check_no_nan(tensor, read, layer)
        main = self._anatomy.main
        return Trace(values, valid=valid, masks={main: batch.mask}, main=main, depth=self._anatomy.depth)

    def _taps(self, site: str, layer: int) -> list[Tap]:
        return taps_of(self._anatomy, site, layer, self._names, self._constants)

    def _job(
        self, batch: Batch, read: Read, layer: int, heads: tuple[int, ...] | None, valid: dict[Read, Tensor]
    ) -> tuple:
        """What is done with the value of a read, in plain data: its axes, heads, columns, real columns, reduction."""
        tail = (-1,)
        if read.site == "z":
            tail = (-1, self._anatomy.attention(read.tower, layer, "z").d_value)
        index = keep = None
        if isinstance(read.positions, str) and read.positions == "all":
            if read.reduce in ("mean", "sum", "max") and not bool(batch.mask.all()):
                keep = batch.mask
        else:
            chosen = select(read.positions, batch.mask, batch)
            index = chosen.index
            if not chosen.uniform:
                keep = chosen.valid
                if read.reduce is None or read.over_heads:
                    valid[read] = keep
        return (*batch.mask.shape, *tail), None if heads is None else list(heads), index, keep, read.reduce

    def _steps(self, taps: list[list[Tap]]) -> list[tuple]:
        """Ends of modules in the order in which they are reached, each with the jobs that need it."""
        uses: dict[tuple[str, str], list[tuple]] = {}
        for job, some in enumerate(taps):
            for tap in some:
                uses.setdefault((tap.module, tap.end), []).append((job, tap.path, tap.factor))
        return [(self._envoys[m], end, uses[m, end]) for m, end in sorted(uses, key=self._order.__getitem__)]


def _with_heads(anatomy: Anatomy, small: Any, config: Any) -> Anatomy:
    """The anatomy of a small model with the number of heads that the large one has."""
    few, heads = (getattr(c, "num_attention_heads", None) for c in (small, config))
    if few == heads:
        return anatomy
    tower = anatomy.towers[anatomy.main]
    layers = tuple(
        replace(x, attention={kind: replace(part, n_heads=heads) for kind, part in x.attention.items()})
        for x in tower.layers
    )
    return replace(anatomy, towers={anatomy.main: replace(tower, layers=layers)})
