"""Claims of batches.py: flat microbatches equal loops over tokens, and the host's counts of them."""

import itertools

import numpy as np
import pytest
import torch
from composer.devices import DeviceCPU

from ettin_foundry.batches import count_tokens, flatten, split_batch
from ettin_foundry.data import build_ettin_loader
from ettin_foundry.tokenizer import load

T, B = 64, 4
TENSORS = ("input_ids", "labels", "sequence_id")
OBJECTIVES = pytest.mark.parametrize(("objective", "rate"), [("mlm", 0.3), ("clm", 0.0), ("mntp", 0.15)])


@pytest.fixture(scope="module")
def tokenizer(data_set):
    return load(data_set / "tokenizer")


@pytest.fixture
def build(data_set, tokenizer):
    def build(objective="mlm", mask_rate=0.3):
        return build_ettin_loader(tokenizer, B, dataset={"local": str(data_set), "split": "train"},
                                  objective=objective, mask_rate=mask_rate, max_seq_len=T)
    return build


def take(spec, number):
    return list(itertools.islice(iter(spec.dataloader), number))


def flat_by_loops(batch):
    """The flat stream from its definition, token by token."""
    flat = {"input_ids": [], "position_ids": [], "target_positions": [], "target_labels": []}
    bounds, rows = [0], 0
    for ids, labels, numbers in zip(*(batch[key].tolist() for key in TENSORS)):
        rows += numbers[0] >= 0
        for t, number in enumerate(numbers):
            if number < 0:
                continue
            if (t == 0 or number != numbers[t - 1]) and flat["input_ids"]:
                bounds.append(len(flat["input_ids"]))
            if labels[t] != -100:
                flat["target_positions"].append(len(flat["input_ids"]))
                flat["target_labels"].append(labels[t])
            flat["position_ids"].append(len(flat["input_ids"]) - bounds[-1])
            flat["input_ids"].append(ids[t])
    if flat["input_ids"]:
        bounds.append(len(flat["input_ids"]))
    lengths = [end - begin for begin, end in zip(bounds, bounds[1:])]
    return {**flat, "cu_seqlens": bounds, "max_seqlen": max(lengths, default=0), "num_rows": rows,
            "num_tokens": len(flat["input_ids"]), "num_targets": len(flat["target_labels"]),
            **{key: batch[key] for key in ("objective", "step", "tokens_before")}}


def with_empty_rows(batch, rows):
    batch = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    for key, empty in (("input_ids", 0), ("labels", -100), ("sequence_id", -1)):
        batch[key][rows] = empty
    return batch


