"""Claims of corpus/mix.py and data_prep/sources.yaml, and of reading what was built, on small datasets."""

import os
import shutil
from collections import Counter

import numpy as np
import pytest
import yaml
from memory_set import write_set
from mix_sets import BUDGETS, ENTRIES, build, chunks_of, make_sets, write_spec

from ettin_foundry import program_folder
from ettin_foundry.corpus.mix import build_mix
from ettin_foundry.data import MANIFEST
from ettin_foundry.data.mixture import open_split
from ettin_foundry.data.order import Order

CATALOGUE = yaml.safe_load((program_folder() / "data_prep" / "sources.yaml").read_text())
PHASES = CATALOGUE["phases"]


@pytest.fixture
def sets(tmp_path):
    """Datasets that a test may spoil; mixtures are built beside them."""
    return make_sets(tmp_path / "sets")


def opened(sets, name="mix", split="train"):
    return open_split(sets.parent / name / split)


def test_an_epoch_has_each_budget_to_the_nearest_shard_and_passes_in_turn(sets):
    build(sets)
    data = opened(sets)
    order = Order(data, 64, packing=True, shuffle=True, seed=3, window=4)
    rows = [(shard, samples) for _, shard, samples in map(order.row, range(order.rows_per_epoch))]
    taken = Counter((data.sources[shard], data.sample(shard, n)["doc"]) for shard, samples in rows for n in samples)
    passes = [int(data.passes[shard]) for shard, _ in rows if data.sources[shard] == "notes"]
    assert passes == sorted(passes) and max(passes) == 3
    for name, wanted in BUDGETS.items():
        origin = open_split(sets.parent / ENTRIES[name]["set"] / "train")
        source = ENTRIES[name].get("source", name)
        original = {origin.sample(shard, index)["doc"]: len(origin.chunk(shard, index))
                    for shard in range(origin.num_shards) for index in range(origin.samples[shard])
                    if origin.sources[shard] == source}
        counts = {doc: number for (of, doc), number in taken.items() if of == name}
        given = sum(number * original[doc] for doc, number in counts.items())
        available = sum(original.values())
        of_source = origin.tokens[np.array(origin.sources) == source]
        assert abs(given - wanted) <= of_source.max() / 2
        assert data.manifest["sources"][name] == {
            "chunks": sum(counts.values()), "tokens": given, "licence": f"licence of {source}",
            "wanted": wanted, "available": available, "repeats": round(given / available, 6)}
        for doc in original:  # evenly: a chunk comes as often as there are full passes, or once more
            assert counts.get(doc, 0) in (wanted // available, wanted // available + 1)


def test_names_are_read_as_they_are_written(sets):
    names = ["1", "null", "yes", "2024-01-01", "1e3", "~"]
    for name in names:
        write_set(sets / name, {name: [np.full(300, 62)]})
    (sets / "spec.yaml").write_text("sets:\n" + "".join(
        f"  {name}: {{set: {name}, source: {name}, tokens: 18_600}}\n" for name in names))
    build_mix(sets / "spec.yaml", sets.parent / "mix")
    assert opened(sets).manifest["sources"].keys() == {*names}


def test_mixture_holds_no_text_and_refers_to_datasets_by_relative_paths(sets):
    build(sets)
    mix = sets.parent / "mix"
    files = sorted(path.relative_to(mix).as_posix() for path in mix.rglob("*") if path.is_file())
    assert files == ["tokenizer/tokenizer.json", "train/manifest.json", "validation/manifest.json"]
    manifest = (mix / "train" / MANIFEST).read_text()
    assert str(sets.parent) not in manifest and len(manifest) < 10_000
    before = chunks_of(opened(sets))
    moved = sets.parent / "elsewhere" / "deeper"
    moved.mkdir(parents=True)
    shutil.move(sets, moved / "sets")
    shutil.move(mix, moved / "mix")
    assert chunks_of(open_split(moved / "mix" / "train")) == before


def test_choice_is_a_function_of_seed_and_source_alone(sets):
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        build(sets, name, seed)
    first, again, other = (opened(sets, name).manifest for name in ("one", "again", "two"))
    assert first == again and other["runs"] != first["runs"]
    build(sets, "fewer", 1, sets={"web": {**ENTRIES["web"], "tokens": BUDGETS["web"]}})
    fewer, full = (Counter(pair for pair in chunks_of(opened(sets, name)) if pair[0] == "web")
                   for name in ("fewer", "one"))
    assert fewer == full


def test_validation_is_that_of_all_datasets_each_once(sets):
    lines = build(sets)  # books and notes share a dataset, code has no validation
    data = opened(sets, split="validation")
    web, both = ([doc for _, doc in chunks_of(open_split(sets / name / "validation"))]
                 for name in ("web", "both"))
    assert sorted(doc for _, doc in chunks_of(data)) == sorted(web + both)
    assert lines[0].endswith(f"{data.samples.sum()} chunks for validation")
    entry = {"set": "sets/web", "tokens": 7000}
    build(sets, "twice", sets={"first": entry, "second": entry})  # a dataset behind two sources
    assert sorted(doc for _, doc in chunks_of(opened(sets, "twice", "validation"))) == sorted(web)
    runs = opened(sets, "twice").manifest["runs"]
    assert runs[0]["shards"] != runs[1]["shards"]  # a source chooses shards of its own
    build(sets, "none", sets={"code": {"set": "sets/code", "tokens": 3000}})
    assert not (sets.parent / "none" / "validation").exists()


WEB = {"web": {"set": "sets/web", "tokens": 3000}}
ARXIV = {"phase": "decay", "sets": {"arxiv": "sets/web"}}
WRONG = [
    ({"sets": {}}, "sets: "), ({"stes": 1}, "stes: .*keys are sets, phase"),
    ({"sets": {"web": "sets/web"}}, "without phase, sets must be .*tokens"),
    ({"sets": WEB, "scale": 2}, "without phase"),
    ({"sets": {"web": {"set": "sets/even", "tokens": 30}}}, "its budget must be half of a shard .*--shard-size"),
    ({"sets": {"web": {**WEB["web"], "tokens": -1}}}, "sets.web.tokens: .*greater than 0, got '-1'"),
    ({"sets": {"web": {**WEB["web"], "source": "wbe"}}}, r"sets.web.source must be one of \['web'\], got 'wbe'"),
    ({"sets": {"web": {**WEB["web"], "set": "sets"}}}, "sets.web: .* holds no manifest"),
    ({"phase": "deccay"}, "phase must be one of pretrain, extend, decay, got 'deccay'"),
    ({**ARXIV, "sets": {"arxive": "sets/web"}}, "sources of phase decay .* got arxive"),
    ({**ARXIV, "scale": 1, "tokens": 3}, "not both"),
    *[({"sets": {**WEB, "odd": {"set": f"sets/{name}", "tokens": 100}}},
       "sets.odd: .* must have the chunk length and tokenizer of .*sets/web") for name in ("short", "other")]]


def test_wrong_specification_and_datasets_that_differ_are_refused_naming_the_key(sets):
    for name, change in (("even", {}), ("short", {"chunk_length": 50}),
                         ("other", {"tokenizer": {"name": "x", "vocab_size": 119}})):
        write_set(sets / name, {"odd": [np.full(20, 9 if change else 62)]}, **change)
    for changes, message in WRONG:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            build(sets, **changes)
        assert sorted(os.listdir(sets.parent)) == ["mix.yaml", "sets"]


def test_unreadable_specification_used_folder_and_link_are_refused(sets):
    (sets / "bad.yaml").write_text("{")
    (sets.parent / "mix").mkdir()  # an empty folder is none that is used
    spec, mix = write_spec(sets.parent), sets.parent / "mix"
    wrong = ((sets / "bad.yaml", mix, "bad.yaml must be YAML"), (spec, sets, "a new or an empty folder"),
             (spec, "s3://bucket/mix", "out must be a local folder"))
    for written, out, message in wrong:
        with pytest.raises((ValueError, FileExistsError), match=message):
            build_mix(written, out)
    build_mix(spec, mix)
    (sets / "web" / "tokenizer" / "more.json").symlink_to(sets / "bad.yaml")
    with pytest.raises(ValueError, match="more.json.*plain file"):
        build(sets, "linked")


def test_phase_of_the_catalogue_is_scaled_or_given_a_total(sets):
    budgets, books = PHASES["decay"], {"set": "sets/both", "source": "books"}
    kept = {"dclm_dolmino": "sets/web", "code_repos": "sets/code", "books": books}
    changes = {"phase": "decay", "sets": kept}
    build(sets, "scaled", scale=2e-7, **changes)
    build(sets, "total", tokens="1e4", **changes)  # YAML reads 1e4 as text
    scaled, total = ({name: facts["wanted"] for name, facts in opened(sets, out).manifest["sources"].items()}
                     for out in ("scaled", "total"))
    assert scaled == {name: round(budgets[name] * 200) for name in kept}
    assert total == {name: round(budgets[name] * 1e4 / 56.7) for name in kept}
    assert opened(sets, "total").manifest["scale"] == pytest.approx(10_000 / 56.7e9)


def test_catalogue_states_the_published_mixtures():
    totals = {phase: round(sum(budgets.values()), 1) for phase, budgets in PHASES.items()}
    assert totals == {"pretrain": 1704.7, "extend": 249.3, "decay": 76.3}  # billions of tokens, as published
    assert {*PHASES["pretrain"], *PHASES["extend"], *PHASES["decay"]} == {*CATALOGUE["sources"]}
