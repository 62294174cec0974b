"""Is a killed and resumed run the run that nothing interrupts, to the last bit? A table of cells, one line each:

    python benchmarks/resume_matrix.py [CELL...]    (all cells: about 6 minutes on two cores; --list names them)

Each cell trains nano for 12 steps twice: once undisturbed, and once killed with SIGKILL before steps 5 and 9, by every
rank itself, and started again by the same command, so that autoresume finds the newest checkpoint. Every step writes
down its loss, learning rate, tokens, rows, masks, parameters, moments and the state of all random generators; both runs
must write the same. An elastic cell goes on with other numbers of ranks, without dropout (whose draws differ by rank):
rows, masks, tokens and learning rates are then the same, losses within 1e-5.

The cells: values of six axes, such that each pair of values of two axes is in one of them at least.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import itertools
import json
import multiprocessing.connection
import multiprocessing.forkserver
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PATHS = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
sys.path[:0] = PATHS
PRELOAD = ["nano_run", "ettin_foundry.training.callbacks", "ettin_foundry.training.clock", "ettin_foundry.data.loader",
           "ettin_foundry.training.checks", "ettin_foundry.training.optimizer", "ettin_foundry.model.composer",
           "ettin_foundry.training.checkpoints", "llmfoundry.command_utils", "torch.distributed.checkpoint"]

STEPS, SAVES = 12, 2
ELASTIC_TOLERANCE = 1e-5  # of losses, relative: other ranks add in another order
OBJECTIVES = {
    "mlm": [], "clm": ["variables.objective=clm", "variables.mask_rate=0.0"], "mntp": ["variables.objective=mntp"],
    # the switch lies after the first resume
    "schedule": ["variables.objective=[{{until: {until}, objective: clm}}, {{objective: mlm}}]",
                 "variables.label=schedule"],
    "mixture": ["variables.objective={{mntp: 0.5, clm: 0.5}}", "variables.label=mixture", "variables.mask_rate=0.15"]}
LAYOUTS = {"one": [], "ddp": [], "fsdp": ["fsdp_config.state_dict_type=full", "callbacks.averages={}"],
           "sharded": ["fsdp_config.state_dict_type=sharded", "callbacks.averages={}"]}
AXES = {"objective": list(OBJECTIVES), "packing": ["packed", "unpacked"], "batch": ["steady", "rising"],
        "workers": ["w0", "w2", "w4"], "epoch": ["inside", "across"], "layout": list(LAYOUTS)}
CELLS = """
mlm-unpacked-steady-w0-inside-one
clm-packed-rising-w2-across-one
mntp-packed-rising-w4-inside-one
schedule-unpacked-steady-w4-across-one
mixture-packed-steady-w0-across-one
mlm-unpacked-rising-w2-inside-ddp
clm-unpacked-steady-w4-across-ddp
mntp-packed-steady-w2-across-ddp
schedule-packed-rising-w0-inside-ddp
mixture-unpacked-rising-w2-inside-ddp
mlm-packed-steady-w4-across-fsdp
clm-unpacked-rising-w0-inside-fsdp
mntp-unpacked-steady-w0-across-fsdp
schedule-unpacked-rising-w2-inside-fsdp
mixture-unpacked-steady-w4-across-fsdp
mlm-unpacked-rising-w0-inside-sharded
clm-packed-steady-w4-across-sharded
mntp-packed-steady-w2-across-sharded
schedule-packed-rising-w0-inside-sharded
mixture-packed-rising-w4-inside-sharded
""".split()
for _one, _other in itertools.combinations(zip(AXES.values(), zip(*(cell.split("-") for cell in CELLS))), 2):
    assert set(itertools.product(_one[0], _other[0])) == set(zip(_one[1], _other[1])), "a pair of values is in no cell"
# what each start runs on; the batch rises until step 9
ELASTIC = {"elastic-steady": "one ddp2 ddp4 one", "elastic-rising": "one ddp2 ddp4 one",
           "elastic-fsdp-rising": "one fsdp2 fsdp4 one", "elastic-sharded": "sharded2 sharded4 sharded2 sharded4"}


# ------------------------------------------------------------------ processes


def _train(rank: int, world: int, port: int, log: str, env: dict[str, str], data: str, out: str,
           overrides: Sequence[str]) -> None:
    """One rank, in a process of its own."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    multiprocessing.set_start_method("fork", force=True)  # of the loader's workers, as in a run by hand
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
                      NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **env)
    import nano_run
    from composer.utils import collect_env

    gc.freeze()  # what the server imported; collecting it would copy its pages
    collect_env.get_cpu_model = lambda: "not asked for"  # it takes a process of 0.4 s
    _register_callbacks()
    nano_run.run(Path(data), Path(out), *overrides).close()


