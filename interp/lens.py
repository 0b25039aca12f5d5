"""`Lens`: one wrapped model. `prepare` makes batches, `run` and `generate` read and edit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.batch import Batch, padding_side
from interp.edits import Edit, flatten
from interp.engine.anatomy import Anatomy, relative_error
from interp.engine.discover import discover
from interp.engine.entry import Entry, Prefix
from interp.engine.plan import layers_of, refuse
from interp.engine.probe import probe_inputs, tokens, vocabulary
from interp.engine.proof import TOLERANCE, prove
from interp.engine.run import Metric, device_of, generate, parameters_of, run
from interp.engine.stepper import Stepper
from interp.errors import AnatomyError, InputError, SettingsError, UnsupportedError
from interp.estimate import Estimate, estimate
from interp.headlist import check_model
from interp.inputs import batch_of, pad_id, prepare_images, prepare_texts, tokenizer_of
from interp.reads import Read
from interp.trace import Trace


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """What `Lens.generate` returns.

    Attributes:
        texts: the generated text of each sample, special tokens left out; None without a tokenizer.
        tokens: generated ids [batch, new]; after a sample's end its padding.
        sequences: prompt and generated ids [batch, pos + new].
        trace: what was read.
    """

    texts: tuple[str, ...] | None
    tokens: Int[Tensor, "batch new"]
    sequences: Int[Tensor, "batch all"]
    trace: Trace


class Lens:
    """A model under the lens: unchanged, with its parts found and proved.

    Made by `interp.wrap` and `interp.load`. Threads take turns: a model is in one run at a time.

    Attributes:
        model: the transformers model that runs: the one that was given, or for another back end one on its parameters.
        processor: its tokenizer or processor, if there is one.
        name: what it is called in results.
        backend: `transformers`, `HookedTransformer`, `TransformerBridge` or `nnsight`: what was given.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any = None,
        *,
        name: str | None = None,
        sample: Mapping[str, Any] | None = None,
        backend: str = "transformers",
    ) -> None:
        self.model = model
        self.processor = processor
        self.backend = backend
        self.name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self._anatomy: Anatomy | None = None
        self._seen: set[str] = set()
        self._padding: dict[str, float] = {}
        self._entries: set[str] = set()
        self._deferred: Exception | None = None
        if sample is not None:
            self._learn(sample)
            return
        inputs = probe_inputs(model, device_of(model), self.dtype)
        try:
            self._learn(inputs)
        except AnatomyError as error:
            if "pixel_values" not in parameters_of(model) or "pixel_values" in inputs:
                raise
            self._deferred = error

    def __repr__(self) -> str:
        """Name, class and towers."""
        if self._anatomy is None:
            return f"Lens({self.name}, {type(self.model).__name__}, anatomy not seen yet)"
        towers = ", ".join(f"{t.name}: {len(t.layers)} layers of {t.d_model}" for t in self._anatomy.towers.values())
        return f"Lens({self.name}, {type(self.model).__name__}, {towers})"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's floating-point parameters."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)

    @property
    def input_device(self) -> torch.device:
        """Where the model takes its inputs; its parameters may lie elsewhere, or be put away (`device_map`)."""
        return device_of(self.model)

    @property
    def vocabulary(self) -> int:
        """How many token ids the model reads: they go from 0 to one less.

        Raises:
            InputError: its configuration does not say.
        """
        return vocabulary(self.model.config)

    @property
    def anatomy(self) -> Anatomy:
        """The model's parts.

        Raises:
            AnatomyError: they were not found on text alone, and no batch with images was seen yet.
        """
        if self._anatomy is None:
            raise AnatomyError(
                f"{self.name}: its parts are found on the first batch with images (run one, or give "
                f"wrap(..., sample=inputs)); text alone did not do: {self._deferred}"
            )
        return self._anatomy

    def _learn(self, inputs: Mapping[str, Any]) -> None:
        """Find and prove the parts that run on these inputs; keep the towers that were known before."""
        given = {k: v for k, v in inputs.items() if v is not None}
        found = discover(self.model, given)
        batch = batch_of(given, self.model.config)
        found = prove(self.model, found, batch)
        if self._anatomy is not None:
            found = replace(found, towers={**self._anatomy.towers, **found.towers})
        self._anatomy = found
        self._seen |= set(given)

    def _see(self, batch: Batch) -> None:
        """Find parts that this batch is the first to reach, such as a vision tower."""
        new = {n for n in batch.inputs if n.startswith(("pixel", "input_features", "input_values"))} - self._seen
        if new or self._anatomy is None:
            self._learn(batch.inputs)

    def _ready(self, batch: Batch) -> None:
        """Find new parts, and check that the batch's padding can be trusted."""
        self._see(batch)
        if "input_ids" not in batch.inputs or any(n.startswith("pixel") for n in batch.inputs):
            return
        if batch.source_mask is not None and batch.padding in ("left", "mixed"):
            raise UnsupportedError("decoder inputs of an encoder-decoder are padded on the right here.")
        mask = batch.mask if batch.source_mask is None else batch.source_mask
        side = padding_side(mask)
        if side is not None:
            self._check_padding_ids(batch.inputs["input_ids"], mask)
            self._check_padding(side)

    def _check_padding_ids(self, ids: Tensor, mask: Tensor) -> None:
        """Models that count positions by the padding id need that id in the padding."""
        if not any(hasattr(m, "create_position_ids_from_input_ids") for m in self.model.modules()):
            return
        pad = pad_id(self.model.config)
        if bool((ids[~mask] != pad).any()) or bool((ids[mask] == pad).any()):
            raise InputError(
                f"{self.name} counts positions by its padding id {pad}: padding must hold that id, and no real "
                "token may."
            )

    def _check_padding(self, side: str) -> None:
        if side not in self._padding:
            self._padding[side] = self._padding_error(side)
        error = self._padding[side]
        if not error <= 1e-3:
            raise UnsupportedError(
                f"{side} padding is refused: {self.name} gives other activations for a padded prompt than for the same "
                f"prompt alone (relative error {error:.1e}). Use lens.prepare(..., padding_side="
                f"{'right' if side != 'right' else 'left'!r})."
            )

    def _padding_error(self, side: str) -> float:
        """Relative error that one padded position makes in the last stream of every token tower."""
        config = self.model.config
        device = device_of(self.model)
        ids = tokens(config, 1, 4).to(device)
        fill = torch.full((1, 1), pad_id(config), dtype=ids.dtype, device=device)
        pieces = {"left": [fill, fill, ids], "right": [ids, fill, fill], "mixed": [fill, ids, fill]}[side]
        masks = [torch.zeros_like(x) if x is fill else torch.ones_like(x) for x in pieces]
        padded = {"input_ids": torch.cat(pieces, 1), "attention_mask": torch.cat(masks, 1)}
        alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(config, "is_encoder_decoder", False):
            decoder = {"decoder_input_ids": ids}
            padded, alone = {**padded, **decoder}, {**alone, **decoder}
            tower = "encoder"
        else:
            tower = self.anatomy.main
        last = len(self.anatomy.towers[tower].layers) - 1
        read = [Read("resid_post", layers=(last,), tower=tower)]
        real = padded["attention_mask"].bool()
        one = run(self.model, self.anatomy, self._positioned(batch_of(alone, config)), read)
        two = run(self.model, self.anatomy, self._positioned(batch_of(padded, config)), read)
        key = (read[0], last)
        return relative_error(two.values[key][real], one.values[key][0])

    def _check_entry(self, batch: Batch, entry: Entry) -> None:
        """Once for each kind of batch: a run that enters behind a prefix gives what the full run gives."""
        # Where images are seen in both directions it depends on the column.
        kind = f"image from {entry.start}" if batch.image_mask is not None else "text"
        if kind in self._entries:
            return
        index = self.anatomy.towers[self.anatomy.main].layer(entry.layer).index
        reads = [Read("resid_pre", layers=(index,)), Read("resid_post", layers=(index,))]
        batch = self._positioned(batch)
        full = run(self.model, self.anatomy, batch, reads)
        stream = full.values[reads[0], index][:, entry.start :]
        there = run(self.model, self.anatomy, batch, reads[1:], entry=replace(entry, resid=stream))
        real = batch.mask[:, entry.start :]
        error = relative_error(
            there.values[reads[1], index][real], full.values[reads[1], index][:, entry.start :][real]
        )
        if not error <= 10 * TOLERANCE.get(self.dtype, 1e-4):
            raise UnsupportedError(
                f"{self.name}: a run that enters at column {entry.start} differs from the full run by {error:.1e} "
                "(its attention is not causal there, or depends on skipped inputs); use start=0."
            )
        self._entries.add(kind)

    def _positioned(self, batch: Batch) -> Batch:
        """The batch with position ids, where padding shifts them and the model does not derive them itself."""
        if "position_ids" in batch.inputs or "input_ids" not in batch.inputs or batch.padding in (None, "right"):
            return batch
        if "position_ids" not in parameters_of(self.model) or self._own_positions:
            return batch
        mask = batch.inputs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            return batch
        ids = (mask.long().cumsum(-1) - 1).clamp_min(0)
        return replace(batch, inputs={**batch.inputs, "position_ids": ids})

    @property
    def _own_positions(self) -> bool:
        """Whether the model derives positions by a rule of its own (padding ids, image grids)."""
        if any(hasattr(m, "create_position_ids_from_input_ids") for m in self.model.modules()):
            return True
        return any(hasattr(m, "get_rope_index") for m in self.model.modules())

    def prepare(
        self,
        texts: str | Sequence[str] | None = None,
        images: Any = None,
        *,
        targets: str | Sequence[str] | None = None,
        padding_side: str | None = None,
        add_special_tokens: bool = True,
        **tensors: Any,
    ) -> Batch:
        """Make a batch from prompts, from prompts and images, from images, or from ready tensors.

        Args:
            texts: prompts. With images each prompt holds the model's image placeholder once for each of its images.
            images: one image or a list of images for each prompt (PIL images or arrays).
            targets: for encoder-decoders, what the decoder reads; its start token alone if left out.
            padding_side: `left` or `right`; the default is left for decoders and right for the rest.
            add_special_tokens: whether the tokenizer adds its own begin and end tokens.
            tensors: the model's own inputs by name (`input_ids`, `attention_mask`, `pixel_values`, ...), instead of
                texts and images. Token inputs may be a list of lists of ids of different lengths.

        Raises:
            InputError: empty or too long prompts, images for a text model, a prompt without its image placeholder,
                tensors that the model does not take or that do not fit together.
        """
        if tensors:
            if texts is not None or images is not None or targets is not None:
                raise InputError("give either texts and images, or ready tensors, not both.")
            batch = batch_of(tensors, self.model.config, takes=parameters_of(self.model), side=self._side(padding_side))
        elif images is not None:
            batch = prepare_images(self.model, self.processor, texts, images, self._side(padding_side))
        elif texts is not None:
            batch = prepare_texts(
                self.model, self.processor, texts, targets, self._side(padding_side), add_special_tokens
            )
        else:
            raise InputError("nothing to prepare: give texts, images, or the model's input tensors by name.")
        inputs = {
            k: v.to(self.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in batch.inputs.items()
        }
        batch = replace(batch, inputs=inputs).to(device_of(self.model))
        self._see(batch)  # methods ask for a tower by name before they run
        return batch

    def _side(self, side: str | None) -> str:
        if side not in (None, "left", "right"):
            raise SettingsError(f"padding_side must be 'left' or 'right', got {side!r}.")
        if side is not None:
            return side
        decoder = hasattr(self.model, "lm_head") or self._anatomy is None or self._anatomy.unembed is not None
        return "left" if decoder and not getattr(self.model.config, "is_encoder_decoder", False) else "right"

    def run(
        self,
        batch: Batch,
        reads: Iterable[str | Read] | str | Read = (),
        edits: Iterable[Edit | Iterable[Edit]] = (),
        *,
        gradients: Iterable[str | Read] = (),
        metric: Metric | None = None,
        entry: Entry | None = None,
        cache: bool = False,
        to: torch.device | str | None = None,
    ) -> Trace:
        """Run the model once, read what was asked for, and stop when nothing is left to read.

        A read sees what the edits of its site left there. Without edits, all values are the model's own, bit for bit.

        Args:
            batch: from `prepare`.
            reads: strings or `Read`s, e.g. `["resid_post", "pattern@last", "logits"]`.
            edits: from `interp.edits`, applied in order. Those of `generated` positions find none here: the same edits
                serve a run and a generation.
            gradients: sites at which the gradient of the metric is wanted.
            metric: maps logits [batch, pos, d_vocab] to one number, or one for each sample.
            entry: begin at a layer (and a column) instead of at the input.
            cache: keep the key/value cache for later entries; it is `trace.cache`.
            to: device to keep the reads on, e.g. "cpu"; None leaves them where they were made.

        Raises:
            UnknownNameError: a site, tower, layer, head or position does not exist.
            UnsupportedError: the model cannot give a site.
            EditError: an edit does not fit, or makes NaN.
            HookError: something asked for was never reached.
            NonFiniteError: the model made NaN at a site that was read.
        """
        if not isinstance(batch, Batch):
            raise InputError(f"run takes a Batch from lens.prepare, got {type(batch).__name__}.")
        self._ready(batch)
        wanted = _reads(reads)
        if entry is not None and entry.start:
            self._check_entry(batch, entry)
        trace = run(
            self.model,
            self.anatomy,
            self._positioned(batch),
            list(dict.fromkeys(wanted)),
            self._mine(edits),
            gradients=_reads(gradients),
            metric=metric,
            entry=entry,
            cache=cache,
            to=to,
        )
        return replace(trace, exporter=self._exported)

    def _exported(self, trace: Trace) -> Any:
        from interp.backends.cache import activation_cache

        return activation_cache(trace, self.anatomy, self.model.config, tokenizer_of(self.processor))

    def estimate(
        self,
        batch: Batch | tuple[int, int],
        reads: Iterable[str | Read] | str | Read = (),
        *,
        gradients: bool = False,
        to: torch.device | str | None = None,
    ) -> Estimate:
        """What a run would take: bytes that come back, bytes at its peak, time, and how many samples fit at once.

        One sample is run once, which gives the time. `check()` of what is returned refuses what cannot fit.

        Args:
            batch: from `prepare`, or how many prompts of how many tokens.
            reads: as for `run`.
            gradients: whether gradients are asked for too.
            to: device to keep the reads on.

        Raises:
            InputError: it cannot be told whose the batch's pictures are.
        """
        if not isinstance(batch, Batch):
            batch = self.prepare(input_ids=tokens(self.model.config, *batch))
        return estimate(self, batch, _reads(reads), gradients=gradients, to=to)

    def generate(
        self,
        batch: Batch,
        edits: Iterable[Edit | Iterable[Edit]] = (),
        *,
        reads: Iterable[str | Read] | str | Read = (),
        max_new_tokens: int = 64,
        do_sample: bool = False,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_new_tokens: int | None = None,
        num_beams: int = 1,
        seed: int | None = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        prefix: Prefix | None = None,
        to: torch.device | str | None = None,
    ) -> Generation:
        """Generate with the edits active in the prompt and in every decoding step; the key/value cache stays in use.

        In edits and reads, `all` means every position of every step, `last` the newest one of each step,
        `generated` the generated tokens that are read back in, and everything else positions of the prompt.

        Args:
            batch: from `prepare`, padded on the left.
            edits: from `interp.edits`.
            reads: what to read on the way; positions of all steps are joined.
            max_new_tokens: how many tokens at most.
            do_sample: sample instead of taking the most likely token.
            temperature: for sampling.
            top_p: for sampling.
            top_k: for sampling.
            min_new_tokens: how many tokens at least.
            num_beams: beam search with so many beams; edits act on each beam as on its sample. No reads, no `prefix`.
            seed: for sampling; needed with `do_sample`.
            logits_processor: transformers `LogitsProcessor`s. While one is called, edits and reads are off the model,
                so that it may run the model itself (`interp.steering.VisualContrast`).
            stopping_criteria: transformers `StoppingCriteria`.
            prefix: what a full run of the batch left (`lens.run(batch, ..., cache=True).cache`): only the last position
                of the prompt is computed anew, and edits of the prompt act there alone.
            to: device to keep the reads on.

        Raises:
            SettingsError: sampling without a seed, sampling options without sampling, beams with reads or a prefix, or
                fewer than one beam.
            InputError: the batch is padded on the right.
            UnsupportedError: the model does not generate, or not behind a prefix; beams with edits of another tower.
        """
        if prefix is not None and self.prefix_refusal is not None:
            raise UnsupportedError(f"{self.name}: {self.prefix_refusal}: generate without a prefix.")
        if not hasattr(self.model, "generate") or not getattr(self.model, "can_generate", lambda: True)():
            raise UnsupportedError(f"{type(self.model).__name__} does not generate (no language-model head).")
        if batch.padding in ("right", "mixed") and not getattr(self.model.config, "is_encoder_decoder", False):
            raise InputError("generation needs left padding: lens.prepare(texts, padding_side='left').")
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        if not do_sample and any(v is not None for v in sampling.values()):
            raise SettingsError(f"{[k for k, v in sampling.items() if v is not None]} need do_sample=True.")
        if do_sample and seed is None:
            raise SettingsError("do_sample=True needs a seed, so that the result can be had again.")
        if isinstance(num_beams, bool) or not isinstance(num_beams, int) or num_beams < 1:
            raise SettingsError(f"num_beams is a whole number of at least 1, got {num_beams!r}.")
        self._ready(batch)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "num_beams": num_beams}
        options |= {k: v for k, v in sampling.items() if v is not None}
        more = {
            "min_new_tokens": min_new_tokens,
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
        }
        options |= {k: v for k, v in more.items() if v is not None}
        wanted = _reads(reads)
        devices = [d for d in {p.device for p in self.model.parameters()} if d.type == "cuda"]
        with torch.random.fork_rng(devices=devices, enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            sequences, trace = generate(
                self.model, self.anatomy, batch, list(dict.fromkeys(wanted)), self._mine(edits), options, prefix, to
            )
        encoder_decoder = getattr(self.model.config, "is_encoder_decoder", False)
        new = sequences if encoder_decoder else sequences[:, batch.mask.shape[1] :]
        tokenizer = tokenizer_of(self.processor)
        texts = None if tokenizer is None else tuple(tokenizer.batch_decode(new, skip_special_tokens=True))
        return Generation(texts, new, sequences, trace)

    @property
    def prefix_refusal(self) -> str | None:
        """Why generation cannot go on behind the keys and values of a run; None if it can."""
        layers = self.anatomy.towers[self.anatomy.main].layers
        if getattr(self.model.config, "is_encoder_decoder", False):
            return "an encoder-decoder generates from its encoder's output"
        if any("mixer" in x.branches for x in layers):
            return "recurrent layers carry a state that a prefix does not hold"
        if any("cross" in x.attention for x in layers) or any(x.adjusted for x in layers):
            return "images enter its later layers"
        if any(hasattr(m, "rope_deltas") for m in self.model.modules()):
            return "it numbers positions by what it remembers of the last image that it saw"
        return None

    def _mine(self, edits: Iterable[Edit | Iterable[Edit]]) -> list[Edit]:
        """Edits as one list; those whose heads come from a ranking have to be of this model."""
        found = flatten(edits)
        for edit in found:
            check_model(edit.model, self.name, edit.name)
        return found

    def layers_with(self, site: str, *, tower: str | None = None) -> list[int]:
        """The layers of a tower that can give a site.

        Raises:
            UnknownNameError: no such site or tower.
            UnsupportedError: no layer can; the message says why.
        """
        return layers_of(self.anatomy, Read(site, tower=tower))

    def refusal(self, site: str, layer: int, *, tower: str | None = None) -> str | None:
        """Why a layer cannot give a site, in the words of the error that reading it there raises; None if it can.

        Raises:
            UnknownNameError: no such site, layer or tower.
            SettingsError: the site does not belong to a layer.
        """
        read = Read(site, tower=tower)
        if not read.row.per_layer:
            raise SettingsError(f"{site!r} exists once, not per layer; see lens.anatomy.refused.")
        try:
            refuse(self.anatomy, read, layer, self.anatomy.tower(tower)[1])
        except UnsupportedError as error:
            return str(error)
        return None

    def stepper(self, batch: Batch, prefix: Prefix | None = None) -> Stepper:
        """The main tower's layers, to be called one at a time on rows that are copies of the batch's samples.

        Args:
            batch: from `prepare`.
            prefix: `lens.run(batch, ..., cache=True).cache`: needed for a start behind the first column, for images,
                and for encoder-decoders.

        Raises:
            UnsupportedError: the layers need more than their stream and what the model gives every layer.
        """
        self._ready(batch)
        return Stepper(self.model, self.anatomy, self._positioned(batch), prefix)

    def unembed(self, stream: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_vocab"]:
        """Logits of a residual stream: the model's final norm, output projection, and what follows it.

        Raises:
            UnsupportedError: the model's head is not a norm and a projection.
        """
        head = self.anatomy.unembed
        if head is None:
            raise UnsupportedError(f"{self.name}: the head is not a final norm and one projection.")
        with torch.no_grad():
            return head(stream)


def _reads(given: Iterable[str | Read] | str | Read) -> list[Read]:
    """One read or several, as a list of reads."""
    return [Read.of(r) for r in ([given] if isinstance(given, (str, Read)) else given)]
