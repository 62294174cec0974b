"""Trains nano while things break at random; are its rows and losses those of a run that nothing disturbs?

    make soak MINUTES=30 SEED=0        (python benchmarks/soak.py --minutes 30 --seed 0; --first R --rounds 1 repeats R)

A round is a run of 60 steps, started again by the same command after each end until it comes to its own. The seed says
what breaks and at which step: ranks are killed (SIGKILL), asked to end (SIGTERM), paused (SIGSTOP); the small disk of
the save folder is full, or no file may grow; the newest checkpoint gets a flipped byte or is cut short; a shard gets a
flipped byte in the local copy of a dataset on an S3 server on loopback, which is cut off for seconds. In half of the
rounds each start has 1, 2 or 4 ranks. After each start the log of the steps must be that of the clean run: all of
it, to the last bit with one rank, whose weights and moments must be equal too; losses within 1e-5 with others.
The output of every start of a round that differs, or ends in a way that nothing explains, is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from resume_matrix import ELASTIC_TOLERANCE, LAYOUTS, OBJECTIVES, Launcher, ended, kill  # noqa: E402
from s3_server import S3Server  # noqa: E402

from ettin_foundry.training.steps import STEPS, read_steps  # noqa: E402

NUM_STEPS, ROWS, SAVE_EVERY, KEEP = 60, 16, 4, 3
DISK = 64 << 20  # of the save folder: 3 checkpoints and one being written are 31 MB
PATIENCE = 180.0  # seconds after which a start that should have gone on hangs
ENDINGS = ["kill", "kill", "terminate", "fill the disk", "limit files", "flip a checkpoint", "cut a checkpoint"]
WEATHER = ["none", "none", "pause", "cut the server", "flip a shard"]
PREEMPTED = 75  # exit status of a run that has saved because it was asked to end


class Wrong(Exception):
    """What must not happen."""


def plan(seed: int, number: int) -> dict[str, Any]:
    """What a round trains, and for each of its starts: ranks, weather, what ends it and when."""
    rng = random.Random(f"{seed}/{number}")
    elastic, objective = rng.random() < 0.5, rng.choice(["mlm", "schedule", "mixture"])
    strikes = sorted(rng.sample(range(2, NUM_STEPS - 2), rng.randint(4, 7)))
    starts = [{"layout": rng.choice(["one1", "ddp2", "ddp4", "fsdp2"]) if elastic else "one1",
               "weather": rng.choice(WEATHER), "weather_seconds": rng.uniform(0.2, 3),
               "ending": rng.choice(ENDINGS), "step": step, "early": rng.random() < 0.2,
               "delay": rng.random(), "where": rng.random()} for step in strikes]
    last = {**starts[-1], "layout": "one1" if not elastic else starts[0]["layout"], "ending": None, "step": NUM_STEPS}
    return {"objective": objective, "elastic": elastic, "workers": rng.choice([0, 0, 2]), "starts": [*starts, last]}


def flip_byte(path: Path, where: float) -> None:
    """Puts a file with one other byte in its place; who has it open reads the old one."""
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1 << int(where * 1000) % 8
    other = path.with_name(f".{path.name}.flipped")
    other.write_bytes(content)
    os.replace(other, path)


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints that have their name, by batch."""
    return sorted(folder.glob("ep*-ba*-rank0.pt"), key=lambda path: int(path.name.split("-")[1][2:]))


def tensors(path: Path) -> list[tuple[str, int]]:
    """(name, CRC-32) of every tensor in a checkpoint."""
    with zipfile.ZipFile(path) as archive:
        return sorted((info.filename, info.CRC) for info in archive.infolist() if "/data/" in info.filename)


def first_difference(found: list[dict[str, Any]], clean: list[dict[str, Any]], exact: bool) -> str | None:
    """The first step in a log that is not the clean run's; a log may end early."""
    for position, entry in enumerate(found):
        expected = clean[position] if position < len(clean) else {}
        for key in expected.keys() | entry.keys():
            mine, theirs = entry.get(key), expected.get(key)
            if key == "loss" and not exact and mine and theirs and abs(mine - theirs) <= ELASTIC_TOLERANCE * theirs:
                continue
            if key != "seconds" and mine != theirs:
                return f"line {position}: {key} {mine}, in the clean run {theirs}"
    return None


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A filesystem of DISK bytes at `folder`; yields False, with the reason printed, where none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"no small filesystem ({done.stderr.strip()}): in place of a full disk, no file may grow", flush=True)
    try:
        yield not done.returncode
    finally:
        if not done.returncode:
            subprocess.run(["umount", "-l", folder], check=True)