def _make_data(folder: str, documents: int, shard_size: str) -> None:
    from conftest import CHUNK_LENGTH, SEED, VOCAB_SIZE, make_documents

    from ettin_foundry.corpus.convert import ConvertOptions, convert
    from ettin_foundry.data.tokenizer import save, train_bpe

    corpus, tokenizer = Path(folder, "corpus"), Path(folder, "tokenizer")
    corpus.mkdir(parents=True)
    with (corpus / "texts.jsonl").open("w") as file:
        file.writelines(json.dumps({"id": f"doc-{i}", "text": text}) + "\n"
                        for i, text in enumerate(make_documents(documents)))
    save(train_bpe(make_documents(300, seed=SEED + 1), VOCAB_SIZE), tokenizer)
    convert(ConvertOptions(sources=[str(corpus)], out=Path(folder, "set"), tokenizer=tokenizer, workers=1,
                           chunk_length=CHUNK_LENGTH, cut_window=0.1, validation=0.1, shard_size=shard_size))


class Launcher:
    """Starts ranks from a server that has imported the host and started no thread: 0.1 s in place of 10 s a rank."""

    def __init__(self) -> None:
        os.environ.update(PYTHONPATH=os.pathsep.join(PATHS), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
                          OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)
        multiprocessing.forkserver.ensure_running()  # it imports while others do something else

    def make_data(self, folder: Path, *, documents: int = 200, shard_size: str = "12kb") -> Path:
        """A small corpus, converted: the dataset's folder."""
        process = self.context.Process(target=_make_data, args=(str(folder), documents, shard_size))
        process.start()
        process.join()
        assert process.exitcode == 0
        return folder / "set"

    def start(self, world: int, data: Path, out: Path, log: Path, overrides: Sequence[str],
              **env: str) -> list[Any]:
        """The processes of a run of `world` ranks, each the leader of a process group; rank 1 logs to LOG.1."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        logs = [f"{log}.{rank}" if rank else str(log) for rank in range(world)]
        ranks = [self.context.Process(target=_train, args=(
            rank, world, port, logs[rank], env, str(data), str(out), list(overrides))) for rank in range(world)]
        for process in ranks:
            process.start()
        return ranks


def kill(ranks: Iterable[Any], number: int = signal.SIGKILL) -> None:
    """Sends a signal to each rank and to what it has started."""
    for process in ranks:
        with contextlib.suppress(ProcessLookupError):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:  # it has ended, or leads no group yet
                if process.is_alive():
                    os.kill(process.pid, number)


def ended(ranks: Sequence[Any], *, seconds: float = 300) -> list[int | None]:
    """Waits for all ranks, and kills the others once one has failed, as a launcher does; their exit statuses."""
    end, grace = time.monotonic() + seconds, None
    while any(process.is_alive() for process in ranks) and time.monotonic() < min(end, grace or end):
        multiprocessing.connection.wait([process.sentinel for process in ranks if process.is_alive()], timeout=0.5)
        if grace is None and any(process.exitcode for process in ranks):
            grace = time.monotonic() + 3
    found = [process.exitcode for process in ranks]
    kill(ranks)
    for process in ranks:
        process.join()
    return found


# ------------------------------------------------------------------ what a run was


def _digest(arrays: Iterable[Any]) -> str:
    found = hashlib.blake2b(digest_size=8)
    for array in arrays:
        found.update(array.detach().contiguous().numpy().data if hasattr(array, "detach") else repr(array).encode())
    return found.hexdigest()


def _register_callbacks() -> None:
    """Registers the callbacks `witness` and `averages`."""
    import nano_run
    import numpy as np
    import torch
    from composer import Callback
    from llmfoundry import registry

    class Averages(Callback):
        """Averages the gradients, which torch 2.7's FSDP2 sums under gloo."""

        def before_backward(self, state: Any, logger: Any) -> None:
            state.loss.register_hook(lambda gradient: gradient / int(os.environ["WORLD_SIZE"]))

    class Witness(Callback):
        """Writes a line a step to the file `path` of this rank; kills its process before the step `die_at`."""

        def __init__(self, path: str, die_at: int = -1) -> None:
            self.path, self.kill_at, self.entry = Path(f"{path}.{os.environ['RANK']}"), die_at, {}

        def before_train_batch(self, state: Any, logger: Any) -> None:
            if state.timestamp.batch == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            rows = nano_run.rows_of(state)
            self.entry = {"step": rows["step"], "tokens": int(state.timestamp.token), "hash": rows["ids_hash"],
                          "lr": state.optimizers[0].param_groups[0]["lr"], "objective": rows["objective"],
                          "masks": [_digest(row) for row in zip(rows["input_ids"], rows["labels"])]}

        def batch_end(self, state: Any, logger: Any) -> None:
            local = [getattr(p, "to_local", lambda p=p: p)() for p in state.model.parameters()]
            moments = [getattr(value, "to_local", lambda value=value: value)()
                       for p in state.model.parameters() for value in state.optimizers[0].state[p].values()]
            line = {**self.entry, "loss": float(state.total_loss_dict["loss/train/total"]),
                    "parameters": _digest(local), "moments": _digest(moments),
                    "generators": _digest([torch.get_rng_state(), np.random.get_state(legacy=True), random.getstate()])}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    registry.callbacks.register("witness", func=Witness)
    registry.callbacks.register("averages", func=Averages)


