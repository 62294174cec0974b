"""Claims of objectives.py, against loops written from the definitions."""

from types import SimpleNamespace

import numpy as np
import pytest
from memory_set import SPECIALS, UNREAL, VOCAB_SIZE

from ettin_foundry.objectives.schedule import MaskRate, ObjectiveSchedule, check_together
from ettin_foundry.objectives.targets import TextVocab, make_inputs, row_generator

CLS, SEP, PAD, MASK = (SPECIALS[name] for name in ("cls", "sep", "pad", "mask"))
T = 256
MASKED = pytest.mark.parametrize("objective", ["mlm", "mntp"])


@pytest.fixture(scope="module")
def vocab():
    entries = {f"token-{number}": number for number in range(VOCAB_SIZE - 1) if number != UNREAL}
    return TextVocab.from_tokenizer(SimpleNamespace(
        cls_token_id=CLS, sep_token_id=SEP, pad_token_id=PAD, mask_token_id=MASK, all_special_ids=[CLS, SEP, PAD, MASK],
        get_vocab=lambda: entries))


def make_row(seed, *, lengths=None, length=T):
    """One row of random pieces and, sometimes, padding."""
    rng = np.random.default_rng(seed)
    if lengths is None:
        lengths, left = [], length
        while left > 3 and (not lengths or rng.random() < 0.8):
            lengths.append(int(rng.integers(1, min(left - 2, 90) + 1)))
            left -= lengths[-1] + 2
    ids, sequence_id, begin = np.full(length, PAD), np.full(length, -1), 0
    for piece, tokens in enumerate(lengths):
        ids[begin:begin + tokens + 2] = [CLS, *rng.integers(0, UNREAL, tokens), SEP]
        sequence_id[begin:begin + tokens + 2] = piece
        begin += tokens + 2
    return ids, sequence_id, rng.random(len(lengths)) < 0.5


def test_text_ids_are_the_real_entries_that_are_no_specials(vocab):
    expected = [number for number in range(VOCAB_SIZE - 1) if number not in (UNREAL, CLS, SEP, PAD, MASK)]
    assert vocab.text.tolist() == expected
    assert [number for number in range(VOCAB_SIZE - 1) if vocab.is_special[number]] == [CLS, SEP, PAD, MASK]


def test_tokenizer_without_mask_token_is_refused():
    tokenizer = SimpleNamespace(name_or_path="some-gpt", cls_token_id=1, sep_token_id=2, pad_token_id=3)
    with pytest.raises(ValueError, match="some-gpt.*mask_token"):
        TextVocab.from_tokenizer(tokenizer)


@pytest.mark.parametrize("seed", range(10))
def test_clm_labels_are_the_next_token_of_the_same_document(seed, vocab):
    ids, sequence_id, ends_document = make_row(seed)
    before = ids.copy()
    input_ids, labels, *_ = make_inputs("clm", ids, sequence_id, ends_document, mask_rate=0, vocab=vocab,
                                    rng=row_generator(0, 0, 0))
    for t in range(T):
        expected = -100
        if t + 1 < T and sequence_id[t] == sequence_id[t + 1] != -1:
            expected = ids[t + 1]
            if ids[t + 1] == SEP and not ends_document[sequence_id[t]]:
                expected = -100  # the document goes on in another chunk: its end is not here
        assert labels[t] == expected
    np.testing.assert_array_equal(input_ids, before)


def test_clm_predicts_the_end_of_finished_documents_only(vocab):
    ids, sequence_id, _ = make_row(0, lengths=[3, 2], length=12)
    for ends, expected in (([True, True], [4, 8]), ([True, False], [4]), ([False, False], [])):
        _, labels, *_ = make_inputs("clm", ids, sequence_id, np.array(ends), mask_rate=0, vocab=vocab,
                                rng=row_generator(0, 0, 0))
        eos = {3: labels[3], 7: labels[7]}
        assert [t + 1 for t, label in eos.items() if label == SEP] == [place for place in expected]


@pytest.mark.parametrize("seed", range(10))
def test_mlm_labels_are_the_tokens_that_were_there(seed, vocab):
    ids, sequence_id, ends_document = make_row(seed)
    before = ids.copy()
    input_ids, labels, *_ = make_inputs("mlm", ids, sequence_id, ends_document, mask_rate=0.3, vocab=vocab,
                                    rng=row_generator(0, 0, seed))
    assert (labels != -100).any()
    for t in range(T):
        assert labels[t] in (-100, before[t])
        if labels[t] == -100:
            assert input_ids[t] == before[t]
    np.testing.assert_array_equal(ids, before)  # the row itself is not changed


@pytest.mark.parametrize("seed", range(10))
def test_mntp_labels_are_those_of_mlm_one_place_earlier(seed, vocab):
    ids, sequence_id, ends_document = make_row(seed)
    inputs, labels = {}, {}
    for objective in ("mlm", "mntp"):
        inputs[objective], labels[objective], *_ = make_inputs(
            objective, ids, sequence_id, ends_document, mask_rate=0.3, vocab=vocab, rng=row_generator(0, 0, seed))
    np.testing.assert_array_equal(inputs["mlm"], inputs["mntp"])
    for t in range(T):
        expected = labels["mlm"][t + 1] if t + 1 < T and sequence_id[t] == sequence_id[t + 1] != -1 else -100
        assert labels["mntp"][t] == expected
    assert (labels["mntp"] != -100).sum() == (labels["mlm"] != -100).sum()


