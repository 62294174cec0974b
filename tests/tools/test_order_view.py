"""What a step reads, told without training: against the batches of a real run and against the loader."""

import copy
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nano_run
import pytest
import torch
from omegaconf import OmegaConf

from ettin_foundry.cli.main import main
from ettin_foundry.data.loader import build_ettin_loader
from ettin_foundry.data.shards import MDSSplit
from ettin_foundry.data.tokenizer import load
from ettin_foundry.tools.order import length_of_run, next_batch, next_step, stream_of, view_step
from ettin_foundry.training.steps import read_steps

TENSORS = ("input_ids", "labels", "sequence_id")


@pytest.fixture(scope="module")
def config(data_set, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    return OmegaConf.to_container(nano_run.configure(data_set, out, *nano_run.RISING), resolve=True)


@pytest.fixture
def cfg(config):
    return copy.deepcopy(config)


def pieces_of(batch):
    """The chunks of a batch, masking undone, row by row."""
    ids = torch.where(batch["labels"] != -100, batch["labels"], batch["input_ids"])
    return [row[numbers == number][1:-1].tolist() for row, numbers in zip(ids, batch["sequence_id"])
            for number in range(int(numbers.max()) + 1)]


def printed(capsys, *arguments):
    """What `ettin order` prints, by lines."""
    with pytest.raises(SystemExit) as ended:
        main(["order", *arguments])
    assert not ended.value.code
    return capsys.readouterr().out.splitlines()


def checkpoint_at(run, batch):
    return next(run[0].glob(f"*ba{batch}-*.pt"))


def test_the_view_of_a_step_is_what_the_run_read(rising_run, cfg, data_set):
    stream, data = stream_of(cfg), MDSSplit(data_set / "train")
    for entry, batch in zip(read_steps(rising_run[0]), rising_run[1]["batches"], strict=True):
        view = view_step(stream, entry["step"])
        seen = view.rows, view.tokens_before, f"{view.ids_hash:012x}"
        assert seen == (entry["rows"], entry["tokens"], entry["ids_hash"])
        assert view.tokens == int((batch["sequence_id"] >= 0).sum())
        assert [piece.chunk.tolist() for piece in view.pieces] == pieces_of(batch)
    stored = {(s["doc"], s["part"]): s for shard in range(data.num_shards)
              for s in (data.sample(shard, i) for i in range(int(data.samples[shard])))}
    for piece in view.pieces:
        sample = stored[piece.doc, piece.part]
        assert (sample["tokens"].tolist(), bool(sample["last"]), sample["source"]) == (
            piece.chunk.tolist(), piece.last, piece.source) and piece.tokens == len(piece.chunk) + 2
    assert len(view_step(stream, 9, rows=2).pieces) < len(view.pieces)
    assert length_of_run(cfg, stream) == len(read_steps(rising_run[0]))


@pytest.mark.parametrize("batch", [3, 6])
def test_from_a_checkpoint_alone_comes_the_exact_next_batch(rising_run, batch, tmp_path):
    alone = shutil.copy(checkpoint_at(rising_run, batch), tmp_path / "alone.pt")
    _, stream, step = next_step(alone)
    expected = rising_run[1]["batches"][batch]
    whole, halves = next_batch(alone), [next_batch(alone, rank=rank, world_size=2) for rank in range(2)]
    assert step == batch == expected["step"] and stream.ramp.rows(step) == len(expected["input_ids"])
    assert whole.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(whole[key], value) if isinstance(value, torch.Tensor) else whole[key] == value, key
    for key in TENSORS:
        assert torch.equal(torch.cat([half[key] for half in halves]), expected[key])


def test_a_schedule_in_shares_of_the_run_is_the_loaders(cfg, data_set):
    cfg["train_loader"]["batch_size_warmup"] = {"min_size": 2, "tokens": "0.5dur"}
    stream = stream_of(cfg)
    loader = build_ettin_loader(load(data_set / "tokenizer"), 8, dataset=cfg["train_loader"]["dataset"], objective="clm",
                                max_seq_len=64, batch_size_warmup={"min_size": 2, "tokens": 1500})
    for batch in itertools.islice(loader.dataloader, 9):
        assert view_step(stream, batch["step"], rows=0).ids_hash == batch["ids_hash"]


def test_the_set_may_lie_elsewhere_and_another_one_is_refused(rising_run, cfg, data_set, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(data_set, moved)
    expected = view_step(stream_of(cfg), 4).ids_hash
    cfg["train_loader"]["dataset"]["local"] = "nowhere"
    for place in (moved, moved / "train"):
        assert view_step(stream_of(cfg, place), 4).ids_hash == expected
    assert next_step(checkpoint_at(rising_run, 3), moved)[2] == 3
    with pytest.raises(ValueError, match="dataset .fingerprint of its manifest.: .* given, the checkpoint was trained with"):
        next_step(checkpoint_at(rising_run, 3), moved / "validation")
    with pytest.raises(FileNotFoundError, match="nowhere.*holds no complete split"):
        stream_of(cfg)


def test_a_checkpoint_that_does_not_say_what_it_reads_is_refused(rising_run, tmp_path):
    state = torch.load(checkpoint_at(rising_run, 3), weights_only=False)
    for key, words in (("dataset_state", "holds no place in the data"), ("callbacks", "holds no record of its config")):
        torch.save({**state, "state": {k: v for k, v in state["state"].items() if k != key}}, tmp_path / "part.pt")
        with pytest.raises(ValueError, match=words):
            next_step(tmp_path / "part.pt")


def test_the_command_prints_a_step_from_a_recipe_and_the_next_one_of_a_checkpoint(rising_run, data_set, tmp_path, capsys):
    overrides = [each for each in (*nano_run.SMALL, *nano_run.RISING) if not each.startswith("~")]
    first, _, *lines, more = printed(capsys, str(data_set), "--yaml", "yamls/nano.yaml", "--step", "6", "--rows", "3",
                                     "--decode", *overrides)
    step, after = read_steps(rising_run[0])[6:8]
    assert first == (f"step 6 of nano-mlm-pretrain: 8 rows, {after['tokens'] - step['tokens']:,} tokens, "
                     f"{step['tokens']:,} before it, in epoch 0; ids_hash {step['ids_hash']}")
    assert {line.split()[0] for line in lines[::2]} == {"0", "1", "2"} and more == "and 5 rows more (--rows)"
    assert "doc-" in lines[0] and "part" in lines[0] and len(lines[1].strip()) > 10
    assert printed(capsys, "--checkpoint", str(checkpoint_at(rising_run, 6)), "--rows", "0")[0] == first


@pytest.mark.parametrize(("arguments", "words"), [
    (["--step", "3"], "--yaml, --checkpoint: neither given"),
    (["--yaml", "yamls/nano.yaml", "--checkpoint", "x.pt"], "--yaml, --checkpoint: both given"),
    (["--yaml", "yamls/nano.yaml"], "--step: not given"),
    (["--yaml", "yamls/nano.yaml", "--step", "3", "--export", "x"], "--step: 3 given with --export"),
    (["--yaml", "yamls/nano.yaml", "--step", "3", "--to", "9"], "--from, --to: 0 and 9 given without --export"),
    (["a", "b", "--yaml", "yamls/nano.yaml", "--step", "3"], "SET: a, b given; one set is possible"),
    (["--checkpoint", "x.pt", "seed=3"], "seed=3: given with --checkpoint"),
    (["--checkpoint", "x.pt"], "x.pt: no such checkpoint"),
    (["nowhere", "--yaml", "yamls/nano.yaml", "--step", "3"], "'nowhere', split: 'train' given"),
    (["--yaml", "yamls/nano.yaml", "--step", "3", "train_loader.name=text"], "train_loader.name: 'text' given"),
    (["--yaml", "yamls/nano.yaml", "--step", "3", "global_train_batch_size=0"], "global_train_batch_size: 0 given")],
    ids=str)
def test_a_wrong_command_line_ends_with_one_line_that_says_so(arguments, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["order", *arguments])
    [line] = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1 and words in line


def test_a_step_is_told_without_torch_and_the_host(data_set):
    root = Path(__file__).resolve().parents[2]
    overrides = [each for each in nano_run.SMALL if not each.startswith("~")]
    command = ["order", str(data_set), "--yaml", "yamls/nano.yaml", "--step", "123456", "--rows", "1", *overrides]
    program = ("import atexit, sys; from ettin_foundry.cli.main import main; atexit.register(lambda: print(sorted("
               "{'torch', 'composer', 'llmfoundry', 'transformers'} & set(sys.modules)))); " f"main({command!r})")
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    first, *_, imported = done.stdout.splitlines()
    assert first.startswith("step 123,456 of nano-mlm-pretrain: 8 rows") and json.loads(imported) == []