def read_witness(path: Path) -> dict[int, list[dict[str, Any]]]:
    """{step: what each process wrote of it}; a step done again is there again."""
    found: dict[int, list[dict[str, Any]]] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        found.setdefault(entry["step"], []).append(entry)
    return found


def difference(whole: Path, parts: Path, world: int) -> str:
    """`bitwise`, or the first step that differs and in what."""
    for rank in range(world):
        expected, found = (read_witness(Path(f"{path}.{rank}")) for path in (whole, parts))
        if sorted(found) != sorted(expected):
            return f"steps {sorted(found)} for {sorted(expected)}"
        for step, [entry] in sorted(expected.items()):
            for again in found[step]:
                if differ := [f"{key} {entry[key]} / {again[key]}" for key in entry if entry[key] != again[key]]:
                    return f"rank {rank}, step {step}: {'; '.join(differ)}"[:300]
    return "bitwise"


def elastic_difference(whole: Path, parts: Path, most: int) -> str:
    """`rows identical, losses within ...`, or the first step that differs and in what."""
    expected, ranks = read_witness(Path(f"{whole}.0")), [Path(f"{parts}.{rank}") for rank in range(most)]
    found, largest = [read_witness(path) for path in ranks if path.exists()], 0.0
    if sorted(found[0]) != sorted(expected):
        return f"steps {sorted(found[0])} for {sorted(expected)}"
    for step, [entry] in sorted(expected.items()):
        rows = sum(len(again["masks"]) for rank in found for again in rank.get(step, []))
        if rows != len(entry["masks"]) * len(found[0][step]):
            return f"step {step}: {rows} rows for {len(entry['masks'])}, done {len(found[0][step])} times"
        masks = [mask for rank in found for again in rank.get(step, []) for mask in again["masks"]]
        if sorted(masks) != sorted(entry["masks"] * len(found[0][step])):
            return f"step {step}: other rows or masks"
        for again in found[0][step]:
            if differ := [key for key in ("tokens", "lr", "objective") if entry[key] != again[key]]:
                return f"step {step}: {differ}"
            largest = max(largest, abs(again["loss"] - entry["loss"]) / entry["loss"])
    return f"{'rows identical, losses within' if largest <= ELASTIC_TOLERANCE else 'losses differ by'} {largest:.1e}"


# ------------------------------------------------------------------ cells


def settings(objective: str, packing: str, batch: str, workers: str, epoch: str) -> list[str]:
    """Keys of a run; its 12 steps read more than an epoch of 325 rows (411 unpacked), or a part of it."""
    rows = 64 if epoch == "across" else 16
    until = rows * (150 if batch == "rising" else 300)
    keys = [key.format(until=until) for key in OBJECTIVES[objective]]
    rising = [f"train_loader.batch_size_warmup={{min_size: {rows // 4}, tokens: {rows * 990 // 4}}}"]  # 3 steps a size
    return [*keys, *(rising if batch == "rising" else []), f"variables.global_batch={rows}",
            f"train_loader.packing={str(packing == 'packed').lower()}", f"train_loader.num_workers={workers[1:]}",
            f"max_duration={STEPS}ba", f"save_interval={SAVES}ba", "save_num_checkpoints_to_keep=3"]


