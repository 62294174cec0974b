"""Encoders by masks, against one row at a time through the whole model."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import lm_eval.api.registry
import pytest
import torch
from ettin_eval.pseudo_likelihood import MaskedLikelihood
from ettin_eval.subject import read_subject
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, ModernBertForMaskedLM

CLS, SEP, MASK = 1, 2, 4  # of tests/conftest.py's tokenizer
PAIRS = [("The capital of France is", " Paris."), ("The capital of France is", " a plant?"),
         ("The capital of France is", " Paris."), ("", "def add(a, b):"), ("Which is a plant? ", "A tree."),
         ("", "A"), ("a " * 90, "return a + b")]


def naive(model, ids: list[int], start: int, protocol: str, objective: str) -> tuple[float, bool]:
    """Batch 1, every position's logits, the definition of each protocol written out. ids: context, continuation."""
    total, greedy = 0.0, True
    for at in range(start, len(ids)):
        if protocol == "pseudo":
            shown = ids[:at] + [MASK] + ids[at + 1:]
            cut = max(len(shown) - 126, 0)  # rows of 128 with [CLS] and [SEP]; cut from the left
        else:
            shown = ids[:at] + [MASK] * {"mask1": 1, "mask3": 3}[protocol]
            cut = max(len(shown) - 126, 0)
        row = [CLS] + shown[cut:] + [SEP]
        place = 1 + at - cut
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row])).logits[0]
        scores = torch.log_softmax(logits[place - 1 if objective == "mntp" else place], -1)
        total += scores[ids[at]].item()
        greedy &= scores.argmax().item() == ids[at]
    return total, greedy


def as_requests(pairs) -> list[Any]:
    return [SimpleNamespace(args=pair) for pair in pairs]


@pytest.mark.parametrize("objective", ["mlm", "mntp"])
@pytest.mark.parametrize("protocol", ["pseudo", "mask1", "mask3"])
def test_batched_equals_one_row_at_a_time(folders, objective, protocol):
    tokenizer = AutoTokenizer.from_pretrained(folders[objective])
    model = ModernBertForMaskedLM.from_pretrained(folders[objective]).eval()
    expected = []
    for context, continuation in PAIRS:
        # the harness: spaces at the end of a context belong to the continuation; the split is counted in tokens
        start = len(tokenizer.encode(context.rstrip(), add_special_tokens=False))
        expected.append(naive(model, tokenizer.encode(context + continuation, add_special_tokens=False), start,
                              protocol, objective))
    for batch_tokens in (1, 700):
        adapter = MaskedLikelihood(read_subject(str(folders[objective])), protocol=protocol,
                                   batch_tokens=batch_tokens)
        found = adapter.loglikelihood(as_requests(PAIRS), disable_tqdm=True)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        for (value, _), (reference, _) in zip(found, expected, strict=True):
            # float32, sums over up to 30 tokens: another batch shape is another order of adding
            assert value == pytest.approx(reference, abs=1e-5)
    text = "def add(a, b):\n    return a + b"
    ids = tokenizer.encode(text, add_special_tokens=False)
    rolling = adapter.loglikelihood_rolling(as_requests([(text,)]))
    assert rolling == [pytest.approx(naive(model, ids, 0, protocol, objective)[0], abs=1e-5)]


def test_equal_rows_run_once(folders):
    adapter = MaskedLikelihood(read_subject(str(folders["mlm"])), protocol="mask1")
    rows = []
    logits = adapter.logits
    adapter.logits = lambda batch: (rows.extend(batch), logits(batch))[1]
    adapter.loglikelihood(as_requests([("A tree", " is"), ("A tree", " is"), ("A tree", " or")]), disable_tqdm=True)
    ids = {ending: adapter.tok_encode("A tree" + ending) for ending in (" is", " or")}
    shared = len(adapter.tok_encode("A tree"))
    # of one row each: the context alone, and each longer gold prefix
    prefixes = {tuple(each[:at]) for each in ids.values() for at in range(shared, len(each))}
    assert len(rows) == len(set(rows)) == len(prefixes)


def test_a_long_continuation_is_seen_through_windows(folders):
    adapter = MaskedLikelihood(read_subject(str(folders["mntp"])))
    text = list(range(10, 210))  # 126 fit between [CLS] and [SEP]
    for at in range(200):
        ids, place = adapter.row(text, at)
        assert len(ids) == 128 and ids[0] == CLS and ids[-1] == SEP and ids[place + 1] == MASK
        restored = [text[at] if token == MASK else token for token in ids[1:-1]]
        assert restored == text[restored[0] - 10:restored[0] - 10 + 126]
        assert place >= 30 or restored[0] == 10  # never without a left side that there is


@pytest.mark.parametrize("protocol", ["pseudo", "mask1", "mask3"])
def test_generation_fills_appended_masks_greedily(folders, protocol):
    tokenizer = AutoTokenizer.from_pretrained(folders["mntp"])
    model = ModernBertForMaskedLM.from_pretrained(folders["mntp"]).eval()
    contexts, masks = ["Which is", "def add(a, b):\n", "tree " * 80], 3 if protocol == "mask3" else 1
    expected = []
    for context in contexts:
        made: list[int] = []
        while len(made) < 6 and SEP not in made:
            left = (tokenizer.encode(context, add_special_tokens=False) + made)[-(126 - masks):]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[CLS, *left, *[MASK] * masks, SEP]])).logits[0]
            made.append(int(logits[len(left)].argmax()))  # mntp: the place before the first mask
        expected.append(tokenizer.decode(made).split("[SEP]")[0])
    adapter = MaskedLikelihood(str(folders["mntp"]), protocol=protocol)
    options = {"until": [], "max_gen_toks": 6, "do_sample": False}
    assert adapter.generate_until(as_requests([(each, options) for each in contexts])) == expected
    stop = expected[0][2]
    stopped = adapter.generate_until(as_requests([(contexts[0], {**options, "until": [stop]})]))
    assert stopped == [expected[0].split(stop)[0]]
    with pytest.raises(ValueError, match="do_sample must be false"):
        adapter.generate_until(as_requests([("a", {"do_sample": True, "temperature": 1.0})]))


def test_an_encoder_of_another_class(folders, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folders["mlm"])
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1,
                                       num_attention_heads=2, intermediate_size=16, initializer_range=0.3)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    adapter: Any = lm_eval.api.registry.get_model("ettin-encoder").create_from_arg_string(
        f"pretrained={tmp_path},protocol=mask1")
    ids = tokenizer.encode("A tree", add_special_tokens=False)
    found, = adapter.loglikelihood(as_requests([("", "A tree")]), disable_tqdm=True)
    assert found[0] == pytest.approx(naive(model, ids, 0, "mask1", "mlm")[0], abs=1e-5)
    assert math.isfinite(found[0])


def test_what_is_refused(folders):
    with pytest.raises(ValueError, match="scoring by masks needs an encoder, got a decoder"):
        MaskedLikelihood(str(folders["clm"]))
    with pytest.raises(ValueError, match="--protocol must be one of pseudo, mask1, mask3, got pll"):
        MaskedLikelihood(str(folders["mlm"]), protocol="pll")
    subject = read_subject(str(folders["mntp"]))
    subject.tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(ValueError, match="must put a token before the text"):
        MaskedLikelihood(subject)
