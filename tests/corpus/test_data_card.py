"""The data card: what the Hub reads, whatever the names hold; the same bytes anywhere; nothing that is not so."""

from __future__ import annotations

import functools
import json
import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from huggingface_hub import DatasetCard
from whole_sets import SOURCES, copy_set, samples_of, whole_set

from ettin_foundry.corpus.card import card_text, picture, read_block, write_card
from ettin_foundry.data.storage import open_storage

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def whole(tokenizer_dir: Path) -> Path:
    return whole_set(tokenizer_dir)


def manifests_of(out: Path) -> dict[str, dict]:
    return {split: json.loads((out / split / "manifest.json").read_text()) for split in ("train", "validation")}


def all_samples(out: Path, split: str) -> list[dict]:
    return [sample for samples in samples_of(out / split).values() for sample in samples]


@functools.lru_cache(maxsize=1)
def lengths_of(out: Path) -> dict[str, np.ndarray]:
    return {split: np.bincount([len(sample["tokens"]) for sample in all_samples(out, split)], minlength=63)
            for split in ("train", "validation")}


def front_matter(out: Path, manifests: dict[str, dict]) -> dict:
    return yaml.safe_load(card_text(open_storage(out), manifests, lengths_of(out)).split("---\n")[1])


def test_card_states_the_counts_of_the_shards(whole: Path) -> None:
    text = (whole / "README.md").read_text()
    for split in ("train", "validation"):
        samples = all_samples(whole, split)
        for source in SOURCES:
            mine = [sample for sample in samples if sample["source"] == source]
            documents, tokens = sum(s["last"] for s in mine), sum(len(s["tokens"]) for s in mine)
            share = tokens / sum(len(s["tokens"]) for s in samples)
            assert f"| {source} | {documents:,} | {len(mine):,} | {tokens:,} | {share:.1%} |" in text
        lengths = np.array([len(sample["tokens"]) for sample in samples])
        quantiles = [int(np.quantile(lengths, q, method="inverted_cdf")) for q in (0.1, 0.5, 0.9)]
        row = " | ".join([f"{lengths.mean():,.1f}", *map(str, quantiles), f"{(lengths == 62).mean():.1%}"])
        assert f"| {split} | {row} |" in text


def test_front_matter_is_what_the_hub_reads(whole: Path) -> None:
    assert DatasetCard.load(whole / "README.md").data.to_dict() == {  # the Hub's own library
        "pretty_name": "wiki, code", "license": "cc-by-4.0", "size_categories": ["n<1K"], "viewer": False,
        "task_categories": ["text-generation", "fill-mask"], "tags": ["ettin", "mds", "tokenized", "pretraining"]}


@pytest.mark.parametrize("licences,expected", [
    (("Apache-2.0", "apache-2.0"), {"license": "apache-2.0"}),
    ((None, None), {"license": "unknown"}),
    (("mit", "cc-by-sa-4.0"), {"license": ["cc-by-sa-4.0", "mit"]}),
    (("ODC-By", "my own: \"licence\" # 1"), {"license": ["odc-by", "other"], "license_name": "my-own-licence-1"}),
])
def test_licences_are_identifiers_that_the_hub_knows(whole: Path, licences: tuple, expected: dict) -> None:
    manifests = manifests_of(whole)
    for manifest in manifests.values():
        for source, licence in zip(manifest["sources"].values(), licences):
            source["licence"] = licence
    meta = front_matter(whole, manifests)
    assert {key: meta[key] for key in meta if key.startswith("license")} == expected


def test_size_category_holds_the_number_of_chunks(whole: Path) -> None:
    manifests = {"train": manifests_of(whole)["train"]}
    for chunks, category in ((999, "n<1K"), (1000, "1K<n<10K"), (123_456, "100K<n<1M"), (10**13, "n>1T")):
        manifests["train"]["totals"]["samples"] = chunks
        assert front_matter(whole, manifests)["size_categories"] == [category]


