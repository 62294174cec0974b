"""The harness's tasks on folders of items, against scores computed here from whole models."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path

import datasets
import pytest
import torch
from ettin_eval import generative, harness, suites
from ettin_eval.generative import bits_per_byte, evaluate
from ettin_eval.main import main
from ettin_eval.subject import read_subject
from ettin_eval.tasks import Settings
from transformers import AutoModelForCausalLM, AutoTokenizer

REAL = Path(os.environ.get("ETTIN_EVAL_DATA", Path(__file__).parents[1] / "data"))
BOS = 1  # [CLS] of tests/conftest.py's tokenizer
QUESTIONS = [("Which is a plant?", ["A tree.", "Paris.", "def add(a, b):", "return"], "A"),
             ("The capital of France", ["a plant", "is Paris.", "a", "b and a tree and a plant"], "B"),
             ("A tree. " * 60, ["a" * 40, "b", "is Paris", "tree"], "D"),  # cut from the left
             ("Which?", ["add " * 150, "b", "is", "tree"], "C")]  # an answer longer than a row of 128


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder as `make eval-data` makes it, of made items."""
    root = tmp_path_factory.mktemp("data")

    def save(folder: str, rows: list[dict]) -> None:
        datasets.Dataset.from_list(rows).save_to_disk(str(root / folder))

    save("ai2_arc/ARC-Easy/validation", [
        {"question": text, "choices": {"text": answers, "label": list("ABCD")}, "answerKey": key}
        for text, answers, key in QUESTIONS])
    for subject, many in (("anatomy", 3), ("virology", 2)):
        for split in ("dev", "test"):
            save(f"hails/mmlu_no_train/{subject}/{split}", [
                {"question": f"Which {subject} {number}?", "choices": ["a", "tree", "Paris", "plant"], "answer": number}
                for number in range(many)])
    save("trivia_qa/rc.wikipedia.nocontext/validation", [
        {"question": text, "answer": {"aliases": [text]}} for text in ("The capital", "A tree", "a plant " * 40)])
    return root


def items(scores, metric):
    return next(score.items for score in scores if score.metric == metric)


