"""The vocabulary of text. Inputs and labels against a loop over tokens: benchmarks/fuzz, `objectives`."""

from types import SimpleNamespace

import pytest

from ettin_foundry.objectives.targets import TextVocab

VOCAB_SIZE, UNREAL = 200, 150  # UNREAL: an id below the vocabulary's end that is no entry
CLS, SEP, PAD, MASK = 190, 191, 192, 193


@pytest.fixture(scope="module")
def vocab():
    entries = {f"token-{number}": number for number in range(VOCAB_SIZE - 1) if number != UNREAL}
    return TextVocab.from_tokenizer(SimpleNamespace(
        cls_token_id=CLS, sep_token_id=SEP, pad_token_id=PAD, mask_token_id=MASK, all_special_ids=[CLS, SEP, PAD, MASK],
        get_vocab=lambda: entries))


def test_text_ids_are_the_real_entries_that_are_no_specials(vocab):
    expected = [number for number in range(VOCAB_SIZE - 1) if number not in (UNREAL, CLS, SEP, PAD, MASK)]
    assert vocab.text.tolist() == expected
    assert [number for number in range(VOCAB_SIZE - 1) if vocab.is_special[number]] == [CLS, SEP, PAD, MASK]
    with pytest.raises(ValueError, match="some-gpt.*mask_token"):
        TextVocab.from_tokenizer(SimpleNamespace(name_or_path="some-gpt", cls_token_id=1, sep_token_id=2))
