"""Activations to train dictionaries on: streamed from a model, mixed in a buffer, or harvested to disk and replayed.

stream = ActivationStream(lens, interp.data.corpus("books/", seed=0), "resid_post.10", context=256)
buffer = MixingBuffer(Prefetch(stream), rows=65_536, batch=4096, seed=0)     # rows for SAEs
for rows in buffer: rows["resid_post.10"]                                    # [4096, d_model]

store = harvest(stream, "activations/", dtype="bfloat16")                    # once ...
for rows in store.rows(batch=4096, seed=1): ...                              # ... for many dictionaries
for contexts in store.contexts(batch=16): ...                                # whole sequences for Lorsa
"""

from interp.dictionaries.activations.batches import Contexts, Rows, Source, State
from interp.dictionaries.activations.buffer import MixingBuffer
from interp.dictionaries.activations.harvest import harvest
from interp.dictionaries.activations.identity import fingerprint
from interp.dictionaries.activations.packing import Packing
from interp.dictionaries.activations.prefetch import Prefetch
from interp.dictionaries.activations.statistics import Statistics, statistics
from interp.dictionaries.activations.store import ActivationStore
from interp.dictionaries.activations.stream import ActivationStream
from interp.dictionaries.activations.together import Together

__all__ = [
    "ActivationStore",
    "ActivationStream",
    "Contexts",
    "MixingBuffer",
    "Packing",
    "Prefetch",
    "Rows",
    "Source",
    "State",
    "Statistics",
    "Together",
    "fingerprint",
    "harvest",
    "statistics",
]
