"""StableAdamW as Ettin used it, and its learning-rate schedules as Composer schedulers (stepped by `clock.Clock`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.distributed as dist
from composer.core import State
from composer.optim import ComposerScheduler
from torch import Tensor
from torch.distributed.tensor import DTensor

from ettin_foundry.training.run_config import lr_factor, parse_time, require

log = logging.getLogger(__name__)


class StableAdamW(torch.optim.Optimizer):
    """AdamW whose step is clipped per tensor, with weight decay independent of the learning rate's scale.

    With debiased betas b1, b2 at step t, moments m, v of gradient g, per tensor (reference: ModernBERT's
    src/optimizer.py, torch-optimi's stableadamw.py):

        rms = sqrt(mean(g^2 / max(v, eps^2)))        v already updated
        eta = lr / max(1, rms)
        p  <- p (1 - (eta / max_lr) weight_decay)    tensors with two or more dimensions only
        p  <- p - eta m / (sqrt(v) + eps)

    So `weight_decay` is what one step at the peak removes; it is not multiplied by lr. Sums are in a fixed order, so
    that replicas stay bit-equal. Sharded parameters (FSDP2) take one all-reduce a group.

    Args:
        params: fp32 or fp64 parameters, before FSDP shards them, since shapes tell norms and biases.
        lr: peak learning rate. betas: decay rates of the moments. eps: added to the root of the second moment.
        weight_decay: fraction of a weight removed per step at lr == max_lr.
        max_lr: `lr` unless given; phases that start below the pretraining peak give that peak.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, *,
                 betas: tuple[float, float] = (0.9, 0.98), eps: float = 1e-6, weight_decay: float = 0.0,
                 max_lr: float | None = None):
        max_lr = lr if max_lr is None else max_lr
        for name, value, fits, allowed in (
                ("lr", lr, lr > 0, "above 0 (to freeze parameters, use disable_grad)"),
                ("eps", eps, eps >= 1e-15, "at least 1e-15"), ("max_lr", max_lr, max_lr > 0, "above 0"),
                ("weight_decay", weight_decay, 0 <= weight_decay < 1, "below 1"),
                ("betas", betas, all(0 <= beta < 1 for beta in betas), "two numbers in [0, 1)")):
            require(fits, f"optimizer.{name}", allowed, value, "correct it")
        if weight_decay > 1e-3:
            log.warning("optimizer.weight_decay: %s is not multiplied by lr; the recipes use 1e-5", weight_decay)
        given = list(params)
        groups = [{"params": [p for p in given if p.ndim > 1]},  # norms and biases are never decayed
                  {"params": [p for p in given if p.ndim <= 1], "weight_decay": 0.0}]
        super().__init__([group for group in groups if group["params"]], {
            "lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay,
            "max_lr": max_lr, "step": torch.tensor(0, dtype=torch.int32)})
        self.accepts: Callable[[float], bool] | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step on every parameter that has a gradient, unless `accepts` is set and refuses the closure's loss."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        if loss is not None and self.accepts is not None and not self.accepts(loss):
            return loss
        # torch.distributed.checkpoint makes an empty optimizer's state by a step at lr 0 with zero gradients; if it
        # counted, the first real step of a run that then loads no optimizer would be biased
        counts = any(group["lr"] != 0 for group in self.param_groups)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in (p for p in params if not self.state[p]):
                self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            if params and counts:
                self._step_group(group, params)
        return loss

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        sharded = [p for p in params if isinstance(p, DTensor)]
        if len(sharded) not in (0, len(params)) or any(p.dtype not in (torch.float32, torch.float64) for p in params):
            raise ValueError("ettin_stable_adamw: parameters must be fp32, and all or none sharded; let fsdp_config "
                             "shard the whole model, and its mixed_precision set the compute type")
        group["step"] = group["step"].cpu() + 1  # a checkpoint may bring it from a GPU; it is read here
        count = int(group["step"])
        beta1, beta2 = ((beta**count - beta) / (beta**count - 1) for beta in (group["beta1"], group["beta2"]))
        # on a CPU about 2^20 entries at a time: fresh memory to work on all of them costs more than the work
        size, ends = 2**20 if params[0].is_cpu and not sharded else 2**62, accumulate(p.numel() for p in params)
        for part in (list(part) for _, part in groupby(params, lambda _: next(ends) // size)):
            weights, gradients, m, v = zip(*([t.to_local() if isinstance(t, DTensor) else t for t in (
                p, p.grad, self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"])] for p in part))
            torch._foreach_lerp_(m, gradients, 1 - beta1)
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)
            work = torch._foreach_clamp_min(v, group["eps"] ** 2)
            torch._foreach_rsqrt_(work)
            torch._foreach_mul_(work, gradients)
            norms = torch._foreach_norm(work)
            torch._foreach_div_(norms, [p.numel() ** 0.5 for p in part])
            rms = torch.stack(norms)
            if sharded:
                rms.square_()
                for dim, placement in enumerate(sharded[0].placements):
                    if placement.is_shard():  # dimensions of replicas are left out: each holds the whole sum already
                        dist.all_reduce(rms, group=sharded[0].device_mesh.get_group(dim))
                rms.sqrt_()
            eta = group["lr"] / rms.clamp_min_(1.0)
            if group["weight_decay"] != 0:
                torch._foreach_mul_(weights, list((1 - eta * (group["weight_decay"] / group["max_lr"])).unbind()))
            torch._foreach_copy_(work, v)
            torch._foreach_sqrt_(work)
            torch._foreach_add_(work, group["eps"])
            torch._foreach_div_(work, list(eta.unbind()))
            torch._foreach_addcdiv_(weights, m, work, value=-1.0)


class _Schedule(ComposerScheduler):
    """`lr_factor` under Composer: times given as strings; alpha_f in [0, 1] is the last factor on the peak lr."""

    def __init__(self, name: str, alpha_f: float, **times: str):
        require(0.0 <= alpha_f <= 1.0, "scheduler.alpha_f", "in [0, 1]", alpha_f, "it is the last factor on the peak")
        for key, value in times.items():
            parse_time(f"scheduler.{key}", value)
        self.block = {"name": name, "alpha_f": alpha_f, **times}

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        assert state.max_duration is not None
        run = (state.max_duration.value, state.max_duration.unit.value)
        return lr_factor(self.block, run, lambda unit: state.timestamp.get(unit).value)


class WarmupStableDecay(_Schedule):
    """A warm-up, and a linear decay ("0tok" for none) that ends at t_max."""

    def __init__(self, t_warmup: str, t_decay: str, *, t_max: str = "1dur", alpha_f: float = 0.0):
        super().__init__("warmup_stable_decay", alpha_f, t_warmup=t_warmup, t_decay=t_decay, t_max=t_max)


class OneMinusSqrt(_Schedule):
    """A decay along 1 - sqrt, by default over the whole run, that ends at t_max."""

    def __init__(self, t_decay: str = "1dur", *, t_max: str = "1dur", alpha_f: float = 0.0):
        super().__init__("one_minus_sqrt", alpha_f, t_decay=t_decay, t_max=t_max)
