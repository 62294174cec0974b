"""Several conversions in one folder, and a conversion while a run reads: refused or safe, also where flock is not."""

import errno
import fcntl
import os

import pytest
from converting import files_of, run, write_corpus

from ettin_foundry.corpus import convert as converting
from ettin_foundry.corpus.finalize import sole_writer
from ettin_foundry.corpus.verify import verify_dataset
from ettin_foundry.data.stream import open_stream


def test_a_second_conversion_into_a_folder_is_refused_and_tasks_of_an_array_are_not(tmp_path, tokenizer_dir, ettin):
    write_corpus(tmp_path / "texts", files=2, documents=20)
    out = tmp_path / "set"
    command = ["convert", tmp_path / "texts", "--out", out, "--tokenizer", tokenizer_dir, "--workers", 1]
    with sole_writer(str(out)):
        code, _, error = ettin(*command)
        assert code == 1 and "--out must be used by one conversion at a time" in error
        assert ettin("finalize", out)[0] == 1
    assert not out.exists()  # nothing came of either
    with sole_writer(str(out), shared=True):
        assert ettin(*command, "--task-index", 0, "--num-tasks", 2)[0] == 0 and ettin(*command)[0] == 1


@pytest.mark.parametrize("cut_window", [0.1, 0.3])
def test_without_locks_two_at_once_give_one_dataset_or_an_error(tmp_path, tokenizer_dir, monkeypatch, cut_window):
    """The second runs from beginning to end while the first has read its plan and written nothing."""
    write_corpus(tmp_path / "texts", files=3, documents=25)
    run(tmp_path / "alone", [tmp_path / "texts"], tokenizer_dir)
    execute, waiting = converting.run_tasks, [True]

    def late(*args, **options):
        if waiting and waiting.pop():
            run(tmp_path / "set", [tmp_path / "texts"], tokenizer_dir, cut_window=cut_window)
        execute(*args, **options)

    monkeypatch.setattr(converting, "run_tasks", late)
    if cut_window == 0.1:  # equal options
        run(tmp_path / "set", [tmp_path / "texts"], tokenizer_dir)
        assert files_of(tmp_path / "set") == files_of(tmp_path / "alone")
    else:
        with pytest.raises(ValueError, match="must be of unit 0 .* and these options, got another unit's record"):
            run(tmp_path / "set", [tmp_path / "texts"], tokenizer_dir)
        assert not verify_dataset(tmp_path / "set").ok  # no reader takes the one's shards for the other's


@pytest.mark.parametrize("flock", [True, False])
def test_a_run_reads_the_same_rows_while_its_dataset_grows(tmp_path, tokenizer_dir, monkeypatch, flock):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if not flock:
        monkeypatch.setattr(fcntl, "flock", refuse)
    for seed in (0, 1):
        write_corpus(tmp_path / f"{seed}", files=2, documents=25, seed=seed)
    run(tmp_path / "set", [tmp_path / "0"], tokenizer_dir)

    def rows(stream):
        return [[chunk.tolist() for chunk in row.chunks] for step in range(20) for row in stream.rows_of(step)]

    def opened():
        place = {"local": str(tmp_path / "set"), "split": "train"}
        return open_stream(dataset=place, max_seq_len=64, packing=True, shuffle=True, shuffle_seed=1,
                           shuffle_window=None, batch_size_warmup=None, global_batch_size=4)

    expected, running = rows(opened()), opened()
    running.rows_of(0)
    run(tmp_path / "set", [tmp_path / "1"], tokenizer_dir, append=True)
    assert rows(running) == expected and rows(opened()) != expected
