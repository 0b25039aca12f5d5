"""`ActivationStream`: the activations of a corpus, context by context, as the model makes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from interp.batch import Batch
from interp.data.corpora import Corpus
from interp.dictionaries.activations.batches import Contexts, State, check_settings
from interp.dictionaries.activations.identity import fingerprint
from interp.dictionaries.activations.packing import Context, Packer, Packing, Place, Separator, Special, Tokens
from interp.errors import InputError, NonFiniteError, SettingsError, UnsupportedError
from interp.evaluation import image_prompt
from interp.inputs import placeholder
from interp.lens import Lens
from interp.reads import Read
from interp.trace import Trace


class ActivationStream:
    """Reads of a model on a corpus, in batches of whole contexts; see `Source` for what all sources have in common.

    All reads come from one pass of the model, which stops after the last of them. An input and its target (for
    transcoders and Lorsa) are two reads. Sites with heads are flattened, [batch, pos, head * d_head], heads in order.

    Args:
        lens: the model.
        corpus: texts, or pictures with prompts (see `interp.data.corpus`).
        reads: what to read, such as `resid_post.10` or `["resid_mid.8", "mlp_out.8"]`; a read of several layers counts
            as one for each. All are of one tower.
        batch: contexts in a pass of the model.
        context: tokens of a context (see `Packing` for this and the options that follow).
        packed: fill contexts with one document after the other.
        special: tokens around each context.
        separator: token behind each document of packed contexts.
        tokens: `all`, `text` or `image` tokens.
        drop_first: leave out the first position of each context.
        epochs: how often to go through the corpus; None for ever.
        padding_side: where shorter contexts of a batch are padded. On the right a column is a position.
        rank: this process; it gets the contexts whose number leaves the rest `rank` when divided by `world`.
        world: how many processes share the contexts. Each gets its share whatever the others do; together they have
            those of a single process. At the end of a corpus one may have a batch more than another.

    Attributes:
        reads: the names in what it hands out, one for each layer, such as `resid_post.10`.
        inputs: what the model was given for the contexts that were handed out last; None before the first.

    Raises:
        UnknownNameError: a site, layer or head does not exist.
        SettingsError: reads of several towers, positions chosen in a read, an option out of its range.
        InputError: the corpus holds no usable token, or contexts longer than the model takes.
        UnsupportedError: the model cannot give a site, or has none with positions.
    """

    def __init__(
        self,
        lens: Lens,
        corpus: Corpus,
        reads: str | Read | Sequence[str | Read],
        *,
        batch: int = 8,
        context: int = 256,
        packed: bool = True,
        special: Special = "tokenizer",
        separator: Separator = "eos",
        tokens: Tokens = "all",
        drop_first: bool = True,
        epochs: int | None = 1,
        padding_side: str = "right",
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if batch < 1 or not 0 <= rank < world:
            raise SettingsError(f"batch is at least 1 and rank below world; found {batch=}, {rank=}, {world=}.")
        self.lens, self.corpus, self.batch = lens, corpus, batch
        self.rank, self.world = rank, world
        self.packing = Packing(context, packed, special, separator, tokens, drop_first, epochs)
        self._side = padding_side
        self._packer = Packer(lens, corpus, self.packing)
        first = next(self._packer.contexts(Place()))
        prepared = self._prepare([first])  # the parts of some models are found on the first picture
        self._reads, self._tower = resolve(lens, reads)
        self.reads = tuple(map(str, self._reads))
        if prepared.source_mask is not None and self._tower != "encoder":
            raise SettingsError(
                f"the decoder of {lens.name} is given a start token alone: read its encoder, such as "
                f"'encoder:{self._reads[0].site}.0'."
            )
        probe = self._contexts_of([first], prepared)
        self._d_in = {name: value.shape[-1] for name, value in probe.values.items()}
        self._model = fingerprint(lens)
        self._go(Place())

    def _go(self, place: Place) -> None:
        self._place = place
        self._coming: Iterator[Context] | None = None
        self._useful = place != Place()
        self.inputs: Batch | None = None

    @property
    def d_in(self) -> dict[str, int]:
        """Width of each read."""
        return dict(self._d_in)

    @property
    def special(self) -> list[int]:
        """Ids of tokens that are never used: special ones, and what stands around contexts and between documents."""
        return list(self._packer.special)

    @property
    def settings(self) -> dict[str, Any]:
        """What decides which activations come."""
        return {
            "model": self.lens.name,
            "fingerprint": self._model,
            "reads": list(self.reads),
            "corpus": self.corpus.identity,
            **asdict(self.packing),
            "padding_side": self._side,
            "batch": self.batch,
            "rank": self.rank,
            "world": self.world,
        }

    def __iter__(self) -> ActivationStream:
        """Itself."""
        return self

    def __next__(self) -> Contexts:
        """The next contexts.

        Raises:
            InputError: the corpus was gone through, and held no token to use.
            NonFiniteError: the model made NaN or infinity at a real token.
        """
        try:
            chunk = self._collect()
            if not self._useful and self.world == 1 and (not chunk or chunk[0].after.epoch > 0):
                raise InputError(f"the corpus holds no usable token: {self.corpus!r} with {self.packing}.")
            if not chunk:
                raise StopIteration
            inputs = self._prepare(chunk)
            out = self._contexts_of(chunk, inputs)
        except BaseException:
            self._coming = None  # so that a next attempt begins where this one did
            raise
        self._place, self.inputs = chunk[-1].after, inputs
        self._useful = self._useful or bool(out.mask.any())
        return out

    def state(self) -> State:
        """The place behind the last contexts that were handed out."""
        return State({"kind": "stream", "settings": self.settings, "place": self._place.json()})

    def restore(self, state: State) -> None:
        """Go to a place.

        Raises:
            SettingsError: the state is of a stream with other settings, another model or another corpus.
        """
        check_settings(state.values.get("settings"), self.settings, "this state")
        self._go(Place(**state.values["place"]))

    def close(self) -> None:
        """Nothing is held."""
        self._coming = None

    def _collect(self) -> list[Context]:
        if self._coming is None:
            self._coming = self._packer.contexts(self._place)
        chunk: list[Context] = []
        for context in self._coming:
            if context.number % self.world == self.rank:
                chunk.append(context)
                if len(chunk) == self.batch:
                    break
        return chunk

    def _prepare(self, chunk: list[Context]) -> Batch:
        if all(c.ids is not None for c in chunk):
            if self.packing.tokens == "image":
                raise InputError("tokens='image' needs pictures, and the corpus holds text alone.")
            more: dict[str, Any] = {}
            if getattr(self.lens.model.config, "is_encoder_decoder", False):
                more["decoder_input_ids"] = torch.full((len(chunk), 1), _start_of_decoder(self.lens.model.config))
            ids = [c.ids for c in chunk]
            return self.lens.prepare(input_ids=ids, padding_side=self._side, **more)
        if not all(c.document is not None for c in chunk):
            raise InputError("the corpus mixes documents with and without pictures; make a stream of each.")
        documents = [c.document for c in chunk if c.document is not None]
        images = [list(d.images) for d in documents]
        if self._packer.tokenizer is None:
            return self.lens.prepare(images=[image for row in images for image in row])
        texts = [
            image_prompt(self.lens, d.text or str(placeholder(self.lens.processor)), chat=False) for d in documents
        ]
        return self.lens.prepare(texts, images, padding_side=self._side)

    def _contexts_of(self, chunk: list[Context], batch: Batch) -> Contexts:
        trace = self.lens.run(batch, self._reads)
        values = {str(r): _flat(v, r) for (r, _), v in trace.values.items()}
        values = {name: values[name] for name in self.reads}
        shape = next(iter(values.values())).shape[:2]
        device = next(iter(values.values())).device
        real, ids = self._real(trace, batch, shape, device)
        mask = real.clone()
        if ids is not None:
            mask &= ~torch.isin(ids, torch.tensor(self._packer.special, device=device))
            image = torch.zeros_like(mask) if batch.image_mask is None else batch.image_mask.to(device)
            if self.packing.tokens != "all":
                mask &= image if self.packing.tokens == "image" else ~image
        elif self.packing.tokens == "text":
            raise SettingsError(f"tokens='text': tower {self._tower!r} reads no text.")
        if self.packing.drop_first:
            mask[torch.arange(len(mask), device=device), real.int().argmax(1)] = False
        number = torch.tensor([c.number for c in chunk], device=device)
        if len(number) != len(mask):
            number = number.repeat_interleave(
                torch.tensor([len(c.document.images) if c.document else 1 for c in chunk], device=device)
            )
        out = Contexts(values, mask, real, ids, self._owners(chunk, real, number, ids), number)
        _check_finite(out)
        return out

    def _real(
        self, trace: Trace, batch: Batch, shape: torch.Size, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Which positions are no padding, and the token ids of the stream where it is one of tokens."""
        ids, mask = batch.inputs.get("input_ids"), batch.mask
        if batch.source_mask is not None:
            mask = batch.source_mask if self._tower == "encoder" else mask
            ids = ids if self._tower == "encoder" else None
        elif self._tower != self.lens.anatomy.main:
            ids = None
        if ids is not None:
            return mask.to(device), ids.to(device)
        found = trace.mask(self._tower)
        if found is None or found.shape != shape:
            found = torch.ones(shape, dtype=torch.bool)
        return found.to(device), None

    def _owners(self, chunk: list[Context], real: Tensor, number: Tensor, ids: Tensor | None) -> Tensor:
        out = torch.full(real.shape, -1, dtype=torch.long, device=real.device)
        if chunk[0].document is None:
            out[real] = torch.tensor([o for c in chunk for o in c.owner], device=real.device)
            return out
        indices = {c.number: c.document.index for c in chunk if c.document is not None}
        out = torch.where(real, torch.tensor([[indices[n]] for n in number.tolist()], device=real.device), out)
        if ids is not None:
            out[torch.isin(ids, torch.tensor(self._packer.special, device=real.device))] = -1
        return out


