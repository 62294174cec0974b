"""Claims of ngrams.py and decontamination.py, against sets of 13-tuples of words found by a regular expression."""

from __future__ import annotations

import itertools
import json
import logging
import os
import pickle
import random
import re
import subprocess
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from ettin_foundry.corpus.decontamination import Hit, NgramIndex, index_sources
from ettin_foundry.corpus.ngrams import _BLOCK, blocks_of_texts, hash_ngrams

ODD_CHARACTERS = ("abcXYZ019   \n\t.,_-'\x00\x1f\x7f\u00a0\u00b2\u00e9\u00c9\u00df\u0130\u03a3\u03c3\u03c2\u2019\u2028\u212a"
                  "\u4f60\u597d\u0301\u0915\u093f\u01c5\u1e9e\ufb01\ufffd\U0001f600\U0001d400\U00010400\U0010ffff\ud800\udfff")
"""Separators, combining marks, characters whose lower case is longer, shorter, ASCII or depends on what follows, halves
of surrogate pairs."""


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def ngrams_of(text: str) -> list[tuple[str, ...]]:
    words = words_of(text)
    return [tuple(words[i:i + 13]) for i in range(len(words) - 12)]


def expected_hits(evaluations: Sequence[tuple[str, str]], texts: Sequence[str]) -> list[list[Hit]]:
    owners: dict[tuple[str, ...], str] = {}
    for name, text in evaluations:
        for ngram in ngrams_of(text):
            owners.setdefault(ngram, name)
    found = []
    for text in texts:
        hits: dict[str, Hit] = {}
        for ngram in ngrams_of(text):
            if ngram in owners:
                hit = hits.get(owners[ngram]) or Hit(owners[ngram], " ".join(ngram), 0)
                hits[hit.evaluation] = hit._replace(count=hit.count + 1)
        found.append(list(hits.values()))
    return found


def random_case(rng: random.Random, characters: str, longest: int) -> tuple[list[tuple[str, str]], list[str]]:
    """Evaluation texts and documents, one of which has a piece of a document, in other letters and spaces."""
    def text() -> str:
        return "".join(rng.choice(characters) for _ in range(rng.randint(0, longest)))

    texts = [text() for _ in range(rng.randint(1, 6))]
    evaluations = [(f"set/{number}", text()) for number in range(3)]
    copied = rng.choice(texts)
    part = copied[rng.randrange(len(copied) // 2 + 1):]
    evaluations[1] = ("set/1", evaluations[1][1] + " " + rng.choice([part, part.swapcase(), part.replace(" ", "--")]))
    return evaluations, texts


@pytest.mark.parametrize("characters", [ODD_CHARACTERS, "ab  ", "\u0430\u0411\u0432 \u2014", "aB\u03a3\u03c3. "],
                         ids=["odd", "two letters", "Cyrillic", "sigmas"])
def test_hits_are_those_of_sets_of_13_tuples_on_random_unicode(characters: str) -> None:
    rng = random.Random(20251)
    num_hits = 0
    for _ in range(100):
        evaluations, texts = random_case(rng, characters, 200)
        expected = expected_hits(evaluations, texts)
        if not any(ngrams_of(text) for _, text in evaluations):
            with pytest.raises(ValueError, match="3 evaluation texts given, none of 13 words"):
                NgramIndex.build(evaluations)
            continue
        index = NgramIndex.build(evaluations)
        assert index.num_ngrams == len({ngram for _, text in evaluations for ngram in ngrams_of(text)})
        assert index.hits_of_batch(texts) == expected
        assert [index.hits(text) for text in texts] == expected
        assert [index.hits_of_pieces([text[:7], text[7:7], text[7:]]) for text in texts] == expected
        num_hits += sum(map(len, expected))
    assert num_hits > 30  # the comparison is not of nothing with nothing


def test_words_are_those_of_the_regular_expression_for_every_character_of_unicode() -> None:
    characters = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) != "Cn"]
    for step in range(0, len(characters), 20_000):
        some = characters[step:step + 20_000]
        text = " ".join(f"{character}x{character}{character}y" for character in some)
        for sample in (text, "\u00c9 " + text):  # with and without a capital letter beyond ASCII
            (block,) = blocks_of_texts([(0, sample)])
            assert block.words(0, 1 << 20) == words_of(sample)


