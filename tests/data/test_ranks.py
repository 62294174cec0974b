"""One rank equals two ranks over gloo, with DDP and with FSDP2: rows exactly; gradients of the first step, losses, and
the metrics of an evaluation in which a rank runs out of rows, to 1e-6. Collectives are those of docs/design.md.

The two ranks are two processes that each run nano_run.py once for both kinds and both objectives.
"""

import json
import os
import subprocess
import sys

import nano_run
import pytest
import torch

from ettin_foundry.tools.pair import compare_steps
from ettin_foundry.training import checkpoints
from ettin_foundry.training.steps import read_steps

SETTINGS = ["model.vocab_size=512", "model.attn_out_dropout=0.0",  # dropout draws differ by rank, as they should
            "device_train_microbatch_size=2", "max_duration=3ba", "eval_interval=3ba", "device_eval_batch_size=16",
            "~save_folder", "~save_interval", "~autoresume", "~save_overwrite"]


@pytest.fixture(scope="module")
def two_ranks(data_set, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "composer.cli.launcher", "-n", "2", nano_run.__file__, str(out),
               f"variables.data={data_set}", *SETTINGS]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOLD": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 75, done.stdout[-3000:] + done.stderr[-3000:]  # of its last run
    return out


def test_both_ranks_end_with_a_checkpoint_when_one_is_told_to(two_ranks):
    """Composer's launcher, which ends the others when one has ended, hands on the code of both."""
    [path] = checkpoints.complete_checkpoints(next((two_ranks / "told").iterdir()))
    assert 1 < checkpoints.read_head(path).record["batch"] < 10_000


@pytest.mark.parametrize("objective", ["mlm", "clm"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks_equal_one(kind, objective, two_ranks, data_set, tmp_path):
    capture = nano_run.register_capture()
    clm = nano_run.CLM if objective == "clm" else []
    trainer = nano_run.run(data_set, tmp_path, *SETTINGS, *clm, "callbacks.capture={}",
                           f"callbacks.ettin_steps.folder={tmp_path}", evaluate=True)
    metrics = nano_run.metrics(trainer)
    trainer.close()
    ranks = [torch.load(two_ranks / f"{kind}-{objective}-rank{r}.pt") for r in (0, 1)]
    assert len(capture.batches) == 3
    for step, alone in enumerate(capture.batches):
        for key in ("input_ids", "labels", "sequence_id"):
            assert torch.equal(torch.cat([rank["batches"][step][key] for rank in ranks]), alone[key])
        assert {rank["batches"][step]["tokens_before"] for rank in ranks} == {alone["tokens_before"]}
    assert compare_steps(tmp_path, two_ranks / f"{kind}-{objective}") is None  # rank 0 wrote the hash of all rows
    assert len(read_steps(tmp_path)) == 3
    # those that docs/design.md lists, with 2 buckets, 2 groups of the optimizer, 4 blocks and 2 microbatches
    expected = {"ddp": {"allreduce": 5 + 2, "broadcast": 1}, "fsdp2": {
        "allreduce": 5 + 3, "broadcast": 1, "allgather_base": 2 * (4 + 4 + 1), "reduce_scatter_base": 2 * (4 + 1)}}
    for rank in ranks:  # once a second they ask each other whether one was told to end
        assert rank["collectives"]["allreduce"] - expected[kind]["allreduce"] in (0, 1)
        assert {**rank["collectives"], "allreduce": 0} == {**expected[kind], "allreduce": 0}
    for rank in ranks:
        assert rank["lrs"] == capture.lrs and rank["tokens"] == capture.tokens
        assert rank["gradients"].keys() == capture.gradients.keys()
        for name, gradient in capture.gradients.items():
            assert (gradient - rank["gradients"][name]).abs().max() <= 1e-6 * gradient.abs().max(), name
    for mine, theirs in zip(capture.losses, ranks[0]["losses"], strict=True):
        assert theirs == pytest.approx(mine, rel=1e-6)
    manifest = json.loads((data_set / "validation" / "manifest.json").read_text())
    rows = sum(shard["rows"]["64"] for shard in manifest["shards"])
    # two full global batches of 2 x 16 rows; the last one fills a part of rank 0's rows and none of rank 1's
    assert rows > 64 and 0 < rows % 32 < 16
    assert metrics.keys() == {"TargetCrossEntropy", "TargetPerplexity", "TargetAccuracy"}
    for rank in ranks:
        assert rank["metrics"] == pytest.approx(metrics, rel=1e-6)