class Matrix:
    """Runs cells in a folder of their own."""

    def __init__(self, folder: Path, data: Path | None, kills: int) -> None:
        self.folder, self.launcher, self.kills = folder, Launcher(), (5, 9)[2 - kills:]
        self.data = data or self.launcher.make_data(folder / "data")

    def cell(self, name: str) -> str:
        """`bitwise`, `rows identical, losses within ...`, or the difference."""
        if name in ELASTIC:
            return self._elastic(name)
        *values, layout = name.split("-")
        keys, world = settings(*values), 1 if layout == "one" else 2
        whole, parts = self.folder / name / "whole", self.folder / name / "parts"
        self._start(whole, f"{layout}{world}", keys)
        for die_at in (*self.kills, -1):
            self._start(parts, f"{layout}{world}", keys, die_at)
        return difference(whole / "witness", parts / "witness", world)

    def _elastic(self, name: str) -> str:
        keys = [*settings("mlm", "packed", "rising" if "rising" in name else "steady", "w0", "inside"),
                "model.attn_out_dropout=0.0"]
        whole, parts, layouts = self.folder / name / "whole", self.folder / name / "parts", ELASTIC[name].split()
        self._start(whole, "one1", keys)
        for layout, die_at in zip(layouts, (3, 5, 9, -1)):
            self._start(parts, layout if layout[-1].isdigit() else f"{layout}1", keys, die_at)
        return elastic_difference(whole / "witness", parts / "witness", max(int(each[-1]) for each in layouts[1:3]))

    def _start(self, out: Path, layout: str, keys: list[str], die_at: int = -1) -> None:
        """Trains until the end, or until all ranks kill themselves before the step `die_at`."""
        kind, world = layout[:-1], int(layout[-1])
        out.mkdir(parents=True, exist_ok=True)
        rows = int(next(key for key in keys if key.startswith("variables.global_batch=")).partition("=")[2])
        micro = rows // (4 if any("batch_size_warmup" in key for key in keys) else 2) // world  # the first size's rows
        witness = [f"callbacks.witness.path={out / 'witness'}", f"callbacks.witness.die_at={die_at}"]
        ranks = self.launcher.start(world, self.data, out / "runs", out / "log", [
            *keys, *LAYOUTS[kind], *witness, f"device_train_microbatch_size={micro}"], FSDP_VERSION="2")
        try:
            statuses = ended(ranks)
        finally:
            kill(ranks)
        # of several ranks, the first that dies takes the connection of the others with it
        if (any(statuses) if die_at < 0 else -signal.SIGKILL not in statuses):
            raise RuntimeError(f"{out}: exit statuses {statuses}; {(out / 'log').read_text()[-3000:]}")
        if die_at >= 0:
            with next((out / "runs").glob("*/steps.jsonl")).open("a") as file:
                file.write(f'{{"step": {die_at}, "tok')  # as if it had been killed while it wrote


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("cells", nargs="*", metavar="CELL")
    parser.add_argument("--data", type=Path, help="a dataset of rows of 64 tokens; one is made if left out")
    parser.add_argument("--kills", type=int, default=2, choices=(1, 2), help="1: before step 9 only; not of elastic")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    known = [*CELLS, *ELASTIC]
    if arguments.list:
        print(*known, sep="\n")
        return 0
    if unknown := [name for name in arguments.cells if name not in known]:
        parser.error(f"CELL must be one of --list, got {unknown[0]}")
    wrong, begin = 0, time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing is left running
    with tempfile.TemporaryDirectory() as folder:
        matrix = Matrix(Path(folder), arguments.data, arguments.kills)
        for name in arguments.cells or known:
            found = matrix.cell(name)
            wrong += not found.startswith(("bitwise", "rows identical"))
            print(f"{name} -> {found}", flush=True)
    print(f"{len(arguments.cells or known)} cells, {wrong} different, {time.monotonic() - begin:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
