"""`ettin show`: every number is the one that counting chunk by chunk gives, and foreign text cannot drive a terminal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from whole_sets import SOURCES, copy_set, histogram, samples_of, whole_samples, whole_set

from ettin_foundry.cli import main as cli
from ettin_foundry.corpus.show import draw_samples, histogram_lines, show_set, source_statistics
from ettin_foundry.data.inspect import find_set, load_decoder, plain
from ettin_foundry.data.shards import MDSSplit
from ettin_foundry.data.storage import open_storage


@pytest.fixture(scope="module")
def whole(tokenizer_dir: Path) -> Path:
    return whole_set(tokenizer_dir)


def naive_rows(lengths: list[int], width: int) -> int:
    """Best-fit decreasing, piece by piece."""
    free: list[int] = []
    for piece in sorted((length + 2 for length in lengths), reverse=True):
        best = min((i for i, space in enumerate(free) if space >= piece), key=lambda i: free[i], default=None)
        if best is None:
            free.append(width)
            best = -1
        free[best] -= piece
    return len(free)


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_statistics_are_those_of_counting(tokenizer_dir: Path, split: str, compression: str | None) -> None:
    folder = whole_set(tokenizer_dir, compression) / split
    shards = whole_samples(tokenizer_dir, split, compression)
    everything = [sample for samples in shards.values() for sample in samples]
    found = source_statistics(MDSSplit(folder))
    assert {s.name for s in found} == set(SOURCES) and [s.tokens for s in found] == sorted(s.tokens for s in found)[::-1]
    for s in found:
        mine = [sample for sample in everything if sample["source"] == s.name]
        lengths = [len(sample["tokens"]) for sample in mine]
        assert (s.chunks, s.tokens, s.documents) == (len(mine), sum(lengths), sum(sample["last"] for sample in mine))
        assert s.lengths.tolist() == histogram(lengths, 62).tolist()
        assert s.share == sum(lengths) / sum(len(sample["tokens"]) for sample in everything)
        assert s.mean == np.mean(lengths) and s.full == np.mean(np.array(lengths) == 62)
        assert s.quantiles == tuple(np.quantile(lengths, (0.1, 0.5, 0.9), method="inverted_cdf"))
        of_shards = [[len(x["tokens"]) for x in samples] for samples in shards.values() if samples[0]["source"] == s.name]
        assert s.shards == len(of_shards) and s.rows == sum(naive_rows(lengths, 64) for lengths in of_shards)
        assert s.fill == sum(length + 2 for length in lengths) / (s.rows * 64)
        assert s.licence == "cc-by-4.0" and not s.dropped


@pytest.mark.parametrize("longest,bins", [(62, 16), (1022, 16), (5, 16), (1, 16), (100, 7)])
def test_histogram_lines_cover_every_length_once(longest: int, bins: int) -> None:
    rng = np.random.default_rng(longest)
    lengths = np.append(0, rng.integers(0, 9, longest))
    lengths[-1] += 1
    begin, chunks, tokens = 1, 0.0, 0.0
    for line in histogram_lines(lengths, bins=bins):
        span, bar, rest = line.split("|")
        first, last = (int(number.replace(",", "")) for number in span.split("-"))
        inside = np.arange(first, last + 1)
        assert first == begin and last >= first
        share, of_tokens = (float(word.rstrip("%")) / 100 for word in rest.split() if word.endswith("%"))
        # printed with one decimal
        assert abs(share - lengths[inside].sum() / lengths.sum()) < 6e-4
        assert abs(of_tokens - (lengths[inside] * inside).sum() / (lengths * np.arange(longest + 1)).sum()) < 6e-4
        begin, chunks, tokens = last + 1, chunks + share, tokens + of_tokens
    assert begin == longest + 1 and abs(chunks - 1) < 0.01 and abs(tokens - 1) < 0.01


def test_samples_are_chunks_of_the_set_decoded(whole: Path) -> None:
    data = MDSSplit(whole / "train")
    reference = Tokenizer.from_file(str(whole / "tokenizer" / "tokenizer.json"))
    stored = {(s["source"], s["doc"], s["part"]): s for samples in samples_of(whole / "train").values() for s in samples}
    found = draw_samples(data, load_decoder(open_storage(whole)), per_source=3, seed=5)
    assert [sample.source for sample in found] == ["code"] * 3 + ["wiki"] * 3
    assert len({(sample.source, sample.doc, sample.part) for sample in found}) == 6
    for sample in found:
        mine = stored[sample.source, sample.doc, sample.part]
        assert sample.tokens.tolist() == mine["tokens"].tolist() and sample.last == bool(mine["last"])
        assert sample.text == reference.decode(mine["tokens"].tolist(), skip_special_tokens=False)
    again = [sample.doc for sample in draw_samples(data, None, per_source=3, seed=5)]
    assert again == [sample.doc for sample in found] != [s.doc for s in draw_samples(data, None, per_source=3, seed=6)]


def test_every_chunk_of_a_source_is_drawn_alike(whole: Path) -> None:
    data = MDSSplit(whole / "validation")
    chunks = int(sum(data.samples[shard] for shard, source in enumerate(data.sources) if source == "wiki"))
    drawn = [next(s for s in draw_samples(data, None, per_source=1, seed=seed) if s.source == "wiki") for seed in range(400)]
    counts = {(sample.doc, sample.part): 0 for sample in drawn}
    for sample in drawn:
        counts[sample.doc, sample.part] += 1
    assert len(counts) == chunks
    everything = draw_samples(data, None, per_source=10**6)
    assert len({(sample.source, sample.doc, sample.part) for sample in everything}) == int(data.samples.sum())
    # 400 draws of n equally probable chunks: five standard deviations
    assert max(counts.values()) < 400 / chunks + 5 * (400 / chunks) ** 0.5


def test_foreign_text_cannot_drive_the_terminal(tokenizer_dir: Path, tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\u202etxt\r\n\x9b31m"
    assert plain(evil) == r"\x1b]0;owned\x07\x1b[2J\u202etxt\r\n\x9b31m"
    assert plain("na\u00efve \u4f60") == "na\u00efve \u4f60" and plain("abcdef", 3) == "abc..."
    out = copy_set(tokenizer_dir, tmp_path)
    path = out / "train" / "manifest.json"
    path.write_text(path.read_text().replace('"wiki"', '"w\\u001b[2Jki\\u202e"').replace('"cc-by-4.0"', '"\\u0007"'))
    assert all(character.isprintable() for line in show_set(out, samples=0) for character in line)


def test_command_shows_the_set_one_split_and_the_picture(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(["show", *map(str, arguments)])
        return end.value.code or 0, *capsys.readouterr()

    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    code, text, _ = run(whole, "--samples", 2, "--picture", tmp_path / "l.svg")
    data = MDSSplit(whole / "train")
    assert code == 0 and f"train: {data.samples.sum():,} chunks of at most 62 tokens, {data.tokens.sum():,} tokens" in text
    assert "validation: " in text and text.count("[wiki]") == 4 and "(512 entries)" in text
    assert (tmp_path / "l.svg").read_bytes() == (whole / "lengths.svg").read_bytes()
    code, text, _ = run(whole / "validation", "--samples", 0)
    assert code == 0 and "train" not in text and "[wiki]" not in text
    assert find_set(whole / "validation").splits == ("validation",)
    for arguments, words in (((tmp_path / "nothing",), "holds no split"), ((whole, "--picture", "x.png"), "ends in .svg"),
                             ((whole / "tokenizer",), "holds no split")):
        code, _, error = run(*arguments)
        assert code == 1 and words in error.strip().splitlines()[-1]
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_set_without_its_tokenizer_shows_ids(tokenizer_dir: Path, tmp_path: Path) -> None:
    out = copy_set(tokenizer_dir, tmp_path)
    (out / "tokenizer" / "tokenizer.json").unlink()
    assert sum("no tokenizer/ beside the set; ids [" in line for line in show_set(out)) == 4
