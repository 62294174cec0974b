"""`ettin order`: a step's documents against the batches of a real run; the order as files, cut where Composer saves."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nano_run
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from composer.core import Event, Time, TimeUnit
from composer.utils import create_interval_scheduler
from omegaconf import OmegaConf

from ettin_foundry.cli.main import main
from ettin_foundry.data.shards import MDSSplit
from ettin_foundry.tools import order as tool
from ettin_foundry.tools.order import export_order, files_of, next_step, steps_of_run, stream_of, view_step
from ettin_foundry.training.steps import read_steps


@pytest.fixture
def cfg(data_set, tmp_path):
    return OmegaConf.to_container(nano_run.configure(data_set, tmp_path / "run", *nano_run.RISING), resolve=True)


def unmasked(batch):
    """(B, T) ids of a batch before masking."""
    return torch.where(batch["labels"] != -100, batch["labels"], batch["input_ids"])


def printed(capsys, *arguments):
    """What `ettin order` prints, by lines."""
    with pytest.raises(SystemExit) as ended:
        main(["order", *arguments])
    assert not ended.value.code
    return capsys.readouterr().out.splitlines()


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_the_view_of_a_step_is_what_the_run_read(rising_run, cfg, data_set):
    stream, data = stream_of(cfg), MDSSplit(data_set / "train")
    stored = {(s["doc"], s["part"]): s["tokens"].tolist() for shard in range(data.num_shards)
              for s in (data.sample(shard, at) for at in range(int(data.samples[shard])))}
    for entry, batch in zip(read_steps(rising_run[0]), rising_run[1]["batches"], strict=True):
        view = view_step(stream, entry["step"])
        seen = len(view.rows), view.rows[0].tokens_before, f"{view.ids_hash:012x}"
        assert seen == (entry["rows"], entry["tokens"], entry["ids_hash"])
        assert view.num_tokens == int((batch["sequence_id"] >= 0).sum())
        read = [row[numbers == number][1:-1].tolist() for row, numbers in zip(unmasked(batch), batch["sequence_id"])
                for number in range(int(numbers.max()) + 1)]
        assert [stored[s["doc"], s["part"]] for samples in view.samples for s in samples] == read
        assert [chunk.tolist() for row in view.rows for chunk in row.chunks] == read
    assert len(view_step(stream, 9, rows=2).samples) == 2
    assert steps_of_run(cfg, stream) == range(len(read_steps(rising_run[0])))
    cfg["train_loader"]["batch_size_warmup"]["tokens"] = f"{1400 / 3000}dur"  # the same in shares of the run
    assert str(stream_of(cfg).ramp) == str(stream.ramp)


def test_the_dataset_may_lie_elsewhere_and_a_checkpoint_alone_names_the_next_step(rising_run, cfg, data_set, tmp_path):
    moved = shutil.copytree(data_set, tmp_path / "moved")
    expected = view_step(stream_of(cfg), 4).ids_hash
    cfg["train_loader"]["dataset"]["local"] = "nowhere"
    for place in (moved, moved / "train"):
        assert view_step(stream_of(cfg, str(place)), 4).ids_hash == expected
    alone = shutil.copy(next(rising_run[0].glob("*ba6-*.pt")), tmp_path / "alone.pt")
    assert next_step(alone)[2] == next_step(alone, str(moved))[2] == 6
    with pytest.raises(ValueError, match="dataset .its fingerprint. must be what the checkpoint was trained with"):
        next_step(alone, str(moved / "validation"))
    state = torch.load(alone, weights_only=False)
    for key in ("dataset_state", "callbacks"):  # the latter hold the config
        torch.save({**state, "state": {k: v for k, v in state["state"].items() if k != key}}, tmp_path / "part.pt")
        with pytest.raises(ValueError, match="part.pt must be of a run with ettin_text, got one without"):
            next_step(tmp_path / "part.pt")


def test_the_command_prints_a_step_from_a_recipe_and_the_next_one_of_a_checkpoint(rising_run, data_set, capsys):
    overrides = [each for each in (*nano_run.SMALL, *nano_run.RISING) if not each.startswith("~")]
    first, _, *lines, more = printed(capsys, str(data_set), "--yaml", "yamls/nano.yaml", "--step", "6", "--rows", "3",
                                     "--decode", *overrides)
    step, after = read_steps(rising_run[0])[6:8]
    assert first == (f"step 6 of nano-mlm-pretrain: 8 rows, {after['tokens'] - step['tokens']:,} tokens, "
                     f"{step['tokens']:,} before it, in epoch 0; ids_hash {step['ids_hash']}")
    assert {line.split()[0] for line in lines[::2]} == {"0", "1", "2"} and more == "and 5 rows more (--rows)"
    assert "doc-" in lines[0] and "part" in lines[0] and len(lines[1].strip()) > 10
    assert printed(capsys, "--checkpoint", str(next(rising_run[0].glob("*ba6-*.pt"))), "--rows", "0")[0] == first


YAML = ["--yaml", "yamls/nano.yaml"]


@pytest.mark.parametrize(("arguments", "words"), [
    (["--step", "3"], "either --yaml or --checkpoint"), ([*YAML, "--checkpoint", "x.pt"], "either --yaml or"),
    (YAML, "--step or --export"), ([*YAML, "--step", "3", "--export", "x"], "--from and --to instead of --step"),
    ([*YAML, "--step", "3", "--to", "9"], "--from and --to must come with --export"),
    (["a", "b", *YAML, "--step", "3"], "one place, got a b"), (["--checkpoint", "x.pt", "seed=3"], "got seed=3"),
    (["--checkpoint", "x.pt"], "x.pt"), (["nowhere", *YAML, "--step", "3"], "'nowhere'"),
    ([*YAML, "--step", "3", "train_loader.name=text"], "got 'text'")], ids=str)
def test_a_wrong_command_line_ends_with_one_line_that_says_so(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["order", *arguments])
    [line] = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1 and words in line


def test_a_step_is_told_without_torch_and_the_host(data_set):
    root = Path(__file__).resolve().parents[2]
    overrides = [each for each in nano_run.SMALL if not each.startswith("~")]
    command = ["order", str(data_set), *YAML, "--step", "123456", "--rows", "1", *overrides]
    program = ("import atexit, sys; from ettin_foundry.cli.main import main; atexit.register(lambda: print(sorted("
               "{'torch', 'composer', 'llmfoundry', 'transformers'} & set(sys.modules)))); " f"main({command!r})")
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    first, *_, imported = done.stdout.splitlines()
    assert first.startswith("step 123,456 of nano-mlm-pretrain: 8 rows") and json.loads(imported) == []


def test_exported_ids_are_those_of_the_run_and_folders_lie_between_its_checkpoints(rising_run, capsys, tmp_path):
    folder, out = rising_run[0], tmp_path / "order"
    [told] = printed(capsys, "--checkpoint", str(folder), "--export", str(out))
    saved = sorted(int(path.name.split("-")[1].removeprefix("ba")) for path in folder.glob("ep0-ba*.pt"))
    expected = [f"checkpoint_{number:06d}/steps_{begin + 1:06d}_to_{end:06d}.parquet"
                for number, (begin, end) in enumerate(zip([0, *saved], saved), 1)]
    assert saved[:3] == [3, 6, 9] and names(out) == [*expected, "order.json"] and f"{len(saved)} files" in told
    table = pa.concat_tables([pq.read_table(out / name) for name in expected])
    assert table.schema.equals(pa.schema([("input_ids", pa.list_(pa.uint16())), ("step", pa.uint64())]))
    read = [(row[numbers >= 0].tolist(), step) for step, batch in enumerate(rising_run[1]["batches"], 1)
            for row, numbers in zip(unmasked(batch), batch["sequence_id"])]
    assert list(zip(table["input_ids"].to_pylist(), table["step"].to_pylist())) == read


@pytest.mark.parametrize("interval", ["7ba", "1ba", "900tok", "5000tok", "300tok", "520tok", "60sp", "5sp"])
def test_files_are_cut_where_composer_saves(cfg, interval, monkeypatch):
    monkeypatch.setattr(tool, "STEPS_PER_FILE", 5)
    stream, due = stream_of(cfg), create_interval_scheduler(interval, include_end_of_training=False)
    clocks = [{TimeUnit.BATCH: step, TimeUnit.TOKEN: stream.tokens_before(step),
               TimeUnit.SAMPLE: stream.ramp.first_row(step)} for step in range(41)]
    number, folders = 1, []
    for step in range(40):
        folders.append(number)
        before, after = (SimpleNamespace(get=clocks[at].__getitem__, batch=Time(at, "ba")) for at in (step, step + 1))
        state = SimpleNamespace(previous_timestamp=before, timestamp=after, get_elapsed_duration=lambda: 0.5)
        number += bool(due(state, Event.BATCH_CHECKPOINT))
    whole = list(files_of(stream, interval, range(40)))
    assert [number for number, steps in whole for _ in steps] == folders
    assert [step for _, steps in whole for step in steps] == list(range(40))
    for (number, steps), (following, _) in zip(whole, whole[1:]):  # full files, but for the last of a folder
        assert len(steps) == 5 or number < following
    for first, last in ((0, 1), (3, 17), (11, 12), (22, 40)):
        cut = [(n, s[max(first - s.start, 0):last - s.start]) for n, s in whole if first < s.stop and s.start < last]
        assert list(files_of(stream, interval, range(first, last))) == cut


def test_a_stopped_export_goes_on_and_ends_with_the_same_files(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "STEPS_PER_FILE", 2)
    stream, whole, parts = stream_of(cfg), tmp_path / "whole", tmp_path / "parts"
    steps = steps_of_run(cfg, stream)
    assert list(export_order(cfg, stream, whole, steps)) == list(steps)
    for stop in (0, 3, 6, 11):
        for step in export_order(cfg, stream_of(cfg), parts, steps):
            if step == stop:
                break
    victim = parts / names(whole)[1]
    victim.write_bytes(victim.read_bytes()[:-40])  # as a crash of the machine may leave it
    times = {path: path.stat().st_mtime_ns for path in parts.rglob("*.parquet")}
    assert list(export_order(cfg, stream, parts, steps)) == list(steps) and names(parts) == names(whole)
    assert all((path.stat().st_mtime_ns == then) is (path != victim) for path, then in times.items())
    assert all((parts / name).read_bytes() == (whole / name).read_bytes() for name in names(whole))


def test_a_range_is_written_under_the_names_of_its_phase_and_a_folder_of_another_is_refused(rising_run, cfg, tmp_path):
    cfg["variables"]["phase"] = "extend"
    stream, out = stream_of(cfg), tmp_path / "part"
    list(export_order(cfg, stream, out, steps_of_run(cfg, stream, 4, 8)))
    assert names(out) == ["ext_000002/steps_000005_to_000006.parquet", "ext_000003/steps_000007_to_000008.parquet",
                          "order.json"]
    rows = sum(entry["rows"] for entry in read_steps(rising_run[0])[4:8])
    assert sum(pq.read_metadata(path).num_rows for path in out.rglob("*.parquet")) == rows
    other = {**cfg, "train_loader": {**cfg["train_loader"], "shuffle_seed": 5}}
    for changed, steps in ((other, range(4, 8)), (cfg, range(4, 9))):
        with pytest.raises(ValueError, match="--export must be a new folder or hold a part of this export"):
            list(export_order(changed, stream_of(changed), out, steps))
    for first, last in ((3, 3), (5, 4), (0, 10**6)):
        with pytest.raises(ValueError, match="--from must be below --to"):
            steps_of_run(cfg, stream, first, last)
    for interval in ("1sec", "0tok"):
        with pytest.raises(ValueError, match="save_interval must be in tok, ba or sp"):
            list(export_order({**cfg, "save_interval": interval}, stream, tmp_path / "none", range(4, 8)))
    assert not (tmp_path / "none").exists()
