"""Saves that are killed, or whose disk fails, at any point: is the newest checkpoint that they leave whole?

    python benchmarks/save_kill.py CHECKPOINT FOLDER POINTS

Tries as many points of saves of CHECKPOINT's state into the new FOLDER by the run's saver: one file and sharded, killed
and with an error, before each call that opens, writes, flushes, renames, links or removes, and at bytes of the file.
Each save is the third of a run that keeps two; every other one replaces a damaged checkpoint of its name. Exits with an
error at the first newest checkpoint that is not what was saved.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import resource
import shutil
import signal
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from ettin_foundry.training import checkpoints, saving  # noqa: E402

CALLS = {"open", "fsync", "replace", "rename", "unlink", "rmdir", "symlink", "close", "write", "mkdir",
         "flush"}


def saved_by_child(save: Any, dies: bool, call: int | None = None, byte: int | None = None) -> tuple[bool, int]:
    """Saves in a process that is killed, or gets an error, before its call number `call` or when it writes `byte`.

    Whether the save came to its end, and the number of its calls.
    """
    calls = mmap.mmap(-1, 8)  # shared with the child

    def watch(frame: Any, event: str, function: Any) -> None:
        if event == "c_call" and function.__name__ in CALLS:
            count = int.from_bytes(calls[:8], "little") + 1
            calls[:8] = count.to_bytes(8, "little")
            if count == call:
                if dies:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    if pid := os.fork():
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        return ended, int.from_bytes(calls[:8], "little")
    code = 1
    try:
        if byte is not None:  # the kernel kills a process that writes beyond it, or says that it may not
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if dies else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (byte, resource.RLIM_INFINITY))
        threading.setprofile(watch)  # of the thread that writes a file
        sys.setprofile(watch)
        save()
        code = 0
    except OSError:
        pass
    finally:
        sys.setprofile(None)
        os._exit(code)


class Saves:
    """A run's saver without the run, one file or sharded: its first two checkpoints, then the third again and again."""

    def __init__(self, content: dict[str, Any], folder: Path, sharded: bool) -> None:
        from composer.callbacks import CheckpointSaver
        from composer.core import Timestamp

        from ettin_foundry.training.clock import Clock

        self.folder, self.before, self.sharded = folder / "run", folder / "before", sharded
        self.contents = [{**content, "model": {name: value + batch for name, value in content["model"].items()}}
                         for batch in range(4)]
        self.paths = [self.folder / (f"ep0-ba{batch}" + ("" if sharded else "-rank0.pt")) for batch in range(4)]
        config = SimpleNamespace(sharded_ckpt_prefix_dir="ep{epoch}-ba{batch}", save_planner=None)
        self.state: Any = SimpleNamespace(run_name="run", fsdp_sharded_state_dict_enabled=sharded, fsdp_config=config,
                                          device_mesh=None)
        self.saver = CheckpointSaver(str(self.folder), overwrite=True, remote_file_name=None, num_checkpoints_to_keep=2,
                                     latest_filename="latest-sharded-rank{rank}" if sharded else "latest-rank{rank}.pt")
        stand_in: Any = SimpleNamespace(optimizers=[SimpleNamespace(param_groups=[])], callbacks=[self.saver])
        Clock({}).before_load(stand_in, None)  # type: ignore[arg-type]
        self.logger: Any = SimpleNamespace(destinations=[])
        folder.mkdir(exist_ok=True)
        for batch in (1, 2, 3):
            self.state.timestamp, self.state.state_dict = Timestamp(batch=batch), lambda at=batch: self.contents[at]
            if batch < 3:
                self.save()
        shutil.move(self.folder, self.before)

    def save(self) -> None:
        self.saver._save_checkpoint(self.state, self.logger)
        saving.wait_for_write()

    def restore(self, damaged: bool) -> None:
        """The folder as it is before the third save; damaged: with a checkpoint of that name, which cannot be read."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.before, self.folder, symlinks=True)
        if damaged:
            new = shutil.copytree(self.paths[2], self.paths[3]) if self.sharded else \
                Path(shutil.copy(self.paths[2], self.paths[3]))
            data = new / "__0_0.distcp" if self.sharded else new
            os.truncate(data, data.stat().st_size // 2)

    def newest(self, case: Any) -> int:
        """The batch of the newest checkpoint, which is what was saved then."""
        newest = checkpoints.repair_latest(self.folder)
        link = self.folder / ("latest-sharded-rank0" if self.sharded else "latest-rank0.pt")
        assert newest in self.paths[2:] and os.path.samefile(link, newest), case
        weights, batch = checkpoints.load_model_state(newest)[0], self.paths.index(newest)
        saved = self.contents[batch]["model"]
        assert all(torch.equal(value, saved[f"model.{name}"]) for name, value in weights.items()), case
        return batch

    def try_points(self, points: int) -> None:
        seen, ended = [0, 0, 0, 0], 0
        for dies in (True, False):
            self.restore(False)
            _, calls = saved_by_child(self.save, dies)
            size = max(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
            at_calls = min(calls, points // 4)
            cases = [{"call": 1 + (calls - 1) * part // (at_calls - 1)} for part in range(at_calls)]
            at_bytes = points // 2 - at_calls
            cases += [{"byte": size * part // at_bytes} for part in range(at_bytes)]
            for number, case in enumerate(cases):
                self.restore(damaged=number % 2 == 1)
                ended += saved_by_child(self.save, dies, **case)[0]
                seen[self.newest((dies, case))] += 1
            self.save()  # in what the last one left
            left = {path.name for path in self.folder.iterdir()} - {"latest-sharded-rank0", "latest-rank0.pt"}
            assert left == {path.name for path in self.paths[2:]}, left
            self.saver.saved_checkpoints[:0] = [str(self.paths[1] / "__0_0.distcp" if self.sharded else self.paths[1])]
            self.saver.saved_checkpoints.pop()
        print(f"{'sharded' if self.sharded else 'one file'}: {sum(seen)} points of {calls} calls and {size:,} bytes; "
              f"{ended} saves came to their end; the newest was then the second {seen[2]} times, the third {seen[3]}")
        assert 0 < seen[3] < sum(seen) and ended <= seen[3]  # the last calls come after a checkpoint is complete


def main(checkpoint: Path, folder: Path, points: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch's, of a process without a group
    logging.getLogger("ettin_foundry").setLevel(logging.ERROR)  # what is passed over
    content = torch.load(checkpoint, weights_only=False)["state"]
    for kind, share in (("file", points * 3 // 4), ("sharded", points // 4)):  # the latter has many calls, each slow
        Saves(content, folder / kind, kind == "sharded").try_points(share)


if __name__ == "__main__":
    Path(sys.argv[2]).mkdir()
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
