"""Compiled blocks: the same numbers, three graphs for a whole run, also sharded and recomputed.

By the compiler's front end and its autograd; code generation is a GPU's matter (test_gpu.py).
"""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

import ettin_foundry.model.transformer as transformer
from ettin_foundry.data.batch import Collator, split_batch
from ettin_foundry.data.stream import open_stream
from ettin_foundry.data.tokenizer import load
from ettin_foundry.model.config import EttinConfig
from ettin_foundry.model.inference import Predictor
from ettin_foundry.model.transformer import Ettin, batch_loss
from ettin_foundry.objectives.targets import TextVocab

T, ROWS = 64, 4


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()
    counters.clear()


def microbatches(data_set, objective, packing, lengths, steps):
    """One of each step."""
    stream = open_stream(dataset={"local": str(data_set), "split": "train"}, max_seq_len=T, global_batch_size=ROWS,
                         packing=packing)
    collate = Collator(objective, TextVocab.from_tokenizer(load(data_set / "tokenizer")), max_seq_len=T,
                       mask_rate=0.0 if objective == "clm" else 0.3, seed=21)
    return [part for step in range(steps) for part in split_batch(collate(stream.rows_of(step)), ROWS, lengths)]


def pair_of(objective):
    """A model and its twin with compiled blocks; dropout, which they draw differently, is off."""
    torch.manual_seed(0)
    model = Ettin(EttinConfig.for_size("nano", causal=objective == "clm", vocab_size=512, attn_out_dropout=0.0)).train()
    twin = copy.deepcopy(model)
    twin.compile_blocks(backend="aot_eager")
    return model, twin


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = batch_loss(model, batch)["loss"]
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    return loss.detach(), [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]


def assert_equal(mine, theirs):
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-5, atol=0)  # fp32 sums in another order, here and below
    for a, b in zip(mine[1], theirs[1]):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-7


@pytest.mark.parametrize("backend", ["reference", "flex_attention"])
@pytest.mark.parametrize(("objective", "packing", "lengths"), [("clm", True, 1), ("mlm", False, 2)])
def test_fifty_steps_of_varied_data_compile_three_graphs_for_a_length(
        data_set, monkeypatch, objective, packing, lengths, backend):
    """The first block, global ones and local ones; packed rows have one length, others a few."""
    monkeypatch.setattr(transformer, "choose", lambda *given: dict.fromkeys(
        (True, False), backend if given[4] else "reference"))  # where blocks are compiled
    parts = microbatches(data_set, objective, packing, lengths, 50)
    model, compiled = pair_of(objective)
    for number, part in enumerate(parts):
        ours = loss_and_gradients(compiled, part)
        if number % 25 == 0:
            assert_equal(ours, loss_and_gradients(model, part))
    assert len({tuple(part["cu_seqlens"].tolist()) for part in parts}) > 40
    seen = len({len(part["input_ids"]) for part in parts})
    assert seen <= lengths and counters["stats"]["unique_graphs"] == 3 * seen and not counters["graph_break"]


def test_compiled_blocks_are_sharded_and_recomputed(data_set, no_process_group):
    """As Composer does it: each block in a wrapper that recomputes it, FSDP2 around; one process over gloo."""
    import torch.distributed as dist
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import fully_shard

    parts = microbatches(data_set, "clm", True, 1, 3)
    model, compiled = pair_of("clm")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layers = compiled.trunk.layers
        for number in range(len(layers)):
            layers[number] = fully_shard(checkpoint_wrapper(layers[number]))
        fully_shard(compiled)
        for part in parts:
            assert_equal(loss_and_gradients(compiled, part), loss_and_gradients(model, part))
        assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]
    finally:
        dist.destroy_process_group()


def test_samples_of_a_run_are_made_without_compiling_for_each_length(data_set):
    _, compiled = pair_of("clm")
    predictor = Predictor(compiled, load(data_set / "tokenizer"), "clm")
    assert len(predictor.generate(["kalo mi", "vol"], max_new_tokens=3)) == 2
    assert counters["stats"]["unique_graphs"] == 0