def draws(objective, vocab, rate, rows):
    """Original ids, inputs, chosen positions and maskable positions of many full rows, flattened."""
    columns = []
    for row in range(rows):
        ids, sequence_id, ends = make_row(row, lengths=[T - 2])
        input_ids, labels, *_ = make_inputs(objective, ids, sequence_id, ends, mask_rate=rate, vocab=vocab,
                                        rng=row_generator(7, 0, row))
        chosen = np.roll(labels, 1) != -100 if objective == "mntp" else labels != -100
        columns.append((ids, input_ids, chosen, ~np.isin(ids, [CLS, SEP, PAD, MASK])))
    return (np.concatenate(column) for column in zip(*columns))


def within_five_sigma(count, n, p):
    return abs(count - n * p) <= 5 * np.sqrt(n * p * (1 - p))


@MASKED
@pytest.mark.parametrize("rate", [0.15, 0.3, 1.0])
def test_share_of_chosen_tokens_is_the_rate_and_they_split_80_10_10(objective, rate, vocab):
    ids, input_ids, chosen, maskable = draws(objective, vocab, rate, 400)
    assert not (chosen & ~maskable).any()
    assert within_five_sigma(chosen.sum(), maskable.sum(), rate)
    n = chosen.sum()
    masked, same = chosen & (input_ids == MASK), chosen & (input_ids == ids)
    # a random id is the old one by chance once in a vocabulary
    chance = 0.1 / vocab.text.size
    assert within_five_sigma(masked.sum(), n, 0.8)
    assert within_five_sigma(same.sum(), n, 0.1 + chance)
    assert within_five_sigma((chosen & ~masked & ~same).sum(), n, 0.1 - chance)


@MASKED
def test_random_ids_are_uniform_over_text_ids(objective, vocab):
    ids, input_ids, chosen, _ = draws(objective, vocab, 1.0, 600)
    random = input_ids[chosen & (input_ids != MASK) & (input_ids != ids)]
    assert set(random) == set(vocab.text.tolist())  # neither specials nor ids that are no entry
    # the original ids are below UNREAL, where a random id equal to the original is not seen: compare above it
    counts = np.bincount(random, minlength=VOCAB_SIZE)[UNREAL + 1:VOCAB_SIZE - 5]
    n, p = counts.sum(), 1 / counts.size
    assert (np.abs(counts - n * p) <= 5 * np.sqrt(n * p)).all()


@MASKED
def test_specials_are_never_chosen_even_inside_a_chunk(objective, vocab):
    ids, sequence_id, ends = make_row(3, lengths=[T - 2])
    ids[10:200:5] = MASK
    ids[11:200:5] = SEP
    for row in range(50):
        input_ids, labels, *_ = make_inputs(objective, ids, sequence_id, ends, mask_rate=1.0, vocab=vocab,
                                        rng=row_generator(1, 0, row))
        assert not np.isin(labels, [CLS, SEP, PAD, MASK]).any()
        special = vocab.is_special[ids]
        np.testing.assert_array_equal(input_ids[special], ids[special])


@MASKED
def test_a_row_with_a_text_token_has_a_target_spread_evenly(objective, vocab):
    ids, sequence_id, ends = make_row(4, lengths=[5, 1], length=16)
    shift = 1 if objective == "mntp" else 0
    chosen = []
    for row in range(1200):
        _, labels, *_ = make_inputs(objective, ids, sequence_id, ends, mask_rate=1e-9, vocab=vocab,
                                rng=row_generator(1, 0, row))
        [target] = np.flatnonzero(labels != -100)
        chosen.append(target + shift)
    counts = np.bincount(chosen, minlength=16)
    assert np.flatnonzero(counts).tolist() == [1, 2, 3, 4, 5, 8]
    assert all(within_five_sigma(count, 1200, 1 / 6) for count in counts[counts > 0])


@pytest.mark.parametrize(("objective", "rate"), [("mlm", 0.3), ("mntp", 0.3), ("clm", 0)])
def test_a_row_without_text_has_no_target_and_no_error(objective, rate, vocab):
    empty = np.full(16, PAD), np.full(16, -1), np.zeros(0, bool)
    input_ids, labels, *_ = make_inputs(objective, *empty, mask_rate=rate, vocab=vocab, rng=row_generator(0, 0, 0))
    assert (labels == -100).all() and (input_ids == PAD).all()


@MASKED
def test_masks_follow_from_seed_epoch_and_row_alone(objective, vocab):
    row = make_row(5)

    def masks(*key):
        return np.stack(make_inputs(objective, *row, mask_rate=0.3, vocab=vocab, rng=row_generator(*key))[:2])

    np.random.seed(1)
    state = np.random.get_state()[1].copy()
    first = masks(21, 3, 1000)
    np.testing.assert_array_equal(first, masks(21, 3, 1000))
    for other in ((22, 3, 1000), (21, 4, 1000), (21, 3, 1001), (3, 21, 1000)):
        assert (first != masks(*other)).any()
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # the global generator was not touched


@pytest.mark.parametrize(("objective", "rate", "message"), [
    ("clm", 0.3, "mask_rate: 0.3 given with objective: clm"), ("mlm", 0, "mask_rate: 0.0 given with objective: mlm"),
    ("mdlm", 0.3, "mask_rate: 0.3 given with objective: mdlm"),
    ("mntp", 1.5, "mask_rate: 1.5 given; a share.*up to 1"), ("mlm", -0.1, "mask_rate: -0.1"),
    ("mlm", float("nan"), "mask_rate: nan"), ("mlm", "0.3", "mask_rate: '0.3' given; a share"),
    ("rtd", 0.3, "objective: 'rtd' given; it must be one of mlm, clm, mntp")])
def test_unfitting_objective_and_mask_rate_are_refused(objective, rate, message):
    with pytest.raises(ValueError, match=message):
        check_together(ObjectiveSchedule.parse(objective), MaskRate.parse(rate))
