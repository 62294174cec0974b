"""The tokenizer: special tokens, templates, fingerprints, and what cannot be used."""

import json

import pytest
from conftest import VOCAB_SIZE, make_documents
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ettin_foundry.data import tokenizer as tokenizers

SPECIALS = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
NAMES = dict(cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", mask_token="[MASK]")


@pytest.fixture(scope="module")
def tok(tokenizer_dir):
    return tokenizers.load(tokenizer_dir)


def word_level(vocabulary, **names):
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def test_trained_vocabulary_has_the_size_asked_and_special_tokens_last(tok):
    assert len(tok) == tokenizers.vocab_size(tok) == VOCAB_SIZE
    assert tok.convert_tokens_to_ids(SPECIALS) == list(range(VOCAB_SIZE - 5, VOCAB_SIZE))
    assert (tok.bos_token, tok.eos_token) == ("[CLS]", "[SEP]")
    ids = tok("ka [MASK].", add_special_tokens=False)["input_ids"]  # the mask takes the space before it
    parts = [tok(part, add_special_tokens=False)["input_ids"] for part in ("ka", ".")]
    assert ids == [*parts[0], tok.mask_token_id, *parts[1]]


def test_encoder_and_decoder_differ_in_template_and_padding_side_only(tok, tmp_path):
    cls, sep = tok.cls_token_id, tok.sep_token_id
    a, b = (tok(text, add_special_tokens=False)["input_ids"] for text in ("kalo", "miter"))
    expected = {"encoder": ([cls, *a, sep], [cls, *a, sep, *b, sep], "right"),
                "decoder": ([cls, *a], [cls, *a, *b], "left")}
    for kind, (single, pair, side) in expected.items():
        made = tokenizers.with_template(tok, kind)
        tokenizers.save(made, tmp_path / kind)
        config = json.loads((tmp_path / kind / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
        for copy in (made, AutoTokenizer.from_pretrained(tmp_path / kind)):
            assert copy("kalo")["input_ids"] == single and copy("kalo", "miter")["input_ids"] == pair
            assert copy.padding_side == side and set(copy("kalo")) == {"input_ids", "attention_mask"}
            assert (copy.bos_token_id, copy.eos_token_id, copy.pad_token_id) == (cls, sep, tok.pad_token_id)


def test_fingerprint_sees_vocabulary_and_normalizer_but_not_template_padding_and_place(tok, tmp_path):
    expected, other = tokenizers.fingerprint(tok), tokenizers.with_template(tok, "decoder")
    other.backend_tokenizer.enable_truncation(4)
    other.backend_tokenizer.enable_padding(length=9000)
    tokenizers.save(other, tmp_path / "elsewhere")
    assert tokenizers.fingerprint(tokenizers.load(tmp_path / "elsewhere")) == {**expected, "name": "elsewhere"}
    tokenizers.check(other, expected)
    retrained = tokenizers.train_bpe(make_documents(60, seed=3), VOCAB_SIZE)
    assert tokenizers.fingerprint(retrained)["vocab_sha256"] != expected["vocab_sha256"]
    path = tmp_path / "elsewhere" / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "normalizer": {"type": "NFKC"}}))
    normalized = tokenizers.load(tmp_path / "elsewhere")
    found = tokenizers.fingerprint(normalized)
    assert found["vocab_sha256"] == expected["vocab_sha256"] and found["probe_sha256"] != expected["probe_sha256"]
    with pytest.raises(ValueError, match="the dataset's, 'tokenizer'.*probe_sha256"):
        tokenizers.check(normalized, expected)


def test_training_on_too_little_text_says_what_is_possible():
    for size, message in (5000, r"at most the \d+ entries .* got 5000"), (100, "261 to 65535 entries, got 100"):
        with pytest.raises(ValueError, match=message):
            tokenizers.train_bpe(["ab ab"], size)


