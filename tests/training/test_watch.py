"""A run that is told to end, that has company in its folder, and that meets trouble."""

import collections
import errno
import fcntl
import os
import random
import signal
import threading
import time
from types import SimpleNamespace

import nano_run
import pytest
import torch

from ettin_foundry.data.loader import RowDataset
from ettin_foundry.training import watch
from ettin_foundry.training.checkpoints import complete_checkpoints, load_checkpoint


def tensors(folder, parts=("model", "optimizers")):
    """Of each checkpoint, in order: {path: tensor} of weights and moments."""
    def leaves(value, name=""):
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return {name: value} if isinstance(value, torch.Tensor) and value.numel() > 1 else {
            key: leaf for part, each in items for key, leaf in leaves(each, f"{name}.{part}").items()}

    states = [load_checkpoint(path)["state"] for path in complete_checkpoints(next(folder.iterdir()))]
    return [leaves({part: state[part] for part in parts}) for state in states]


def same(one, other):
    return [torch.equal(value, other[key]) for key, value in one.items()]


@pytest.mark.parametrize("tell, tell_at", [("SIGTERM", 3), ("SIGUSR1", 2)])  # the latter's step saves anyway
def test_told_to_end_it_saves_once_exits_75_and_goes_on_as_if_nothing_had_been(
        tell, tell_at, rising_run, data_set, capture, tmp_path):
    whole, expected = rising_run
    command = [*nano_run.RISING, "train_loader.num_workers=2", "train_loader.prefetch_factor=1"]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    with pytest.raises(SystemExit) as end:
        nano_run.run(data_set, tmp_path, *command, f"callbacks.capture={{tell_at: {tell_at}, tell: {tell}}}")
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert end.value.code == 75 and capture.losses == expected["losses"][:tell_at + 1]
    assert [path.name for path in complete_checkpoints(next(tmp_path.iterdir()))] == [
        f"ep0-ba{batch}-rank0.pt" for batch in sorted({3, tell_at + 1})]
    nano_run.run(data_set, tmp_path, *command, "callbacks.capture={}").close()
    assert capture.losses == expected["losses"][tell_at + 1:]
    resumed, undisturbed = tensors(tmp_path)[-1], tensors(whole.parent)[-1]
    assert len(undisturbed) > 60 and all(same(undisturbed, resumed))


@pytest.fixture
def said(caplog):
    return lambda: [record.getMessage() for record in caplog.records if record.name == watch.log.name]