def causal(folder, pairs):
    """Each (context, continuation) alone: the sum over the continuation, all that fits on its left visible."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    totals = []
    for context, continuation in pairs:
        start = len(tokenizer.encode(context, add_special_tokens=False))
        ids = tokenizer.encode(context + continuation, add_special_tokens=False)
        parts = [(start, len(ids))] if len(ids) - start <= 128 else [
            (at, min(at + 64, len(ids))) for at in range(start, len(ids), 64)]
        total = 0.0
        for first, last in parts:
            # 128 inputs predict up to the 129th token; the first input is BOS, whatever is cut
            row = [BOS, *ids[max(0, last - 128):last]]
            with torch.no_grad():
                scores = model(input_ids=torch.tensor([row[:-1]])).logits[0].log_softmax(-1)
            total += sum(scores[at, row[at + 1]].item() for at in range(len(row) - 1 - (last - first), len(row) - 1))
        totals.append(total)
    return totals


def test_a_decoder_answers_as_computed_alone(folders, data):
    scores = evaluate("arc_easy", None, read_subject(str(folders["clm"])), Settings(data))
    acc, acc_norm = [], []
    for question, answers, key in QUESTIONS:
        totals = causal(folders["clm"], [(f"Question: {question}\nAnswer:", f" {each}") for each in answers])
        acc.append(float(totals.index(max(totals)) == "ABCD".index(key)))
        normed = [total / len(answer) for total, answer in zip(totals, answers, strict=True)]
        acc_norm.append(float(normed.index(max(normed)) == "ABCD".index(key)))
    assert items(scores, "acc") == tuple(acc) and items(scores, "acc_norm") == tuple(acc_norm)
    assert len({*acc}) == 2  # some right, some wrong
    assert scores[0].settings == {"shots": 0, "split": "validation", "data": "allenai/ai2_arc/ARC-Easy"}


def test_every_row_begins_with_exactly_one_bos(folders, data):
    model = generative.language_model(read_subject(str(folders["clm"])), Settings(data))
    rows, forward = [], model.model.forward
    model.model.forward = lambda *args, **kwargs: (rows.append(args[0] if args else kwargs["input_ids"]),
                                                   forward(*args, **kwargs))[1]
    for context in ("", "Which", "[CLS]Which", " A tree." * 90):
        request = type("Request", (), {"args": (context, " tree")})
        values = model.loglikelihood([request])
        assert (rows[-1][0, 0], (rows[-1] == BOS).sum()) == (BOS, 1), context
        if context != "[CLS]Which":
            # float32, three tokens: another batch shape is another order of adding
            assert values[0][0] == pytest.approx(causal(folders["clm"], [(context, " tree")])[0], abs=1e-5)
    rows.clear()
    request = type("Request", (), {"args": ("A tree. " * 90, {"until": ["\n"], "do_sample": False})})
    other = type("Request", (), {"args": ("Which", {"until": ["\n"], "do_sample": False})})
    model.generate_until([request, other])
    assert rows[0][0, 0] == BOS and (rows[0] == BOS).sum(1).tolist() == [1, 1]


def test_bits_per_byte_of_a_decoder(folders, data, tmp_path):
    text = "Die Größe: The capital of France is Paris. " * 40
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "one.txt").write_text(text, encoding="utf-8")
    score, = bits_per_byte(100, read_subject(str(folders["clm"])), Settings(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(folders["clm"])
    model = AutoModelForCausalLM.from_pretrained(folders["clm"]).eval()
    expected, rest = [], text
    while len(rest.encode()) >= 512:
        piece = rest.encode()[:512].decode(errors="ignore")
        rest = rest[len(piece):]
        ids, bits = [BOS, *tokenizer.encode(piece, add_special_tokens=False)], 0.0
        for start in range(0, len(ids) - 1, 128):  # windows of 128 predictions, each from the token before it
            window = torch.tensor([ids[start:start + 129]])
            if window.shape[1] < 129 and start:  # the last window is filled up with context
                window = torch.tensor([ids[-129:]])
            with torch.no_grad():
                nats = -model(input_ids=window[:, :-1]).logits[0].log_softmax(-1).gather(1, window[0, 1:, None])
            bits += nats[-(len(ids[start + 1:start + 129])):].sum().item() / math.log(2)
        expected.append(bits / len(piece.encode()))
    assert len(expected) == score.n == 3 and score.metric == "bits_per_byte"
    assert sorted(score.items or ()) == pytest.approx(sorted(expected), rel=1e-5)  # float32 sums of 200 terms


def test_bits_per_byte_of_an_encoder_says_its_protocol(folders, data):
    for protocol, limit in (("pseudo", 1), ("mask1", 1)):
        score, = bits_per_byte(100, read_subject(str(folders["mntp"])), Settings(data, limit, protocol=protocol))
        assert (score.metric, score.n) == (f"{protocol}_bits_per_byte", 1)
        assert score.settings["text"].startswith("docstrings of scikit-learn ")


def test_subjects_are_one_mean_and_their_own(folders, data, monkeypatch):
    subjects = [path for path in generative._yamls("mmlu") if path.stem in ("mmlu_anatomy", "mmlu_virology")]
    assert len(generative._yamls("mmlu")) == 57
    monkeypatch.setattr(generative, "_yamls", lambda name: subjects)
    scores = evaluate("mmlu", None, read_subject(str(folders["mlm"])), Settings(data, protocol="mask1"))
    assert [(score.task, score.n) for score in scores] == [("mmlu", 5), ("mmlu_anatomy", 3), ("mmlu_virology", 2)]
    assert scores[0].items == (scores[1].items or ()) + (scores[2].items or ())
    assert scores[0].settings["protocol"] == "mask1"


CODE_EVAL = """  # the interface of the hub's metric of this name, which nothing else ships
import datasets
import evaluate
def passes(code):
    try:
        exec(code, {})
        return 1
    except Exception:
        return 0
