"""Flat microbatches equal loops over tokens, and Composer's counts of them."""

import hashlib
import pickle

import numpy as np
import pytest
import torch

from ettin_foundry.data.batch import Collator, Packed, count_samples, count_tokens, split_batch
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
    """The flat stream from its definition, token by token."""
    ids, positions, targets, labels, weights, bounds = [], [], [], [], [], [0]
    counts = dict.fromkeys(("num_rows", "num_loss_tokens"), 0)
    for row in range(len(batch["labels"])):
        of_row, numbers = batch["labels"][row].tolist(), batch["sequence_id"][row].tolist()
        counts["num_rows"] += numbers[0] >= 0
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
    bounds += [len(ids)] * bool(ids)
    lengths = [end - begin for begin, end in zip(bounds, bounds[1:])]
    return {"input_ids": ids, "position_ids": positions, "target_positions": targets, "target_labels": labels,
            **({"target_weights": weights} if "row_weight" in batch else {}), **counts, "num_tokens": len(ids),
            "cu_seqlens": bounds, "max_seqlen": max(lengths, default=0), "num_targets": len(labels),
            "causal": any(batch["causal"].tolist()) if "causal" in batch else batch["objective"] == "clm",
            **{key: batch[key] for key in ("objective", "mask_rate", "step", "tokens_before", "ids_hash")}}


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
            type(value) in (int, str, float, bool)), key
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in flat.items()}


def rows_in_parts(batch, size):
    """Rows of each microbatch: those of clm first, none of both kinds; of a mixture, one part more than rows need."""
    if "causal" not in batch:
        return [list(range(B * 2))[first:first + size] for first in range(0, B * 2, size)]
    parts = []
    for kind in (True, False):
        rows = [row for row, causal in enumerate(batch["causal"].tolist()) if causal == kind]
        parts += [rows[first:first + size] for first in range(0, len(rows), size)]
    return parts + [[]] * (-(-B * 2 // size) + 1 - len(parts))


@OBJECTIVES
@pytest.mark.parametrize("empty", [[], [5], list(range(8))], ids=["full", "one empty", "all empty"])
def test_microbatches_equal_loops_over_the_tokens_of_their_rows(take, objective, rate, empty):
    """Of any size, as Composer asks when it searches one that fits: 8 rows are too many, then 4, 2, 1 are tried."""
    two = take(2, objective=objective, mask_rate=rate)
    batch = {key: torch.cat([each[key] for each in two]) if isinstance(value, torch.Tensor) else value
             for key, value in two[0].items()}
    batch = with_empty_rows(batch, empty)
    before = pick(batch, list(range(8)))
    for size in (8, 5, 4, 2, 1):
        expected = [flat_by_loops(pick(before, rows)) for rows in rows_in_parts(before, size)]
        parts = split_batch(batch, size)
        assert [plain(part) for part in parts] == expected
        assert [plain(part) for part in pickle.loads(pickle.dumps(Packed(parts))).unpack()] == expected  # from a worker
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(batch[key], value), key
    for size in (0, 0.5):
        with pytest.raises(ValueError, match=f"device_train_microbatch_size must be an integer >= 1, got {size}"):
            split_batch(batch, size)


@OBJECTIVES
def test_a_stream_of_a_fixed_length_ends_with_documents_that_nothing_else_sees(take, objective, rate):
    for empty in ([], [1, 2], [0, 1, 2, 3]):
        batch = with_empty_rows(take(1, objective=objective, mask_rate=rate)[0], empty)
        for loose, fixed in zip(split_batch(batch, 2), split_batch(batch, 2, 8), strict=True):
            eighth, tokens, documents = 2 * T // 8, loose["num_tokens"], len(loose["cu_seqlens"]) - 1
            assert len(fixed["input_ids"]) == max(1, -(-tokens // eighth)) * eighth
            assert (len(fixed["cu_seqlens"]) - 1).bit_count() == 1 and fixed["max_seqlen"] == T
            lengths = fixed["cu_seqlens"].diff()
            assert fixed["cu_seqlens"][:documents + 1].tolist() == loose["cu_seqlens"].tolist()
            assert lengths.min() >= 0 and lengths.max() <= T and fixed["cu_seqlens"][-1] == len(fixed["input_ids"])
            assert fixed["position_ids"].tolist() == [at for n in lengths.tolist() for at in range(n)]
            for key, value in loose.items():
                if key in ("input_ids", "position_ids"):
                    assert torch.equal(fixed[key][:tokens], value)
                elif key not in ("cu_seqlens", "max_seqlen"):
                    assert torch.equal(fixed[key], value) if isinstance(value, torch.Tensor) else fixed[key] == value


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


@OBJECTIVES
def test_composer_counts_rows_tokens_and_targets_alike_before_and_after_the_split(take, objective, rate):
    [batch] = take(1, objective, rate)
    divisor = batch["loss_tokens"].sum() if "loss_tokens" in batch else (batch["labels"] != -100).sum()
    expected = B, int((batch["sequence_id"] >= 0).sum()), int(divisor)
    for counted in ([batch], split_batch(batch, 1), split_batch(batch, 1, 8)):
        counts = [(count_samples(part), *count_tokens(part).values()) for part in counted]
        assert np.sum(counts, 0) == pytest.approx(expected, abs=1e-5)  # an empty microbatch counts 1e-6 targets
    assert batch["num_targets"] == int((batch["labels"] != -100).sum()) and batch["num_positions"] == B * T
    lengths = {}
    for row, numbers in enumerate(batch["sequence_id"].tolist()):
        kind = bool(batch["causal"][row]) if "causal" in batch else objective == "clm"
        lengths.setdefault(kind, []).extend(numbers.count(number) for number in range(max(numbers) + 1))
    assert batch["num_documents"] == sum(map(len, lengths.values()))
    assert {kind: sorted(np.repeat(*found)) for kind, found in batch["document_lengths"].items()} == {
        kind: sorted(found) for kind, found in lengths.items()}
    for empty in split_batch(with_empty_rows(batch, [0, 1, 2, 3]), 2):
        counts = count_tokens(empty)  # of one dtype on all ranks, and no division by zero
        assert 0 < counts["loss_generating"] <= 1e-6 and type(counts["loss_generating"]) is float
