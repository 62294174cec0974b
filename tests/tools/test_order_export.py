"""The order as Parquet files: the ids of a real run at every step, cut where Composer saves, resumable, nothing mixed up."""

import copy
import itertools
import shutil
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
from ettin_foundry.tools import order_export
from ettin_foundry.tools.order import stream_of
from ettin_foundry.tools.order_export import Part, export_order, parts_of
from ettin_foundry.training.steps import read_steps


@pytest.fixture(scope="module")
def config(data_set, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    return OmegaConf.to_container(nano_run.configure(data_set, out, *nano_run.RISING), resolve=True)


@pytest.fixture
def cfg(config):
    return copy.deepcopy(config)


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_exported_ids_are_those_of_the_run_and_folders_lie_between_its_checkpoints(rising_run, capsys, tmp_path):
    folder, out = rising_run[0], tmp_path / "order"
    with pytest.raises(SystemExit):
        main(["order", "--checkpoint", str(folder), "--export", str(out)])
    saved = sorted(int(path.name.split("-")[1].removeprefix("ba")) for path in folder.glob("ep0-ba*.pt"))
    expected = [f"checkpoint_{number:06d}/steps_{begin + 1:06d}_to_{end:06d}.parquet"
                for number, (begin, end) in enumerate(zip([0, *saved], saved), 1)]
    assert saved[:3] == [3, 6, 9] and names(out) == [*expected, "order.json"]
    assert f"{len(saved)} files" in capsys.readouterr().out
    tables = []
    for name in expected:
        file = pq.ParquetFile(out / name)
        assert file.schema_arrow.equals(pa.schema([("input_ids", pa.list_(pa.uint16())), ("step", pa.uint64())]))
        assert file.metadata.row_group(0).column(0).compression == "ZSTD"
        tables.append(file.read())
    table = pa.concat_tables(tables)
    read = []
    for number, batch in enumerate(rising_run[1]["batches"], 1):
        ids = torch.where(batch["labels"] != -100, batch["labels"], batch["input_ids"])  # masking undone
        read += [(row[numbers >= 0].tolist(), number) for row, numbers in zip(ids, batch["sequence_id"])]
    assert list(zip(table["input_ids"].to_pylist(), table["step"].to_pylist())) == read


@pytest.mark.parametrize("interval", ["7ba", "1ba", "900tok", "5000tok", "300tok", "520tok", "60sp", "5sp"])
def test_parts_are_cut_where_composer_saves(cfg, interval, monkeypatch):
    monkeypatch.setattr(order_export, "STEPS_PER_FILE", 5)
    stream, due = stream_of(cfg), create_interval_scheduler(interval, include_end_of_training=False)
    clocks = [{TimeUnit.BATCH: step, TimeUnit.TOKEN: stream.tokens_before(step),
               TimeUnit.SAMPLE: stream.ramp.first_row(step)} for step in range(41)]
    number, folders = 1, []
    for step in range(40):
        folders.append(number)
        before, after = (SimpleNamespace(get=clocks[at].__getitem__, batch=Time(at, "ba")) for at in (step, step + 1))
        state = SimpleNamespace(previous_timestamp=before, timestamp=after, get_elapsed_duration=lambda: 0.5)
        number += bool(due(state, Event.BATCH_CHECKPOINT))
    whole = list(parts_of(stream, interval, 0, 40))
    assert [part.number for part in whole for _ in range(part.begin, part.end)] == folders
    assert [step for part in whole for step in range(part.begin, part.end)] == list(range(40))
    for part, following in zip(whole, whole[1:]):  # full files, but for the last of a folder
        assert part.end - part.begin == 5 or part.number < following.number
    for first, last in ((0, 1), (3, 17), (11, 12), (22, 40)):
        cut = [Part(p.number, max(p.begin, first), min(p.end, last)) for p in whole if p.end > first and p.begin < last]
        assert list(parts_of(stream, interval, first, last)) == cut


def test_a_stopped_export_goes_on_and_ends_with_the_same_files(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(order_export, "STEPS_PER_FILE", 2)
    stream = stream_of(cfg)

    class Stopped(Exception):
        pass

    def stop_after(ticks):
        def tick(done, total):
            if next(counted) == ticks:
                raise Stopped

        counted = itertools.count()
        return tick

    files, written = export_order(cfg, stream, tmp_path / "whole")
    assert files == written == len(names(tmp_path / "whole")) - 1
    for ticks in (0, 3, 6, 11):
        with pytest.raises(Stopped):
            export_order(cfg, stream_of(cfg), tmp_path / "parts", tick=stop_after(ticks))
    assert export_order(cfg, stream_of(cfg), tmp_path / "parts")[0] == files
    victim = tmp_path / "parts" / names(tmp_path / "parts")[1]
    victim.write_bytes(victim.read_bytes()[:-40])  # as a crash of the machine may leave it
    times = {name: (tmp_path / "parts" / name).stat().st_mtime_ns for name in names(tmp_path / "parts")}
    assert export_order(cfg, stream, tmp_path / "parts") == (files, 1)
    for name in names(tmp_path / "whole"):
        content, path = (tmp_path / "whole" / name).read_bytes(), tmp_path / "parts" / name
        assert path.read_bytes() == content and (path.stat().st_mtime_ns == times[name] or path == victim)
    assert names(tmp_path / "whole") == names(tmp_path / "parts")


def test_a_range_is_written_as_a_part_of_the_whole_under_the_names_of_its_phase(rising_run, cfg, tmp_path):
    cfg["variables"]["phase"] = "extend"
    assert export_order(cfg, stream_of(cfg), tmp_path / "part", first=4, last=8) == (2, 2)
    assert names(tmp_path / "part")[:2] == ["ext_000002/steps_000005_to_000006.parquet",
                                            "ext_000003/steps_000007_to_000008.parquet"]
    rows = sum(entry["rows"] for entry in read_steps(rising_run[0])[4:8])
    assert sum(pq.read_metadata(path).num_rows for path in (tmp_path / "part").rglob("*.parquet")) == rows


def test_another_folder_content_range_or_interval_is_refused(cfg, tmp_path):
    stream, out = stream_of(cfg), tmp_path / "order"
    export_order(cfg, stream, out, last=2)
    with pytest.raises(ValueError, match=r"holds an order with steps \[0, 2\], and this one has \[0, 3\]"):
        export_order(cfg, stream, out, last=3)
    other = {**cfg, "train_loader": {**cfg["train_loader"], "shuffle_seed": 5}}
    with pytest.raises(ValueError, match="holds an order with shuffle_seed 21, and this one has 5"):
        export_order(other, stream_of(other), out, last=2)
    for name, words in (("notes.txt", "holds 'notes.txt'; a new or empty"), ("order.json", "not what an export wrote")):
        mixed = shutil.copytree(out, tmp_path / name)
        (mixed / name).write_text("[1]")
        with pytest.raises(ValueError, match=words):
            export_order(cfg, stream, mixed, last=2)
    (out / "order.json").unlink()
    with pytest.raises(ValueError, match="holds no order.json; a new or empty folder"):
        export_order(cfg, stream, out, last=2)
    for first, last in ((3, 3), (5, 4), (0, 10**6)):
        with pytest.raises(ValueError, match=f"--from, --to: {first} and {last} given; the run has the steps 0 to"):
            export_order(cfg, stream, tmp_path / "new", first=first, last=last)
    for interval in ("1sec", "0.1dur", "0tok"):
        with pytest.raises(ValueError, match=f"save_interval: '{interval}' given; folders are"):
            export_order({**cfg, "save_interval": interval}, stream, tmp_path / interval)
    assert not (tmp_path / "new").exists() and not (tmp_path / "1sec").exists()
