"""Rows, pooling and heads of fine-tuning, against transformers and sentence-transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ettin_eval.finetune import Classifier, Recipe, embed, fit, padded, pooled, predict, token_rows, trunk_of
from ettin_eval.subject import read_subject
from ettin_eval.tasks import Settings
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoModel

TEXTS = ["The capital of France is Paris.", "A tree.", "def add(a, b):\n    return a + b"]


@pytest.mark.parametrize("name", ["mlm", "clm"])
def test_a_text_is_written_as_its_tokenizer_writes_it(folders: dict[str, Path], name: str) -> None:
    subject = read_subject(str(folders[name]))
    assert token_rows(subject, [(text,) for text in TEXTS]) == subject.tokenizer(TEXTS).input_ids


def test_a_pair_has_a_separator_in_both_kinds(folders: dict[str, Path]) -> None:
    pair = ("A tree.", "Paris is.")
    for name, end in (("mlm", " [SEP]"), ("clm", "")):
        subject = read_subject(str(folders[name]))
        words = subject.tokenizer.convert_tokens_to_string(
            subject.tokenizer.convert_ids_to_tokens(token_rows(subject, [pair])[0]))
        assert words.replace(" ", "") == f"[CLS]A tree.[SEP]Paris is.{end}".replace(" ", "")


@pytest.mark.parametrize("lengths", [(40, 3), (3, 40), (40, 40)])
def test_the_longer_text_of_a_pair_is_cut(folders: dict[str, Path], lengths: tuple[int, int]) -> None:
    subject = read_subject(str(folders["mlm"]))
    row = token_rows(subject, [("q" * lengths[0], "z" * lengths[1])], max_length=23)[0]   # one token a letter
    q, z = (row.count(subject.tokenizer(letter, add_special_tokens=False).input_ids[0]) for letter in "qz")
    assert len(row) == 23 and (q, z) == {(40, 3): (17, 3), (3, 40): (3, 17), (40, 40): (10, 10)}[lengths]


@pytest.mark.parametrize("mode", ["mean", "lasttoken"])
def test_pooling_is_that_of_sentence_transformers(mode: str) -> None:
    torch.manual_seed(0)
    states, mask = torch.randn(3, 7, 8), torch.tensor([[1] * 7, [1] * 3 + [0] * 4, [1] + [0] * 6])
    theirs = Pooling(8, mode)({"token_embeddings": states, "attention_mask": mask})["sentence_embedding"]  # type: ignore[arg-type]
    torch.testing.assert_close(pooled(states, mask, mode), theirs)


@pytest.mark.parametrize("name", ["mlm", "clm"])
def test_a_batch_embeds_as_each_text_alone(folders: dict[str, Path], name: str) -> None:
    subject = read_subject(str(folders[name]))
    model = AutoModel.from_pretrained(folders[name]).eval()
    with torch.no_grad():
        alone = [model(**subject.tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in TEXTS]
    rows = token_rows(subject, [(text,) for text in TEXTS])
    for pooling, expected in (("mean", [each.mean(0) for each in alone]), ("lasttoken", [each[-1] for each in alone])):
        for batch_tokens in (40, 1000):
            got = embed(subject, Settings(batch_tokens=batch_tokens), rows, pooling)
            # sums of fp32 in another order, over states of about 1
            np.testing.assert_allclose(got, torch.stack(expected).numpy(), atol=2e-5)


@pytest.mark.parametrize("name", ["mlm", "clm"])
def test_fine_tuning_learns_and_repeats(folders: dict[str, Path], name: str) -> None:
    subject = read_subject(str(folders[name]))
    rows = token_rows(subject, [(f"{'good' if each % 2 else 'bad'} number {each}",) for each in range(40)])
    labels = [each % 2 for each in range(40)]
    runs = [predict(fit(subject, Settings(), rows, labels, 2, Recipe(3e-3, 3e-4, 8)), rows, 512) for _ in range(2)]
    assert (runs[0].argmax(1) == labels).all() and np.array_equal(runs[0], runs[1])


def test_both_kinds_begin_from_heads_of_one_shape_that_no_checkpoint_gives(folders: dict[str, Path]) -> None:
    shapes = []
    for name in ("mlm", "clm"):
        subject = read_subject(str(folders[name]))
        model = Classifier(trunk_of(subject, "cpu"), subject.pooling, 3)
        shapes.append([(key, value.shape) for key, value in model.named_parameters() if not key.startswith("trunk.")])
        saved = subject.model().state_dict()
        dense = saved["head.dense.weight" if name == "mlm" else "lm_head.dense.weight"]
        assert not torch.equal(model.head[0].weight, dense)  # type: ignore[arg-type]
        batch = padded(token_rows(subject, [("A tree.",)]))
        assert model(**batch)["logits"].shape == (1, 3)
    assert shapes[0] == shapes[1]