@OBJECTIVES
@pytest.mark.parametrize("empty", [[], [1], [2, 3], [0, 1, 2, 3]], ids=["full", "one empty", "half", "all empty"])
def test_flat_stream_equals_loops_over_tokens(build, objective, rate, empty):
    for batch in take(build(objective=objective, mask_rate=rate), 3):
        batch = with_empty_rows(batch, empty)
        flat, expected = flatten(batch), flat_by_loops(batch)
        assert flat.keys() == expected.keys()
        for key, value in flat.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == (torch.int32 if key == "cu_seqlens" else torch.int64)
                assert value.tolist() == expected[key], key
            else:
                assert type(value) in (int, str) and value == expected[key], key
        assert flat["cu_seqlens"][-1] == flat["num_tokens"] and flat["cu_seqlens"][0] == 0


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9])
def test_microbatches_put_together_are_the_flat_batch(build, size):
    for batch in take(build(), 3):
        batch = with_empty_rows(batch, [2])
        whole, parts = flatten(batch), split_batch(batch, size)
        assert len(parts) == -(-B // size)
        for key in ("input_ids", "position_ids", "target_labels"):
            assert torch.equal(torch.cat([part[key] for part in parts]), whole[key])
        for key in ("num_rows", "num_tokens", "num_targets"):
            assert sum(part[key] for part in parts) == whole[key]
        tokens = np.cumsum([0, *(part["num_tokens"] for part in parts)])
        for key, each in (("target_positions", slice(None)), ("cu_seqlens", slice(1, None))):
            moved = torch.cat([part[key][each] + int(before) for part, before in zip(parts, tokens)])
            assert torch.equal(moved, whole[key][each])
        assert max(part["max_seqlen"] for part in parts) == whole["max_seqlen"]


def stream_of(parts):
    """Microbatches one after the other as the documents, targets and scalars they hold, whatever the split."""
    documents, targets, scalars = [], [], []
    for part in parts:
        bounds = part["cu_seqlens"].tolist()
        before = sum(len(document) for document in documents)
        documents += [part["input_ids"][a:b].tolist() for a, b in zip(bounds, bounds[1:])]
        targets += zip((part["target_positions"] + before).tolist(), part["target_labels"].tolist())
        scalars.append({key: part[key] for key in ("objective", "step", "tokens_before")})
    return documents, targets, scalars[0], all(each == scalars[0] for each in scalars)


@OBJECTIVES
def test_the_same_batch_split_again_and_again_gives_the_same_stream(build, objective, rate):
    """As the host does when it searches a microbatch that fits: 8 rows run out of memory, then 4, 2, 1 are tried."""
    two = take(build(objective=objective, mask_rate=rate), 2)
    batch = {key: torch.cat([each[key] for each in two]) if key in TENSORS else value for key, value in two[0].items()}
    batch = with_empty_rows(batch, [5])
    before = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    splits = {size: split_batch(batch, size) for size in (8, 4, 2, 1)}
    assert {size: len(parts) for size, parts in splits.items()} == {8: 1, 4: 2, 2: 4, 1: 8}
    streams = [stream_of(parts) for parts in splits.values()]
    expected = flat_by_loops(before)
    documents, targets, _, alike = streams[0]
    assert [token for document in documents for token in document] == expected["input_ids"]
    assert targets == list(zip(expected["target_positions"], expected["target_labels"])) and alike
    assert all(stream == streams[0] for stream in streams)
    assert batch.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(batch[key], value) if isinstance(value, torch.Tensor) else batch[key] == value, key


def test_split_batch_refuses_a_part_of_a_row(build):
    [batch] = take(build(), 1)
    for size in (0, 0.5):
        with pytest.raises(ValueError, match=f"device_train_microbatch_size: {size} given"):
            split_batch(batch, size)


def test_host_counts_rows_tokens_and_targets_alike_before_and_after_the_split(build):
    spec = build()
    [batch] = take(spec, 1)
    batch = with_empty_rows(batch, [3])
    real, targets = int((batch["sequence_id"] >= 0).sum()), int((batch["labels"] != -100).sum())
    for counted in ([batch], [flatten(batch)], spec.split_batch(batch, 1)):
        assert sum(spec.get_num_samples_in_batch(part) for part in counted) == B - 1
        assert sum(spec.get_num_tokens_in_batch(part) for part in counted) == real
        found = sum(spec.get_num_tokens_in_batch(part, token_type="loss_generating") for part in counted)
        assert found == pytest.approx(targets, abs=1e-5)  # an empty microbatch counts 1e-6


def test_batch_without_targets_counts_above_zero_and_as_a_float(build):
    [batch] = take(build(), 1)
    for empty in (batch | {"labels": torch.full_like(batch["labels"], -100)}, with_empty_rows(batch, [0, 1, 2, 3])):
        for form in (empty, flatten(empty)):
            counts = count_tokens(form)
            assert 0 < counts["loss_generating"] <= 1e-6 and type(counts["loss_generating"]) is float
    full = count_tokens(batch)["loss_generating"]
    assert type(full) is float  # all ranks reduce one dtype
    assert torch.tensor(full) + torch.tensor(1e-6) == full  # and an empty rank changes no sum


def test_host_moves_the_tensors_of_a_microbatch_and_keeps_its_scalars(build):
    [flat] = split_batch(take(build(), 1)[0], B)
    moved = DeviceCPU().batch_to_device(flat)
    assert {key: type(value) for key, value in moved.items()} == {key: type(value) for key, value in flat.items()}
