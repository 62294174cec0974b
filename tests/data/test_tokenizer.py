"""The tokenizer: special tokens, templates, fingerprints, and text that must stay text."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import VOCAB_SIZE, make_documents
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ettin_foundry.data import tokenizer as tokenizers

SPECIALS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]


@pytest.fixture(scope="module")
def tok(tokenizer_dir: Path) -> PreTrainedTokenizerFast:
    return tokenizers.load(tokenizer_dir)


def word_level(vocabulary: list[str], **names: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose ordinary vocabulary holds every word given, special or not."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def test_trained_vocabulary_has_the_size_asked_and_special_tokens_last(tok: PreTrainedTokenizerFast) -> None:
    assert len(tok) == tokenizers.vocab_size(tok) == VOCAB_SIZE
    assert tok.convert_tokens_to_ids(SPECIALS) == list(range(VOCAB_SIZE - 5, VOCAB_SIZE))
    assert (tok.bos_token, tok.eos_token) == ("[CLS]", "[SEP]")


def test_mask_takes_the_space_before_it(tok: PreTrainedTokenizerFast) -> None:
    ids = tok("ka [MASK].", add_special_tokens=False)["input_ids"]
    assert ids == [*tok("ka", add_special_tokens=False)["input_ids"], tok.mask_token_id,
                   *tok(".", add_special_tokens=False)["input_ids"]]


def test_training_twice_gives_the_same_tokenizer() -> None:
    first, second = (tokenizers.train_bpe(make_documents(40), 300).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_text_comes_back_after_encoding(tok: PreTrainedTokenizerFast) -> None:
    texts = [*make_documents(50, seed=7), "  tabs\t\tand \r\n lines  ", "\U0001f468\u200d\U0001f469", "def f():\n pass"]
    for text, ids in zip(texts, tokenizers.encode_batch(tok, texts)):
        assert ids.dtype == np.uint16
        assert tok.decode(ids.tolist(), clean_up_tokenization_spaces=False) == unicodedata.normalize("NFC", text)


def test_plain_encoding_equals_transformers_without_special_tokens(tok: PreTrainedTokenizerFast) -> None:
    texts = make_documents(50, seed=8)
    expected = [tok(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert [ids.tolist() for ids in tokenizers.encode_batch(tok, texts)] == expected


def test_literal_special_tokens_stay_ordinary_text(tok: PreTrainedTokenizerFast) -> None:
    text = "a [MASK] b[CLS][SEP] [PAD]\n[UNK]"
    assert tok.mask_token_id in tok(text)["input_ids"]  # what a plain call makes of it
    ids = tokenizers.encode_batch(tok, [text])[0]
    assert not set(ids.tolist()) & set(tok.all_special_ids)
    assert tok.decode(ids.tolist(), clean_up_tokenization_spaces=False) == text


def test_encoding_leaves_the_tokenizer_itself_as_it_was(tok: PreTrainedTokenizerFast) -> None:
    before = tok.backend_tokenizer.to_str()
    tokenizers.encode_batch(tok, ["[MASK]"])
    assert tok.backend_tokenizer.to_str() == before and tok("[MASK]")["input_ids"][1] == tok.mask_token_id


def test_tokenizer_that_makes_special_tokens_of_text_is_refused() -> None:
    names = dict(unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", mask_token="[MASK]")
    encoder = tokenizers.PlainEncoder(word_level([*SPECIALS, "a", "b"], **names))
    assert encoder(["a b"])[0].tolist() == [5, 6]
    with pytest.raises(ValueError, match=r"special token 4 \('\[MASK\]'\).*special=True"):
        encoder(["a b", "a [MASK] b"])


@pytest.mark.parametrize("reload", [False, True], ids=["copy", "saved-and-loaded"])
def test_encoder_and_decoder_differ_in_template_and_padding_side_only(tok: PreTrainedTokenizerFast, tmp_path: Path,
                                                                      reload: bool) -> None:
    cls, sep = tok.cls_token_id, tok.sep_token_id
    a, b = (tok(text, add_special_tokens=False)["input_ids"] for text in ("kalo", "miter"))
    expected = {"encoder": ([cls, *a, sep], [cls, *a, sep, *b, sep], "right"),
                "decoder": ([cls, *a], [cls, *a, *b], "left")}
    for kind, (single, pair, side) in expected.items():
        copy = tokenizers.with_template(tok, kind)
        if reload:
            tokenizers.save(copy, tmp_path / kind)
            assert json.loads((tmp_path / kind / "tokenizer_config.json").read_text())["tokenizer_class"] == \
                "PreTrainedTokenizerFast"
            copy = AutoTokenizer.from_pretrained(tmp_path / kind)
        assert copy("kalo")["input_ids"] == single and copy("kalo", "miter")["input_ids"] == pair
        assert copy.padding_side == side and set(copy("kalo")) == {"input_ids", "attention_mask"}
        assert (copy.bos_token_id, copy.eos_token_id, copy.pad_token_id) == (cls, sep, tok.pad_token_id)
    with pytest.raises(ValueError, match="'encoder' or 'decoder'"):
        tokenizers.with_template(tok, "mlm")


def test_fingerprint_ignores_template_padding_and_place(tok: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    expected = tokenizers.fingerprint(tok)
    other = tokenizers.with_template(tok, "decoder")
    other.backend_tokenizer.enable_truncation(4)
    other.backend_tokenizer.enable_padding(length=9000)
    tokenizers.save(other, tmp_path / "elsewhere")
    found = tokenizers.fingerprint(tokenizers.load(tmp_path / "elsewhere"))
    assert {**found, "name": ""} == {**expected, "name": ""}
    assert found["name"] == "elsewhere"  # and not its path
    tokenizers.check(other, expected)


def test_fingerprint_sees_vocabulary_and_normalizer(tok: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    expected = tokenizers.fingerprint(tok)
    retrained = tokenizers.train_bpe(make_documents(60, seed=3), VOCAB_SIZE)
    assert tokenizers.fingerprint(retrained)["vocab_sha256"] != expected["vocab_sha256"]
    tok.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, "normalizer": {"type": "NFKC"}}))
    normalized = tokenizers.fingerprint(tokenizers.load(tmp_path))
    assert normalized["vocab_sha256"] == expected["vocab_sha256"]
    assert normalized["probe_sha256"] != expected["probe_sha256"]


def test_check_names_both_tokenizers(tok: PreTrainedTokenizerFast) -> None:
    block = {**tokenizers.fingerprint(tok), "name": "the-other", "vocab_size": 99}
    with pytest.raises(ValueError, match=r"tokenizer tokenizer: its vocab_size is 512, .*'the-other', .* is 99"):
        tokenizers.check(tok, block)


def test_training_on_too_little_text_says_what_is_possible() -> None:
    with pytest.raises(ValueError, match=r"5000 given; the corpus gives only \d+ entries\. Ask for at most"):
        tokenizers.train_bpe(["ab ab"], 5000)
    with pytest.raises(ValueError, match="261 .* to 65535"):
        tokenizers.train_bpe(["ab ab"], 100)


@pytest.mark.parametrize("names,words,message", [
    (dict(cls_token="[CLS]", sep_token="[SEP]"), [], r"no pad_token, mask_token; .*--train-tokenizer"),
    (dict(cls_token="[CLS]", sep_token="[CLS]", pad_token="[PAD]", mask_token="[MASK]"), [], "share ids"),
    (dict(cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", mask_token="[MASK]"),
     [f"w{i}" for i in range(65_540)], r"65545 entries; at most 65535"),
], ids=["missing", "shared", "too-large"])
def test_unusable_tokenizer_is_refused(names: dict[str, str], words: list[str], message: str, tmp_path: Path) -> None:
    word_level([*SPECIALS, *words], **names).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        tokenizers.load(tmp_path)


def test_tokenizer_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere/nothing: neither a folder nor"):
        tokenizers.load("nowhere/nothing")
    with pytest.raises(ValueError, match="no tokenizer.json"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        tokenizers.load(tmp_path)


def test_bos_and_eos_follow_cls_and_sep_where_a_tokenizer_names_none(tmp_path: Path) -> None:
    names = dict(cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", mask_token="[MASK]")
    word_level(SPECIALS, **names).save_pretrained(tmp_path)
    tok = tokenizers.load(tmp_path)
    assert (tok.bos_token, tok.eos_token) == ("[CLS]", "[SEP]")


def test_ettin_vocabulary_gives_the_published_ids(ettin_tokenizer_dir: Path) -> None:
    tok = tokenizers.load(ettin_tokenizer_dir)
    sentence = "The capital of France is [MASK]."
    body = [510, 5347, 273, 6181, 310, 50284, 15]  # the data folder's README, from the published tokenizer
    assert tokenizers.with_template(tok, "encoder")(sentence)["input_ids"] == [50281, *body, 50282]
    assert tokenizers.with_template(tok, "decoder")(sentence)["input_ids"] == [50281, *body]
    assert tokenizers.vocab_size(tok) == 50368
    ids = tokenizers.encode_batch(tok, [sentence + "<|endoftext|>"])[0].tolist()
    assert max(ids) < 50280 and 50279 not in ids and tok.decode(ids) == sentence + "<|endoftext|>"


def test_ettin_fingerprint_is_the_one_on_record(ettin_tokenizer_dir: Path) -> None:
    """Every manifest on disk holds these: a change of probe or hash would orphan all data sets."""
    block = tokenizers.fingerprint(tokenizers.load(ettin_tokenizer_dir))
    assert block["special_ids"] == {"unk": 50280, "cls": 50281, "sep": 50282, "pad": 50283, "mask": 50284}
    assert block["vocab_sha256"] == "613fdec67dde2dfc762bc35da5d56c2b79834c15b0d451588a8801e7de3e7262"
    assert block["probe_sha256"] == "70d9455a7f38e0230226d447fa5d95847de18171a927ef6b03d67ec3229e1617"