def test_hostile_names_stay_text(whole: Path, tmp_path: Path) -> None:
    evil = "a|b\n---\nlicense: mit # --> <script>alert(1)</script> `x` [y](z)\x1b[31m"
    manifests = manifests_of(whole)
    for manifest in manifests.values():
        manifest["sources"][evil] = {**manifest["sources"].pop("wiki"), "dropped": {evil: 3}}
        manifest["options"]["text_field"] = evil
    text = card_text(open_storage(whole), manifests, lengths_of(whole))
    assert front_matter(whole, manifests)["pretty_name"] == f"code, {evil}"
    body = text.split("---\n", 2)[2]
    assert "\x1b" not in body and "<script>" not in body and body.count("-->") == 1 and body.endswith("-->\n")
    assert "--" not in body[body.rindex("<!--") + 4:-4]
    tables = [line for line in body.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables if "script" in line} == {10, 3}  # no cell more
    (tmp_path / "README.md").write_text(text)
    block = read_block(open_storage(tmp_path))
    assert block is not None and evil in block["splits"]["train"]["sources"]


def test_same_dataset_gives_the_same_bytes_elsewhere_and_under_other_settings(whole: Path, tmp_path: Path) -> None:
    import matplotlib

    other = shutil.copytree(whole, tmp_path / "elsewhere")
    for name in ("README.md", "lengths.svg"):
        (other / name).unlink()
    with matplotlib.rc_context({"font.size": 20.0, "axes.facecolor": "red", "svg.fonttype": "path"}):
        write_card(open_storage(other), manifests_of(other), lengths_of(other))
    for name in ("README.md", "lengths.svg"):
        assert (other / name).read_bytes() == (whole / name).read_bytes()
    assert not re.search(rb"20[0-9][0-9]-[0-9][0-9]|" + bytes(whole.parent), (other / "lengths.svg").read_bytes())


def test_picture_shows_the_shares(whole: Path) -> None:
    """The outline of the filled histogram in the SVG, read back into shares, is the counted one."""
    lengths = lengths_of(whole)
    root = ElementTree.fromstring((whole / "lengths.svg").read_bytes())
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert {"train", "validation", "tokens in the chunk", "share of all chunks", "share of all tokens"} <= set(texts)
    edges = np.unique(np.linspace(1, 63, 49).round().astype(int))
    for axes, weights in ((1, lengths["train"]), (2, lengths["train"] * np.arange(63))):
        panel = next(element for element in root.iter(f"{SVG}g") if element.get("id") == f"axes_{axes}")
        outline = [path for path in panel.iter(f"{SVG}path") if "#1f77b4" in (path.get("style") or "")][0].get("d")
        heights = np.array([[float(number) for number in point] for point in re.findall(r"([\d.]+) ([\d.]+)", outline)])
        tops = heights[:, 1].max() - heights[1:-1:2, 1][:len(edges) - 1]
        shares = np.array([weights[a:b].sum() for a, b in zip(edges[:-1], edges[1:])]) / weights.sum()
        # coordinates are printed with six decimals
        assert np.allclose(tops / tops.sum(), shares, atol=1e-6), axes
    image = picture({"_a": np.array([0, 3, 4]), "$\\frac{1}{2}$": np.array([0, 1, 1])})  # names are no formulas
    texts = [(element.text or "").strip() for element in ElementTree.fromstring(image).iter(f"{SVG}text")]
    assert {"_a", "$\\frac{1}{2}$"} <= set(texts)


def test_card_written_by_hand_is_left_alone(tokenizer_dir: Path, tmp_path: Path) -> None:
    out = copy_set(tokenizer_dir, tmp_path)
    (out / "README.md").write_text("# Mine\n")
    write_card(open_storage(out), manifests_of(out), lengths_of(out))
    assert (out / "README.md").read_text() == "# Mine\n"
    assert read_block(open_storage(out)) is None


def test_code_in_the_card_runs(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.findall(r"```python\n(.*?)```", (whole / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(whole)
    found: dict = {}
    exec(code[0], found)
    assert found["tokens"].tolist() == all_samples(whole, "train")[0]["tokens"].tolist()
