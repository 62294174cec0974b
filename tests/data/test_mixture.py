"""Mixtures as they are read: datasets that were altered, manifests that lie, datasets and mixtures elsewhere."""

import pickle
import shutil

import fsspec
import numpy as np
import pytest
from hand_made import edit, set_in, spoil
from memory_set import write_set
from mix_sets import build, chunks_of, make_sets, shards

from ettin_foundry.data import MANIFEST
from ettin_foundry.data.mixture import open_split


@pytest.fixture
def sets(tmp_path):
    """Datasets that a test may spoil; mixtures are built beside them."""
    return make_sets(tmp_path / "sets")


@pytest.fixture
def mix(sets):
    build(sets)
    return sets.parent / "mix"


def test_a_missing_or_altered_dataset_is_refused_by_name_at_opening(sets, mix):
    shutil.rmtree(sets / "both" / "train")
    with pytest.raises(FileNotFoundError, match=r"its dataset '\.\./sets/both' \(for books, notes\).*no manifest.json"):
        open_split(mix / "train")
    write_set(sets / "both", {"books": shards(3, seed=4), "notes": shards(2, seed=8)}, seed=4)
    with pytest.raises(ValueError, match=r"its dataset '\.\./sets/both' \(for books, notes\).*fingerprint.*altered"):
        open_split(mix / "train")


@pytest.fixture
def cloud(sets):
    """Puts folders below memory://, a file system of this process."""
    memory = fsspec.filesystem("memory")
    yield lambda folder, name: memory.put(f"{folder}/", f"/{name}/", recursive=True)
    memory.store.clear()


def test_a_remote_mixture_is_read_with_its_datasets_beside_it(sets, mix, cloud, tmp_path):
    expected = chunks_of(open_split(mix / "train"))
    cloud(mix, "bucket/mixtures/mix")
    cloud(sets, "bucket/mixtures/sets")
    local = tmp_path / "local" / "train"
    for _ in range(2):  # fetched, then there
        assert chunks_of(open_split(local, remote="memory://bucket/mixtures/mix/train")) == expected
    copy = open_split(tmp_path / "copy" / "train", remote=str(mix / "train"))  # a folder is fetched from too
    assert copy.fetches and chunks_of(copy) == expected and list((tmp_path / "copy").rglob("*.mds"))
    edit(tmp_path / "local" / "train", lambda m: m.update(seed=5))
    with pytest.raises(ValueError, match="holds another dataset than dataset.remote"):
        open_split(local, remote="memory://bucket/mixtures/mix/train")


def test_one_limit_holds_for_all_datasets_of_a_mixture_together(sets, mix, cloud, tmp_path):
    cloud(sets, "bucket")
    for name, place in (("near", "sets"), ("far", "memory://bucket")):
        where = {"web": f"{place}/web", "code": "sets/code", "both": f"{place}/both"}
        build(sets, name, sets={key: {"set": where[key], "tokens": 6000} for key in where})
    folder = tmp_path / "far" / "train"
    sizes = sorted(path.stat().st_size for path in (sets / "web" / "train").glob("*.mds"))
    expected, most = open_split(tmp_path / "near" / "train"), 0
    web = [shard for shard, source in enumerate(expected.sources) if source == "web"]
    need = sum(sizes[-len(web):])  # far more than a third of the limit for one of three datasets
    data = pickle.loads(pickle.dumps(open_split(folder, cache_limit=need)))
    data.check_room(web)
    with pytest.raises(ValueError, match=rf"dataset.cache_limit must be at least \d+ bytes.* got {need}"):
        data.check_room(range(expected.num_shards))
    assert all(data.chunk(shard, 0).size for shard in web) and len(list(folder.rglob("*.mds"))) == len(web)  # no share
    for shard in range(data.num_shards):
        data.prefetch([shard])
        assert np.array_equal(data.chunk(shard, 0), expected.chunk(shard, 0))
        most = max(most, sum(path.stat().st_size for path in folder.rglob("*.mds")))
    assert need // 2 < most <= need < sum(sizes)
    with pytest.raises(ValueError, match="dataset.cache_limit must be left out"):
        open_split(mix / "train", cache_limit=100_000)


def test_any_wrong_value_in_a_manifest_is_refused_or_changes_nothing_of_the_data(mix):
    expected, refusals = chunks_of(open_split(mix / "train")), 0
    for place, value in spoil(mix / "train" / MANIFEST, values=2):
        try:
            found = chunks_of(open_split(mix / "train"))
        except (ValueError, OSError) as error:
            assert str(mix.parent) in str(error), (place, value, error)
            refusals += 1
        else:
            assert found == expected, (place, value)
    assert refusals > 100


@pytest.mark.parametrize(("change", "message"), [
    (set_in("runs", 0, "source", value="else"), "source of runs"),
    (set_in("sets", 0, "path", value="a\0b"), "sets.0.path"),
    (set_in("runs", 0, "shards", value=[9]), "it names shard 9 of a dataset; that has 9"),
    (set_in("runs", 0, "shards", value=[1, 1]), "take a shard once"),
    (set_in("parts", value=[{"source": "web", "set": 0, "shard": 0}]), "parts: .*at most 0 items"),
    (set_in("totals", "samples", value=3), "totals.samples"),
    (lambda m: m["sets"][0].update(m["sets"][1]), "take a shard once|that has|has fingerprint"),
    *[(lambda m, change=change: m.update({**change, "runs": m["runs"][:1]}),
       r"its dataset '\.\./sets/web' .* has chunk_length 62 and tokenizer") for change in (
        {"chunk_length": 50}, {"tokenizer": {"name": "test", "vocab_size": 119}})]], ids=range(9))
def test_a_manifest_that_contradicts_itself_is_refused_at_opening(mix, change, message):
    edit(mix / "train", change)
    with pytest.raises(ValueError, match=message):
        open_split(mix / "train")
