"""What the main process does in a step besides the model: milliseconds per part, for the two shapes of the recipes.

    python benchmarks/host_step.py runs/demo/data                      this tree
    python benchmarks/host_step.py runs/demo/data . ../other-tree      several trees, in turn

The run is the real one: LLM-Foundry's `train` on yamls/nano.yaml, with loader workers, Composer's Trainer and the
recipes' callbacks. Only the model's pass is left out: its loss is a constant of one parameter, so what is timed is what
a GPU would wait for: CPU time of the main thread, whatever else the machine does. 352 rows of 1,024 in microbatches of
88, and 128 rows of 8,192 in microbatches of 8, as 150m has them; one thread, no GPU, so nothing is pinned or copied to
a device. Medians over the steps.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS, WORKERS = 24, 2
SHAPES = ((352, 1024, 88), (128, 8192, 8))  # rows of a batch, tokens of a row, rows of a microbatch
PARTS = ("take the batch", "split it", "count", "copy of a microbatch", "events of the step", "events of microbatches",
         "to the device", "sums over ranks", "all others", "in all")


class Spent:
    """CPU seconds of the main thread by part, of the step that runs; a part called by another one counts there."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.steps: list[dict[str, float]] = []
        self.inside, self.begun = False, time.thread_time()

    def next_step(self) -> None:
        now = time.thread_time()
        self.steps.append({**self.seconds, "in all": now - self.begun})
        self.begun = now
        self.seconds.clear()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return function(*args, **kwargs)
            name = part
            if part == "events":  # of the engine: the callbacks and loggers, and the host's own work around them
                of_pass = any(word in args[1].value for word in ("forward", "loss", "backward"))
                name = "events of microbatches" if of_pass else "events of the step"
            self.inside, begin = True, time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.thread_time() - begin
                self.inside = False
        return call

    def medians(self) -> dict[str, float]:
        """{part: milliseconds a step}; the first steps, which open shards and start workers, are left out."""
        found = {part: 1e3 * statistics.median(step.get(part, 0.0) for step in self.steps[4:]) for part in PARTS}
        found["all others"] = found["in all"] - sum(found[part] for part in PARTS[:-2])
        return found


def measure(data: str, rows: int, length: int, microbatch: int) -> dict[str, float]:
    """{part: median milliseconds a step} of the tree on PYTHONPATH."""
    sys.path.insert(0, os.getcwd())  # for the tree's train.py
    import composer.trainer.trainer as host
    import torch
    from composer.core import DataSpec, Engine
    from composer.devices import DeviceCPU
    from llmfoundry.command_utils import train as run_training
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    import ettin_foundry.model.composer as model
    from ettin_foundry import register
    from train import configure

    torch.set_num_threads(1)
    register()
    spent = Spent()

    def without_pass(inner: Any, batch: dict[str, Any]) -> dict[str, Any]:
        loss = inner.output_bias.sum() * 0 + 1
        return {"loss": loss, "nll": loss, "correct": None, "num_targets": 1, "num_loss_tokens": 1}

    next_batch, made = spent.timed("take the batch", _BaseDataLoaderIter.__next__), DataSpec.__init__

    def take(iterator: Any) -> Any:
        spent.next_step()
        return next_batch(iterator)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:  # it keeps the functions that it is given
        made(self, *args, **kwargs)
        self.split_batch = spent.timed("split it", self.split_batch)
        self.get_num_samples_in_batch = spent.timed("count", self.get_num_samples_in_batch)

    iterators: Any = _BaseDataLoaderIter
    model.batch_loss, iterators.__next__, DataSpec.__init__ = without_pass, take, init
    for owner, name, part in ((Engine, "run_event", "events"), (DeviceCPU, "batch_to_device", "to the device"),
                              (host, "deepcopy", "copy of a microbatch"), (host.dist, "all_reduce", "sums over ranks"),
                              (DataSpec, "get_num_tokens_in_batch", "count")):
        setattr(owner, name, spent.timed(part, getattr(owner, name)))
    with tempfile.TemporaryDirectory() as folder:
        run_training(configure([
            "yamls/nano.yaml", f"variables.data={data}", f"variables.max_seq_len={length}",
            f"global_train_batch_size={rows}", f"variables.microbatch_tokens={microbatch * length}",
            f"variables.eval_tokens={length}", f"max_duration={STEPS}ba", f"variables.save_root={folder}",
            f"train_loader.num_workers={WORKERS}", "eval_loader=null", "save_interval=1000ba",
            "loggers.ettin_console=null"])).close()
    return spent.medians()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="a converted dataset with chunks of at most 1,022 tokens")
    parser.add_argument("trees", nargs="*", default=["."], help="checkouts to compare")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    data = str(Path(options.dataset).resolve())
    if options.child is not None:
        print(*measure(data, *SHAPES[options.child]).values())
        return
    for number, (rows, length, microbatch) in enumerate(SHAPES):
        print(f"{rows} rows of {length:,}, microbatches of {microbatch} rows: ms a step")
        columns = []
        for tree in options.trees:
            env = {**os.environ, "PYTHONPATH": str(Path(tree).resolve()), "OMP_NUM_THREADS": "1",
                   "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
            command = [sys.executable, "-P", str(Path(__file__).resolve()), data, "--child", str(number)]
            done = subprocess.run(command, env=env, cwd=tree, stdout=subprocess.PIPE, text=True, check=True)
            columns.append([float(word) for word in done.stdout.split()[-len(PARTS):]])
        print(f"{'':>22}" + "".join(f"{tree:>16}" for tree in options.trees))
        for part, *values in zip(PARTS, *columns):
            print(f"{part:>22}" + "".join(f"{value:16.2f}" for value in values), flush=True)


if __name__ == "__main__":
    main()
