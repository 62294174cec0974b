"""Short nano runs through the true path for the tests of training: yamls/nano.yaml, LLM-Foundry's `train`, one process.

Also a program: `python tests/nano_run.py OUT KEY=VALUE...` trains with DDP and then with FSDP2 as one of the ranks that
the environment describes, evaluates, and writes what it captured (see test_ranks.py).
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import multiprocessing
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf as om

from ettin_foundry.data.batch import split_batch

ROOT = Path(__file__).resolve().parents[1]
# nano with the small vocabulary of the fixtures; batches of 8 rows of 64 tokens
SMALL = ["variables.max_seq_len=64", "variables.global_batch=8", "model.vocab_size=512",
         "device_train_microbatch_size=4", "variables.warmup=1ba", "max_duration=8ba", "save_interval=4ba",
         "eval_interval=1000ba", "loggers.ettin_console=null",
         "~callbacks.speed_monitor", "~callbacks.runtime_estimator", "~callbacks.scheduled_gc"]
# sizes of batches go up: 2, 4, 6, 8 rows, two steps of each but the last
RISING = ["train_loader.batch_size_warmup={min_size: 2, tokens: 1400}", "device_train_microbatch_size=2",
          "max_duration=3000tok", "save_interval=3ba", "variables.warmup=2000tok"]
CLM = ["variables.objective=clm", "variables.mask_rate=0.0"]


def program() -> Any:
    """train.py as a module."""
    spec: Any = importlib.util.spec_from_file_location("ettin_train_program", ROOT / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def configure(data: Path, out: Path, *overrides: str, evaluate: bool = False) -> Any:
    """nano.yaml with `SMALL` and the overrides; `~key` removes a key. It evaluates only if asked to."""
    wanted = [*SMALL, *([] if evaluate else ["eval_loader=null"]), f"variables.data={data}",
              f"variables.save_root={out}", *overrides]
    if "~save_folder" in wanted and not any(each.startswith("callbacks.ettin_steps") for each in wanted):
        wanted.append("~callbacks.ettin_steps")  # it has nowhere to write
    config = program().configure([str(ROOT / "yamls" / "nano.yaml"), *(w for w in wanted if not w.startswith("~"))])
    for key in (w[1:] for w in wanted if w.startswith("~")):
        above, _, last = key.rpartition(".")
        (om.select(config, above, default={}) if above else config).pop(last, None)
    return config


def put(cfg: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config in plain containers with dotted keys set; the value `...` removes one."""
    cfg = copy.deepcopy(cfg)
    for key, value in changes.items():
        *blocks, last = key.split(".")
        block = cfg
        for part in blocks:
            block = block.setdefault(part, {})
        block[last] = value
        if value is ...:
            del block[last]
    return cfg


def rows_of(state: Any) -> dict[str, Any]:
    """The (B, T) batch of the step, made again from the stream; what the workers made of it is the same."""
    from composer.utils import dist

    batch, loader = state.batch, state.train_dataloader
    collate = copy.copy(loader.collate_fn)
    size, collate.microbatch_size = collate.microbatch_size, None
    rows = loader.dataset.rows_of(batch["step"], rank=dist.get_global_rank(), world_size=dist.get_world_size())
    again = collate(rows)
    for mine, theirs in zip(split_batch(again, size), batch["microbatches"].unpack(), strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key], key
    return {key: value for key, value in again.items() if key != "document_lengths"}  # torch.load takes no arrays


def collectives(profile: Any) -> Counter[str]:
    return Counter(event.name[6:].strip("_") for event in profile.function_events if event.name.startswith("c10d::"))


