"""Sound files of each kind, and what reads them: what a reader takes must be consistent, what it refuses it must name.

`make` writes a folder of sound files, `read` reads all of them as training, commands and exports do, and holds what it
gets to what the files promise (assert). `seal` makes sizes and hashes right again, as whoever damages a file could.
"""

from __future__ import annotations

import functools
import json
import math
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import hand_made
import numpy as np
import torch
from conftest import make_documents
from memory_set import write_set

import train
from ettin_foundry.corpus import plan as plans
from ettin_foundry.corpus.convert import ConvertOptions, convert
from ettin_foundry.corpus.finalize import finalize
from ettin_foundry.corpus.mix import build_mix
from ettin_foundry.data import tokenizer as tokenizers
from ettin_foundry.data.mixture import MixtureSplit, open_split
from ettin_foundry.data.storage import open_storage
from ettin_foundry.data.stream import open_stream
from ettin_foundry.hub.folder import export_model
from ettin_foundry.hub.load import LoadedModel, load_model
from ettin_foundry.model.config import EttinConfig
from ettin_foundry.model.transformer import Ettin
from ettin_foundry.model.weights import tensor_table, weights_checkpoint
from ettin_foundry.tools import plan as plan_tool
from ettin_foundry.training import checkpoints, checks, loading, run_config
from ettin_foundry.training.steps import cut_steps, read_steps

ROOT = Path(__file__).resolve().parents[2]
T = 64  # tokens of a row
SHAPE: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 1,
                         "vocab_size": 512, "max_position_embeddings": T}


class Reader(NamedTuple):
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    files: str  # pattern of those that are damaged
    keys: str = "$."  # pattern of a key that an error begins with, where it names no path in the folder
    seal: Callable[[Path], object] | None = None


def quietly(work: Callable[..., Any], *arguments: Any) -> Any:
    """The result; None where damaged files are refused."""
    try:
        return work(*arguments)
    except (ValueError, OSError):
        return None


# ------------------------------------------------------------------ datasets


def make_splits(folder: Path) -> None:
    rng = np.random.default_rng(5)
    shards = [(source, hand_made.random_documents(rng, 12)) for source in "aab"]
    for name in ("plain", "packed"):
        hand_made.write_split(folder / name / "train", shards, packed=name == "packed")


def seal_splits(folder: Path) -> None:
    for split in folder.glob("*/train"):
        hand_made.seal(split)


def read_rows(folder: Path, split: str = "train") -> Any:
    """An epoch as training reads it: every chunk once, no row longer than it may be, the tokens that were stated."""
    stream = open_stream(dataset={"local": str(folder), "split": split}, max_seq_len=T, global_batch_size=1,
                         shuffle_window=2)
    data, order, tokens, taken = stream.data, stream.order, 0, Counter[tuple[int, int]]()
    data.prefetch = lambda shards: None  # its threads outlive an example
    for shard in range(data.num_shards):  # so that no example walks through chunks that are only stated
        data.lengths(shard)
    vocab_size = data.tokenizer["vocab_size"]
    for number in range(order.rows_per_epoch):
        assert order.tokens_before(number) == tokens, "tokens before a row differ from a walk"
        [row] = stream.rows_of(number)
        assert len(row.ends_document) == len(row.chunks) > 0
        assert all(1 <= len(chunk) <= data.chunk_length and chunk.max() < vocab_size for chunk in row.chunks)
        length = sum(len(chunk) + 2 for chunk in row.chunks)
        assert length <= T, f"a row of {length} tokens"
        tokens += length
        _, shard, samples = order.row(number)
        taken.update((shard, sample) for sample in samples)
    chunks = {(shard, at) for shard in range(data.num_shards) for at in range(int(data.samples[shard]))}
    assert set(taken) == chunks and taken.total() == len(chunks), "an epoch does not hold each chunk once"
    assert tokens == order.tokens_per_epoch == int(data.tokens.sum()) + 2 * len(chunks)
    return data


def read_split(folder: Path) -> None:
    data = read_rows(folder)
    for shard in range(data.num_shards):
        for at in range(int(data.samples[shard])):
            sample = data.sample(shard, at)
            assert isinstance(sample["doc"], str) and sample["last"] in (0, 1)
    hash(data.fingerprint)
    again = open_split(folder / "train")
    for shard in range(again.num_shards):
        quietly(again.check_shard, shard)
    if not isinstance(again, MixtureSplit):
        quietly(again.check_index)


