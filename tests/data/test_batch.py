"""Flat microbatches equal loops over tokens, and Composer's counts of them."""

import hashlib

import numpy as np
import pytest
import torch

from ettin_foundry.data.batch import Collator, count_samples, count_tokens, flatten, split_batch
from ettin_foundry.data.stream import open_stream
from ettin_foundry.data.tokenizer import load
from ettin_foundry.objectives.targets import TextVocab

T, B = 64, 4
TENSORS = ("input_ids", "labels", "sequence_id")
MIXED = {"mntp": 0.6, "clm": 0.4}
OBJECTIVES = pytest.mark.parametrize(
    ("objective", "rate"), [("mlm", 0.3), ("clm", 0.0), ("mntp", 0.15), (MIXED, 0.15)],
    ids=["mlm", "clm", "mntp", "mixed"])


@pytest.fixture
def take(data_set):
    """The first batches of the training stream of an objective."""
    vocab = TextVocab.from_tokenizer(load(data_set / "tokenizer"))
    stream = open_stream(dataset={"local": str(data_set), "split": "train"}, max_seq_len=T, global_batch_size=B)

    def take(number, objective="mlm", mask_rate=0.3):
        collate = Collator(objective, vocab, max_seq_len=T, mask_rate=mask_rate, seed=21)
        return [collate(stream.rows_of(step)) for step in range(number)]

    return take


def flat_by_loops(batch):
    """The flat stream from its definition, token by token; rows of clm first."""
    ids, positions, targets, labels, weights, bounds = [], [], [], [], [], [0]
    counts = dict.fromkeys(("num_rows", "num_loss_tokens", "num_causal_documents", "num_causal_tokens"), 0)
    number_of_rows = len(batch["labels"])
    causal = batch["causal"].tolist() if "causal" in batch else [batch["objective"] == "clm"] * number_of_rows
    for row in sorted(range(number_of_rows), key=lambda row: not causal[row]):
        of_row, numbers = batch["labels"][row].tolist(), batch["sequence_id"][row].tolist()
        counts["num_rows"] += numbers[0] >= 0
        counts["num_causal_documents"] += (max(numbers) + 1) * causal[row]
        counts["num_loss_tokens"] += batch["loss_tokens"][row].item() if "loss_tokens" in batch else sum(
            label != -100 for label in of_row)
        for t, number in enumerate(numbers):
            if number < 0:
                continue
            if (t == 0 or number != numbers[t - 1]) and ids:
                bounds.append(len(ids))
            if of_row[t] != -100:
                targets.append(len(ids))
                labels.append(of_row[t])
                weights.append(batch["row_weight"][row].item() if "row_weight" in batch else 1.0)
            positions.append(len(ids) - bounds[-1])
            ids.append(batch["input_ids"][row][t].item())
            counts["num_causal_tokens"] += causal[row]
    bounds += [len(ids)] * bool(ids)
    lengths = [end - begin for begin, end in zip(bounds, bounds[1:])]
    return {"input_ids": ids, "position_ids": positions, "target_positions": targets, "target_labels": labels,
            **({"target_weights": weights} if "row_weight" in batch else {}), **counts, "num_tokens": len(ids),
            "cu_seqlens": bounds, "max_seqlen": max(lengths, default=0), "num_targets": len(labels),
            **{key: value for key, value in batch.items() if not isinstance(value, torch.Tensor)}}


def with_empty_rows(batch, rows):
    batch = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    for key, empty in (("input_ids", 0), ("labels", -100), ("sequence_id", -1), ("causal", False), ("loss_tokens", 0)):
        if key in batch:
            batch[key][rows] = empty
    return batch


def pick(batch, rows):
    return {key: value[rows] if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def plain(flat):
    """A flat batch as lists and scalars, its types checked."""
    dtypes = {"cu_seqlens": torch.int32, "target_weights": torch.float32}
    for key, value in flat.items():
        assert value.dtype == dtypes.get(key, torch.int64) if isinstance(value, torch.Tensor) else (
            type(value) in (int, str, float)), key
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in flat.items()}


@OBJECTIVES
@pytest.mark.parametrize("empty", [[], [1], [2, 3], [0, 1, 2, 3]], ids=["full", "one empty", "half", "all empty"])
def test_flat_stream_equals_loops_over_tokens(take, objective, rate, empty):
    for batch in take(3, objective=objective, mask_rate=rate):
        batch = with_empty_rows(batch, empty)
        assert plain(flatten(batch)) == flat_by_loops(batch)