@functools.cache
def register_capture() -> type:
    """Registers the callback `capture`: what a test wants to see of the last run, kept on the class."""
    from composer import Callback
    from llmfoundry import registry

    class Capture(Callback):
        """Of each step losses, learning rates, tokens, batches, optimizer groups; of the first weights, moments,
        gradients, seed. Dies before the step `die_at`; before `tell_at` the last rank and its workers get the signal
        `tell`; `averages` gradients that FSDP2 sums under gloo (torch 2.7)."""

        def __init__(self, die_at: int = -1, averages: bool = False, tell_at: int = -1, tell: str = "SIGUSR1") -> None:
            self.die_at, self.averages, self.tell_at, self.tell = die_at, averages, tell_at, tell.removeprefix("SIG")
            Capture.losses, Capture.lrs, Capture.tokens, Capture.batches, Capture.groups = [], [], [], [], []
            Capture.weights, Capture.moments, Capture.gradients, Capture.seed = {}, {}, {}, None
            Capture.profile = torch.autograd.profiler.profile()

        def before_train_batch(self, state: Any, logger: Any) -> None:
            if state.timestamp.batch == self.die_at:
                raise RuntimeError("killed")
            if state.timestamp.batch == self.tell_at and os.environ.get("RANK", "0") == os.environ.get("TOLD", "0"):
                pids = [str(worker.pid) for worker in multiprocessing.active_children()]
                subprocess.run(["kill", "-s", self.tell, *pids, str(os.getpid())], check=True)  # from another process
            groups, parameters = state.optimizers[0].param_groups, dict(state.model.named_parameters())
            if not Capture.batches:
                Capture.seed, optimized = state.rank_zero_seed, state.optimizers[0].state
                Capture.weights = {name: p.detach().clone() for name, p in parameters.items()}
                Capture.moments = {name: optimized[p]["exp_avg_sq"].clone() for name, p in parameters.items()
                                   if p in optimized}
            Capture.batches.append(rows_of(state))
            Capture.groups.append([{**{k: float(v) for k, v in g.items() if k not in ("params", "betas")},
                                    "base_lr": state.schedulers[0].base_lrs[0]} for g in groups])
            Capture.lrs.append(groups[0]["lr"])
            Capture.tokens.append(int(state.timestamp.token))

        def before_backward(self, state: Any, logger: Any) -> None:
            if self.averages:
                state.loss.register_hook(lambda gradient: gradient / int(os.environ["WORLD_SIZE"]))

        def after_train_batch(self, state: Any, logger: Any) -> None:
            for name, p in state.model.named_parameters() if not Capture.gradients else ():
                own = name.replace("_checkpoint_wrapped_module.", "").replace("module.", "")
                Capture.gradients[own] = (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).clone()

        def batch_end(self, state: Any, logger: Any) -> None:
            Capture.losses.append(float(state.total_loss_dict["loss/train/total"]))
            if os.environ.get("WORLD_SIZE") == "2" and int(state.timestamp.batch) in (2, 3):  # the step's last callback
                # the third step alone: in the second, DDP agrees on its buckets
                Capture.profile.__exit__(None, None, None) if Capture.profile.entered else Capture.profile.__enter__()

    registry.callbacks.register("capture", func=Capture)
    return Capture


def metrics(trainer: Any) -> dict[str, float]:
    """The last evaluation's metrics over all ranks; every rank must call this."""
    return {name: float(metric.compute()) for name, metric in trainer.state.eval_metrics["eval"].items()}


def run(data: Path, out: Path, *overrides: str, evaluate: bool = False) -> Any:
    """Trains, evaluating as the recipe does if asked to; returns Composer's Trainer (close it)."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)  # nano gains nothing from a second thread; on a busy machine threads wait for each other
    from llmfoundry.command_utils import train

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(configure(data, out, *overrides, evaluate=evaluate))


def main(argv: list[str]) -> None:
    out, overrides = Path(argv[0]), argv[1:]
    data = Path(next(o.split("=", 1)[1] for o in overrides if o.startswith("variables.data=")))
    capture = register_capture()
    rank = int(os.environ["RANK"])
    for name, version, extra in (("ddp", "1", []), ("fsdp2", "2", ["fsdp_config.activation_checkpointing=true",
                                                              "callbacks.capture.averages=true"])):
        os.environ["FSDP_VERSION"] = version
        for objective, clm in (("mlm", []), ("clm", CLM)):
            folder = out / f"{name}-{objective}"
            trainer = run(data, folder, *overrides, *clm, "callbacks.capture={}", *extra,
                          f"callbacks.ettin_steps.folder={folder}", evaluate=True)
            torch.save({"losses": capture.losses, "gradients": capture.gradients, "lrs": capture.lrs,
                        "tokens": capture.tokens, "batches": capture.batches, "metrics": metrics(trainer),
                        "collectives": collectives(capture.profile)},
                       out / f"{name}-{objective}-rank{rank}.pt")
            trainer.close()
    # one rank is told to end a run that saves: both exit with the code of that
    run(data, out / "told", *(o for o in overrides if not o.startswith("~")), "callbacks.capture.tell_at=1",
        "max_duration=100000ba", "save_interval=100000ba", "eval_interval=100000ba", evaluate=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(sys.argv[1:])
