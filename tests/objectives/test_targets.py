"""Labels and masks against loops written from their definitions; those of clm: tests/data/test_loader.py."""

from types import SimpleNamespace

import numpy as np
import pytest

from ettin_foundry.objectives.targets import TextVocab, draw_objective, make_inputs, row_generator

VOCAB_SIZE, UNREAL = 200, 150  # UNREAL: an id below the vocabulary's end that is no entry
CLS, SEP, PAD, MASK = 190, 191, 192, 193
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
    with pytest.raises(ValueError, match="some-gpt.*mask_token"):
        TextVocab.from_tokenizer(SimpleNamespace(name_or_path="some-gpt", cls_token_id=1, sep_token_id=2))


@pytest.mark.parametrize("seed", range(5))
def test_masked_labels_are_the_tokens_that_were_there_and_those_of_mntp_one_place_earlier(seed, vocab):
    (before, sequence_id, _), row = make_row(seed), make_row(seed)
    mlm, mntp, mixed = (make_inputs(name, *row, mask_rate=0.3, vocab=vocab, rng=row_generator(0, 0, seed), mixed=both)
                        for name, both in (("mlm", False), ("mntp", False), ("mlm", True)))
    np.testing.assert_array_equal(row[0], before)  # the row itself is not changed
    np.testing.assert_array_equal(mlm.input_ids, mntp.input_ids)
    for t in range(T):
        assert mlm.labels[t] in (-100, before[t])
        if mlm.labels[t] == -100:
            assert mlm.input_ids[t] == before[t]
        later = mlm.labels[t + 1] if t + 1 < T and sequence_id[t] == sequence_id[t + 1] != -1 else -100
        assert mntp.labels[t] == later
    targets = (mlm.labels != -100).sum()
    assert targets == (mntp.labels != -100).sum() > 0
    assert (mlm.weight, mlm.loss_tokens) == (1.0, targets)
    np.testing.assert_array_equal(mlm.labels, mixed.labels)
    assert (mixed.weight, mixed.loss_tokens) == (1 / 0.3, sum(t not in (CLS, SEP, PAD, MASK) for t in before))


def within_five_sigma(count, n, p):
    return abs(count - n * p) <= 5 * np.sqrt(n * p * (1 - p))


@MASKED
@pytest.mark.parametrize("rate", [0.15, 1.0])
def test_chosen_tokens_are_the_rate_and_split_80_10_10_with_uniform_random_ids(objective, rate, vocab):
    columns = []
    for row in range(600):
        ids, sequence_id, ends = make_row(row, lengths=[T - 2])
        ids[10:20:5], ids[11:20:5] = MASK, SEP  # specials inside a chunk are never chosen
        inputs = make_inputs(objective, ids, sequence_id, ends, mask_rate=rate, vocab=vocab,
                             rng=row_generator(7, 0, row))
        chosen = np.roll(inputs.labels, 1) != -100 if objective == "mntp" else inputs.labels != -100
        columns.append((ids, inputs.input_ids, chosen, ~np.isin(ids, [CLS, SEP, PAD, MASK])))
    ids, input_ids, chosen, maskable = (np.concatenate(column) for column in zip(*columns))
    assert not (chosen & ~maskable).any() and within_five_sigma(chosen.sum(), maskable.sum(), rate)
    n, masked, same = chosen.sum(), chosen & (input_ids == MASK), chosen & (input_ids == ids)
    chance = 0.1 / vocab.text.size  # a random id is the old one by chance once in a vocabulary
    assert within_five_sigma(masked.sum(), n, 0.8) and within_five_sigma(same.sum(), n, 0.1 + chance)
    random = input_ids[chosen & ~masked & ~same]
    assert within_five_sigma(random.size, n, 0.1 - chance)
    assert set(random) == set(vocab.text.tolist())  # neither specials nor ids that are no entry
    # the original ids are below UNREAL, where a random id equal to the original is not seen: compare above it
    counts = np.bincount(random, minlength=VOCAB_SIZE)[UNREAL + 1:CLS]
    assert (np.abs(counts - counts.mean()) <= 5 * np.sqrt(counts.mean())).all()


@MASKED
def test_a_row_with_a_text_token_has_a_target_spread_evenly(objective, vocab):
    row, chosen = make_row(4, lengths=[5, 1], length=16), []
    for number in range(1200):
        inputs = make_inputs(objective, *row, mask_rate=1e-9, vocab=vocab, rng=row_generator(1, 0, number))
        [target] = np.flatnonzero(inputs.labels != -100)
        chosen.append(target + (objective == "mntp"))
    counts = np.bincount(chosen, minlength=16)
    assert np.flatnonzero(counts).tolist() == [1, 2, 3, 4, 5, 8]
    assert all(within_five_sigma(count, 1200, 1 / 6) for count in counts[counts > 0])


@MASKED
def test_masks_follow_from_seed_epoch_and_row_alone(objective, vocab):
    row = make_row(5)

    def masks(*key):
        return np.stack(make_inputs(objective, *row, mask_rate=0.3, vocab=vocab, rng=row_generator(*key))[:2])

    first = masks(21, 3, 1000)
    np.testing.assert_array_equal(first, masks(21, 3, 1000))
    assert all((first != masks(*other)).any() for other in ((22, 3, 1000), (21, 4, 1000), (21, 3, 1001), (3, 21, 1000)))


def test_rows_of_a_mixture_are_drawn_with_their_shares():
    shares = {"mntp": 0.75, "clm": 0.25}
    first, second = ([draw_objective(shares, 3, epoch, row) for row in range(4000)] for epoch in (0, 1))
    assert within_five_sigma(first.count("clm"), 4000, 0.25) and set(first) == set(shares)
    of_masks = ["mntp" if row_generator(3, 0, row).random() < 0.75 else "clm" for row in range(4000)]  # another stream
    assert first not in (second, of_masks) and first[:9] == [draw_objective(shares, 3, 0, row) for row in range(9)]