@OBJECTIVES
def test_a_batch_splits_into_any_microbatches_of_its_rows_those_of_clm_first(take, objective, rate):
    """As Composer does it when it searches a microbatch that fits: 8 rows run out of memory, then 4, 2, 1 are tried."""
    two = take(2, objective=objective, mask_rate=rate)
    batch = {key: torch.cat([each[key] for each in two]) if isinstance(value, torch.Tensor) else value
             for key, value in two[0].items()}
    batch = with_empty_rows(batch, [5])
    before = pick(batch, list(range(8)))
    order = sorted(range(8), key=lambda row: "causal" in before and not before["causal"][row])
    for size in (8, 5, 4, 2, 1):
        expected = [flat_by_loops(pick(before, order[first:first + size])) for first in range(0, 8, size)]
        assert [plain(part) for part in split_batch(batch, size)] == expected
    for key, value in before.items():
        assert torch.equal(batch[key], value) if isinstance(value, torch.Tensor) else batch[key] == value, key
    for size in (0, 0.5):
        with pytest.raises(ValueError, match=f"device_train_microbatch_size must be an integer >= 1, got {size}"):
            split_batch(batch, size)


def test_rows_of_a_mixture_are_those_of_the_single_objectives(take):
    """A row of a mixture has the inputs and labels that it has in a run of its objective alone, at this mask rate."""
    mixed = take(40, objective=MIXED, mask_rate=0.15)
    alone = {name: take(40, objective=name, mask_rate=rate) for name, rate in (("mntp", 0.15), ("clm", 0.0))}
    causal = []
    for at, batch in enumerate(mixed):
        assert batch["objective"] == "mntp+clm" and batch["mask_rate"] == 0.15
        assert batch["ids_hash"] == alone["mntp"][at]["ids_hash"] == alone["clm"][at]["ids_hash"]
        for row, sees_past in enumerate(batch["causal"].tolist()):
            single = alone["clm" if sees_past else "mntp"][at]
            assert all(torch.equal(batch[key][row], single[key][row]) for key in TENSORS)
            assert batch["row_weight"][row].item() == pytest.approx(1.0 if sees_past else 1 / 0.15, rel=1e-7)  # fp32
            ids, labels = alone["clm"][at]["input_ids"][row], batch["labels"][row]
            text = int(((batch["sequence_id"][row] >= 0) & (ids < 507)).sum())  # 512 entries, the last 5 special
            assert batch["loss_tokens"][row].item() == (int((labels != -100).sum()) if sees_past else text)
        causal += batch["causal"].tolist()
    assert abs(sum(causal) - 0.4 * len(causal)) <= 5 * np.sqrt(len(causal) * 0.24)  # five deviations


def test_schedules_act_at_the_tokens_before_a_batch(take):
    seen = set()
    for batch in take(40, objective=[{"until": 2000, "objective": "clm"}, {"objective": "mlm"}],
                      mask_rate=[{"until": 4000, "from": 0.5, "to": 0.1}, {"rate": 0.1}]):
        tokens = batch["tokens_before"]
        assert batch["objective"] == ("clm" if tokens < 2000 else "mlm")
        expected = 0.0 if tokens < 2000 else 0.5 - 0.4 * min(tokens, 4000) / 4000
        assert batch["mask_rate"] == pytest.approx(expected, rel=1e-12)  # float64
        seen.add((tokens < 2000, tokens < 4000))
    assert len(seen) == 3


def test_a_batchs_hash_is_the_sum_of_those_of_its_rows_before_masking_each_with_its_place(take):
    [batch] = take(1, objective="clm", mask_rate=0.0)
    total = 0
    for place, row in enumerate(batch["input_ids"].tolist()):
        content = b"".join(token.to_bytes(8, "little") for token in row)  # padding included
        digest = hashlib.blake2b(content, digest_size=6, salt=place.to_bytes(8, "little")).digest()
        total += int.from_bytes(digest, "little")
    assert batch["ids_hash"] == total % 2**48 == take(1)[0]["ids_hash"]


def test_composer_counts_rows_tokens_and_targets_alike_before_and_after_the_split(take):
    [batch] = take(1)
    batch = with_empty_rows(batch, [3])
    expected = B - 1, int((batch["sequence_id"] >= 0).sum()), int((batch["labels"] != -100).sum())
    for counted in ([batch], [flatten(batch)], split_batch(batch, 1)):
        counts = [(count_samples(part), *count_tokens(part).values()) for part in counted]
        assert np.sum(counts, 0) == pytest.approx(expected, abs=1e-5)  # an empty microbatch counts 1e-6 targets
    for empty in (batch | {"labels": torch.full_like(batch["labels"], -100)}, with_empty_rows(batch, [0, 1, 2, 3])):
        for form in (empty, flatten(empty)):
            counts = count_tokens(form)  # of one dtype on all ranks, and no division by zero
            assert 0 < counts["loss_generating"] <= 1e-6 and type(counts["loss_generating"]) is float