@pytest.mark.parametrize("names, words, message", [
    (dict(cls_token="[CLS]", sep_token="[SEP]"), SPECIALS[:4], "different cls, sep, pad and mask"),
    ({**NAMES, "sep_token": "[CLS]"}, SPECIALS, "different cls, sep, pad and mask"),
    (NAMES, [*SPECIALS, *map(str, range(65_540))], "at most 65535 entries.*65545")], ids=["missing", "shared", "large"])
def test_unusable_tokenizer_is_refused(names, words, message, tmp_path):
    word_level(words, **names).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        tokenizers.load(tmp_path)


FIVE = {**NAMES, "unk_token": "[UNK]", "tokenizer_class": "TokenizersBackend", "backend": "tokenizers"}
LAYOUTS = {  # tokenizer_config.json beside the same tokenizer.json
    "of transformers 4": {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES, "unk_token": "[UNK]"},
    "of transformers 5": FIVE, "5, further tokens": {**FIVE, "extra_special_tokens": ["<a>", "<b>"]},
    "5, named tokens": {**FIVE, "extra_special_tokens": [], "image_token": "<a>"},
    "5, class of a model": {**FIVE, "tokenizer_class": "BertTokenizer", "do_lower_case": True, "strip_accents": None},
    "names no tokens": {"tokenizer_class": "PreTrainedTokenizerFast"}, "names no class": NAMES,
    "tokenizer.json alone": None}


@pytest.mark.parametrize("case", LAYOUTS)
def test_every_layout_of_a_saved_tokenizer_is_read_and_saved_alike(case, tmp_path):
    backend = word_level([*SPECIALS, "a", "b", "<a>", "<b>"]).backend_tokenizer
    backend.add_special_tokens([*SPECIALS, "<a>", "<b>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    if LAYOUTS[case] is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(LAYOUTS[case]))
    for folder in (tmp_path, tmp_path / "again"):
        tok = tokenizers.load(folder)
        assert tokenizers.special_ids(tok) == {"unk": 0, "cls": 1, "sep": 2, "pad": 3, "mask": 4}
        assert (tok.bos_token, tok.eos_token) == ("[CLS]", "[SEP]")
        assert tok("a b", add_special_tokens=False)["input_ids"] == [5, 6] and tokenizers.vocab_size(tok) == 9
        assert {0, 1, 2, 3, 4, 7, 8} == tokenizers.forbidden_ids(tok)
        tokenizers.save(tokenizers.with_template(tok, "encoder"), tmp_path / "again")


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere/nothing must be a folder"):
        tokenizers.load("nowhere/nothing")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        with pytest.raises(ValueError, match="cannot be read"):
            tokenizers.load(tmp_path)
        (tmp_path / name).write_text("{")


def test_ettin_vocabulary_gives_the_published_ids_and_the_fingerprint_on_record(ettin_tokenizer_dir):
    """Every manifest on disk holds these hashes: a change of probe or hash would orphan all datasets."""
    tok = tokenizers.load(ettin_tokenizer_dir)
    sentence = "The capital of France is [MASK]."
    body = [510, 5347, 273, 6181, 310, 50284, 15]  # the data folder's README, from the published tokenizer
    assert tokenizers.with_template(tok, "encoder")(sentence)["input_ids"] == [50281, *body, 50282]
    assert tokenizers.with_template(tok, "decoder")(sentence)["input_ids"] == [50281, *body]
    block = tokenizers.fingerprint(tok)
    assert block["vocab_size"] == 50368
    assert block["special_ids"] == {"unk": 50280, "cls": 50281, "sep": 50282, "pad": 50283, "mask": 50284}
    assert block["vocab_sha256"] == "613fdec67dde2dfc762bc35da5d56c2b79834c15b0d451588a8801e7de3e7262"
    assert block["probe_sha256"] == "70d9455a7f38e0230226d447fa5d95847de18171a927ef6b03d67ec3229e1617"