def read_splits(folder: Path) -> None:
    for name in ("plain", "packed"):
        read_split(folder / name)


def make_mixture(folder: Path) -> None:
    rng = np.random.default_rng(6)
    for name, sources in (("web", ("web",)), ("both", ("books", "notes"))):
        write_set(folder / name, {source: [rng.integers(1, 63, 25) for _ in range(3)] for source in sources})
    sets = {"web": {"set": "web", "tokens": 2500}, "books": {"set": "both", "source": "books", "tokens": 1000},
            "notes": {"set": "both", "source": "notes", "tokens": 4000}}
    (folder / "mix.yaml").write_text(json.dumps({"sets": sets}))
    build_mix(folder / "mix.yaml", folder / "mix", seed=3)


def read_mixture(folder: Path) -> None:
    build_mix(folder / "mix.yaml", folder / "again", seed=3)
    read_rows(folder / "again")
    read_split(folder / "mix")


def make_conversion(folder: Path) -> None:
    texts = folder.parent / "texts"
    texts.mkdir()
    lines = [json.dumps({"id": str(at), "text": text}) for at, text in enumerate(make_documents(30, longest=60))]
    (texts / "texts.jsonl").write_text("\n".join(lines))
    tokenizers.save(tokenizers.train_bpe(make_documents(100, seed=1), 300), texts / "tokenizer")
    convert(ConvertOptions(sources=[str(texts / "texts.jsonl")], out=folder, tokenizer=texts / "tokenizer", workers=1,
                           chunk_length=T - 2, validation=0.2, shard_size="4kb", unit_size="2kb"))


def read_conversion(folder: Path) -> None:
    storage = open_storage(folder)
    quietly(plans.published_units, storage)
    plan = plans.read_plan(storage)
    if plan is not None:
        options: Any = SimpleNamespace(record=lambda: plan.options, append=False)
        quietly(functools.partial(plans.plan_conversion, tokenizer=plan.tokenizer, storage=storage), options, plan, [])
    finalize(folder)
    read_rows(folder)  # "makes a readable dataset"


# ------------------------------------------------------------------ configs


def make_config(folder: Path) -> None:
    folder.mkdir()
    shutil.copy(ROOT / "yamls" / "nano.yaml", folder)
    (folder / "over.yaml").write_bytes((ROOT / "yamls" / "phases" / "decay.yaml").read_bytes())


def read_config(folder: Path) -> None:
    """Everything that train.py does with a config before it looks for files and devices."""
    config = train.configure([str(folder / "nano.yaml"), str(folder / "over.yaml"), "variables.source=runs/other",
                              "variables.label=mlm"])
    plain: Any = run_config.om.to_container(config, resolve=True)
    if not checks._is_ours(plain):
        return
    checks.check_settings(plain)
    checks.check_loggers(plain)
    plan_tool.text([plan_tool.plan_run(plain)])
    then = run_config.settings(plain)
    again = run_config.settings(json.loads(run_config.config_text(plain)))
    pairs = {key: (then.get(key), again.get(key)) for key in then | again}
    differing = {key: (was, now) for key, (was, now) in pairs.items()
                 if repr(was) != repr(now) and not key.startswith(("n_gpus", "device_", "eval_"))}
    assert not differing, f"a config differs from its own record: {differing}"
    checks.resolve_schedules(plain)


# ------------------------------------------------------------------ models


def small_model(causal: bool) -> tuple[Ettin, Any]:
    torch.manual_seed(4)
    return Ettin(EttinConfig(causal=causal, **SHAPE)), tokenizers.train_bpe(make_documents(300, seed=1), 512)


def make_hf(folder: Path) -> None:
    for name, causal in (("encoder", False), ("decoder", True)):
        model, tokenizer = small_model(causal)
        export_model(model, model.config, tokenizer, folder / name, objective="clm" if causal else "mntp")


def check_model(loaded: LoadedModel) -> None:
    shapes = {row.name: row.shape for row in tensor_table(loaded.config)}
    assert {name: tuple(tensor.shape) for name, tensor in loaded.state.items()} == shapes
    assert loaded.objective in ("mlm", "clm", "mntp") and (loaded.objective == "clm") == loaded.config.causal
    json.dumps(loaded.facts, default=str)


