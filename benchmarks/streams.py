"""The documents that benchmarks train on, as our flat stream and as transformers' padded batch.

Both forms hold the same documents, tokens and targets, so that tokens per second can be compared. Documents are
synthetic and seeded unless they come from a converted set: lengths are log-normal (median 589, sigma 1), cut at the
row length, which gives the mean of 615 tokens that Ettin's rows of 1,024 had; ids are skewed towards small ones as
words are. A packed row is at least 99.5% full, so a stream of rows is written here as documents one after another, up
to the token budget.

Torch and numpy only.
"""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["MASK_RATE", "document_lengths", "flat_stream", "machine", "padded_batch", "results_path",
           "stored_documents", "synthetic_documents", "tree_of"]

MASK_RATE = 0.3  # of the recipes
MEDIAN_TOKENS, SIGMA = 589, 1.0  # mean of min(length, 1024) is 615: facts of Ettin's pretraining rows
SHORTEST = 8


def document_lengths(num_tokens: int, longest: int, *, seed: int) -> list[int]:
    """Lengths, BOS and EOS included, of documents that together have exactly `num_tokens` tokens."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = []
    left = num_tokens
    while left:
        length = int(np.clip(rng.lognormal(np.log(MEDIAN_TOKENS), SIGMA), SHORTEST, longest))
        if left - length < SHORTEST:  # the last one takes what is left, so that no tail is too short to be a document
            length = min(left, longest)
        lengths.append(length)
        left -= length
    return lengths


def synthetic_documents(num_tokens: int, longest: int, vocab_size: int, *, seed: int) -> list[np.ndarray]:
    """Documents of seeded lengths; ids fall off like word frequencies do."""
    rng = np.random.default_rng(seed + 1)
    return [np.minimum((vocab_size * rng.random(n) ** 4).astype(np.int64), vocab_size - 1)
            for n in document_lengths(num_tokens, longest, seed=seed)]


def stored_documents(folder: str, num_tokens: int, longest: int) -> list[np.ndarray]:
    """The first documents of a converted set's training split, with BOS and EOS.

    Raises:
        ValueError: the set holds fewer tokens than asked for.
    """
    from ettin_foundry.data.shards import MDSSplit

    data = MDSSplit(Path(folder) / "train")
    special = data.manifest["tokenizer"]["special_ids"]
    documents, left = [], num_tokens
    for shard in range(data.num_shards):
        for sample in range(int(data.samples[shard])):
            chunk = np.asarray(data.chunk(shard, sample)).astype(np.int64)
            document = np.concatenate(([special["cls"]], chunk, [special["sep"]]))[:min(longest, left)]
            documents.append(document)
            left -= len(document)
            if left < SHORTEST:
                return documents
    raise ValueError(f"--data: {folder} holds {num_tokens - left} tokens, {num_tokens} are needed; convert a larger "
                     "corpus or ask for fewer --tokens")


def _targets(documents: list[np.ndarray], objective: str, seed: int) -> list[np.ndarray]:
    """One boolean array per document: which tokens are to be predicted (for clm: all but the first)."""
    rng = np.random.default_rng(seed)
    if objective == "clm":
        return [np.arange(len(d)) > 0 for d in documents]
    chosen = [rng.random(len(d)) < MASK_RATE for d in documents]
    chosen[0][0] = True  # never a batch without any target
    return chosen


def flat_stream(documents: list[np.ndarray], objective: str, mask_id: int, *, seed: int) -> dict[str, Any]:
    """What `ettin_foundry.model.transformer.Ettin` takes, on the CPU.

    Returns:
        input_ids, position_ids (N,), cu_seqlens (D + 1,) int32, max_seqlen, target_positions, target_labels (n,),
        num_tokens, num_targets, lengths.
    """
    ids, chosen = np.concatenate(documents), np.concatenate(_targets(documents, objective, seed))
    lengths = [len(d) for d in documents]
    places = np.flatnonzero(chosen)
    inputs = ids if objective == "clm" else np.where(chosen, mask_id, ids)
    return {
        "input_ids": torch.from_numpy(inputs),
        "position_ids": torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
        "cu_seqlens": torch.from_numpy(np.cumsum([0, *lengths])).int(),
        "max_seqlen": max(lengths),
        "target_positions": torch.from_numpy(places - int(objective == "clm")),  # a decoder predicts one place earlier
        "target_labels": torch.from_numpy(ids[places]),
        "num_tokens": len(ids), "num_targets": len(places), "lengths": lengths,
    }


def padded_batch(documents: list[np.ndarray], objective: str, mask_id: int, *, seed: int) -> dict[str, Any]:
    """What transformers' models take: one document per row, right padding, the same targets as `flat_stream`.

    Returns:
        input_ids, attention_mask, labels, each (D, M); transformers shifts clm labels itself.
    """
    shape = (len(documents), max(len(d) for d in documents))
    ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels = np.full(shape, -100, np.int64)
    for row, (document, chosen) in enumerate(zip(documents, _targets(documents, objective, seed))):
        n = len(document)
        ids[row, :n] = document if objective == "clm" else np.where(chosen, mask_id, document)
        labels[row, :n] = np.where(chosen, document, -100)
        mask[row, :n] = 1
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(labels)}


def machine(device: str) -> dict[str, Any]:
    """Where a measurement was made."""
    facts = {"torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count(),
             "threads": torch.get_num_threads(), "device": device}
    if device == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}  # type: ignore
    return facts


def results_path(name: str, out: str | None) -> Path:
    """benchmarks/results/DATE-name without suffix, or the same in the folder `out`."""
    folder = Path(out) if out else Path(__file__).resolve().parent / "results"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{datetime.date.today().isoformat()}-{name}"


def tree_of(wanted: str, folder: str) -> Path | None:
    """A checkout to compare with: a folder as it is, or a git revision laid out in `folder`; None where neither is."""
    if Path(wanted).is_dir():
        return Path(wanted).resolve()
    if shutil.which("git"):
        root = Path(__file__).resolve().parents[1]
        done = subprocess.run(["git", "-C", str(root), "archive", wanted], capture_output=True)
        if not done.returncode:
            subprocess.run(["tar", "-x", "-C", folder], input=done.stdout, check=True)
            return Path(folder)
    print(f"--compare: {wanted} is neither a folder nor a revision known here; nothing is compared with it", flush=True)
    return None
