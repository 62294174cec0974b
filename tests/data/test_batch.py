"""Flat microbatches equal loops over tokens, and Composer's counts of them."""

import hashlib

import numpy as np
import pytest
import torch

from ettin_foundry.data.batch import Collator, count_samples, count_tokens, flatten, split_batch
from ettin_foundry.data.stream import hash_row, open_stream
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
    flat = {"input_ids": [], "position_ids": [], "target_positions": [], "target_labels": [], "target_weights": []}
    bounds, rows, loss_tokens, causal_documents, causal_tokens = [0], 0, 0, 0, 0
    causal = batch["causal"].tolist() if "causal" in batch else [batch["objective"] == "clm"] * len(batch["labels"])
    weights = batch["row_weight"].tolist() if "row_weight" in batch else [1.0] * len(causal)
    columns = list(zip(*(batch[key].tolist() for key in TENSORS), causal, weights, range(len(causal))))
    for ids, labels, numbers, sees_past, weight, row in sorted(columns, key=lambda column: not column[3]):
        rows += numbers[0] >= 0
        loss_tokens += (batch["loss_tokens"][row].item() if "loss_tokens" in batch else
                        sum(label != -100 for label, number in zip(labels, numbers) if number >= 0))
        causal_documents += (max(numbers) + 1) * sees_past
        causal_tokens += sum(number >= 0 for number in numbers) * sees_past
        for t, number in enumerate(numbers):
            if number < 0:
                continue
            if (t == 0 or number != numbers[t - 1]) and flat["input_ids"]:
                bounds.append(len(flat["input_ids"]))
            if labels[t] != -100:
                flat["target_positions"].append(len(flat["input_ids"]))
                flat["target_labels"].append(labels[t])
                flat["target_weights"].append(weight)
            flat["position_ids"].append(len(flat["input_ids"]) - bounds[-1])
            flat["input_ids"].append(ids[t])
    if flat["input_ids"]:
        bounds.append(len(flat["input_ids"]))
    lengths = [end - begin for begin, end in zip(bounds, bounds[1:])]
    if "row_weight" not in batch:
        flat.pop("target_weights")
    return {**flat, "num_loss_tokens": loss_tokens, "num_causal_documents": causal_documents,
            "num_causal_tokens": causal_tokens, "mask_rate": batch["mask_rate"], "ids_hash": batch["ids_hash"],
            "cu_seqlens": bounds, "max_seqlen": max(lengths, default=0), "num_rows": rows,
            "num_tokens": len(flat["input_ids"]), "num_targets": len(flat["target_labels"]),
            **{key: batch[key] for key in ("objective", "step", "tokens_before")}}


def with_empty_rows(batch, rows):
    batch = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    for key, empty in (("input_ids", 0), ("labels", -100), ("sequence_id", -1), ("causal", False), ("loss_tokens", 0)):
        if key in batch:
            batch[key][rows] = empty
    return batch


@OBJECTIVES
@pytest.mark.parametrize("empty", [[], [1], [2, 3], [0, 1, 2, 3]], ids=["full", "one empty", "half", "all empty"])
def test_flat_stream_equals_loops_over_tokens(take, objective, rate, empty):
    for batch in take(3, objective=objective, mask_rate=rate):
        batch = with_empty_rows(batch, empty)
        flat, expected = flatten(batch), flat_by_loops(batch)
        assert flat.keys() == expected.keys()
        for key, value in flat.items():
            if isinstance(value, torch.Tensor):
                assert value.dtype == {"cu_seqlens": torch.int32, "target_weights": torch.float32}.get(key, torch.int64)
                assert value.tolist() == expected[key], key
            else:
                assert type(value) in (int, str, float) and value == expected[key], key
        assert flat["cu_seqlens"][-1] == flat["num_tokens"] and flat["cu_seqlens"][0] == 0


@OBJECTIVES
def test_a_batch_split_into_any_microbatches_gives_the_same_stream(take, objective, rate):
    """As Composer does it when it searches a microbatch that fits: 8 rows run out of memory, then 4, 2, 1 are tried."""
    two = take(2, objective=objective, mask_rate=rate)
    batch = {key: torch.cat([each[key] for each in two]) if isinstance(value, torch.Tensor) else value
             for key, value in two[0].items()}
    batch = with_empty_rows(batch, [5])
    before = with_empty_rows(batch, [])
    expected = flat_by_loops(before)
    for size, number in ((8, 1), (5, 2), (4, 2), (2, 4), (1, 8)):
        parts = split_batch(batch, size)
        assert len(parts) == number
        for key in ("input_ids", "position_ids", "target_labels"):
            assert torch.cat([part[key] for part in parts]).tolist() == expected[key]
        tokens = np.cumsum([0, *(part["num_tokens"] for part in parts)]).tolist()
        for key, skipped in (("target_positions", 0), ("cu_seqlens", 1)):
            moved = torch.cat([part[key][skipped:] + ahead for part, ahead in zip(parts, tokens)])
            assert moved.tolist() == expected[key][skipped:]
        for key in ("num_rows", "num_tokens", "num_targets", "num_loss_tokens", "num_causal_documents"):
            assert sum(part[key] for part in parts) == expected[key]
        assert all(part[key] == before[key] for part in parts for key in ("objective", "step", "tokens_before"))
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


def test_a_rows_hash_depends_on_its_ids_its_padding_and_its_place_and_a_batch_has_their_sum(take):
    [batch] = take(1, objective="clm", mask_rate=0.0)
    ids = batch["input_ids"].numpy()
    content = b"".join(int(i).to_bytes(8, "little") for i in ids[1])
    digest = hashlib.blake2b(content, digest_size=6, salt=(1).to_bytes(8, "little"))
    assert hash_row(ids[1], 1) == int.from_bytes(digest.digest(), "little")
    total = sum(hash_row(row, at) for at, row in enumerate(ids)) % 2**48
    assert batch["ids_hash"] == total == take(1)[0]["ids_hash"]  # before masking
    changed = ids.copy()
    changed[1, 5] += 1
    for rows in (changed, ids[[1, 0, 2, 3]], ids[:, :-1]):
        assert sum(hash_row(row, at) for at, row in enumerate(rows)) % 2**48 != total


def test_composer_counts_rows_tokens_and_targets_alike_before_and_after_the_split(take):
    [batch] = take(1)
    batch = with_empty_rows(batch, [3])
    real, targets = int((batch["sequence_id"] >= 0).sum()), int((batch["labels"] != -100).sum())
    for counted in ([batch], [flatten(batch)], split_batch(batch, 1)):
        assert sum(count_samples(part) for part in counted) == B - 1
        assert sum(count_tokens(part)["total"] for part in counted) == real
        found = sum(count_tokens(part)["loss_generating"] for part in counted)
        assert found == pytest.approx(targets, abs=1e-5)  # an empty microbatch counts 1e-6
    for empty in (batch | {"labels": torch.full_like(batch["labels"], -100)}, with_empty_rows(batch, [0, 1, 2, 3])):
        for form in (empty, flatten(empty)):
            counts = count_tokens(form)  # of one dtype on all ranks, and no division by zero
            assert 0 < counts["loss_generating"] <= 1e-6 and type(counts["loss_generating"]) is float
