"""EttinModel: FLOPs, refusals and samples equal naive loops over documents and tokens."""

from types import SimpleNamespace

import numpy as np
import parity
import pytest
import torch
from torch import nn

from ettin_foundry.data.batch import flatten
from ettin_foundry.data.tokenizer import load
from ettin_foundry.model.composer import EttinModel

VOCAB_SIZE = 512  # of the fixtures' tokenizer


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return load(tokenizer_dir)


def model_of(objective, tokenizer=None, max_seq_len=64, **fields):
    """nano with large random weights, so that every place of a text has a clear favourite of its own."""
    torch.manual_seed(0)
    model = EttinModel(tokenizer, size="nano", objective=objective, max_seq_len=max_seq_len,
                       **{"vocab_size": VOCAB_SIZE, **fields})
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    nn.init.normal_(model.model.trunk.embeddings.tok_embeddings.weight, std=0.5)
    return model


def batch_of(objective, rows=((5, 12, 20), (40,), (1, 9), ())):
    """(B, T) with documents of the given lengths in each row, then padding."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(VOCAB_SIZE, (len(rows), 40), generator=generator)
    numbers = [[number for number, length in enumerate(lengths) for _ in range(length)] for lengths in rows]
    sequence_id = torch.tensor([row + [-1] * (40 - len(row)) for row in numbers])
    chosen = (torch.rand(ids.shape, generator=generator) < 0.3) & (sequence_id >= 0)
    labels = ids.where(chosen, -100)
    if objective == "clm":
        followed = (sequence_id[:, 1:] == sequence_id[:, :-1]) & (sequence_id[:, 1:] >= 0)
        labels[:, :-1], labels[:, -1] = ids[:, 1:].where(followed, -100), -100
    return {"input_ids": ids, "labels": labels, "sequence_id": sequence_id, "objective": objective}


def naive_logits(model, ids):
    """(L, V) of one document by itself."""
    return parity.our_logits(model.eval().model, torch.tensor(ids))


def test_flops_of_a_batch_are_those_of_a_loop_over_its_documents():
    model = model_of({"mlm": 0.5, "clm": 0.5}, local_attention=8)
    pairs = 0
    lengths = {True: (5, 12, 12, 20, 1), False: (40, 9, 3)}
    for length, causal in [(length, kind) for kind, of_kind in lengths.items() for length in of_kind]:
        for layer in range(4):
            left, right = (length, length) if layer % 3 == 0 else (3 if causal else 4, 4)
            pairs += sum(i - left <= j <= i + right * (not causal) for i in range(length) for j in range(length))
    counted = {causal: np.stack(np.unique(of_kind, return_counts=True)) for causal, of_kind in lengths.items()}
    batch = {"num_tokens": 102, "num_targets": 31, "document_lengths": counted}
    assert model.flops_per_batch(batch) == model.config.flops(102, 31, pairs)
    assert model.flops_per_batch({"num_tokens": 0, "num_targets": 0, "document_lengths": {}}) == 0


@pytest.mark.parametrize(("last", "given", "reach"),
                         [("clm", {}, 63), ("mlm", {}, 63), ("mlm", {"window_left": 64}, 64)])
def test_rows_of_clm_have_the_decoders_window_whatever_the_model_ends_as(last, given, reach):
    first = "mlm" if last == "clm" else "clm"
    model = EttinModel(size="nano", objective=[{"until": 10, "objective": first}, {"objective": last}], max_seq_len=512,
                       **given)
    windows = {causal: config.windows for causal, config in model.model.configs.items()}
    assert windows == {True: {True: (-1, 0), False: (reach, 0)}, False: {True: (-1, -1), False: (64, 64)}}
    assert model.objective == last


def test_weighted_targets_are_divided_by_the_loss_tokens_in_loss_and_metric():
    """As rows of a mixture are: each nll has its row's weight, and the divisor is the batch's own."""
    model = model_of("mlm").eval()
    batch = batch_of("mlm", rows=((5,), (40,), (9,), ()))
    weights, texts, total = [2.0, 1.25, 10.0, 1.0], [4, 38, 6, 0], 0.0
    batch |= {"row_weight": torch.tensor(weights), "loss_tokens": torch.tensor(texts)}
    for weight, ids, labels, length in zip(weights, batch["input_ids"], batch["labels"], (5, 40, 9)):
        logits = naive_logits(model, ids[:length].tolist()).double()
        nll = nn.functional.cross_entropy(logits, labels[:length], ignore_index=-100, reduction="sum")
        total += weight * nll.item()
    flat = flatten(batch)
    with torch.no_grad():
        outputs = model.eval_forward(flat)
    metric = model.get_metrics(is_train=False)["TargetCrossEntropy"]
    model.update_metric(flat, outputs, metric)
    for found in (model.loss(outputs, flat), metric.compute()):
        assert found.item() == pytest.approx(total / sum(texts), rel=1e-5)  # fp32 against float64
    assert flat["num_targets"] != sum(texts)


def test_what_does_not_fit_is_refused(tokenizer):
    for objective, other in (("mlm", "clm"), ("clm", "mlm"), ("mntp", "mlm")):
        model = model_of(objective)
        with pytest.raises(ValueError, match=f"model.objective must include the batch's '{other}', got {objective};"):
            model(flatten(batch_of(other)))
        assert model(flatten(batch_of(objective)))["loss"].isfinite()
    for call, words in (
            (lambda: model_of("mlm", tokenizer, vocab_size=511), "vocab_size must be at least the 512 entries.*511"),
            (lambda: model_of("mntp", tokenizer).predictor.generate(["x"]), "generate needs a decoder"),
            (lambda: model_of("clm", tokenizer).predictor.fill_mask(["[MASK]"]), "fill-mask needs an encoder"),
            (lambda: model_of("mlm", tokenizer).predictor.fill_mask(["[MASK]", "kalo"]), "must have a .MASK.*'kalo'"),
            (lambda: model_of("mlm", tokenizer, max_seq_len=16).predictor.fill_mask(["[MASK]" * 15]), "most 16 .*17")):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize(("objective", "before"), [("mlm", 0), ("mntp", 1)])
def test_fill_mask_reads_an_mlm_model_at_the_mask_and_an_mntp_model_one_before(objective, before, tokenizer):
    model = model_of(objective, tokenizer)
    texts = ["kalo [MASK] mi ter", "vol sta ge quo [MASK] hy [MASK]"]
    for text, answer in zip(texts, model.predictor.fill_mask(texts, top_k=3), strict=True):
        ids = [tokenizer.cls_token_id, *tokenizer.encode(text, add_special_tokens=False), tokenizer.sep_token_id]
        at = ids.index(tokenizer.mask_token_id)
        best = naive_logits(model, ids).softmax(-1).topk(3)
        assert best.indices[at].tolist() != best.indices[at - 1].tolist()  # else the places could not be told apart
        assert [token for token, _ in answer] == [tokenizer.decode([i]) for i in best.indices[at - before].tolist()]
        # alone or beside others: fp32 sums in another order
        assert [p for _, p in answer] == pytest.approx(best.values[at - before].tolist(), rel=1e-4)


def continued(model, ids, eos):
    """Greedy, the whole document again for each of 12 tokens. Returns the new ids and why it stopped."""
    new = []
    while len(new) < 12:
        if len(ids) + len(new) == model.config.max_position_embeddings:
            return new, "context full"
        token = int(naive_logits(model, ids + new)[-1].argmax())
        if token == eos:
            return new, "EOS"
        new.append(token)
    return new, "number"


def test_greedy_generation_equals_a_loop_over_argmax(tokenizer):
    prompts = ["kalo mi", "vol sta ge quo hy", "kalo " * 15]
    starts = [[tokenizer.cls_token_id, *tokenizer.encode(p, add_special_tokens=False)] for p in prompts]
    model = model_of("clm", max_seq_len=len(starts[2]) + 5)
    free = [continued(model, ids, None)[0] for ids in starts]
    # a random model never ends a document: let the token that only the first prompt's continuation has be the end
    eos = next(token for token in free[0][2:] if all(token not in other for other in free[1:]))
    model.tokenizer = SimpleNamespace(cls_token_id=tokenizer.cls_token_id, sep_token_id=eos,
                                      encode=tokenizer.encode, decode=tokenizer.decode)
    expected = [continued(model, ids, eos) for ids in starts]
    assert [why for _, why in expected] == ["EOS", "number", "context full"]  # all three ways to stop
    model.train()
    state = torch.get_rng_state()
    assert model.predictor.generate(prompts, max_new_tokens=12) == [tokenizer.decode(new) for new, _ in expected]
    model.predictor.generate(prompts, max_new_tokens=2, temperature=1.0)
    assert model.training and torch.equal(torch.get_rng_state(), state)  # samples leave the run as it was
