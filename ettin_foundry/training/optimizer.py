"""StableAdamW as Ettin used it, and its learning-rate schedules on the token clock.

The optimizer is torch-optimi's (the library the reference trained with); `StableAdamW` here only closes its traps: weight
decay on norms and biases, a wrong kernel choice on CPU, and sharded parameters. The schedules are pure functions of time
(`lr_schedules.py`), wrapped as Composer schedulers; that batch k gets exactly f(tokens before batch k) is the work of
`callbacks.Clock`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from composer.core import State, Time, TimeUnit
from composer.optim import ComposerScheduler
from optimi import StableAdamW as OptimiStableAdamW
from optimi.utils import HAS_TRITON, debias_beta
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ettin_foundry.training.lr import one_minus_sqrt, warmup_stable_decay

__all__ = [
    "OneMinusSqrt",
    "StableAdamW",
    "WarmupStableDecay",
    "fsdp2_gradient_factor",
    "one_minus_sqrt",
    "warmup_stable_decay",
]


class StableAdamW(OptimiStableAdamW):
    """AdamW whose step is clipped per tensor, with weight decay independent of the learning rate's scale.

    With debiased betas b1, b2 at step t, moments m, v of gradient g, per tensor (reference: ModernBERT's
    src/optimizer.py, torch-optimi's stableadamw.py):

        rms = sqrt(mean(g^2 / max(v, eps^2)))        v already updated
        eta = lr / max(1, rms)
        p  <- p (1 - (eta / max_lr) weight_decay)    tensors with two or more dimensions only
        p  <- p - eta m / (sqrt(v) + eps)

    So `weight_decay` is what one step at the peak removes; it is not multiplied by lr.

    Args:
        params: parameters, or group dicts with a `params` key. Build before FSDP wraps the model: which tensors are norms
            and biases (one dimension or none) is read from their shapes here.
        lr: peak learning rate, above 0.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: fraction of a weight removed per step at lr == max_lr.
        max_lr: lr at which `weight_decay` applies in full; `lr` unless given. Phases that start below the pretraining peak
            give that peak.

    Raises:
        ValueError: lr not above 0, weight_decay or eps out of range, or a group setting that would have no effect.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        max_lr: float | None = None,
    ):
        for name, value in (("lr", lr), ("max_lr", max_lr)):
            if value is not None and not value > 0:
                raise ValueError(f"optimizer.{name}: {value!r} given; it must be above 0, because weight decay is relative "
                                 "to it. Freeze parameters with disable_grad instead")
        super().__init__(
            _split_by_decay(params), lr, betas=(betas[0], betas[1]), weight_decay=weight_decay, eps=eps,
            decouple_lr=True, max_lr=max_lr, kahan_sum=None, foreach=False, triton=False,
        )
        # before optimi's own hook, which makes the kernels' scratch tensors where group["triton"] says so
        self.register_load_state_dict_post_hook(_after_load, prepend=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step on every parameter that has a gradient.

        Raises:
            ValueError: some parameters are sharded and some are not, or sharded ones are not float32.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if all(group["lr"] == 0 for group in self.param_groups):
            # torch.distributed.checkpoint makes an empty optimizer's state by a step at lr 0 with zero gradients; if it
            # counted, the first real step of a run that then loads no optimizer would be biased
            for group in self.param_groups:
                self._init_group(group, [], [], [], [], [], [], [])
            return loss
        sharded = [isinstance(p, DTensor) for group in self.param_groups for p in group["params"]]
        if not any(sharded):
            _choose_kernels(self)
            super().step()
        elif all(sharded):
            self._step_sharded()
        else:
            raise ValueError(f"ettin_stable_adamw: {sum(sharded)} of {len(sharded)} parameters are sharded (DTensor); all "
                             "or none may be. Let fsdp_config shard the whole model")
        return loss

    def _step_sharded(self) -> None:
        """The same formula on local shards: one all-reduce of one number per tensor, and no read by the host."""
        work, means = [], []
        for group in self.param_groups:
            params, grads, exp_avgs, exp_avg_sqs = [], [], [], []
            self._init_group(group, params, grads, exp_avgs, exp_avg_sqs, [], [], [])
            group["step"].add_(1)
            beta1 = debias_beta(group["beta1"], int(group["step"]))
            beta2 = debias_beta(group["beta2"], int(group["step"]))
            for p, grad, exp_avg, exp_avg_sq in zip(params, grads, exp_avgs, exp_avg_sqs):
                if p.dtype is not torch.float32:
                    raise ValueError(f"ettin_stable_adamw: a sharded parameter is {p.dtype}; only torch.float32 is allowed. "
                                     "Remove master_weights_dtype; fsdp_config.mixed_precision sets the compute type")
                g, m, v = grad.to_local(), exp_avg.to_local(), exp_avg_sq.to_local()
                m.lerp_(g, 1 - beta1)
                v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
                # local shards carry no padding, and an empty one sums to zero
                means.append(g.square().div_(v.clamp_min(group["eps"] ** 2)).sum() / p.numel())
                work.append((group, p, m, v))
        _sum_over_shards([p for _, p, _, _ in work], means)
        for (group, p, m, v), mean in zip(work, means):
            eta = group["lr"] / mean.sqrt().clamp_min(1.0)  # a tensor, so that nothing waits for the device
            local = p.to_local()
            if group["weight_decay"] != 0:
                local.mul_(1 - eta * (group["weight_decay"] / group["max_lr"]))
            local.sub_((m / v.sqrt().add_(group["eps"])).mul_(eta))


def _split_by_decay(params: Iterable[Tensor] | Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups in which tensors of one dimension or none (norms, biases) have a group of their own without weight decay."""
    given: list[Any] = list(params)
    groups: list[dict[str, Any]] = given if given and isinstance(given[0], dict) else [{"params": given}]
    allowed = ("params", "lr", "max_lr", "weight_decay", "eps")
    result = []
    for group in groups:
        inert = sorted(set(group) - set(allowed))
        if inert:
            raise ValueError(f"optimizer.param_groups: key(s) {', '.join(inert)} would have no effect; a group may set "
                             f"{', '.join(allowed[1:])}")
        members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        if "lr" in group and "max_lr" not in group:  # weight decay is relative to the group's own peak
            group = {**group, "max_lr": group["lr"]}
        matrices = [p for p in members if p.ndim > 1]
        if members and not matrices and group.get("weight_decay", 0) != 0:
            raise ValueError(f"optimizer.param_groups: weight_decay {group['weight_decay']} given for a group of norms and "
                             "biases only, which are never decayed; remove it or match other parameters")
        if matrices:
            result.append({**group, "params": matrices})
        if len(members) > len(matrices):
            result.append({**group, "params": [p for p in members if p.ndim <= 1], "weight_decay": 0.0})
    return result


def _choose_kernels(optimizer: torch.optim.Optimizer) -> None:
    """Triton for plain CUDA tensors, plain torch elsewhere (optimi 0.3.3 decides on an empty list: Triton even on CPU)."""
    for group in optimizer.param_groups:
        group["triton"] = HAS_TRITON and all(p.is_cuda and not isinstance(p, DTensor) for p in group["params"])
        group["foreach"] = False


def _after_load(optimizer: torch.optim.Optimizer) -> None:
    """A checkpoint brings the kernel choice and the state's shape of the machine that wrote it; this restores ours."""
    _choose_kernels(optimizer)
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = group["step"].cpu()  # read as an int each step
        for p in group["params"]:
            state = optimizer.state[p]
            if group["triton"] and "kahan_comp" in state and state["kahan_comp"] is None:
                state["kahan_comp"] = torch.zeros(1, dtype=torch.uint8, device=p.device)  # the kernel wants a pointer


def _sum_over_shards(params: list[DTensor], values: list[Tensor]) -> None:
    """Replaces each rank's scalar with its sum over the ranks that hold the other shards of that parameter.

    One all-reduce for all parameters that are sharded alike (so one in all under FSDP2). Mesh dimensions that hold
    replicas are left out: every replica holds the whole sum already.
    """
    alike: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    for i, p in enumerate(params):
        dims = tuple(d for d, placement in enumerate(p.placements) if placement.is_shard())
        alike.setdefault((p.device_mesh, dims), []).append(i)
    for (mesh, dims), indices in alike.items():
        vector = torch.stack([values[i] for i in indices])
        for dim in dims:
            dist.all_reduce(vector, group=mesh.get_group(dim))
        for i, value in zip(indices, vector.unbind()):
            values[i] = value


def fsdp2_gradient_factor(model: nn.Module) -> float:
    """What FSDP2's gradients must be multiplied by to be averages over ranks: 1.0 where the backend averages.

    FSDP2 asks its backend for an average. gloo in torch 2.7.0 sums instead, without a word: seen with 4 ranks and a bias
    whose gradient is 1 on each, which comes out as 4. So this asks the backend itself, by one tiny reduce-scatter; every
    rank must call it. StableAdamW nearly hides such a factor, but clipping and other optimizers do not.
    `callbacks.Clock` applies it to the gradient of the loss, before anything reads a gradient.
    """
    sharded = next((p for p in model.parameters() if isinstance(p, DTensor)), None)
    if sharded is None:
        return 1.0
    mesh = sharded.device_mesh
    dim = max(d for d, placement in enumerate(sharded.placements) if placement.is_shard())
    group, device = mesh.get_group(dim), sharded.to_local().device
    result = torch.zeros(1, device=device)
    ones = torch.ones(dist.get_world_size(group), device=device)
    dist.reduce_scatter_tensor(result, ones, op=dist.ReduceOp.AVG, group=group)
    return 1.0 / round(result.item())  # an average of ones may come out a rounding error beside 1


class _Schedule(ComposerScheduler):
    """Times given as strings, brought to the unit of the run's max_duration."""

    def __init__(self, alpha_f: float, **times: str | Time):
        if not 0.0 <= alpha_f <= 1.0:
            raise ValueError(f"scheduler.alpha_f: {alpha_f!r} given; the final factor on the peak lr must be in [0, 1]")
        self.alpha_f = alpha_f
        self.times = {name: _parse_time(name, value) for name, value in times.items()}

    def _in_one_unit(self, state: State, ssr: float) -> tuple[float, dict[str, float]]:
        """The run's present time, and the schedule's times, as numbers in the unit of max_duration."""
        if ssr != 1.0:
            raise ValueError(f"scale_schedule_ratio: {ssr} given; only 1.0 is allowed here. Give times in dur instead")
        if state.max_duration is None:
            raise ValueError("max_duration: missing; the schedule needs it. Give it in tok or ba")
        unit, total = state.max_duration.unit, state.max_duration.value
        if unit not in (TimeUnit.TOKEN, TimeUnit.BATCH):
            raise ValueError(f"max_duration: {state.max_duration.to_timestring()} given; the loader is endless, so only tok "
                             "and ba are allowed. Give the run's length in tokens")
        numbers = {}
        for name, time in self.times.items():
            if time.unit == TimeUnit.DURATION:
                numbers[name] = time.value * total
            elif time.unit == unit or time.value == 0:
                numbers[name] = float(time.value)
            else:
                raise ValueError(f"scheduler.{name}: {time.to_timestring()} given with max_duration "
                                 f"{state.max_duration.to_timestring()}; use its unit ({unit.value}) or dur")
        spent = sum(value for name, value in numbers.items() if name != "t_max")
        if spent > numbers["t_max"] * (1 + 1e-12):  # 0.3dur + 0.7dur may round to a hair above 1dur
            names = " + ".join(name for name in numbers if name != "t_max")
            raise ValueError(f"scheduler: {names} is {spent:.0f}{unit.value}, more than t_max "
                             f"({numbers['t_max']:.0f}{unit.value}); shorten them or lengthen the run")
        return float(state.timestamp.get(unit).value), numbers


def _parse_time(name: str, value: str | Time) -> Time:
    try:
        time = value if isinstance(value, Time) else Time.from_timestring(value)
    except (TypeError, ValueError):
        time = None
    if time is None or time.unit not in (TimeUnit.TOKEN, TimeUnit.BATCH, TimeUnit.DURATION) or time.value < 0:
        raise ValueError(f"scheduler.{name}: {value!r} given; a time of at least 0 in tok, ba or dur is needed, such as "
                         "3000000000tok, 500ba or 0.2dur")
    return time


class WarmupStableDecay(_Schedule):
    """`warmup_stable_decay` as a Composer scheduler.

    Args:
        t_warmup: length of the warm-up, in tok, ba or dur (a share of max_duration).
        t_decay: length of the final linear decay; "0tok" for none.
        t_max: when the decay ends.
        alpha_f: factor on the peak lr at t_max, in [0, 1].

    Raises:
        ValueError: an unknown unit, alpha_f outside [0, 1], or a warm-up and decay that do not fit into t_max.
    """

    def __init__(self, t_warmup: str | Time, t_decay: str | Time, *, t_max: str | Time = "1dur", alpha_f: float = 0.0):
        super().__init__(alpha_f, t_warmup=t_warmup, t_decay=t_decay, t_max=t_max)

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        t, times = self._in_one_unit(state, ssr)
        return warmup_stable_decay(
            t, warmup=times["t_warmup"], decay=times["t_decay"], total=times["t_max"], alpha_f=self.alpha_f)


class OneMinusSqrt(_Schedule):
    """`one_minus_sqrt` as a Composer scheduler.

    Args:
        t_decay: length of the decay, above 0; by default the whole run.
        t_max: when the decay ends.
        alpha_f: factor on the peak lr at t_max, in [0, 1].

    Raises:
        ValueError: an unknown unit, alpha_f outside [0, 1], no decay at all, or one longer than t_max.
    """

    def __init__(self, t_decay: str | Time = "1dur", *, t_max: str | Time = "1dur", alpha_f: float = 0.0):
        super().__init__(alpha_f, t_decay=t_decay, t_max=t_max)
        if self.times["t_decay"].value == 0:
            raise ValueError(f"scheduler.t_decay: {t_decay!r} given; one_minus_sqrt must decay over something. For a flat "
                             "lr use warmup_stable_decay with t_decay: 0tok")

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        t, times = self._in_one_unit(state, ssr)
        return one_minus_sqrt(t, decay=times["t_decay"], total=times["t_max"], alpha_f=self.alpha_f)