def test_hits_of_a_document_longer_than_a_block_are_those_of_the_whole_however_it_is_cut() -> None:
    rng = random.Random(3)
    vocabulary = ["".join(rng.choice("abcdefgh\u00e9\u03a3") for _ in range(rng.randint(1, 12))) for _ in range(50)]
    text = " ".join(rng.choice(vocabulary) for _ in range(3 * _BLOCK // 6)).title()
    assert len(text) > 2 * _BLOCK
    ngrams = ngrams_of(text)
    chosen = [0, len(ngrams) - 1, *rng.sample(range(len(ngrams)), 300)]
    blocks = [i for i in range(len(ngrams)) if i % 1000 < 40]  # and some stretches, so that cuts fall into them
    evaluations = [(f"e{i}", " ".join(ngrams[i])) for i in [*chosen, *blocks]]
    expected = expected_hits(evaluations, [text])[0]
    assert len(expected) > 1000
    index = NgramIndex.build(evaluations)
    assert index.hits(text) == expected
    for size in (1000, _BLOCK - 1, _BLOCK, 2 * _BLOCK):
        assert index.hits_of_pieces(text[i:i + size] for i in range(0, len(text), size)) == expected


def test_an_ngram_over_any_cut_between_blocks_is_found() -> None:
    words = [f"w{i}" for i in range(26)]
    index = NgramIndex.build([("e", " ".join(words[:13]))])
    for shift in range(-60, 60, 3):
        filler = ("x" * 7 + " ") * ((_BLOCK + shift) // 8) + "y" * (shift % 8)
        assert index.hits_of_pieces([filler, " ", ". ".join(words)]) == [Hit("e", " ".join(words[:13]), 1)]


@pytest.mark.parametrize("shift", range(6))
def test_text_without_spaces_is_cut_between_its_words_only(shift: int) -> None:
    text = "x" * shift + "".join(f",w{i:06d}" for i in range(_BLOCK // 8 + 100))
    evaluations = [("e", text[_BLOCK - 300:_BLOCK + 300])]
    expected = expected_hits(evaluations, [text])[0]
    assert expected[0].count > 50 and NgramIndex.build(evaluations).hits(text) == expected


def test_memory_does_not_grow_with_a_document() -> None:
    program = """if True:
        from pathlib import Path
        from ettin_foundry.corpus.decontamination import NgramIndex
        def peak():  # of this process alone; getrusage tells the peak of the one that started it, too
            (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
            return int(line.split()[1]) // 1024
        index = NgramIndex.build([("e", " ".join(f"w{i}" for i in range(13)))])
        pieces = {"words": "some words, \u2014 and more. " * 2000, "one word": "a" * 60_000, "no word": "-" * 60_000}
        for piece in pieces.values():
            index.hits_of_pieces([piece] * 70)  # more than 12 blocks: of so many, the last words are held
        begin = peak()
        for name, piece in pieces.items():
            index.hits_of_pieces(piece for _ in range(160))
            print(name, peak() - begin)
    """
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    for line in found.stdout.splitlines():
        assert int(line.split()[-1]) < 5, found.stdout  # MiB, of 9 MB of text; what there is, is the allocator's


def test_a_window_over_two_documents_is_no_ngram_of_either() -> None:
    words = "one two three four five six seven eight nine ten eleven twelve thirteen".split()
    whole = " ".join(words)
    index = NgramIndex.build([("e", whole)])
    for cut in range(1, 13):
        parts = [" ".join(words[:cut]), " ".join(words[cut:])]
        assert index.hits_of_batch(parts) == [[], []]
        assert index.hits_of_batch([*parts, whole, *parts]) == [[], [], [Hit("e", whole, 1)], [], []]
    with pytest.raises(ValueError, match="none of 13 words"):
        NgramIndex.build([("a", " ".join(words[:6])), ("b", " ".join(words[6:]))])


def test_thirteen_words_may_be_thirteen_characters() -> None:
    text = "\u0130" * 13  # each becomes i and a combining dot, which is no letter
    assert ngrams_of(text) == [("i",) * 13]
    assert NgramIndex.build([("e", text)]).hits_of_batch(["i " * 13, text]) == [[Hit("e", "i " * 12 + "i", 1)]] * 2


@pytest.mark.parametrize("kind", ["counter", "letters", "pairs", "long", "swaps"])
def test_hashes_of_alike_ngrams_collide_no_more_than_random_numbers(kind: str) -> None:
    rng = random.Random(1)
    number = 20_000 if kind == "long" else 80_000
    ngrams = {
        "counter": lambda i: ["the"] * (i % 13) + [str(i)] + ["the"] * (12 - i % 13),
        "letters": lambda i: [rng.choice("ab0") for _ in range(13)],
        "pairs": lambda i: [f"w{rng.randrange(50_000)}" if j in (3, 9) else "x" for j in range(13)],
        "long": lambda i: ["internationalization" * 3 + f"{i:06d}" + "x" * (i % 9)] * 13,
        "swaps": lambda i: rng.sample("zero one two three four five six seven eight nine ten eleven 12".split(), 13)}[kind]
    distinct = {" ".join(ngrams(i)) for i in range(number)}
    texts = enumerate_lines(sorted(distinct))
    hashes = np.concatenate([hash_ngrams(block.hashes)[::13] for block in blocks_of_texts(texts)])
    assert len(np.unique(hashes)) == len(hashes) == len(distinct)
    expected = len(hashes)**2 / 2**33
    for shift in (0, 16, 32):  # any 32 of the 64 bits
        collisions = len(hashes) - len(np.unique(hashes >> np.uint64(shift) & np.uint64(0xFFFFFFFF)))
        assert collisions < expected + 6 * expected**0.5 + 3  # Poisson: 6 standard deviations, and 3 for the small ones


def enumerate_lines(lines: Sequence[str]) -> list[tuple[int, str]]:
    """Lines of 13 words as texts of whole lines, so that every 13th n-gram is a line."""
    return [(0, "\n".join(lines[i:i + 200])) for i in range(0, len(lines), 200)]


def test_words_that_differ_only_in_one_byte_anywhere_have_different_hashes() -> None:
    for length in (1, 7, 8, 9, 16, 17, 63, 64, 65, 80):
        words = {"a" * length} | {"a" * at + "b" + "a" * (length - at - 1) for at in range(length)} | {"a" * (length + 1)}
        (block,) = blocks_of_texts([(0, " ".join(sorted(words)) + " filler" * 13)])
        assert len(set(block.hashes[:len(words)].tolist())) == len(words)


@pytest.fixture
def index() -> NgramIndex:
    rng = random.Random(5)
    return NgramIndex.build([(f"set/\u00e9{i}", " ".join(rng.choice("ab") for _ in range(rng.randint(5, 60))))
                             for i in range(200)])


def test_a_saved_index_finds_the_same_and_is_handed_over_by_its_path(index: NgramIndex, tmp_path: Path) -> None:
    index.save(tmp_path / "index")
    loaded = NgramIndex.load(tmp_path / "index")
    rng = random.Random(6)
    texts = [" ".join(rng.choice("aaaaaab") for _ in range(30)) for _ in range(300)]
    found = index.hits_of_batch(texts)
    assert sum(map(len, found)) > 0 and loaded.hits_of_batch(texts) == found
    assert loaded.record() == index.record() and index.num_texts == 200 and 0 < index.num_short < 60
    handed = pickle.dumps(loaded)
    assert len(handed) < 300 and pickle.loads(handed).record() == index.record()
    with pytest.raises(TypeError, match="save and load it"):
        pickle.dumps(index)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_the_file_is_the_same_for_the_same_texts_and_another_for_others(index: NgramIndex, tmp_path: Path) -> None:
    evaluations = [("a", "one " * 20), ("b", "two " * 20)]
    for name, texts in (("1", evaluations), ("2", evaluations), ("3", evaluations[::-1]), ("4", evaluations[:1])):
        NgramIndex.build(texts).save(tmp_path / name)
    first, second, third, fourth = ((tmp_path / name).read_bytes() for name in "1234")
    assert first == second and len({first, third, fourth}) == 3
    prints = [NgramIndex.load(tmp_path / name).fingerprint for name in "1234"]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def edited_header(content: bytes, **changes: object) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8:8 + size])
    for name, change in changes.items():
        header[name] = {**header[name], **change} if isinstance(change, dict) else change
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size:]


@pytest.mark.parametrize("change", [
    lambda content: b"", lambda content: content[:-1], lambda content: content[:100], lambda content: b"\xff" * 100,
    lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    lambda content: (1 << 62).to_bytes(8, "little") + content[8:],
    lambda content: edited_header(content, ngrams={"data_offsets": [0, 1 << 60]}),
    lambda content: edited_header(content, ngrams={"data_offsets": [-64, 8]}),
    lambda content: edited_header(content, ngrams={"dtype": "F64"}),
    lambda content: edited_header(content, owners={"shape": [2, 2]}),
    lambda content: edited_header(content, bitmap={"data_offsets": [0, 0]}),
    lambda content: edited_header(content, bitmap=None),
    lambda content: edited_header(content, __metadata__={"index": '{"version": 2}'}),
    lambda content: edited_header(content, __metadata__={"index": "["}),
], ids=["empty", "shorter", "header cut", "noise", "flipped bit", "header length", "offset beyond", "offset before", "dtype",
        "shape", "empty bitmap", "missing", "version", "metadata"])
def test_an_altered_index_is_refused(index: NgramIndex, tmp_path: Path, change: object) -> None:
    path = tmp_path / "index"
    index.save(path)
    NgramIndex.load(path)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match="index: is no index of evaluation texts .* needed. Remove it"):
        NgramIndex.load(path)


def test_a_missing_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none: missing; the index .* is needed. Start the conversion again"):
        NgramIndex.load(tmp_path / "none")


def test_evaluation_texts_too_short_to_be_found_are_counted_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        index = NgramIndex.build([("a/0", "word " * 13), ("a/1", "word " * 12), ("b/0", ""), ("b/1", "other " * 14)])
    assert index.record() == {"words": 13, "texts": 4, "short": 2, "ngrams": 2, "xxh3_128": index.fingerprint}
    assert "2 of 4 evaluation texts have fewer than 13 words and cannot be found; the first is a/1" in caplog.text


def test_no_texts_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="0 evaluation texts given, none of 13 words or more; .* Give each example as one"):
        NgramIndex.build([])


