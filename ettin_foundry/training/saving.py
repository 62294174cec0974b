"""Saving: a checkpoint is whole on the disk before `latest` leads to it, and older ones go after that.

Composer writes under the final name, and training waits for the disk. Here a file gets its name at its end, and a
thread writes it from a copy in host memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from composer import callbacks
from composer.core import State
from composer.loggers import Logger
from composer.utils import checkpoint, dist, format_name_with_dist, reproducibility
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils._pytree import tree_map_only

from ettin_foundry.data.storage import atomic_file, sync_folder
from ettin_foundry.training.checkpoints import move_link

log = logging.getLogger(__name__)

_under_way: list[Future[None]] = []  # at most one in a process


def wait_for_write() -> None:
    """Returns when this process's last checkpoint is on the disk; raises what kept it from getting there."""
    while _under_way:
        _under_way.pop().result()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """One clear line of what fails inside."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:  # torch.save's for a disk, dcp's on every rank
        what = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        raise OSError(f"{path}: not saved: {what}; the checkpoints before it are whole: make room and give the same "
                      "command again") from error


def _tell(path: Path, begun: float) -> None:
    if dist.get_global_rank() == 0:
        size = sum(file.stat().st_size for file in (path, *path.rglob("*")))  # a sharded checkpoint is a folder
        log.info("saved path=%s MB=%.1f seconds=%.1f", path, size / 1e6, time.monotonic() - begun)


def write_whole(state_dict: dict[str, Any], filename: str) -> None:
    """In place of Composer's writer: the file has its name once all of it is on the disk, and replaces what had it."""
    path = Path(filename)
    for left in path.parent.glob(".*.partial"):  # by a killed run
        left.unlink()
    with atomic_file(path) as file:
        torch.save(state_dict, file)


class CheckpointSaver(callbacks.CheckpointSaver):  # in checkpoints its state stands under the name of its class
    """Composer's, but training waits for a copy to host memory alone; the next save and its end wait for the disk.

    An error of a write stops the run at the next step. Training waits for sharded, weights-only and uploaded saves.
    """

    def fit_start(self, state: State, logger: Logger) -> None:
        """Counts the files of earlier processes of this run too, so that the oldest of all is removed first."""
        super().fit_start(state, logger)
        if self.num_checkpoints_to_keep == 0 and self.remote_uploader is None:
            self.num_checkpoints_to_keep = 1  # the newest is all that this folder has
        folder, sharded = format_name_with_dist(self.folder, state.run_name), state.fsdp_sharded_state_dict_enabled
        depth = 2 if sharded else 1  # ba4/__0_0.distcp, or ba4.pt
        paths = [Path(folder, *Path(name).parts[-depth:]) for name in self.all_saved_checkpoints_to_timestamp]
        self.saved_checkpoints[:0] = [str(path) for path in paths if (path.parent if sharded else path).exists()]

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        wait_for_write()
        begun = time.monotonic()
        path = Path(checkpoint.get_save_filename(state, self.filename.format(state, keep_placeholders=True)))
        sharded, uploads = state.fsdp_sharded_state_dict_enabled, self.remote_uploader or any(
            each.can_upload_files() and getattr(each, "_log_artifacts", True) for each in logger.destinations)
        if sharded or uploads or self.weights_only or self.ignore_keys:
            with _naming(path):
                if sharded and dist.get_global_rank() == 0:  # the others write when it has made its plan
                    path.with_name(".metadata").unlink(missing_ok=True)  # of what is written over
                super()._save_checkpoint(state, logger)
            _tell(path.parent if sharded else path, begun)
            return
        self.last_checkpoint_batch = state.timestamp.batch
        self.all_saved_checkpoints_to_timestamp[str(path)] = state.timestamp  # it names itself
        content = {"state": state.state_dict(), "rng": reproducibility.get_rng_state()}  # every rank's
        if dist.get_global_rank() == 0:
            content = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), content)
            writer = ThreadPoolExecutor(1, "checkpoint")  # for this file; Python's exit waits for it
            link = self.latest_filename.format(state) if self.latest_filename else None
            _under_way.append(writer.submit(self._write, content, path, link, begun))
            writer.shutdown(wait=False)

    def _write(self, content: dict[str, Any], path: Path, link: str | None, begun: float) -> None:
        with _naming(path):
            write_whole(content, str(path))
            if link is not None:
                move_link(Path(link), os.path.relpath(path, os.path.dirname(link)))
            self.saved_checkpoints.append(str(path))
            _tell(path, begun)
            self._rotate_checkpoints()

    def _rotate_checkpoints(self, sharding_enabled: bool = False) -> None:
        while 0 <= self.num_checkpoints_to_keep < len(self.saved_checkpoints):
            oldest = Path(self.saved_checkpoints.pop(0))
            if not sharding_enabled:
                oldest.unlink(missing_ok=True)
            elif dist.get_global_rank() == 0:
                sync_folder(Path(self.saved_checkpoints[-1]).parent)
                oldest.with_name(".metadata").unlink(missing_ok=True)  # half a folder is not complete
                shutil.rmtree(oldest.parent, ignore_errors=True)

    def batch_end(self, state: State, logger: Logger) -> None:
        super().batch_end(state, logger)
        if _under_way and _under_way[0].done():
            wait_for_write()

    def fit_end(self, state: State, logger: Logger) -> None:
        wait_for_write()
        super().fit_end(state, logger)
