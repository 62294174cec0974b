"""Memory and time of `ettin export`, `export --every` and `average`: `python benchmarks/export_memory.py --size 400m`.

Checkpoints with optimizer state, as Composer lays them out, are made in a temporary folder and deleted afterwards.
Each command runs in a process of its own. Its peak is the kernel's (VmHWM: heap and mapped pages that were touched);
the highest heap (RssAnon) is sampled every 10 ms. `imports only` is what torch and transformers take before any
weight is read.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from conftest import SEED, VOCAB_SIZE, make_documents  # noqa: E402

from ettin_foundry.data.tokenizer import save, train_bpe  # noqa: E402
from ettin_foundry.model.config import EttinConfig  # noqa: E402
from ettin_foundry.model.weights import tensor_table, weights_checkpoint  # noqa: E402

_IMPORTS = ("import torch, transformers, safetensors.torch, ettin_foundry.model.weights, "
            "ettin_foundry.training.checkpoints")
_COMMAND = "import sys; from ettin_foundry.cli.main import main; main(sys.argv[1:])"


class Peak(NamedTuple):
    """Of one process: seconds, highest resident memory and highest heap, in bytes."""

    seconds: float
    total: int
    heap: int


def make_checkpoint(path: Path, size: str, tokenizer: Path, batch: int, *, causal: bool) -> EttinConfig:
    """A checkpoint of random weights with the two moments of StableAdamW beside them."""
    config = EttinConfig.for_size(size, causal=causal)
    generator = torch.Generator().manual_seed(batch)
    state = {row.name: torch.empty(row.shape).normal_(0, 0.02, generator=generator) for row in tensor_table(config)}
    objective = "clm" if causal else "mlm"
    content = weights_checkpoint(state, config, objective=objective, tokenizer=str(tokenizer))
    content["state"]["callbacks"]["Clock"].update(tokens=1000 * batch, batch=batch, phase="pretrain", run_name="run",
                                                  run_hash="0" * 64, objective_schedule=json.dumps(objective))
    moments = {f"model.{name}": {key: torch.zeros_like(t) for key in ("exp_avg", "exp_avg_sq")}
               for name, t in state.items()}
    content["state"]["optimizers"] = {"StableAdamW": {"state": moments, "param_groups": []}}
    torch.save(content, path)
    return config


def watch(code: str, *arguments: Any) -> Peak:
    """Runs `python -c code arguments` to its end.

    Raises:
        RuntimeError: it failed.
    """
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    peak = dict.fromkeys(("VmHWM", "RssAnon"), 0)  # getrusage's maximum starts with the fork's
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in peak:
                peak[name] = max(peak[name], 1024 * int(value.split()[0]))
        time.sleep(0.01)
    if process.returncode:
        raise RuntimeError(f"{arguments}: {process.communicate()[1][-2000:]}")
    return Peak(time.monotonic() - begin, peak["VmHWM"], peak["RssAnon"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", default="400m")
    parser.add_argument("--checkpoints", type=int, default=3, help="for --every and average")
    parser.add_argument("--only", nargs="*", help="names of rows")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save(train_bpe(make_documents(300, seed=SEED + 1), VOCAB_SIZE), folder / "tokenizer")
        runs = folder / "runs"
        runs.mkdir()
        for batch in range(1, arguments.checkpoints + 1):
            config = make_checkpoint(runs / f"ep0-ba{batch}-rank0.pt", arguments.size, folder / "tokenizer", batch,
                                     causal=True)
        last = runs / f"ep0-ba{arguments.checkpoints}-rank0.pt"
        weights = 4 * config.num_parameters
        print(f"{arguments.size}: weights {weights / 1e9:.2f} GB in fp32, "
              f"checkpoint {last.stat().st_size / 1e9:.2f} GB\n\n"
              "| command | seconds | peak GB | of it heap GB | peak above imports / weights |\n|---|---|---|---|---|")
        base = watch(_IMPORTS)
        rows = {
            "imports only": lambda: base,
            "export": lambda: watch(_COMMAND, "export", last, folder / "hf"),
            f"export --every, {arguments.checkpoints} checkpoints":
                lambda: watch(_COMMAND, "export", "--every", runs, folder / "all"),
            f"average --last {arguments.checkpoints}":
                lambda: watch(_COMMAND, "average", runs, folder / "mean.pt", "--last", arguments.checkpoints),
        }
        for name, run in rows.items():
            if not arguments.only or name in arguments.only:
                peak = run()
                print(f"| {name} | {peak.seconds:.1f} | {peak.total / 1e9:.2f} | {peak.heap / 1e9:.2f} | "
                      f"{(peak.total - base.total) / weights:.2f} |", flush=True)


if __name__ == "__main__":
    main()
