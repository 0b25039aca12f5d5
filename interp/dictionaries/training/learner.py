"""One dictionary in training: its optimiser, its counts of activity, its step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.dictionaries.activations import Contexts, Rows, Statistics
from interp.dictionaries.base import Dictionary, Loss
from interp.dictionaries.fidelity import Fidelity
from interp.dictionaries.lorsa.files import rescale
from interp.dictionaries.lorsa.lorsa import Lorsa
from interp.dictionaries.training.settings import TrainSettings
from interp.dictionaries.training.sharded import gather, part_of, sharded, whole
from interp.errors import InputError, NonFiniteError, SettingsError
from interp.processes import Processes

_SHOWN = ("fvu", "explained_variance_legacy", "l0", "cosine", "l2_ratio")


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """A dictionary and what it is trained on.

    Attributes:
        dictionary: trained in place; a Lorsa on whole contexts, others on rows (of contexts, on their tokens to use).
        read: name of its activations in the source, such as `resid_post.10`.
        target: name of what it is to reconstruct; None for the activations themselves.
    """

    dictionary: Dictionary | Lorsa
    read: str
    target: str | None = None

    def check(self, name: str, widths: Mapping[str, int]) -> None:
        """Whether the source has what is read, as wide as the dictionary.

        Raises:
            InputError: it has not.
        """
        cfg = self.dictionary.cfg
        for read, width, what in ((self.read, cfg.d_in, "d_in"), (self.target, cfg.width_out, "d_out")):
            if read is None:
                continue
            if read not in widths:
                raise InputError(f"{name}: the source reads {', '.join(widths)}, not {read!r}.")
            if widths[read] != width:
                raise InputError(f"{name}: {read} is {widths[read]} wide, but the dictionary has {what}={width}.")
        if self.dictionary.transcodes and self.target is None:
            kind = type(self.dictionary).__name__
            raise InputError(f"{name}: a {kind} needs a target, the read that it is to reconstruct.")


class Learner:
    """A dictionary with everything that its training remembers.

    Args:
        name: of the dictionary in the log.
        job: the dictionary and its reads.
        settings: of the run.
        processes: that train together.
    """

    def __init__(self, name: str, job: Job, settings: TrainSettings, processes: Processes) -> None:
        self.name, self.job, self.settings, self.processes = name, job, settings, processes
        self.dictionary = job.dictionary.train()
        self.scale = self.target_scale = 1.0
        device = self.dictionary.b_dec.device
        self.since = torch.zeros(self.dictionary.cfg.d_sae, dtype=torch.int64, device=device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.autocast == "float16")
        self.optimiser = self._adam()
        if settings.sharded and processes.world == 1:
            raise SettingsError("sharded=True needs several processes: start them with torchrun.")

    def _adam(self) -> torch.optim.Adam:
        parameters, settings = list(self.dictionary.parameters()), self.settings
        fused = parameters[0].is_floating_point() and parameters[0].dtype in (torch.float32, torch.float64)
        betas = (settings.adam_beta1, settings.adam_beta2)
        return torch.optim.Adam(parameters, lr=settings.lr, betas=betas, fused=fused)

    def ready(self) -> None:
        """Before the first step, with the first weights there: spread the dictionary, where that is wanted."""
        if self.settings.sharded:
            self.dictionary = sharded(self.dictionary)
            self.optimiser, self.since = self._adam(), self.since.to(self.dictionary.b_dec.device)

    def finished(self) -> Dictionary | Lorsa:
        """The dictionary that was given, as it is now."""
        if self.settings.sharded:
            gather(self.dictionary, self.job.dictionary)
        return self.job.dictionary.eval()

    def begin(self, found: Mapping[str, Statistics]) -> None:
        """Take the scale of activations, and the first bias, from a sample of them."""
        cfg, job = self.dictionary.cfg, self.job
        target = job.target or job.read
        if cfg.normalize_activations == "expected_average_only_in":
            self.scale, self.target_scale = found[job.read].scale, found[target].scale
            if isinstance(self.dictionary, Lorsa):  # it may begin at the layer's heads, which read x as it is
                rescale(self.dictionary, 1 / self.scale, 1 / self.target_scale)
        if self.settings.b_dec_init == "mean":
            with torch.no_grad():
                bias = self.dictionary.b_dec
                bias.copy_(found[target].mean.to(bias) * self.target_scale)

    @property
    def dead(self) -> Tensor:
        """Which latents are dead [d_sae]."""
        return self.since >= self.settings.dead_feature_window

    def step(self, item: Rows | Contexts, step: int, log: bool) -> dict[str, Any]:
        """One batch; the row of the log where one is asked for.

        Raises:
            InputError: a Lorsa got rows.
            NonFiniteError: the loss or the gradient is NaN or infinite; the dictionary is as it was before the step.
        """
        settings, dictionary = self.settings, self.dictionary
        weight = dictionary.W_dec
        even = not isinstance(item, Contexts)  # all processes have as many tokens
        item, masks = self._fitting(item, weight.device)
        like = {"device": weight.device, "dtype": weight.dtype}
        x = item[self.job.read].to(**like) * self.scale
        target: Any = None if self.job.target is None else item[self.job.target].to(**like) * self.target_scale
        low = None if settings.autocast is None else getattr(torch, settings.autocast)
        with torch.autocast(weight.device.type, low, enabled=low is not None):
            loss = dictionary.loss(
                x,
                target,
                **masks,
                dead=self.dead,
                sparsity=settings.sparsity_at(step),
                reduce=self.processes.reduce if self.processes.world > 1 else None,
            )
        self._check(loss, step)
        self.optimiser.zero_grad(set_to_none=True)
        share = None if even else self._share(loss)
        self.scaler.scale(loss.total if share is None else loss.total * share).backward()
        self.scaler.unscale_(self.optimiser)
        gradients = [p.grad for p in dictionary.parameters() if p.grad is not None]
        if not settings.sharded:  # else they are averaged on their way
            self.processes.average(gradients)
        dictionary.before_step()
        norm = torch.nn.utils.get_total_norm(gradients)
        if not whole(norm).isfinite() and not self.scaler.is_enabled():
            raise NonFiniteError(
                f"{self.name}: the gradient is {whole(norm).item()} in step {step}; lower lr, or clip it."
            )
        if settings.grad_clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(dictionary.parameters(), settings.grad_clip_norm, norm)
        lr = settings.lr_at(step)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimiser)
        self.scaler.update()
        dictionary.after_step()
        counts = self.processes.reduce(loss.counts().to(self.since), "sum")
        self.since.add_(1).masked_fill_(counts > 0, 0)
        return self._row(loss, share, step, lr) if log else {}

    def _fitting(self, item: Any, device: torch.device) -> tuple[Rows | Contexts, dict[str, Any]]:
        """What the dictionary reads: rows, or contexts with their masks."""
        if not isinstance(item, Contexts):
            if self.dictionary.sequences:
                raise InputError(f"{self.name}: a Lorsa reads whole contexts, and the source gives rows.")
            return item, {}
        if not self.dictionary.sequences:
            return item.rows(), {}
        return item, {"mask": item.mask.to(device), "real": item.real.to(device)}

    def _share(self, loss: Loss) -> Tensor | None:
        """Factor of this process's means, by the number of its tokens; None for one process."""
        world = self.processes.world
        if world == 1:
            return None
        own = torch.tensor(float(len(loss.target)), device=loss.total.device)
        return own * world / self.processes.reduce(own.clone(), "sum")

    def _check(self, loss: Loss, step: int) -> None:
        total = float(loss.total.detach())
        # Every process has to stop where one does.
        fine = self.processes.reduce(torch.tensor(float(math.isfinite(total)), device=loss.total.device), "min")
        if not fine:
            wrong = [name for name, part in loss.parts.items() if not bool(part.isfinite())]
            raise NonFiniteError(
                f"{self.name}: the loss is {total} in step {step} ({', '.join(wrong) or 'in another process'}); lower "
                "lr, or look at the activations."
            )

    @torch.no_grad()
    def _row(self, loss: Loss, share: Tensor | None, step: int, lr: float) -> dict[str, Any]:
        cfg, processes = self.dictionary.cfg, self.processes
        parts = torch.stack([loss.total.detach(), *(p.detach().to(loss.total) for p in loss.parts.values())]).double()
        means = (processes.reduce(parts if share is None else parts * share, "sum") / processes.world).tolist()
        fidelity = Fidelity(cfg.width_out, cfg.d_sae, device=loss.target.device)
        fidelity.update(loss.target, loss.reconstruction.detach(), loss.latents)
        numbers = fidelity.result(processes.reduce if processes.world > 1 else None).numbers()
        row: dict[str, Any] = {"dictionary": self.name, "step": step + 1, "lr": lr}
        row |= dict(zip(("loss", *loss.parts), means, strict=True))
        # Ratios to nothing (all targets are equal, or one is zero) have no value.
        row |= {name: numbers[name] if math.isfinite(numbers[name]) else None for name in _SHOWN}
        return row | {"dead": int(self.dead.sum())}

    def tensors(self) -> dict[str, Tensor]:
        """All that has to be kept: weights, buffers, the optimiser's means, the counts; every process calls this."""
        out = {f"weights.{name}": whole(value) for name, value in self.dictionary.state_dict().items()}
        names = {id(p): n for n, p in self.dictionary.named_parameters()}
        for parameter, kept in self.optimiser.state.items():
            out |= {f"adam.{names[id(parameter)]}.{key}": whole(torch.as_tensor(x)) for key, x in kept.items()}
        return {**out, "since": self.since}

    def values(self) -> dict[str, Any]:
        """The rest, as json holds it."""
        return {"scale": self.scale, "target_scale": self.target_scale, "scaler": self.scaler.state_dict()}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Go back to what `tensors` and `values` gave."""
        weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
        self.dictionary.load_state_dict(weights)
        self.ready()
        for name, parameter in self.dictionary.named_parameters():
            start = f"adam.{name}."
            kept = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
            if kept:
                steps = kept.pop("step")
                fused = self.optimiser.param_groups[0]["fused"]
                moved = {key: part_of(value, parameter) for key, value in kept.items()}
                self.optimiser.state[parameter] = {"step": steps.to(parameter.device) if fused else steps, **moved}
        self.since.copy_(tensors["since"])
        self.scale, self.target_scale = values["scale"], values["target_scale"]
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(values["scaler"])