def test_of_two_runs_in_a_folder_the_second_is_refused_and_says_who_is_there(data_set, tmp_path):
    folder = tmp_path / "nano-mlm-pretrain"
    folder.mkdir()
    with (folder / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write("process 7 on node3")
        other.flush()
        with pytest.raises(ValueError, match="save_folder must be used by one run at a time, .*7 on node3 trains; end"):
            nano_run.run(data_set, tmp_path)
    assert [path.name for path in folder.iterdir()] == [".lock"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_without_flock_a_fresh_lease_is_heeded_and_an_old_one_taken_over(number, monkeypatch, tmp_path):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    path = tmp_path / "run" / ".lock"
    watch.Watch()._hold(path)
    watch.Watch()._hold(path)  # the same process goes on
    path.write_text("process 7 on node3")
    with pytest.raises(ValueError, match="process 7 on node3 trains; end it and wait 120 s"):
        watch.Watch()._hold(path)
    os.utime(path, (0, time.time() - 121))
    watch.Watch()._hold(path)
    assert path.read_text().startswith(f"process {os.getpid()} on ")


def test_a_spike_is_told_once_in_a_hundred_steps_and_each_objective_has_its_own_usual_loss(said, monkeypatch):
    rng, mine, count = random.Random(5), watch.Watch(), iter(range(1, 10_000))
    for look in ("_look_at_disk", "_look_at_memory"):
        monkeypatch.setattr(mine, look, lambda _: None)

    def end_steps(objective, losses):
        for loss in losses:
            state = SimpleNamespace(batch={"objective": objective}, total_loss_dict={"loss/train/total": loss},
                                    timestamp=SimpleNamespace(batch=SimpleNamespace(value=next(count))))
            mine.batch_start(state, None)  # type: ignore[arg-type]
            mine.batch_end(state, None)  # type: ignore[arg-type]

    # noise on a curve that falls, and on a flat one: 8 deviations above is one in 10^15
    end_steps("mlm", [9 - 4 * step / (step + 500) + rng.gauss(0, 0.15) for step in range(3000)])
    end_steps("clm", [2.0 + rng.gauss(0, 0.05) for _ in range(200)])
    assert not said()
    end_steps("clm", [5.5, 2.0, 5.5])
    end_steps("mlm", [5.5])
    [line] = said()
    assert line.startswith("clm loss 5.500 at step 3200, usual are 2.0") and "ettin order --step" in line


def test_skipped_rows_change_nothing_and_a_resumed_run_skips_the_same(data_set, capture, monkeypatch, tmp_path):
    monkeypatch.setattr(watch, "_FEWEST", 2)
    monkeypatch.setattr(watch, "_SPREADS", -1.0)  # what is not far below the median is unusual: about half
    command = ["max_duration=12ba", "save_interval=1ba", "callbacks.ettin_watch.policy=skip_rows",
               "variables.peak_lr=1e-4"]  # losses that fall at once are never unusual

    def skipped(trainer):
        trainer.close()
        return next(each for each in trainer.state.callbacks if isinstance(each, watch.Watch)).skipped

    steps = skipped(nano_run.run(data_set, tmp_path / "whole", *command, "callbacks.capture={}"))
    losses, saved = capture.losses, tensors(tmp_path / "whole")
    assert 2 <= len(steps) <= 9
    assert [step for step in range(1, 12) if all(same(saved[step], saved[step - 1]))] == steps
    with pytest.raises(RuntimeError, match="killed"):
        nano_run.run(data_set, tmp_path / "parts", *command, "callbacks.capture.die_at=6")
    assert skipped(nano_run.run(data_set, tmp_path / "parts", *command, "callbacks.capture={}")) == steps
    assert capture.losses == losses[6:]


def test_a_batch_that_does_not_come_and_a_full_disk_are_told_with_what_to_do(
        data_set, capture, monkeypatch, tmp_path, capfd):
    rows_of = RowDataset.rows_of

    def slow(self, step, **kwargs):
        time.sleep(1.0 if step == 2 else 0.0)
        return rows_of(self, step, **kwargs)

    monkeypatch.setattr(RowDataset, "rows_of", slow)
    monkeypatch.setattr(watch.shutil, "disk_usage", lambda _: SimpleNamespace(free=20_000_000))
    nano_run.run(data_set, tmp_path, "max_duration=4ba", "callbacks.ettin_watch.stall_seconds=0.4").close()
    disk, *stalls = [line.split("watch: ")[1] for line in capfd.readouterr().err.splitlines() if "watch: " in line]
    assert "for 2 more checkpoints of 0.0 GB; make room" in disk  # of 640,768 parameters, 12 bytes each
    assert 1 <= len(stalls) <= 2 and "train_loader: rank 0 waits for a batch since " in stalls[0]


def test_growing_memory_is_told(monkeypatch, said):
    pages, mine = collections.deque([4096, 4096 * 64, 4096 * 65]), watch.Watch()
    monkeypatch.setattr(watch.os, "sysconf", lambda _: pages.popleft())
    for step in (99, 199, 299):
        mine._look_at_memory(step)
    [line] = said()
    assert line.startswith("rank 0's memory grew from ") and "GB by step 199; see what grows" in line


def test_a_rank_that_gives_no_sign_of_life_is_named(monkeypatch, said):
    store, mine = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True), watch.Watch()
    for name, value in {"_BEAT": 0.05, "_OLD": 0.3}.items():
        monkeypatch.setattr(watch, name, value)
    monkeypatch.setattr(watch.dist, "get_world_size", lambda: 2)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    thread = threading.Thread(target=mine._look_from_beside)
    thread.start()
    for _ in range(5):
        store.set("ettin_watch/1", f"{time.time()} node9")
        time.sleep(0.1)
    alive = said()
    time.sleep(0.6)
    mine._ended.set()
    thread.join()
    assert not alive and said()[0].startswith("rank 1 on node9 gave no sign of life for 0 s, and the others wait")
