"""`ettin order`: a step's documents against the batches of a real run."""

import shutil

import nano_run
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf

from ettin_foundry.data.shards import MDSSplit
from ettin_foundry.tools.order import next_step, stream_of, view_step
from ettin_foundry.training.steps import read_steps
from examples import data_order

YAML = ["--yaml", "yamls/nano.yaml"]
SMALL, RISING = ([each for each in given if not each.startswith("~")] for given in (nano_run.SMALL, nano_run.RISING))


@pytest.fixture
def cfg(data_set, tmp_path):
    return OmegaConf.to_container(nano_run.configure(data_set, tmp_path / "run", *nano_run.RISING), resolve=True)


def unmasked(batch):
    """(B, T) ids of a batch before masking."""
    return torch.where(batch["labels"] != -100, batch["labels"], batch["input_ids"])


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
    cfg["train_loader"]["batch_size_warmup"]["tokens"] = f"{1400 / 3000}dur"  # the same in shares of the run
    assert str(stream_of(cfg).ramp) == str(stream.ramp)


def test_a_checkpoint_alone_names_the_next_step(rising_run, tmp_path):
    alone = shutil.copy(next(rising_run[0].glob("*ba6-*.pt")), tmp_path / "alone.pt")
    assert next_step(alone)[2] == 6
    state = torch.load(alone, weights_only=False)
    for key in ("dataset_state", "callbacks"):  # the latter hold the config
        torch.save({**state, "state": {k: v for k, v in state["state"].items() if k != key}}, tmp_path / "part.pt")
        with pytest.raises(ValueError, match="part.pt must be of a run with ettin_text, got one without"):
            next_step(tmp_path / "part.pt")


def test_the_command_prints_a_step_from_a_recipe_and_the_next_one_of_a_checkpoint(rising_run, data_set, ettin):
    words = f"variables.data={data_set}", *YAML, "--step", "6", "--rows", "3", "--decode", *SMALL, *RISING
    first, _, *lines, more = ettin("order", *words)[1].splitlines()
    step, after = read_steps(rising_run[0])[6:8]
    assert first == (f"step 6 of nano-mlm-pretrain: 8 rows, {after['tokens'] - step['tokens']:,} tokens, "
                     f"{step['tokens']:,} before it, in epoch 0; ids_hash {step['ids_hash']}")
    assert {line.split()[0] for line in lines[::2]} == {"0", "1", "2"} and more == "and 5 rows more (--rows)"
    assert "doc-" in lines[0] and "part" in lines[0] and len(lines[1].strip()) > 10
    out = ettin("order", "--checkpoint", next(rising_run[0].glob("*ba6-*.pt")), "--rows", "0")[1]
    assert out.splitlines()[0] == first


def test_the_example_writes_the_ids_of_the_run_and_goes_on_after_a_stop(rising_run, data_set, tmp_path, monkeypatch):
    monkeypatch.setattr(data_order, "STEPS_PER_FILE", 4)
    for _ in range(2):
        data_order.main([str(tmp_path), "6", YAML[1], f"variables.data={data_set}", *SMALL, *RISING])
        (tmp_path / "steps_000005_to_000006.parquet").rename(tmp_path / "later")
    (tmp_path / "later").rename(tmp_path / "steps_000005_to_000006.parquet")
    table = pa.concat_tables([pq.read_table(path) for path in sorted(tmp_path.glob("*.parquet"))])
    assert table.schema.equals(pa.schema([("input_ids", pa.list_(pa.uint16())), ("step", pa.uint64())]))
    read = [(row[numbers >= 0].tolist(), step) for step, batch in enumerate(rising_run[1]["batches"][:6], 1)
            for row, numbers in zip(unmasked(batch), batch["sequence_id"])]
    assert list(zip(table["input_ids"].to_pylist(), table["step"].to_pylist())) == read