def test_sources_are_read_and_named(tmp_path: Path) -> None:
    texts = [" ".join(f"{letter}{i}" for i in range(20)) for letter in "abc"]
    (tmp_path / "glue.jsonl").write_text("".join(json.dumps({"question": text, "id": f"q{i}"}) + "\n"
                                                 for i, text in enumerate(texts[:2])))
    (tmp_path / "plain.txt").write_text(texts[2])
    found = index_sources([str(tmp_path / "glue.jsonl"), f"mine={tmp_path / 'plain.txt'}"], text_field="question")
    assert [hits[0].evaluation for hits in found.hits_of_batch(texts)] == ["glue/q0", "glue/q1", "mine/plain.txt"]
    assert [hits[0].count for hits in found.hits_of_batch(texts)] == [8, 8, 8]


@pytest.mark.parametrize(("source", "error", "message"), [
    ("none.txt", FileNotFoundError, "--decontaminate: .*none.txt"),
    ("glue.jsonl", ValueError, "--decontaminate: .*glue.jsonl.*'text'.*--decontaminate-field"),
    ("short.txt", ValueError, "--decontaminate: 1 evaluation texts given, none of 13 words"),
])
def test_sources_that_cannot_serve_are_refused(tmp_path: Path, source: str, error: type[Exception], message: str) -> None:
    (tmp_path / "glue.jsonl").write_text('{"question": "one two"}\n')
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(error, match=message):
        index_sources([str(tmp_path / source)])


def test_many_small_documents_at_once_are_told_apart() -> None:
    rng = random.Random(9)
    texts = [" ".join(rng.choice("ab") for _ in range(rng.choice([0, 5, 13, 14, 30]))) for _ in range(3000)]
    evaluations = [(f"e{i}", " ".join(ngram)) for i, ngram in
                   enumerate(itertools.islice(itertools.product("ab", repeat=13), 0, None, 500))]
    assert NgramIndex.build(evaluations).hits_of_batch(texts) == expected_hits(evaluations, texts)