def read_hf(folder: Path) -> None:
    for name in ("encoder", "decoder"):
        loaded = load_model(folder / name, default_objective="mlm")
        check_model(loaded)
        assert all(tensor.dtype == torch.float32 and math.isfinite(tensor.sum()) for tensor in loaded.state.values())
        tokenizer = loaded.tokenizer()
        ids = tokenizer("a text (of two) words", add_special_tokens=False)["input_ids"]
        assert all(0 <= number < tokenizers.vocab_size(tokenizer) for number in ids)


def checkpoint_state() -> dict[str, Any]:
    """What Composer's checkpoint of a run of ours holds, made by hand."""
    model, tokenizer = small_model(False)
    config = run_config.resolved([str(ROOT / "yamls" / "nano.yaml")])
    state = weights_checkpoint(
        model.state_dict(), model.config, objective="mlm", batch=4, tokens=2000, run_name="run", phase="pretrain",
        objective_schedule="mlm", tokenizer_fingerprint=tokenizers.fingerprint(tokenizer),
        run_config=run_config.config_text(config), run_hash="0" * 64)
    moments = {name: {"step": torch.tensor(4.0), "exp_avg": torch.zeros(8)}
               for name in list(state["state"]["model"])[:3]}
    state["state"] |= {
        "optimizers": {"StableAdamW": {"state": moments, "param_groups": [{"lr": 1e-3, "params": list(moments)}]}},
        "dataset_state": {"train": {"rows": 32, "fingerprint": "f" * 64, "order": 2}}, "rank_zero_seed": 21,
        "schedulers": {"WarmupStableDecay": {"last_epoch": 4}}}
    state["rng"] = [{"python": random.getstate(), "torch": torch.get_rng_state(), "numpy": np.random.get_state()}]
    return state


def make_checkpoints(folder: Path) -> None:
    """Save folders of one file a checkpoint, and of a folder a checkpoint, each with two; and a log of steps."""
    import torch.distributed.checkpoint as dcp

    (folder / "whole").mkdir(parents=True)
    for batch in (2, 4):
        torch.save(checkpoint_state(), folder / "whole" / f"ep0-ba{batch}.pt")
        dcp.save(checkpoint_state(), checkpoint_id=folder / "sharded" / f"ep0-ba{batch}")
    lines = [json.dumps({"step": step, "tokens": step * 100, "rows": 8, "loss": 5.5, "lr": 1e-3}) for step in range(20)]
    (folder / "whole" / "steps.jsonl").write_text("\n".join(lines) + "\n")


def read_log(folder: Path) -> None:
    assert all(isinstance(entry["step"], int) for entry in read_steps(folder))
    cut_steps(folder / "steps.jsonl", 10)
    left = read_steps(folder)
    assert not left or left[-1]["step"] < 10, "a step is left that will be done again"


def read_checkpoints(folder: Path) -> None:
    read_checkpoint(folder / "sharded")
    read_checkpoint(folder / "whole")
    read_log(folder / "whole")


def read_checkpoint(folder: Path) -> None:
    """The newest of two checkpoints may be damaged: every reader of it, and what autoresume would take."""
    path = folder / "ep0-ba4.pt" if folder.name == "whole" else folder / "ep0-ba4"
    found = checkpoints.complete_checkpoints(folder)
    wrong = checkpoints.damage(path) if path in found else "incomplete"
    assert wrong is None or isinstance(wrong, str) and wrong
    newest = checkpoints.repair_latest(folder)
    assert newest is not None, "a sound checkpoint is passed over"
    assert newest.name.startswith("ep0-ba4" if wrong is None else "ep0-ba2"), f"{newest.name} is taken: {wrong}"
    head = checkpoints.read_head(path)
    assert isinstance(head.record, dict) and isinstance(head.data, dict)
    weights, _ = checkpoints.load_model_state(path)
    assert all(isinstance(tensor, torch.Tensor) for tensor in weights.values())
    loading.load_checkpoint(path) if path.is_file() else None
    check_model(load_model(path))


READERS: dict[str, Reader] = {
    "shard": Reader(make_splits, read_splits, "*/train/*", seal=seal_splits),
    "mixture": Reader(make_mixture, read_mixture, "mix*", keys=r"sets\."),
    "conversion": Reader(make_conversion, read_conversion, "[pu]*", keys="sources must "),
    "config": Reader(make_config, read_config, "*.yaml", keys="."),
    "hf": Reader(make_hf, read_hf, "*/*[!d]"),
    "checkpoint": Reader(make_checkpoints, read_checkpoints, "*/*[4l]*"),
}