def resolve(lens: Lens, reads: str | Read | Sequence[str | Read]) -> tuple[list[Read], str]:
    """Reads of one layer each, and the tower that all of them are of.

    Raises:
        UnknownNameError, UnsupportedError: the model does not have, or cannot give one.
        SettingsError: none, several towers, one read twice, positions or a reduction, a site without positions.
    """
    wanted = [Read.of(r) for r in ([reads] if isinstance(reads, (str, Read)) else reads)]
    found: list[Read] = []
    for read in wanted:
        if read.positions is not read.positions or not (isinstance(read.positions, str) and read.positions == "all"):
            raise SettingsError(f"{read}: positions are chosen by tokens= and drop_first=, not in the read.")
        if read.reduce is not None or read.row.axes[1] != "pos":
            raise SettingsError(f"{read} is no tensor [batch, pos, d], so no dictionary can be trained on it.")
        if not read.row.per_layer:
            found.append(read)
            continue
        depth = (
            lens.anatomy.depth[lens.anatomy.main if read.tower in (None, "cross") else read.tower]
            if _known(lens, read.tower)
            else 0
        )
        layers = lens.layers_with(read.site, tower=read.tower) if read.layers is None else read.layers
        found += [read.but(layers=(n + depth if n < 0 else n,)) for n in layers]
    if not found:
        raise SettingsError("no read was given: name at least one, such as 'resid_post.10'.")
    twice = [str(r) for r in found if found.count(r) > 1]
    if twice:
        raise SettingsError(f"{twice[0]} is read twice.")
    towers = list(dict.fromkeys(r.tower or lens.anatomy.main for r in found))
    if len(towers) > 1:
        raise SettingsError(f"reads of one stream are of one tower, found {', '.join(towers)}: make a stream for each.")
    return found, towers[0]


def _known(lens: Lens, tower: str | None) -> bool:
    return tower in (None, "cross") or tower in lens.anatomy.depth


def _flat(value: Tensor, read: Read) -> Tensor:
    if value.ndim != len(read.row.axes):
        raise UnsupportedError(f"{read}: the model packs samples into one row there; such sites are not streamed.")
    return value.flatten(2)


def _start_of_decoder(config: Any) -> int:
    start = getattr(config, "decoder_start_token_id", None)
    return int(start if start is not None else getattr(config, "pad_token_id", 0) or 0)


def _check_finite(contexts: Contexts) -> None:
    for name, value in contexts.values.items():
        if bool(torch.isfinite(value).all()):
            continue
        wrong = ~torch.isfinite(value).all(-1) & contexts.real
        if bool(wrong.any()):
            row, column = wrong.nonzero()[0].tolist()
            raise NonFiniteError(f"{name} is not finite in context {int(contexts.number[row])}, position {column}.")
