"""The loader: the batch contract, resume and elasticity, evaluation, refusals. Flat batches: test_batch.py."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch

from ettin_foundry.data.batch import count_samples
from ettin_foundry.data.loader import build_ettin_loader
from ettin_foundry.data.shards import MDSSplit
from ettin_foundry.data.tokenizer import load, train_bpe
from ettin_foundry.objectives.targets import TextVocab, make_inputs, row_generator

T, B = 64, 4
TENSORS = ("input_ids", "labels", "sequence_id")


@pytest.fixture(scope="module")
def tokenizer(data_set):
    return load(data_set / "tokenizer")


@pytest.fixture
def build(data_set, tokenizer):
    """Builds a loader; keys given replace these."""
    def build(batch_size=B, tokenizer=tokenizer, **keys):
        settings = {"dataset": {"local": str(data_set), "split": "train"}, "objective": "mlm", "mask_rate": 0.3,
                    "max_seq_len": T, "shuffle_window": 3, **keys}
        return build_ettin_loader(tokenizer, batch_size, **settings)
    return build


@pytest.fixture
def world(monkeypatch):
    """Lets the loader believe that it is one rank of several."""
    def set_world(size, rank):
        monkeypatch.setattr("composer.utils.dist.get_world_size", lambda: size)
        monkeypatch.setattr("composer.utils.dist.get_global_rank", lambda: rank)
    return set_world


def take(spec, number):
    return list(itertools.islice(iter(spec.dataloader), number))


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others):
        assert batch.keys() == other.keys()
        for key, value in batch.items():
            mine, theirs = (x.numpy() if isinstance(x, torch.Tensor) else x for x in (value, other[key]))
            np.testing.assert_equal(mine, theirs, key)


def steps_of_an_epoch(spec):
    return -(-spec.dataloader.dataset.order.rows_per_epoch // B)


@pytest.mark.parametrize("packing", [True, False])
def test_a_decoders_batch_holds_the_stored_chunks_of_the_order_and_predicts_what_follows(
        build, data_set, tokenizer, packing):
    data, spec = MDSSplit(data_set / "train"), build(objective="clm", mask_rate=0, packing=packing)
    assert spec.dataloader.batch_size == B
    bos, eos, pad = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
    for step, batch in enumerate(take(spec, 8)):
        assert [key for key, value in batch.items() if isinstance(value, torch.Tensor)] == list(TENSORS)
        assert all(batch[key].shape == (B, T) and batch[key].dtype == torch.int64 for key in TENSORS)
        assert (batch["objective"], batch["step"]) == ("clm", step) and type(batch["tokens_before"]) is int
        for at in range(B):
            _, shard, samples = spec.dataloader.dataset.order.row(step * B + at)
            assert packing or len(samples) == 1
            ids, labels, numbers = [], [], []
            for number, sample in enumerate(data.sample(shard, sample) for sample in samples):
                tokens = sample["tokens"].tolist()
                ids += [bos, *tokens, eos]
                labels += [*tokens, eos if sample["last"] else -100, -100]  # no EOS inside a document
                numbers += [number] * (len(tokens) + 2)
            for key, row, filler in (("input_ids", ids, pad), ("labels", labels, -100), ("sequence_id", numbers, -1)):
                assert batch[key][at].tolist() == row + [filler] * (T - len(row))


@pytest.mark.parametrize(("objective", "rate"), [("mlm", 0.3), ("mntp", 0.15)])
def test_an_encoder_reads_the_decoders_rows_masked_by_seed_epoch_and_row(build, data_set, tokenizer, objective, rate):
    data, vocab = MDSSplit(data_set / "train"), TextVocab.from_tokenizer(tokenizer)
    spec, decoder = build(objective=objective, mask_rate=rate), build(objective="clm", mask_rate=0)
    order = spec.dataloader.dataset.order
    number = steps_of_an_epoch(spec) + 3
    for step, (batch, twin) in enumerate(zip(take(spec, number), take(decoder, number))):
        assert torch.equal(batch["sequence_id"], twin["sequence_id"])
        assert batch["tokens_before"] == twin["tokens_before"]
        for at, row in enumerate(range(step * B, step * B + B)):
            epoch, shard, samples = order.row(row)
            input_ids, labels, *_ = make_inputs(
                objective, twin["input_ids"][at].numpy(), twin["sequence_id"][at].numpy(),
                data.last(shard)[list(samples)], mask_rate=rate, vocab=vocab,
                rng=row_generator(21, row // order.rows_per_epoch, row % order.rows_per_epoch))
            assert batch["input_ids"][at].tolist() == input_ids.tolist()
            assert batch["labels"][at].tolist() == labels.tolist()
    assert epoch == 1


@pytest.mark.parametrize(("fixed_shapes", "packing"), [(False, True), (True, True), (True, False)])
def test_microbatches_are_the_same_from_a_worker_and_where_the_host_searches_their_size(build, fixed_shapes, packing):
    keys = {"fixed_shapes": fixed_shapes, "packing": packing}
    ready, auto = build(8, microbatch_size=2, num_workers=2, **keys), build(8, **keys)
    for made, whole in zip(take(ready, 4), take(auto, 4)):
        parts = ready.split_batch(made, 2)
        assert_same(parts, auto.split_batch(whole, 2))
        lengths = {len(part["input_ids"]) for part in parts}
        assert not fixed_shapes or (lengths == {2 * T} if packing else all(not n % (2 * T // 8) for n in lengths))


WARMUP = {"min_size": 4, "tokens": 4000}  # 4, 8, 12 rows, then 16


@pytest.mark.parametrize(("keys", "workers"), [
    ({}, 0), ({"objective": "clm", "mask_rate": 0.0, "packing": False}, 0), ({"batch_size_warmup": WARMUP}, 2),
    ({"objective": "mntp", "mask_rate": 0.15, "batch_size_warmup": WARMUP}, 0)], ids=str)
def test_a_run_resumed_at_any_step_on_any_ranks_reads_what_one_never_stopped_reads(build, world, keys, workers):
    one = build(16, **keys)
    whole = take(one, 30)
    assert one.dataloader.batch_size == 16  # what Composer is told, also while batches are smaller
    rows = np.cumsum([0, *(len(batch["input_ids"]) for batch in whole)]).tolist()
    assert rows[-1] > one.dataloader.dataset.order.rows_per_epoch
    for step, ranks in ((0, 2), (1, 4), (9, 1), (13, 4), (25, 2)) if not workers else ((9, 2),):
        state = json.loads(json.dumps(one.dataloader.dataset.state_dict(rows[step], True)))  # plain data only
        parts = []
        for rank in range(ranks):
            world(ranks, rank)
            part = build(16 // ranks, num_workers=workers, **keys)
            part.dataloader.dataset.load_state_dict(state)
            parts.append(take(part, 5))
        # Composer counts from the beginning or from the last resume
        assert part.dataloader.dataset.state_dict(16, False)["rows"] == rows[step] + 16
        for batch, *shares in zip(whole[step:step + 5], *parts):
            assert all(torch.equal(torch.cat([share[key] for share in shares]), batch[key]) for key in TENSORS)
            assert all(share[key] == batch[key] for share in shares for key in ("step", "tokens_before", "objective"))
            assert sum(share["ids_hash"] for share in shares) % 2**48 == batch["ids_hash"]


@pytest.mark.parametrize(("change", "words"), [
    ({"packing": False}, "packing must be .*, True, got False"), ({"shuffle_seed": 22}, "shuffle_seed must be .* 22"),
    ({"shuffle_window": 4}, "shuffle_window must be .* 4"), ({"max_seq_len": 96}, "max_seq_len must be .*, 64, got 96"),
    ({"split": "validation"}, "train_loader.dataset .its fingerprint. must be"),
    ({"batch_size_warmup": None}, "batch_size_warmup must be .*'4 to 16 rows, [0-9]+ steps of each size', got None"),
    ({"batch_size_warmup": {**WARMUP, "tokens": 9000}}, "'4 to 16 rows, .*got '4 to 16 rows")], ids=str)
def test_checkpoint_of_another_stream_is_refused_naming_both(build, data_set, change, words):
    state = build(16, batch_size_warmup=WARMUP).dataloader.dataset.state_dict(16, True)
    dataset = {"local": str(data_set), "split": change.pop("split", "train")}
    other = build(16, **{"batch_size_warmup": WARMUP, "dataset": dataset, **change})
    with pytest.raises(ValueError, match=words):
        other.dataloader.dataset.load_state_dict(state)


def test_a_state_of_another_order_or_place_or_of_another_loader_is_refused(build):
    state = build().dataloader.dataset.state_dict(12, True)
    for broken, words in (({**state, "order": 1}, "train_loader.order .its version."), ({}, "written by ettin_text"),
                          ({**state, "rows": -1}, "written by ettin_text"), (None, "written by ettin_text")):
        with pytest.raises(ValueError, match=words):
            build().dataloader.dataset.load_state_dict(broken)
    with pytest.raises(ValueError, match="global_train_batch_size .* got 8 rows: row 12 begins no step"):
        build(8).dataloader.dataset.load_state_dict(state)


def test_loader_that_lost_sight_of_the_other_ranks_or_cannot_share_its_rows_stops(build, world):
    world(2, 1)
    spec = build()
    world(1, 0)
    with pytest.raises(RuntimeError, match="of 2 ranks, iterated as rank 0 of 1"):
        take(spec, 1)
    world(8, 0)
    with pytest.raises(ValueError, match="min_size must be a multiple of the 8 processes, got 4"):
        build(2, batch_size_warmup=WARMUP)


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_data_gives_the_batches_of_local_data_also_within_a_limit(build, data_set, tmp_path, workers):
    local = build()
    number = steps_of_an_epoch(local) + 5
    place = {"local": str(tmp_path / "data"), "split": "train", "remote": str(data_set)}
    assert_same(take(build(dataset={**place, "cache_limit": "90kb"}, num_workers=workers), number), take(local, number))
    finite = {"shuffle": False, "shuffle_window": None, "num_workers": workers}
    for _ in range(2):  # every evaluation has the same masks
        assert_same(take(build(dataset=place, **finite), 10**6), take(build(**finite), 10**6))
    with pytest.raises(ValueError, match="dataset.cache_limit.*train_loader.shuffle_window"):
        build(dataset={**place, "cache_limit": "40kb"})


def test_shards_ahead_of_the_row_are_announced_with_every_batch(build, monkeypatch):
    spec, asked = build(), []
    rows = spec.dataloader.dataset
    monkeypatch.setattr(rows.data, "prefetch", asked.append)
    take(spec, 3)
    assert asked == [rows.order.shards_ahead(row) for row in (0, B, 2 * B)]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_is_one_epoch_with_the_same_number_of_batches_on_every_rank(build, world, workers):
    keys = {"shuffle": False, "shuffle_window": None}
    whole = build(1, **keys)
    rows = take(whole, 10**6)
    assert len(rows) == len(whole.dataloader) == whole.num_samples
    per_rank = []
    for rank in range(3):
        world(3, rank)
        spec = build(2, **keys, num_workers=workers)
        per_rank.append(take(spec, 10**6))
        assert len(per_rank[-1]) == len(spec.dataloader) == -(-len(rows) // 6)
    assert sum(count_samples(batch) for batches in per_rank for batch in batches) == len(rows)
    together = torch.cat([batch["input_ids"] for step in zip(*per_rank) for batch in step])
    assert torch.equal(together[:len(rows)], torch.cat([row["input_ids"] for row in rows]))
    last = per_rank[-1][-1]
    assert len(rows) % 6  # so that the last batch has empty rows, which hold nothing
    assert set(last["sequence_id"][-1].tolist()) == {-1} and set(last["labels"][-1].tolist()) == {-100}


@pytest.mark.parametrize(("keys", "words"), [
    ({"dataset": {"local": "x", "split": "train", "remotes": "y"}}, "dataset must have the keys local"),
    ({"dataset": {"local": "nowhere", "split": "train"}}, "dataset.split must be .*'nowhere'.*holds none"),
    ({"dataset": {"local": "x", "split": "validation", "remote": "nowhere"}}, "train with eval_loader=null"),
    ({"split": "test"}, "dataset.split must be .*'train', 'validation'.*got 'test'"),
    ({"objective": "rtd"}, "objective"), ({"objective": "clm"}, "mask_rate"), ({"mask_rate": 0.0}, "mask_rate"),
    ({"max_seq_len": 63}, "max_seq_len must be at least 64.*got 63"), ({"max_seq_len": 2}, "max_seq_len must .*>= 3"),
    ({"max_seq_len": 64.0}, "max_seq_len"), ({"shuffle_seed": -1}, "shuffle_seed"), ({"batch_size": 0.5}, "batch_size"),
    ({"shuffle_window": 0}, "shuffle_window"), ({"shuffle": "false"}, "shuffle must be true or false, got 'false'"),
    ({"shuffle": False}, "shuffle_window must be left out"), ({"prefetch_factor": 2}, "prefetch_factor"),
    ({"shuffle": False, "shuffle_window": None, "batch_size": 16, "batch_size_warmup": WARMUP}, "must be left out"),
    ({"batch_size_warmup": {"min_size": 3, "tokens": 500}}, "min_size must be .*got 3")], ids=str)
def test_settings_that_are_wrong_or_without_effect_are_refused(build, data_set, keys, words):
    if "split" in keys:
        keys = {"dataset": {"local": str(data_set), **keys}}
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        build(**keys)
    with pytest.raises(ValueError, match="vocab_size"):  # data of another tokenizer
        build(tokenizer=train_bpe(["some other text, of other words entirely"] * 50, 280))


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_writes_nothing_beside_the_data_and_draws_from_no_global_generator(build, data_set, tmp_path, workers):
    copy = shutil.copytree(data_set, tmp_path / "copy")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}  # a folder's changes with its entries
    spec = build(dataset={"local": str(copy), "split": "train"}, num_workers=workers)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(spec, 3)
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == numpy_state).all()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
