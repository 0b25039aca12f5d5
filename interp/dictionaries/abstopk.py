"""Top-k dictionaries whose latents may be negative.

Source: "AbsTopK: Rethinking Sparse Autoencoders for Bidirectional Features" (arXiv 2510.00404). Of every token the k
pre-activations of largest size are kept with their signs, without a ReLU.
"""

from __future__ import annotations

from interp.dictionaries.topk import TopK


class AbsTopK(TopK):
    """The k pre-activations of largest size of every token, with their signs."""

    absolute = True
