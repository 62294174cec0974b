"""Ray for real, on this machine: a worker killed with -9, errors as they were, and nothing left running."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pool_jobs
import psutil
import pytest
from converting import files_of, run, write_corpus
from pool_jobs import jobs

from ettin_foundry.corpus.executors import Board, Tick, run_tasks

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")


@pytest.fixture(scope="module", autouse=True)
def _small_ray() -> Iterator[None]:
    """A folder of its own for Ray's files, short because they hold sockets, and nothing that calls home."""
    patch, folder = pytest.MonkeyPatch(), tempfile.mkdtemp(prefix="ray-")
    before = psutil.Process().children(recursive=True)  # of other tests: the compiler has workers of its own
    here = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    for name, value in {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled",
                        "RAY_DEDUP_LOGS": "0", "PYTHONPATH": here}.items():
        patch.setenv(name, value)
    patch.delenv("RAY_ADDRESS", raising=False)
    yield
    started = {*psutil.Process().children(recursive=True)}.difference(before)
    ray.shutdown()
    assert psutil.wait_procs(started, timeout=5)[1] == []
    shutil.rmtree(folder)
    patch.undo()


def test_conversion_on_ray_with_a_killed_worker_writes_the_bytes_of_one_process(tmp_path, tokenizer_dir, caplog):
    write_corpus(tmp_path / "texts", files=6, documents=2_000)
    settings = {"validation": 0.2, "unit_size": "64kb", "engine": "tokenizers"}
    run(tmp_path / "one", [tmp_path / "texts"], tokenizer_dir, **settings)
    over, own = threading.Event(), psutil.Process()

    def kill() -> None:
        """Workers that have a task, one after the other until one of them died in the middle of it."""
        while not over.is_set() and "died" not in caplog.text:
            with contextlib.suppress(psutil.NoSuchProcess):
                if found := [child for child in own.children(recursive=True) if "attempt" in "".join(child.cmdline())]:
                    found[0].kill()
                    over.wait(1.0)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        run(tmp_path / "ray", [tmp_path / "texts"], tokenizer_dir, executor="ray", workers=2, **settings)
    finally:
        over.set()
        killer.join()
    assert "died (WorkerCrashedError" in caplog.text and "which begins again" in caplog.text
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "one") and not ray.is_initialized()


@pytest.fixture(scope="module")
def cluster(_small_ray: None) -> None:
    """A Ray that somebody else started: it is used, and left running."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, logging_level="ERROR",
             log_to_driver=False)


@pytest.mark.usefixtures("cluster")
def test_errors_and_hopeless_tasks_are_as_in_a_local_pool(tmp_path):
    options = {"workers": 2, "board": Board("test", 0), "ray": True}
    with pytest.raises(FileNotFoundError, match="no such corpus") as raised:
        run_tasks(pool_jobs.raising, jobs(3, tmp_path)[::-2], **options)  # type: ignore[arg-type]
    assert raised.value.filename == "/data/corpus.jsonl" and "in raising" in str(raised.value.__cause__)
    assert list(tmp_path.glob("tidied.0.*"))  # the other one was ended, and could clean up
    with pytest.raises(ChildProcessError, match="job-3: 2 workers died in it, the last of WorkerCrashedError"):
        run_tasks(pool_jobs.dying, jobs(4, tmp_path, "9"), tries=2, **options)  # type: ignore[arg-type]
    assert len(list(tmp_path.glob("try.3.*"))) == 2
    run_tasks(pool_jobs.in_steps, jobs(3), **options)  # type: ignore[arg-type]
    assert options["board"].total == Tick(15, 150, 1500, 15_000)
    assert ray.is_initialized()


def test_no_cluster_at_the_address_is_said_at_once(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"--ray-address must be HOST:PORT .*got {address}"):
            run_tasks(pool_jobs.in_steps, jobs(1), workers=1, board=Board("", 0), ray=True, ray_address=address)
