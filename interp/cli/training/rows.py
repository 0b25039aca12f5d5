"""SAEs and transcoders of a run of `interp train`, and the rows of activations that they are trained on."""

from typing import TYPE_CHECKING, Any

import torch

from interp.dictionaries import SAE, Job, Transcoder
from interp.dictionaries.activations import ActivationStore, ActivationStream, MixingBuffer, Prefetch, harvest

if TYPE_CHECKING:
    from interp.data.corpora import Corpus
    from interp.dictionaries.activations import Rows, Source
    from interp.dictionaries.training import Processes
    from interp.lens import Lens


def begun(
    kind: str, settings: Any, lens: "Lens", texts: "Corpus", processes: "Processes"
) -> tuple[ActivationStream, dict[str, Job]]:
    """This process's share of the activations of the corpus, and the dictionaries by name."""
    reads = dict.fromkeys(read for pair in settings.reads(kind) for read in pair if read is not None)
    options = {**settings.stream_options(), "batch": settings.contexts}
    stream = ActivationStream(lens, texts, list(reads), **options, rank=processes.rank, world=processes.world)
    return stream, jobs_of(kind, settings, stream)


def jobs_of(kind: str, settings: Any, stream: ActivationStream) -> dict[str, Job]:
    """The dictionaries by name, such as `resid_post.10-topk-k32`, on the model's device."""
    jobs = {}
    device = stream.lens.input_device
    asked = dict.fromkeys(read for pair in settings.reads(kind) for read in pair if read is not None)
    named = dict(zip(asked, stream.reads, strict=True))  # layers from the end have their number there
    for one, other in settings.reads(kind):
        read, target = named[one], None if other is None else named[other]
        for options in settings.dictionaries(stream.d_in[read]):
            sized = [f"k{options['k']:g}"] if "k" in options else []
            parts = [read.replace(":", "-"), options["architecture"], *sized]
            if target is not None:
                options = {**options, "d_out": stream.d_in[target]}
            made = (SAE if target is None else Transcoder)(**options)
            jobs["-".join(parts)] = Job(made.to(device), read, target)
    return jobs


def source_of(settings: Any, stream: ActivationStream, processes: "Processes", say: Any) -> "Source[Rows]":
    """Batches of this process: mixed from the stream, or from the store where one is named."""
    device, world = stream.lens.input_device, processes.world
    # On a CPU a thread that reads ahead would take the cores of the training.
    ahead = Prefetch(stream) if device.type == "cuda" else stream
    if settings.store is None:
        share = {"rows": settings.buffer // world, "batch": settings.batch_size // world}
        return MixingBuffer(ahead, **share, seed=settings.seed + processes.rank, dtype=torch.float32)
    say(f"activations are kept in {settings.store}")
    tokens = -(-settings.tokens // world)
    harvest(ahead, settings.store, tokens=tokens, dtype=settings.store_dtype, keep="rows")
    ahead.close()
    processes.wait()
    store = ActivationStore(settings.store)
    options = {"batch": settings.batch_size, "seed": settings.seed, "epochs": None, "device": device}
    return store.rows(**options, rank=processes.rank, world=world)