class Soak:
    """Rounds, one after another, and their tally."""

    def __init__(self, launcher: Launcher, disk: Path, has_disk: bool, server: S3Server, seed: int) -> None:
        self.launcher, self.disk, self.has_disk, self.server, self.seed = launcher, disk, has_disk, server, seed
        self.folder = folder = disk.parent
        self.tally, self.clean = Counter[str](), {}
        self.env: dict[str, str] = {"FSDP_VERSION": "2"}
        server.connect(SimpleNamespace(setenv=self.env.__setitem__, setattr=lambda *_: None))
        self.data = self.launcher.make_data(folder / "data", documents=600)
        for path in (path for path in self.data.rglob("*") if path.is_file()):
            server.put(f"set/{path.relative_to(self.data)}", path.read_bytes())

    # -------------------------------------------------------------- runs

    def _keys(self, what: dict[str, Any], layout: str, remote: bool) -> list[str]:
        kind, world = layout[:-1], int(layout[-1])
        objective = [key.format(until=NUM_STEPS * ROWS * 30) for key in OBJECTIVES[what["objective"]]]
        fetched = [f"train_loader.dataset.remote={self.server.url('set')}", "train_loader.dataset.cache_limit=150kb"]
        # at nano's 3e-3, rounding alone makes losses of 2 ranks differ by 1e-3 after 50 steps; at this, by 2e-7
        same = ["model.attn_out_dropout=0.0", "variables.peak_lr=3e-4"] if what["elastic"] else []
        return [*objective, *same, *LAYOUTS[kind], f"variables.global_batch={ROWS}",
                f"device_train_microbatch_size={ROWS // 2 // world}",
                f"max_duration={NUM_STEPS}ba", f"save_interval={SAVE_EVERY}ba", f"save_num_checkpoints_to_keep={KEEP}",
                "train_loader.shuffle_window=2", f"train_loader.num_workers={what['workers']}",
                *(fetched if remote else [])]

    def clean_run(self, what: dict[str, Any]) -> tuple[list[dict[str, Any]], list[tuple[str, int]]]:
        """Steps, and last checkpoint's tensors, of a run of one rank that nothing disturbs, with its data here."""
        key = what["objective"], what["elastic"]
        if key not in self.clean:
            out = self.folder / f"clean-{'-'.join(map(str, key))}"
            ranks = self.launcher.start(1, self.data, out, self.folder / "clean.log", self._keys(what, "one1", False))
            if any(ended(ranks)):
                raise Wrong(f"the clean run failed: {(self.folder / 'clean.log').read_text()[-2000:]}")
            [folder] = out.iterdir()
            self.clean[key] = read_steps(folder), tensors(checkpoints_of(folder)[-1])
            shutil.rmtree(out)
        return self.clean[key]

    def round(self, number: int) -> None:
        """Trains one disturbed run to its end; raises Wrong."""
        what = plan(self.seed, number)
        (clean, weights), out, work = self.clean_run(what), self.disk / "runs", self.folder / f"round-{number}"
        shutil.rmtree(out, ignore_errors=True)
        work.mkdir()
        self.out, self.work, self.damaged = out, work, dict[str, int]()
        for index, start in enumerate(what["starts"]):
            print(f"round {number} start {index}: {start}", file=(work / "plan.txt").open("a"))
            for attempt in range(6):  # the weather may end a start
                log = work / f"start-{index}-{attempt}.log"
                done = self._start(what, start, log)
                steps = read_steps(self._run_folder()) if (self._run_folder() / STEPS).is_file() else []
                if differs := first_difference(steps, clean, exact=not what["elastic"]):
                    raise Wrong(f"start {index}: {differs}")
                self.tally["starts"] += 1
                text = log.read_text(errors="replace")
                self.tally["checkpoints passed over"] += text.count("is passed over and kept")
                self.tally["shards made again"] += text.count("it is made once more")
                if done or start["ending"]:
                    break
            else:
                raise Wrong("the last start did not come to its end")
            if done:
                break
        if len(steps) != NUM_STEPS:
            raise Wrong(f"{len(steps)} steps in the log")
        if not what["elastic"] and tensors(checkpoints_of(self._run_folder())[-1]) != weights:
            raise Wrong("weights or moments of the last checkpoint differ from the clean run's")
        self.tally["rounds"] += 1
        self.tally["rounds to the last bit"] += not what["elastic"]
        shutil.rmtree(work)

    def _run_folder(self) -> Path:
        return next((path for path in self.out.glob("*") if path.is_dir()), self.out)

    def _steps_done(self) -> int:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return len(read_steps(self._run_folder()))
        return 0

    # -------------------------------------------------------------- one start

    def _start(self, what: dict[str, Any], start: dict[str, Any], log: Path) -> bool:
        """One start, in its weather, ended as planned; whether the run came to its end."""
        world = int(start["layout"][-1])
        log.touch()  # a rank may be killed before it opens it
        ranks = self.launcher.start(world, self.work / "local", self.out, log,
                                    self._keys(what, start["layout"], True), **self.env)
        self.server.clear()
        try:
            if start["early"] and start["ending"]:
                self._wait(ranks, NUM_STEPS, seconds=3 * start["delay"])
            else:
                middle = min(self._steps_done() + 2, start["step"])
                if self._wait(ranks, middle):
                    self._weather(start, ranks)
                self._wait(ranks, start["step"])
                time.sleep(0.15 * start["delay"])
            if all(process.is_alive() for process in ranks) and start["ending"]:
                self._end(start, ranks)
                return False
            statuses = ended(ranks, seconds=PATIENCE)
            if None in statuses:
                raise Wrong(f"{log.name} hangs")
            if any(statuses) and start["weather"] != "cut the server":
                raise Wrong(f"{log.name} ended with {statuses} by itself")
            self.tally["starts ended by the weather"] += any(statuses)
            return not any(statuses)
        finally:
            kill(ranks, signal.SIGCONT)
            kill(ranks)
            for process in ranks:
                process.join()

    def _wait(self, ranks: list[Any], step: int, seconds: float = PATIENCE) -> bool:
        """Waits until the log has this step; False where a rank has ended, or after so many seconds."""
        end = time.monotonic() + seconds
        while all(process.is_alive() for process in ranks):
            if self._steps_done() > step:
                return True
            if time.monotonic() > end:
                if seconds == PATIENCE:
                    kill(ranks, signal.SIGABRT)  # prints where each thread is
                    time.sleep(1)
                    raise Wrong(f"no step {step} after {PATIENCE:.0f} s")
                return False
            time.sleep(0.03)
        return False

    def _weather(self, start: dict[str, Any], ranks: list[Any]) -> None:
        name, seconds = start["weather"], start["weather_seconds"]
        if name == "pause":
            some = ranks[:1 + int(start["where"] * len(ranks))]
            kill(some, signal.SIGSTOP)
            time.sleep(seconds)
            kill(some, signal.SIGCONT)
        elif name == "cut the server":
            if start["where"] < 0.5:
                self.server.fail(lambda request: True, times=1 << 30)
            else:
                self.server.cut(lambda request: True, times=1 << 30, after=int(start["where"] * 2000))
            time.sleep(seconds)
            self.server.clear()
        elif name == "flip a shard":
            with contextlib.suppress(FileNotFoundError, ValueError):  # removed to make room; none is there
                shards = (self.work / "local" / "train").glob("*.mds")
                flip_byte(max(shards, key=lambda path: path.stat().st_mtime_ns), start["where"])  # the last to be read
        if name != "none":
            self.tally[name] += 1

    def _end(self, start: dict[str, Any], ranks: list[Any]) -> None:
        """Ends a start by a fault, or brings about what will end it."""
        name = start["ending"]
        if name == "limit files" or name == "fill the disk" and not self.has_disk:
            for process in ranks:
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
            ended(ranks, seconds=10)
        elif name == "fill the disk":
            with contextlib.suppress(OSError), (self.disk / "filler").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 16))
            ended(ranks, seconds=10)
            (self.disk / "filler").unlink()
        elif name == "terminate":
            for process in ranks:
                process.terminate()
            statuses = ended(ranks, seconds=PATIENCE)
            # a rank that was still starting dies at once, and the launcher kills those that wait for it
            if None in statuses and -signal.SIGTERM not in statuses:
                raise Wrong(f"asked to end, its ranks ended with {statuses}")
            self.tally["preempted with a checkpoint"] += statuses == [PREEMPTED] * len(ranks)
        else:
            kill(ranks)
            for process in ranks:
                process.join()
        if "checkpoint" in name and not self._damage(name, start["where"]):
            return
        self.tally[name] += 1

    def _damage(self, name: str, where: float) -> bool:
        """Damages the newest checkpoint, if one before it is whole."""
        found = [path for path in checkpoints_of(self._run_folder())
                 if self.damaged.get(path.name) != path.stat().st_mtime_ns]
        if len(found) < 2:
            return False
        if "flip" in name:
            flip_byte(found[-1], where)
        else:
            os.truncate(found[-1], int(where * found[-1].stat().st_size))
        self.damaged[found[-1].name] = found[-1].stat().st_mtime_ns
        return True


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--rounds", type=int, default=1 << 30, help="at most so many rounds")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing is left running or mounted
    begin, wrong, launcher = time.monotonic(), 0, Launcher()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    with small_disk(folder / "disk") as has_disk, S3Server() as server:
        soak = Soak(launcher, folder / "disk", has_disk, server, arguments.seed)
        print(f"ready after {time.monotonic() - begin:.0f} s", flush=True)
        for number in range(arguments.first, arguments.first + arguments.rounds):
            if time.monotonic() - begin > 60 * arguments.minutes or wrong == 5:
                break
            try:
                soak.round(number)
                print(f"round {number}: equal; {dict(soak.tally)}, {time.monotonic() - begin:.0f} s", flush=True)
            except Wrong as error:
                wrong += 1
                shutil.copytree(soak.out, soak.work / "runs", symlinks=True, dirs_exist_ok=True)
                print(f"round {number}: {error}; what its starts wrote is in {soak.work}", flush=True)
    rest = [f"{count} {name}" for name, count in sorted(soak.tally.items()) if "round" not in name]
    print(f"soak: {soak.tally['rounds']} rounds ({soak.tally['rounds to the last bit']} to the last bit), "
          f"{', '.join(rest)}; {wrong} differences; seed {arguments.seed}, {time.monotonic() - begin:.0f} s")
    if not wrong:
        shutil.rmtree(folder)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