class CodeEval(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(description="", citation="", features=datasets.Features(
            {"predictions": datasets.Sequence(text), "references": text}))
    def _compute(self, predictions, references, k):
        right = [passes(codes[0] + chr(10) + test) for codes, test in zip(predictions, references)]
        return {"pass@1": sum(right) / len(right)}, {}
"""


def test_generated_code_is_run(folders, tmp_path, monkeypatch):
    (tmp_path / "code_eval").mkdir()
    (tmp_path / "code_eval" / "code_eval.py").write_text(CODE_EVAL)
    monkeypatch.chdir(tmp_path)  # `evaluate` looks here before it looks at the hub
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    datasets.Dataset.from_list([
        {"task_id": f"HumanEval/{number}", "prompt": f"def {name}(a, b):\n", "entry_point": name, "test":
         f"def check(f):\n    assert f(2, 3) == {value}", "canonical_solution": ""}
        for number, (name, value) in enumerate([("add", 5), ("times", 6), ("plus", 5), ("broken", 1)])
    ]).save_to_disk(str(tmp_path / "data/openai/openai_humaneval/none/test"))

    def write(self, requests, disable_tqdm=False):
        return ["    1 +" if "broken" in each.args[0] else "    return a + b\n" for each in requests]

    monkeypatch.setattr(harness._Decoder, "generate_until", write)
    subject = dataclasses.replace(read_subject(str(folders["clm"])), max_length=2048)
    score, = evaluate("humaneval", None, subject, Settings(tmp_path / "data"))
    assert (score.metric, score.value, score.items) == ("pass@1", 0.5, (1.0, 0.0, 1.0, 0.0))


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_generated_answers(folders, data, objective):
    score, = evaluate("triviaqa", 2, read_subject(str(folders[objective])), Settings(data, seed=3))
    assert (score.task, score.metric, score.n) == ("triviaqa_2", "exact_match", 2)


def test_items_are_drawn_by_the_seed(folders, data):
    subject = read_subject(str(folders["clm"]))
    drawn = {seed: evaluate("arc_easy", 2, subject, Settings(data, seed=seed))[0] for seed in range(6)}
    assert drawn[0] == evaluate("arc_easy", 200, subject, Settings(data, limit=2))[0].model_copy(
        update={"task": "arc_easy_2"})
    assert len({score.items for score in drawn.values()}) > 1 and {score.n for score in drawn.values()} == {2}
    assert evaluate("arc_easy", None, subject, Settings(data))[0].n == 4


def test_what_a_folder_lacks_is_named(folders, data, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out.json"), "--data", str(data), "--device", "cpu"]
    with pytest.raises(SystemExit):
        main([str(folders["clm"]), "--tasks", "sciq", *out])
    error = capsys.readouterr().err
    assert f"error: sciq needs allenai/sciq, got {data} with ai2_arc, hails/mmlu_no_train, trivia_qa; leave" in error
    with pytest.raises(SystemExit):
        main([str(folders["clm"]), "--tasks", "humaneval", *out])
    assert "humaneval runs code that the model writes; set HF_ALLOW_CODE_EVAL=1" in capsys.readouterr().err
    empty = tmp_path / "data"
    datasets.Dataset.from_dict({"question": []}).save_to_disk(str(empty / "ai2_arc/ARC-Easy/validation"))
    with pytest.raises(ValueError, match="must hold at least one item, got none"):
        evaluate("arc_easy", None, read_subject(str(folders["clm"])), Settings(empty))
    datasets.Dataset.from_dict({"question": ["a"], "answer": ["b"]}).save_to_disk(str(empty / "gsm8k/main/test"))
    with pytest.raises(ValueError, match="the split train of openai/gsm8k, for the 5 shots, got test"):
        evaluate("gsm8k", None, read_subject(str(folders["clm"])), Settings(empty))


def test_a_suite_leaves_out_what_the_folder_lacks(folders, data, tmp_path, capsys, monkeypatch):
    main_out = tmp_path / "out.json"
    kept = ("arc_easy", "piqa", "triviaqa")
    monkeypatch.setitem(suites.SUITES, "generative", [task for task in generative.TASKS if task.name in kept])
    with pytest.raises(SystemExit) as ended:
        main([str(folders["clm"]), "--suite", "generative", "--data", str(data), "--limit", "2",
              "--out", str(main_out)])
    assert ended.value.code == 0
    said = capsys.readouterr()
    assert "piqa left out: piqa needs baber/piqa" in said.err and "finished: 2 tasks" in said.out
    assert set(json.loads(main_out.read_text())["tasks"]) == {"arc_easy", "triviaqa"}


@pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is not there; `make eval-data` makes it")
def test_the_real_sets_of_the_folder(folders):
    subject, settings = read_subject(str(folders["clm"])), Settings(REAL, limit=2)
    ran = {}
    for name in generative.HARNESS:
        if name != "mmlu" and not generative.missing(name, settings):
            ran[name] = {score.metric: score.n for score in evaluate(name, None, subject, settings)}
    both = {"acc": 2, "acc_norm": 2}
    assert ran == {"arc_easy": both, "arc_challenge": both, "hellaswag": both, "openbookqa": both, "piqa": both,
                   "sciq": both, "social_iqa": {"acc": 2}, "triviaqa": {"exact_match": 2}, "winogrande": {"acc": 2}}
