"""Saves that are killed, or whose disk fails, at any point: is the newest checkpoint that they leave whole?

    python benchmarks/save_kill.py CHECKPOINT FOLDER POINTS

Tries as many points of a save of CHECKPOINT's state into the new FOLDER by the host's saver, half with a kill and half
with an error: before each call that opens, writes, flushes, renames, links or removes, and at bytes of the file. Exits
with an error at the first checkpoint that is not whole.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from ettin_foundry.training import checkpoints  # noqa: E402

CALLS = {"open", "fsync", "replace", "remove", "unlink", "symlink", "close", "write", "mkdir", "flush"}


def saved_by_child(save: Any, dies: bool, call: int | None = None, byte: int | None = None) -> int:
    """Saves in a process that is killed, or gets an error, before its call number `call` or when it writes `byte`.

    The number of its calls where nothing was asked for, else 1 if the save came to its end.
    """
    count = 0

    def watch(frame: Any, event: str, function: Any) -> None:
        nonlocal count
        count += event == "c_call" and function.__name__ in CALLS
        if count == call and event == "c_call" and function.__name__ in CALLS:
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    if pid := os.fork():
        return max(0, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    done = 0
    try:
        if byte is not None:  # the kernel kills a process that writes beyond it, or says that it may not
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if dies else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (byte, resource.RLIM_INFINITY))
        sys.setprofile(watch)
        save()
        done = 1 if call is not None or byte is not None else min(count, 255)
    except OSError:
        pass
    finally:
        sys.setprofile(None)
        os._exit(done)


def main(checkpoint: Path, folder: Path, points: int) -> None:
    from composer.callbacks import CheckpointSaver
    from composer.core import Timestamp

    from ettin_foundry.training.clock import Clock

    torch.set_num_threads(1)
    state: Any = SimpleNamespace(run_name="run", fsdp_sharded_state_dict_enabled=False, timestamp=Timestamp(batch=2),
                                 state_dict=lambda: torch.load(checkpoint, weights_only=False)["state"])
    Clock({}).before_load(SimpleNamespace(optimizers=[SimpleNamespace(param_groups=[])]), None)  # type: ignore[arg-type]
    content = state.state_dict()
    state.state_dict = lambda: content
    saver = CheckpointSaver(str(folder), overwrite=True, remote_file_name=None)
    folder.mkdir()

    def save() -> None:
        saver._save_checkpoint(state, None)  # type: ignore[arg-type]

    save()
    state.timestamp, (old, new) = Timestamp(batch=3), (folder / f"ep0-ba{batch}-rank0.pt" for batch in (2, 3))
    seen, ended, size = {"old": 0, "new": 0}, 0, old.stat().st_size
    for dies in (True, False):
        calls = saved_by_child(save, dies)
        assert new.exists() and 3 < calls < 255
        cases = [{"call": call} for call in range(1, calls + 1)]
        cases += [{"byte": size * part // points} for part in range(max(8, points // 2 - calls))]
        for case in cases:
            new.unlink(missing_ok=True)
            ended += saved_by_child(save, dies, **case)
            newest = checkpoints.repair_latest(folder)
            assert newest == new or not new.exists(), (dies, case)  # a file has its name only when it is whole
            assert newest in (old, new) and os.path.samefile(folder / "latest-rank0.pt", newest), (dies, case)
            weights, _ = checkpoints.load_model_state(newest)
            assert all(torch.equal(value, content["model"][f"model.{name}"]) for name, value in weights.items()), case
            seen["new" if newest == new else "old"] += 1
        new.unlink(missing_ok=True)
        save()
        assert {path.name for path in folder.iterdir()} == {old.name, new.name, "latest-rank0.pt"}
    print(f"{sum(seen.values())} points, {ended} saves came to their end; the newest checkpoint was then {seen}")
    assert ended < seen["new"] < sum(seen.values()) // 2  # the last calls come after the file has its name


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
