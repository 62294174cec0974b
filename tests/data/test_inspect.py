"""`ettin show`: every number is the one of counting chunk by chunk; foreign text cannot drive a terminal."""

import json

import numpy as np
import pytest
from converting import SOURCES, copy_set, files_of, samples_of, whole_set
from tokenizers import Tokenizer

from ettin_foundry.data.inspect import draw_samples, find_dataset, plain, show_text, source_rows
from ettin_foundry.data.shards import MDSSplit
from ettin_foundry.data.storage import open_storage


def key(sample):
    return sample["source"], sample["doc"], sample["part"]


@pytest.mark.parametrize("split,compression", [("train", None), ("validation", "zstd")])
def test_statistics_are_those_of_counting(tokenizer_dir, split, compression):
    folder = whole_set(tokenizer_dir, compression) / split
    manifest, everything = json.loads((folder / "manifest.json").read_text()), samples_of(folder)
    found = {row["source"]: row for row in source_rows(MDSSplit(folder))}
    tokens = {name: sum(len(sample["tokens"]) for sample in everything if sample["source"] == name) for name in found}
    assert set(found) == set(SOURCES) and [*tokens.values()] == sorted(tokens.values(), reverse=True)
    for name, row in found.items():
        lengths = [len(sample["tokens"]) for sample in everything if sample["source"] == name]
        rows = sum(entry["rows"]["64"] for entry in manifest["shards"] if entry["source"] == name)
        quantiles = np.quantile(lengths, (0.1, 0.5, 0.9), method="inverted_cdf").astype(int)
        stated = manifest["sources"][name]
        assert list(row.values()) == [
            name, f"{stated['documents']:,}", f"{len(lengths):,}", f"{sum(lengths):,}",
            f"{sum(lengths) / sum(tokens.values()):.1%}", f"{np.mean(lengths):,.1f}", *map(str, quantiles),
            f"{lengths.count(62) / len(lengths):.1%}", f"{rows:,}", f"{sum(n + 2 for n in lengths) / rows / 64:.1%}",
            f"{stated['bytes'] / sum(lengths):.2f}", "cc-by-4.0"]


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_samples_are_chunks_of_the_dataset_decoded(tokenizer_dir, tmp_path, compression):
    whole = whole_set(tokenizer_dir, compression)
    data, before = find_dataset(whole).open("train", tmp_path), files_of(whole)
    reference = Tokenizer.from_file(str(whole / "tokenizer" / "tokenizer.json"))
    stored = {key(sample): sample for sample in samples_of(whole / "train")}
    assert len(set(map(key, draw_samples(data, per_source=10**6)))) == int(data.samples.sum())
    found, lines = draw_samples(data, per_source=3, seed=5), show_text(whole, samples=3, seed=5)
    assert [sample["source"] for sample in found] == ["code"] * 3 + ["wiki"] * 3 and len(set(map(key, found))) == 6
    for sample in found:
        tokens = stored[key(sample)]["tokens"].tolist()
        assert sample["tokens"].tolist() == tokens and sample["last"] == stored[key(sample)]["last"]
        assert f"    {plain(reference.decode(tokens, skip_special_tokens=False), 400)}\n" in lines
    assert files_of(whole) == before  # nothing is expanded into the dataset


def test_foreign_text_cannot_drive_the_terminal(tokenizer_dir, tmp_path):
    assert plain("\x1b]0;owned\x07\u202etxt\r\n\x9b31m") == r"\x1b]0;owned\x07\u202etxt\r\n\x9b31m"
    assert plain("na\u00efve \u4f60") == "na\u00efve \u4f60" and plain("abcdef", 3) == "abc..."
    path = copy_set(tokenizer_dir, tmp_path) / "train" / "manifest.json"
    text = path.read_text().replace('"wiki"', '"w\\u001b[2Jki\\u202e"')
    path.write_text(text.replace('"cc-by-4.0"', '"\\u0007"'))
    assert all(character.isprintable() for character in show_text(tmp_path / "set", samples=0) if character != "\n")


def test_command_shows_dataset_split_and_url(tokenizer_dir, tmp_path, ettin):
    whole = copy_set(tokenizer_dir, tmp_path)
    code, text, _ = ettin("show", whole, "--samples", 2)
    assert code == 0 and "train: 175 chunks of at most 62 tokens, 7,875 tokens" in text
    assert text.count("[wiki]") == 4 and "(512 entries)" in text
    code, text, _ = ettin("show", whole / "validation", "--samples", 0)
    assert code == 0 and "train" not in text and "[wiki]" not in text
    assert ettin("show", whole / "tokenizer")[0] == 1
    remote = open_storage(url := f"memory://{tmp_path.name}/set")
    for name, data in files_of(whole).items():
        remote.write_bytes(name, data)
    assert ettin("show", url) == ettin("show", whole)
    (whole / "tokenizer" / "tokenizer.json").unlink()
    assert ettin("show", whole)[1].count("no tokenizer/ beside the dataset; ids [") == 4
