"""A run that is told to end, that has company in its folder, and that meets trouble, each through the true path."""

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

import ettin_foundry
from ettin_foundry.data.loader import RowDataset
from ettin_foundry.training import watch
from ettin_foundry.training.checkpoints import complete_checkpoints, load_checkpoint


@pytest.fixture(scope="module")
def capture():
    ettin_foundry.register()
    return nano_run.register_capture()


def leaves(value, name=""):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else None
    if items is None:
        return {name: value}
    return {key: leaf for part, each in items for key, leaf in leaves(each, f"{name}.{part}").items()}


@pytest.mark.parametrize("tell, tell_at", [("SIGTERM", 3), ("SIGUSR1", 2)])  # the latter's step saves anyway
def test_told_to_end_it_saves_once_exits_75_and_goes_on_as_if_nothing_had_been(
        tell, tell_at, rising_run, data_set, capture, tmp_path):
    whole, expected = rising_run
    command = [*nano_run.RISING, "train_loader.num_workers=2", "train_loader.prefetch_factor=1"]
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    try:
        with pytest.raises(SystemExit) as end:
            nano_run.run(data_set, tmp_path, *command, f"callbacks.capture={{tell_at: {tell_at}, tell: {tell}}}")
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGUSR1), handlers):
            signal.signal(number, handler)
    assert end.value.code == 75 and capture.losses == expected["losses"][:tell_at + 1]
    [folder] = tmp_path.iterdir()
    assert [path.name for path in complete_checkpoints(folder)] == [
        f"ep0-ba{batch}-rank0.pt" for batch in sorted({3, tell_at + 1})]
    nano_run.run(data_set, tmp_path, *command, "callbacks.capture={}").close()
    assert capture.losses == expected["losses"][tell_at + 1:]
    resumed, undisturbed = (leaves(load_checkpoint(complete_checkpoints(path)[-1])["state"])
                            for path in (folder, whole))
    tensors = {key for key, value in undisturbed.items() if isinstance(value, torch.Tensor)}
    assert len(tensors) > 60 and all(torch.equal(resumed[key], undisturbed[key]) for key in tensors)


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
            nano_run.run(data_set, tmp_path, "model.vocab_size=512")
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
    os.utime(path, (time.time() - 121,) * 2)
    watch.Watch()._hold(path)
    assert path.read_text().startswith(f"process {os.getpid()} on ")


def losses_of(mine, objective, values):
    """Hands losses to the callback as the trainer does; those that it called unusual."""
    found = []
    for step, loss in enumerate(values, mine.steps):
        state = SimpleNamespace(batch={"objective": objective}, total_loss_dict={"loss/train/total": loss},
                                timestamp=SimpleNamespace(batch=SimpleNamespace(value=step + 1)))
        mine.batch_start(state, None)
        if loss > mine._usual()[1]:
            found.append(step)
        mine._look_at_disk = mine._look_at_memory = lambda _: None
        mine.batch_end(state, None)
    mine.steps += len(values)
    return found


def test_a_spike_is_told_once_in_a_hundred_steps_and_each_objective_has_its_own_usual_loss(said):
    rng, mine = random.Random(5), watch.Watch()
    mine.steps = 0
    # noise of 2% on a curve that falls: nothing; one in 10^15 would be 8 deviations above
    assert not losses_of(mine, "mlm", [9 - 4 * step / (step + 500) + rng.gauss(0, 0.15) for step in range(3000)])
    assert not losses_of(mine, "clm", [2.0 + rng.gauss(0, 0.05) for _ in range(200)])
    assert losses_of(mine, "clm", [5.5, 2.0, 5.5]) == [3200, 3202] and not losses_of(mine, "mlm", [5.5])
    [line] = said()
    assert line.startswith("clm loss 5.500 at step 3200, usual are 2.0") and "ettin order --step" in line


