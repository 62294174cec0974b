"""How long a save holds training: the host's own, the same but whole or absent, and from a copy in host memory.

    python benchmarks/save_hold.py FOLDER [SIZE ...]

Saves weights and both moments of SIZE (17m and 400m) in fp32 from the CPU's memory, which must hold them twice, into
FOLDER by Composer's saver and by this package's. Training is held until `_save_checkpoint` returns; a write is done
when the file is on the disk.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from composer import callbacks  # noqa: E402
from composer.core import Timestamp  # noqa: E402
from composer.utils import checkpoint  # noqa: E402

from ettin_foundry.model.config import EttinConfig  # noqa: E402
from ettin_foundry.model.transformer import Ettin  # noqa: E402
from ettin_foundry.training import saving  # noqa: E402


def state_of(size: str) -> Any:
    """A run's state as far as a saver asks for it."""
    with torch.device("meta"):
        model = Ettin(EttinConfig.for_size(size, causal=False))
    shapes = {name: value.shape for name, value in model.named_parameters()}
    content = {part: {name: torch.full(shape, 0.1) for name, shape in shapes.items()}
               for part in ("model", "exp_avg", "exp_avg_sq")}
    return SimpleNamespace(run_name="run", fsdp_sharded_state_dict_enabled=False, timestamp=Timestamp(batch=1),
                           state_dict=lambda: content)


def seconds(saver: callbacks.CheckpointSaver, state: Any, path: Path) -> tuple[float, float]:
    """Until a save lets training go on, and until all of it is on the disk."""
    begin, logger = time.perf_counter(), SimpleNamespace(destinations=[])
    saver._save_checkpoint(state, logger)  # type: ignore[arg-type]
    held = time.perf_counter() - begin
    saving.wait_for_write()
    with path.open("rb") as file:
        os.fsync(file.fileno())
    done = time.perf_counter() - begin
    path.unlink()
    return held, done


def main(folder: Path, sizes: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    composers, path = checkpoint._write_checkpoint_file, folder / "ep0-ba1-rank0.pt"
    print("| size | GB | saver | held s | on the disk after s |\n|---|---|---|---|---|")
    for size in sizes:
        state = state_of(size)
        for name, saver, write in (("Composer's", callbacks.CheckpointSaver, composers),
                                   ("whole or absent", callbacks.CheckpointSaver, saving.write_whole),
                                   ("from a copy", saving.CheckpointSaver, saving.write_whole)):
            checkpoint._write_checkpoint_file = write
            gigabytes = sum(v.nbytes for part in state.state_dict().values() for v in part.values()) / 1e9
            held, done = seconds(saver(str(folder), overwrite=True, remote_file_name=None), state, path)
            print(f"| {size} | {gigabytes:.2f} | {name} | {held:.2f} | {done:.2f} |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or ["17m", "400m"])
