"""Claims of mix_set.py and mix_manifest.py: sets that were altered, manifests that lie, sets and mixtures elsewhere."""

import json
import pickle
import shutil
import time

import numpy as np
import pytest
from memory_set import write_set
from mix_sets import BUDGETS, ENTRIES, build, chunks_of, edit, make_sets, shards

from ettin_foundry.data.manifest import MANIFEST
from ettin_foundry.data.mixture import chunk_permutation, open_split
from ettin_foundry.data.order import Order

T = 64


@pytest.fixture
def sets(tmp_path):
    """Sets that a test may spoil; mixtures are built beside them."""
    return make_sets(tmp_path / "sets")


# ---------------------------------------------------------------- sets that are not what the mixture was built from

def test_missing_set_is_refused_by_name(sets):
    build(sets)
    shutil.rmtree(sets / "code")
    with pytest.raises(FileNotFoundError, match=r"its set '\.\./sets/code' \(for code\).*no manifest.json"):
        open_split(sets.parent / "mix" / "train")


def test_altered_set_is_refused_by_name_at_opening(sets):
    build(sets)
    shutil.rmtree(sets / "both" / "train")
    write_set(sets / "both", {"books": shards(3, seed=4), "notes": shards(2, seed=8)}, seed=4)
    with pytest.raises(ValueError, match=r"its set '\.\./sets/both' \(for books, notes\).*fingerprint.*altered or replaced"):
        open_split(sets.parent / "mix" / "train")


def test_flipped_byte_in_a_set_is_found_by_verify_and_before_use(sets):
    build(sets)
    data = open_split(sets.parent / "mix" / "train")
    data.verify()
    [first, *_] = [shard for shard in range(data.num_shards) if data.sources[shard] == "web"]
    name = f"shard.{data._shard[first]:05d}.mds"
    victim = sets / "web" / "train" / name
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    fresh = open_split(sets.parent / "mix" / "train")
    for read in (fresh.verify, lambda: fresh.chunk(first, 0), lambda: fresh.check_shard(first)):
        with pytest.raises(ValueError, match=f"{name}.*xxh64"):
            read()


@pytest.mark.parametrize("change", [{"chunk_length": 50}, {"tokenizer": {"name": "test", "vocab_size": 119}}], ids=str)
def test_sets_of_another_tokenizer_or_chunk_length_are_refused_naming_both(sets, change):
    write_set(sets / "odd", {"odd": shards(2, seed=9, longest=50)}, **change)
    entries = {"web": {**ENTRIES["web"], "tokens": 3000}, "odd": {"set": "sets/odd", "tokens": 1000}}
    with pytest.raises(ValueError, match=rf"sets.odd: .*sets/odd/train has {[*change][0]} .*sets/web has "):
        build(sets, sets=entries)


def test_tokenizers_of_other_names_are_the_same(sets):
    write_set(sets / "named", {"named": shards(2, seed=9)}, tokenizer={"name": "other", "vocab_size": 120})
    build(sets, sets={"web": {**ENTRIES["web"], "tokens": 3000}, "named": {"set": "sets/named", "tokens": 1000}})
    assert open_split(sets.parent / "mix" / "train").num_shards > 2


def test_bad_shard_taken_in_part_is_replaced_with_the_same_lengths_where_that_is_wished(sets):
    build(sets)
    good = open_split(sets.parent / "mix" / "train")
    part = next(shard for shard in range(good.num_shards) if good._part[shard] >= 0 and good.sources[shard] == "web")
    name = f"shard.{good._shard[part]:05d}.mds"
    expected = np.sort(good.sample_lengths(part)), good.lengths(part)
    (sets / "web" / "train" / name).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=name):
        open_split(sets.parent / "mix" / "train").sample_lengths(part)
    skipping = open_split(sets.parent / "mix" / "train", on_bad_shard="skip")
    assert np.array_equal(np.sort(skipping.sample_lengths(part)), expected[0])
    assert np.array_equal(skipping.lengths(part), expected[1])
    Order(skipping, T, packing=True, shuffle=True, seed=0, window=30).row(0)


# ---------------------------------------------------------------- remote