def test_skipped_rows_change_nothing_and_a_resumed_run_skips_the_same(data_set, capture, monkeypatch, tmp_path):
    monkeypatch.setattr(watch, "_FEWEST", 2)
    monkeypatch.setattr(watch, "_SPREADS", -1.0)  # what is not far below the median is unusual: about half
    command = ["model.vocab_size=512", "max_duration=12ba", "save_interval=1ba",
               "callbacks.ettin_watch.policy=skip_rows"]

    def skipped(trainer):
        return next(each for each in trainer.state.callbacks if isinstance(each, watch.Watch)).skipped

    whole = nano_run.run(data_set, tmp_path / "whole", *command, "callbacks.capture={}")
    steps, losses = skipped(whole), capture.losses
    whole.close()
    assert 2 <= len(steps) <= 9
    saved = [leaves({key: load_checkpoint(path)["state"][key] for key in ("model", "optimizers")})
             for path in complete_checkpoints(next((tmp_path / "whole").iterdir()))]
    for step in range(1, 12):
        same = [torch.equal(value, saved[step - 1][key]) for key, value in saved[step].items()
                if isinstance(value, torch.Tensor) and value.numel() > 1]
        assert all(same) if step in steps else not all(same)
    with pytest.raises(RuntimeError, match="killed"):
        nano_run.run(data_set, tmp_path / "parts", *command, "callbacks.capture.die_at=6")
    resumed = nano_run.run(data_set, tmp_path / "parts", *command, "callbacks.capture={}")
    assert (skipped(resumed), capture.losses) == (steps, losses[6:])
    resumed.close()


def test_a_batch_that_does_not_come_and_a_full_disk_are_told_with_what_to_do(
        data_set, capture, monkeypatch, tmp_path, capfd):
    rows_of = RowDataset.rows_of

    def slow(self, step, **kwargs):
        time.sleep(1.0 if step == 2 else 0.0)
        return rows_of(self, step, **kwargs)

    monkeypatch.setattr(RowDataset, "rows_of", slow)
    monkeypatch.setattr(watch.shutil, "disk_usage", lambda _: SimpleNamespace(free=20_000_000))
    nano_run.run(data_set, tmp_path, "model.vocab_size=512", "max_duration=4ba",
                 "callbacks.ettin_watch.stall_seconds=0.4").close()
    disk, *stalls = [line.split("watch: ")[1] for line in capfd.readouterr().err.splitlines() if "watch: " in line]
    # nano has 640,768 parameters, of 12 bytes
    assert disk.startswith("save_folder: 0.0 GB free in ") and "room for 2 more checkpoints of 0.0 GB; make" in disk
    assert 1 <= len(stalls) <= 2 and "train_loader: rank 0 waits for a batch since " in stalls[0]


def test_growing_memory_is_told(monkeypatch, said):
    pages, mine = collections.deque([4096, 4096 * 64, 4096 * 65]), watch.Watch()
    monkeypatch.setattr(watch.os, "sysconf", lambda _: pages.popleft())
    for step in (99, 199, 299):
        mine._look_at_memory(step)
    [line] = said()
    assert line.startswith("rank 0's memory grew from ") and "GB by step 199; before it runs out, see what" in line


def test_a_rank_that_gives_no_sign_of_life_is_named(monkeypatch, said):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    monkeypatch.setattr(watch, "_BEAT", 0.05)
    monkeypatch.setattr(watch, "_OLD", 0.3)
    monkeypatch.setattr(watch.dist, "get_world_size", lambda: 2)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    mine = watch.Watch()
    thread = threading.Thread(target=mine._look_from_beside)
    thread.start()
    for _ in range(5):
        store.set("ettin_watch/1", f"{time.time()} node9")
        time.sleep(0.1)
    assert not said()
    time.sleep(0.6)
    mine._ended.set()
    thread.join()
    assert said()[0].startswith("rank 1 on node9 gave no sign of life for 0 s, and the others wait")
