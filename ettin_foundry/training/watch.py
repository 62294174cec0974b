"""The callback `ettin_watch`, of every run: its end on a signal, its folder, and what goes wrong in its weeks."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import socket
import threading
import time
from collections import defaultdict, deque
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
from composer.callbacks import CheckpointSaver
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist, format_name_with_dist

from ettin_foundry.data.cache import locked
from ettin_foundry.training.run_config import PREEMPTED, require

log = logging.getLogger(__name__)

_OFTEN = 100  # steps between looks at memory and disk, and between two warnings of a kind
_WINDOW, _FEWEST, _SPREADS, _MOST = 128, 50, 8.0, 5  # losses that say what is usual, at least; how far above; in a row
_BEAT, _OLD = 30.0, 120.0  # seconds between signs of life, and after which a holder or rank is gone
_ECHO = 5.0  # seconds in which SIGTERM may come again: schedulers tell all processes, and Composer's launcher its ranks


class Watch(Callback):
    """Ends a run in order when told to, keeps its save folder for it alone, and warns: what is seen, and what to do.

    The first SIGTERM or SIGUSR1 to any rank has all finish the step, save, and exit with `PREEMPTED`; Composer's
    handler ends within the step. A SIGTERM 5 s after it ends a process at once. The host's KillLossSpike knows one
    rank's last microbatch and no objectives, and forgets all at a resume; its MemoryMonitor logs figures.

    policy: `warn` of a loss spike; or `skip_rows`, where such a step changes neither weights nor moments. Statistics
    are in the checkpoint, so a resumed run decides alike. stall_seconds: that a batch may take to come.
    """

    def __init__(self, policy: str = "warn", stall_seconds: float = 120.0) -> None:
        require(policy in ("warn", "skip_rows"), "callbacks.ettin_watch.policy", "warn or skip_rows", policy, "set one")
        self.policy, self.stall_seconds, self.skipped = policy, stall_seconds, list[int]()
        self._losses: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_WINDOW))
        self._said, self._memory, self._handlers = dict[str, int](), dict[str, int](), dict[int, Any]()
        self._objective, self._told_at, self._waits_since = "", 0.0, float("inf")
        self._ended, self._held, self._lock = threading.Event(), contextlib.ExitStack(), Path("/dev/null")
        self._saver: Any = None
        self._beside: Any = None

    def init(self, state: State, logger: Logger) -> None:
        self._saver = next((each for each in state.callbacks if isinstance(each, CheckpointSaver)), None)
        if self._saver and dist.get_global_rank() == 0:
            self._hold(Path(format_name_with_dist(self._saver.folder, state.run_name), ".lock"))

    def _hold(self, path: Path) -> None:
        """Refuses a save folder of another run: by flock, else by a lease, the file that its holder touches."""
        path.parent.mkdir(parents=True, exist_ok=True)
        own, self._lock = f"process {os.getpid()} on {socket.gethostname()}", path
        try:
            free = self._held.enter_context(locked(path, wait=False))
        except OSError:
            free = not path.read_text() or time.time() - path.stat().st_mtime > _OLD
        if not free and (holder := path.read_text()) != own:
            raise ValueError(f"save_folder must be used by one run at a time, got {path.parent}, where {holder} "
                             f"trains; end it and wait {_OLD:.0f} s, or set another run_name or save_folder")
        path.write_text(own)

    def fit_start(self, state: State, logger: Logger) -> None:
        state.callbacks = [*(each for each in state.callbacks if each is not self), self]  # after what saves
        if self._saver and threading.current_thread() is threading.main_thread():  # others cannot take signals
            self._handlers = {number: signal.signal(number, self._tell) for number in (signal.SIGTERM, signal.SIGUSR1)}
        if self.policy == "skip_rows":
            state.optimizers[0].accepts = lambda loss: self._accepts(loss, state.device)  # type: ignore[attr-defined]
        self._look_at_disk(state)
        self._beside = threading.Thread(target=self._look_from_beside, daemon=True)
        self._beside.start()

    def batch_start(self, state: State, logger: Logger) -> None:
        self._objective = str(state.batch["objective"])  # type: ignore[index]

    def _usual(self) -> tuple[float, float]:
        """The usual loss of the batch's objective, and the highest one."""
        middle = median(losses := self._losses[self._objective] or [0.0])
        spread = 1.4826 * median(abs(loss - middle) for loss in losses)  # the deviation, were they normal
        highest = middle + _SPREADS * max(spread, 0.005 * middle)
        return middle, highest if len(losses) >= _FEWEST else float("inf")

    def _accepts(self, loss: float, device: Any) -> bool:
        """Whether the optimizer learns from a step with this loss on this rank; every rank must ask."""
        dist.all_reduce(total := device.tensor_to_device(torch.tensor([loss])))  # as the host does for the step's loss
        return not total.item() / dist.get_world_size() > self._usual()[1]  # a loss that is no number ends the run

    def batch_end(self, state: State, logger: Logger) -> None:
        step, loss = state.timestamp.batch.value - 1, float(state.total_loss_dict["loss/train/total"])
        (usual, highest), losses = self._usual(), self._losses[self._objective]
        losses.append(loss)
        if loss > highest:
            skips = self.policy == "skip_rows"
            what = "the step is passed over" if skips else "see its rows by ettin order --step"
            self._warn("loss", step, f"{self._objective} loss {loss:.3f} at step {step}, usual are {usual:.3f} to "
                       f"{highest:.3f}; {what}. If it stays up, go on from an earlier checkpoint with a lower lr")
            self.skipped += [step] * skips
            if self.skipped[-_MOST:] == [*range(step - _MOST + 1, step + 1)]:
                log.warning("%d steps in a row were passed over, so this is no spike: the next are learned from", _MOST)
                losses.clear()
        if step % _OFTEN == _OFTEN - 1:
            self._look_at_memory(step)
            self._look_at_disk(state)

    def state_dict(self) -> dict[str, Any]:  # an empty one loads from sharded checkpoints of before
        losses = {objective: [*values] for objective, values in self._losses.items()}
        return {} if self.policy == "warn" else {"losses": json.dumps(losses), "skipped": json.dumps(self.skipped)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped = json.loads(state.get("skipped", "[]"))
        for objective, losses in json.loads(state.get("losses", "{}")).items():
            self._losses[objective].extend(losses)

    def _warn(self, kind: str, step: int, text: str) -> None:
        if step - self._said.get(kind, -_OFTEN) >= _OFTEN:
            self._said[kind] = step
            log.warning("%s", text)

    def _look_at_memory(self, step: int) -> None:
        gpu = torch.cuda.memory_reserved() if torch.cuda.is_initialized() else 0
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        for what, now in ("memory", pages * os.sysconf("SC_PAGE_SIZE")), ("GPU's reserved memory", gpu):
            if now > 1.25 * (before := self._memory.setdefault(what, now)) + 2**30:
                self._memory[what] = now
                self._warn(what, step, f"rank {dist.get_global_rank()}'s {what} grew from {before / 1e9:.1f} to "
                           f"{now / 1e9:.1f} GB by step {step}; see what grows with callbacks.memory_snapshot")

    def _look_at_disk(self, state: State) -> None:
        """Whether the next checkpoints fit, with weights and two moments in fp32."""
        if self._saver and dist.get_global_rank() == 0:
            kept, folder = self._saver.num_checkpoints_to_keep, self._lock.parent
            size, free = 12 * sum(p.numel() for p in state.model.parameters()), shutil.disk_usage(folder).free
            if free < size * (3 if kept < 0 else 1 + max(0, kept - len(self._saver.saved_checkpoints))):
                self._warn("disk", state.timestamp.batch.value, f"save_folder: room in {folder} for {free // size} "
                           f"more checkpoints of {size / 1e9:.1f} GB; make room, or set save_num_checkpoints_to_keep=2")

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self._waits_since = time.monotonic()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self._waits_since = float("inf")

    def _look_from_beside(self) -> None:
        """In a thread: renews the lease, says that a batch does not come, and which rank gives no sign of life."""
        rank, keys, store = dist.get_global_rank(), [f"ettin_watch/{r}" for r in range(dist.get_world_size())], None
        with contextlib.suppress(RuntimeError):  # the host's store ends with rank 0
            if len(keys) > 1:
                store: Any = torch.distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            while not self._ended.wait(min(_BEAT, self.stall_seconds)):
                if self._lock.is_file():
                    os.utime(self._lock)
                if (waited := time.monotonic() - self._waits_since) >= self.stall_seconds:
                    log.warning("train_loader: rank %d waits for a batch since %.0f s; see whether its storage answers "
                                "(dataset.local, remote), its workers run (top) and /dev/shm has room", rank, waited)
                if store:
                    store.set(keys[rank], f"{time.time()} {socket.gethostname()}")
                for key in keys if store and rank == 0 and store.check(keys) else ():
                    at, host = store.get(key).decode().split()
                    if (since := time.time() - float(at)) > _OLD:
                        log.warning("rank %s on %s gave no sign of life for %.0f s, and the others wait for it: look "
                                    "at that node, end the run, and go on by the same command", key[12:], host, since)

    def _tell(self, number: int, _: Any) -> None:
        self._told_at = self._told_at or time.monotonic()
        if number == signal.SIGTERM and time.monotonic() - self._told_at > _ECHO:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        """Ends the run if a rank was told to: saves unless that was just done, waits for uploads and all ranks."""
        told, now, before = self._told_at > 0, state.timestamp, state.previous_timestamp
        assert before is not None and state.max_duration is not None
        if dist.get_world_size() > 1:  # they ask each other once a second, by the host's clock, which they share
            if now.total_wct // timedelta(seconds=1) == before.total_wct // timedelta(seconds=1):
                return
            dist.all_reduce(any_told := state.device.tensor_to_device(torch.tensor([int(told)])), "MAX")
            told = bool(any_told.item())
        if not told or not self._saver or now >= state.max_duration:
            return
        if self._saver.last_checkpoint_batch != state.timestamp.batch:
            self._saver._save_checkpoint(state, logger)
        self._saver.fit_end(state, logger)
        dist.barrier()
        while self._handlers:  # Composer's launcher sends SIGTERM to the others when the first rank has ended
            signal.signal(self._handlers.popitem()[0], signal.SIG_IGN)
        self.fit_end(state, logger)
        log.warning("told to end: saved at batch %d; the same command goes on from there", state.timestamp.batch.value)
        raise SystemExit(PREEMPTED)

    def fit_end(self, state: State, logger: Logger) -> None:
        self._ended.set()
        if self._beside:
            self._beside.join()  # its connection must not meet the interpreter's end
        while self._handlers:
            signal.signal(*self._handlers.popitem())

    def close(self, state: State, logger: Logger) -> None:
        self.fit_end(state, logger)
        self._held.close()
