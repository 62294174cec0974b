"""The data card: what the Hub reads, whatever the names hold; the same bytes anywhere; nothing that is not so."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from converting import SOURCES, copy_set, samples_of, whole_set
from huggingface_hub import DatasetCard

from ettin_foundry.corpus.finalize import card_text, read_hashes, write_card
from ettin_foundry.data.storage import open_storage

SPLITS = ("train", "validation")


@pytest.fixture(scope="module")
def whole(tokenizer_dir: Path) -> Path:
    return whole_set(tokenizer_dir)


def manifests_of(out: Path) -> dict[str, dict]:
    return {split: json.loads((out / split / "manifest.json").read_text()) for split in SPLITS}


def lengths_of(out: Path) -> dict[str, np.ndarray]:
    return {split: np.bincount([len(s["tokens"]) for s in samples_of(out / split)], minlength=63) for split in SPLITS}


def front_matter(out: Path, manifests: dict[str, dict]) -> dict:
    return yaml.safe_load(card_text(open_storage(out), manifests, lengths_of(out)).split("---\n")[1])


def test_card_states_the_counts_of_the_shards(whole):
    text = (whole / "README.md").read_text()
    for split in SPLITS:
        samples = samples_of(whole / split)
        for source in SOURCES:
            mine = [sample for sample in samples if sample["source"] == source]
            documents, tokens = sum(s["last"] for s in mine), sum(len(s["tokens"]) for s in mine)
            share = tokens / sum(len(s["tokens"]) for s in samples)
            assert f"| {source} | {documents:,} | {len(mine):,} | {tokens:,} | {share:.1%} |" in text
        lengths = np.array([len(sample["tokens"]) for sample in samples])
        quantiles = [int(np.quantile(lengths, q, method="inverted_cdf")) for q in (0.1, 0.5, 0.9)]
        row = " | ".join([f"{lengths.mean():,.1f}", *map(str, quantiles), f"{(lengths == 62).mean():.1%}"])
        assert re.search(rf"\| {split} \| .* \| {re.escape(row)} \|", text)


def test_front_matter_is_what_the_hub_reads(whole):
    assert DatasetCard.load(whole / "README.md").data.to_dict() == {  # the Hub's own library
        "pretty_name": "wiki, code", "license": "cc-by-4.0", "viewer": False,
        "task_categories": ["text-generation", "fill-mask"], "tags": ["ettin", "mds", "pretraining"]}


@pytest.mark.parametrize("licences,expected", [
    (("Apache-2.0", "apache-2.0"), {"license": "apache-2.0"}), ((None, None), {"license": "unknown"}),
    (("mit", "cc-by-sa-4.0"), {"license": ["cc-by-sa-4.0", "mit"]}),
    (("ODC-By", "my own: \"licence\" # 1"), {"license": ["odc-by", "other"], "license_name": "my-own-licence-1"})])
def test_licences_are_words_that_the_hub_knows(whole, licences, expected):
    manifest = manifests_of(whole)["train"]
    for source, licence in zip(manifest["sources"].values(), licences):
        source["licence"] = licence
    found = front_matter(whole, {"train": manifest})
    assert {key: found[key] for key in found if key.startswith("license")} == expected


def test_hostile_names_stay_text(whole, tmp_path):
    evil = "a|b\n---\nlicense: mit # --> <script>alert(1)</script> `x` [y](z)\x1b[31m"
    manifests = manifests_of(whole)
    for manifest in manifests.values():
        manifest["sources"][evil] = {**manifest["sources"].pop("wiki"), "dropped": {evil: 3}}
        manifest["options"]["text_field"] = evil
    text = card_text(open_storage(whole), manifests, lengths_of(whole))
    assert front_matter(whole, manifests)["pretty_name"] == f"code, {evil}"
    body = text.split("---\n", 2)[2]
    assert "\x1b" not in body and "<script>" not in body and len(re.findall("[^\\\\]-->", body)) == 1
    tables = [line for line in body.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables if "script" in line} == {10, 3}  # no cell more
    (tmp_path / "README.md").write_text(text)
    assert read_hashes(open_storage(tmp_path)) == read_hashes(open_storage(whole))


def test_same_dataset_gives_the_same_card_elsewhere_with_the_hash_of_every_small_file(whole, tmp_path):
    other = shutil.copytree(whole, tmp_path / "elsewhere")
    (other / "README.md").unlink()
    write_card(open_storage(other), manifests_of(other), lengths_of(other))
    assert (other / "README.md").read_bytes() == (whole / "README.md").read_bytes()
    small = [path for name in ("*/manifest.json", "tokenizer/*") for path in other.glob(name)]
    assert read_hashes(open_storage(other)) == {
        path.relative_to(other).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in small}


def test_card_written_by_hand_is_left_alone(tokenizer_dir, tmp_path):
    out = copy_set(tokenizer_dir, tmp_path)
    (out / "README.md").write_text("# Mine\n")
    write_card(open_storage(out), manifests_of(out), lengths_of(out))
    assert (out / "README.md").read_text() == "# Mine\n" and not read_hashes(open_storage(out))
