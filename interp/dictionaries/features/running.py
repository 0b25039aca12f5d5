"""The best few of what streams by, for all latents at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.dictionaries.features.contexts import Places
from interp.errors import SettingsError

MOST_BYTES = 4 * 2**30


class Running:
    """For each latent the n windows with the largest keys, and the latent's activations in them.

    Memory is latents x n x (width + 5) numbers, however much streams by. Of equal keys the earlier one is kept.

    Args:
        latents: how many.
        n: windows of each.
        keep_acts: whether activations are kept; without them they are known to be zero.
        device: where.
    """

    def __init__(self, latents: int, n: int, *, keep_acts: bool, device: torch.device) -> None:
        self.n, self.keep_acts = n, keep_acts
        whole = {"dtype": torch.long, "device": device}
        self.key = torch.full((latents, n), -torch.inf, device=device)
        self.context = torch.full((latents, n), -1, **whole)
        self.centre, self.start, self.length = (torch.zeros(latents, n, **whole) for _ in range(3))
        self.acts = torch.zeros(latents, n, int(keep_acts), device=device)

    def offer(
        self,
        key: Float[Tensor, "contexts latents"],
        valid: Bool[Tensor, "contexts latents"],
        rows: Int[Tensor, " contexts"],
        centre: Int[Tensor, "contexts latents"],
        bounds: tuple[Int[Tensor, "contexts latents"], Int[Tensor, "contexts latents"]],
        read: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> None:
        """Take in one window of each context for each latent.

        Args:
            key: by which windows are ranked.
            valid: which may be taken.
            rows: what the contexts are called.
            centre: the middle column of each window.
            bounds: the first column of each window, and the one behind its last.
            read: gives the activations at contexts, columns and latents; 0 at tokens that are not used.
        """
        if not self.n:
            return
        found = key.masked_fill(~valid, -torch.inf).t()
        changed = (found > self.key[:, -1:]).any(1).nonzero()[:, 0]
        if not len(changed):
            return
        both = torch.cat([self.key[changed], found[changed]], 1)
        best, order = both.sort(dim=1, descending=True, stable=True)
        best, order = best[:, : self.n], order[:, : self.n]
        old = order.clamp_max(self.n - 1)
        fresh = (order >= self.n) & (best > -torch.inf)
        which = (order - self.n).clamp_min(0)
        start, stop = bounds[0].t()[changed].gather(1, which), bounds[1].t()[changed].gather(1, which)
        self.key[changed] = best
        new = {
            "context": rows[which],
            "centre": centre.t()[changed].gather(1, which),
            "start": start,
            "length": stop - start,
        }
        for name, value in new.items():
            held = getattr(self, name)
            held[changed] = torch.where(fresh, value, held[changed].gather(1, old))
        if self.keep_acts:
            self._keep(changed, old, fresh, which, start, stop, read)

    def _keep(
        self,
        changed: Tensor,
        old: Tensor,
        fresh: Tensor,
        which: Tensor,
        start: Tensor,
        stop: Tensor,
        read: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> None:
        self._widen(int((stop - start)[fresh].max()) if bool(fresh.any()) else 0)
        width = self.acts.shape[2]
        moved = self.acts[changed].gather(1, old[..., None].expand(-1, -1, width))
        latent, slot = fresh.nonzero(as_tuple=True)
        columns = start[fresh][:, None] + torch.arange(width, device=start.device)
        inside = columns < stop[fresh][:, None]
        columns = torch.minimum(columns, stop[fresh][:, None] - 1)
        values = read(which[fresh][:, None], columns, changed[latent][:, None])
        moved[latent, slot] = values.masked_fill(~inside, 0).to(moved.dtype)
        self.acts[changed] = moved

    def _widen(self, width: int) -> None:
        latents, n, have = self.acts.shape
        if width <= have:
            return
        if latents * n * width * 4 > MOST_BYTES:
            raise SettingsError(
                f"{latents} latents with {n} windows of {width} tokens each would take "
                f"{latents * n * width * 4 / 2**30:.1f} GiB: choose some latents=, or a smaller k, sampled or window."
            )
        wider = self.acts.new_zeros(latents, n, width)
        wider[:, :, :have] = self.acts
        self.acts = wider

    def places(self) -> Places:
        """What was kept, on the CPU."""
        context = self.context.masked_fill(self.key == -torch.inf, -1)
        return Places(context.cpu(), self.centre.cpu(), self.start.cpu(), self.length.cpu(), self.acts.cpu())