@pytest.fixture
def cloud(sets):
    """Puts folders below memory://, a file system of this process."""
    import fsspec

    memory = fsspec.filesystem("memory")

    def put(folder, name):
        for path in folder.rglob("*"):
            if path.is_file():
                memory.pipe_file(f"/{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    yield put
    memory.store.clear()


def test_sets_behind_urls_are_built_from_and_read_alike(sets, cloud, tmp_path):
    build(sets)
    expected = chunks_of(open_split(tmp_path / "mix" / "train")), chunks_of(open_split(tmp_path / "mix" / "validation"))
    cloud(sets, "bucket")
    remote = {name: {**entry, "set": f"memory://bucket/{entry['set'].removeprefix('sets/')}", "tokens": BUDGETS[name]}
              for name, entry in ENTRIES.items()}
    build(sets, "far", sets=remote)
    manifest = json.loads((tmp_path / "far" / "train" / MANIFEST).read_text())
    assert manifest["sets"][0]["path"] == "memory://bucket/web" and not (tmp_path / "far" / "cache").exists()
    assert (tmp_path / "far" / "tokenizer" / "tokenizer.json").read_text() == "{}"
    cloud(sets, "elsewhere")
    edit(tmp_path / "far", set_in("sets", 0, "path", value="memory://bucket/gone"), "validation")
    with pytest.raises(FileNotFoundError, match=r"'memory://bucket/gone' \(for web\): .*gone/validation holds no"):
        open_split(tmp_path / "far" / "validation")
    edit(tmp_path / "far", set_in("sets", 0, "path", value="memory://elsewhere/web"), "validation")
    data = open_split(tmp_path / "far" / "train")
    assert data.fetches and not list((tmp_path / "far").rglob("*.mds"))
    wanted = [int(np.flatnonzero(np.array(data.sources) == source)[-1]) for source in BUDGETS]
    data.prefetch(wanted)
    paths = [data._of(shard)._files.path(int(data._shard[shard])) for shard in wanted]
    for path in paths:  # each into the folder of its own set, in the background
        for _ in range(500):
            if path.exists():
                break
            time.sleep(0.01)
        assert path.exists()
    assert sorted((tmp_path / "far").rglob("*.mds")) == sorted(set(paths))
    assert (chunks_of(data), chunks_of(open_split(tmp_path / "far" / "validation"))) == expected
    assert list((tmp_path / "far" / "train" / "sets").rglob("*.mds"))


def test_remote_mixture_is_read_with_its_sets_beside_it(sets, cloud, tmp_path):
    build(sets)
    expected = chunks_of(open_split(tmp_path / "mix" / "train"))
    cloud(tmp_path / "mix", "bucket/mixtures/mix")
    cloud(sets, "bucket/mixtures/sets")
    local = tmp_path / "local" / "train"
    for _ in range(2):  # fetched, then there
        assert chunks_of(open_split(local, remote="memory://bucket/mixtures/mix/train")) == expected
    copy = open_split(tmp_path / "copy" / "train", remote=str(tmp_path / "mix" / "train"))  # a folder is fetched from too
    assert copy.fetches and chunks_of(copy) == expected and list((tmp_path / "copy").rglob("*.mds"))
    edit(tmp_path / "local", lambda m: m.update(seed=5))
    with pytest.raises(ValueError, match="holds another set than dataset.remote"):
        open_split(local, remote="memory://bucket/mixtures/mix/train")


def test_cache_limit_is_shared_out_among_the_sets_that_fetch(sets, cloud, tmp_path):
    cloud(sets, "bucket")
    entries = {"web": {"set": "memory://bucket/web", "tokens": 7000}, "code": {"set": "sets/code", "tokens": 3000},
               "both": {"set": "memory://bucket/both", "tokens": 3000}}
    build(sets, sets=entries)
    data = open_split(tmp_path / "mix" / "train", cache_limit=100_000)
    limits = [one._files.cache_limit for one in data._sets]
    assert limits[1] is None and sum(limit or 0 for limit in limits) in (99_999, 100_000)
    assert limits[0] > limits[2] > 10_000
    data.check_room(range(4))
    shards = list(range(0, data.num_shards, 2))
    data.check_room(shards)  # every set gets what it needs at a time, whatever its share of the bytes is
    for one, stored in data._by_set(shards):
        assert one.files.cache_limit is None or one.files.cache_limit >= one.files.room_needed(len(stored))
    assert sum(one.files.cache_limit or 0 for one in data._sets) <= 100_000
    with pytest.raises(ValueError, match="dataset.cache_limit"):
        open_split(tmp_path / "mix" / "train", cache_limit=30_000).check_room(range(data.num_shards))
    build(sets, "near")
    with pytest.raises(ValueError, match="dataset.cache_limit: 100000 given, but no set of this mixture is remote"):
        open_split(tmp_path / "near" / "train", cache_limit=100_000)


def test_mixture_can_be_pickled_and_limits_what_its_sets_keep_open(sets):
    build(sets)
    data = open_split(sets.parent / "mix" / "train", max_open=10)
    data.chunk(0, 0)
    again = pickle.loads(pickle.dumps(data))
    assert chunks_of(again) == chunks_of(data)
    assert sum(one.max_open for one in data._sets) <= 10 + 1 + 4 * len(data._sets)


# ---------------------------------------------------------------- manifests that lie

def set_in(*path, value):
    def change(manifest):
        place = manifest
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
    return change


ATTACKS = [
    (set_in("version", value=2), r"format and version are \['ettin-mix', 2\]"),
    (set_in("chunk_length", value=0), "chunk_length is 0"), (set_in("chunk_length", value=True), "chunk_length is True"),
    (set_in("split", value="../../x"), "split is '../../x'"), (set_in("seed", value=2**32), "seed is 4294967296"),
    (set_in("tokenizer", value={}), "vocab_size is None"), (set_in("sets", value=[]), "it lists no set"),
    (set_in("sets", 0, "path", value="/etc"), r"sets\[0\]: path is '/etc'; a path relative to the mixture"),
    (set_in("sets", 0, "path", value="a\0b"), "path is"), (set_in("sets", 0, "path", value=3), "path is 3"),
    (set_in("sets", 0, "fingerprint", value="../../../etc/x"), "fingerprint is"),
    (set_in("runs", 0, "source", value="else"), r"runs\[0\]: source is 'else'"),
    (set_in("runs", 0, "set", value=3), r"runs\[0\]: set is 3; there are 3 sets"),
    (set_in("runs", 0, "set", value=-1), "set is -1"), (set_in("runs", 0, "pass", value=1.5), "pass is 1.5"),
    (set_in("runs", 0, "shards", value=[-1]), r"runs\[0\]: shards has an entry that is no whole number"),
    (set_in("runs", 0, "shards", value=[2**60]), "shards has an entry that is no"),
    (set_in("parts", 0, "extra", value=3), "extra is 3"), (set_in("parts", 0, "extra", value=["3"]), "extra has an entry"),
    (set_in("runs", 0, "shards", value=[9]), "it names shard 9 of set 0; that set has 9"),
    (set_in("runs", 0, "shards", value=[1, 1]), "a shard is taken twice in one pass"),
    (set_in("parts", 0, "lengths", value={"63": 1}), "1 chunks of length '63'; lengths of 1 to 62 are possible"),
    (set_in("parts", 0, "lengths", value={"\u0663": 1}), "lengths of 1 to 62"),
    (set_in("parts", 0, "lengths", value={"3": -1}), "-1 chunks of length '3'"),
    (set_in("parts", 0, "first", value=10**9), "its lengths must count as many"),
    (lambda m: m["parts"][0].update(first=9_999, extra=[], lengths={"5": 9_999}), "it takes 9999 chunks .* has"),
    (lambda m: m["parts"][0].update(first=0, extra=[5_000], lengths={"5": 1}), r"numbers \(5000,\) of shard"),
    (set_in("totals", "tokens", value=5), "totals.tokens is 5"),
    (lambda m: m.update(runs=[], parts=[]), "it takes no shard"),
    (lambda m: m["sets"][0].update(m["sets"][1]), "a shard is taken twice|that set has|has fingerprint"),
]


@pytest.mark.parametrize(("change", "message"), ATTACKS, ids=range(len(ATTACKS)))
def test_manifest_that_states_what_cannot_be_is_refused_at_opening(sets, change, message):
    build(sets)
    edit(sets.parent / "mix", change)
    with pytest.raises(ValueError, match=message):
        open_split(sets.parent / "mix" / "train")


def test_part_whose_chunks_are_others_than_stated_is_refused_before_use(sets):
    build(sets)
    mix = sets.parent / "mix"
    data = open_split(mix / "train")
    number = max(range(len(data._parts)), key=lambda number: data._parts[number].first)
    shard = int(np.flatnonzero(data._part == number)[0])
    stored = data._of(shard).sample_lengths(int(data._shard[shard]))

    def twice(manifest):  # one chunk two times, with lengths that agree
        part = manifest["parts"][number]
        chunks = chunk_permutation(manifest["seed"], part["source"], part["shard"], len(stored))
        part.update(first=part["first"] - 1, extra=[int(chunks[0])])
        manifest["totals"]["tokens"] += int(stored[chunks[0]]) - int(stored[chunks[part["first"]]])
        counts = np.bincount(stored[[*chunks[:part["first"]], chunks[0]]])
        part["lengths"] = {str(length): int(counts[length]) for length in np.flatnonzero(counts)}
    for change in (twice, set_in("seed", value=5)):
        original = (mix / "train" / MANIFEST).read_bytes()
        edit(mix, change)
        with pytest.raises(ValueError, match="the chunks that it takes of shard .* are not of the lengths that it states"):
            open_split(mix / "train").sample_lengths(shard)
        (mix / "train" / MANIFEST).write_bytes(original)


def test_index_beyond_a_part_is_an_error(sets):
    build(sets)
    data = open_split(sets.parent / "mix" / "train")
    shard = int(np.flatnonzero(data._part >= 0)[0])
    for index in (-1, int(data.samples[shard])):
        with pytest.raises(IndexError, match=f"chunk {index} of shard {shard}"):
            data.chunk(shard, index)
