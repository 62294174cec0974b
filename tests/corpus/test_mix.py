"""Claims of mix.py, mix_spec.py and data_prep/sources.yaml, and of reading what was built, on small sets."""

import itertools
import json
import os
import shutil
from collections import Counter

import numpy as np
import pytest
from memory_set import write_set
from mix_sets import BUDGETS, ENTRIES, build, chunks_of, make_sets, shards, write_spec

from ettin_foundry.corpus.mix import MixtureSplit, build_mix, open_split
from ettin_foundry.corpus.mix_spec import CATALOGUE, read_catalogue, read_spec
from ettin_foundry.data.manifest import MANIFEST
from ettin_foundry.data.order import Order
from ettin_foundry.data.shards import MDSSplit

T = 64


@pytest.fixture
def sets(tmp_path):
    """Sets that a test may spoil; mixtures are built beside them."""
    return make_sets(tmp_path / "sets")


def test_budgets_are_met_within_a_tenth_of_a_percent_with_whole_chunks_and_counted_repeats(sets):
    summary = build(sets)
    data = open_split(sets.parent / "mix" / "train")
    stored = {name: open_split(sets / folder / "train") for name, folder in
              (("web", "web"), ("code", "code"), ("books", "both"), ("notes", "both"))}
    taken = Counter(chunks_of(data))
    for name, wanted in BUDGETS.items():
        origin = stored[name]
        original = {origin.sample(shard, index)["doc"]: origin.chunk(shard, index) for shard in range(origin.num_shards)
                    for index in range(origin.samples[shard]) if origin.sources[shard] in (name, "github", "web")}
        counts = {doc: number for (source, doc), number in taken.items() if source == name}
        assert counts.keys() <= original.keys()
        given = sum(number * len(original[doc]) for doc, number in counts.items())
        available = sum(map(len, original.values()))
        share = summary.sources[name]
        assert (share.wanted, share.tokens, share.available) == (wanted, given, available)
        assert given == wanted  # 0.1% is wanted; with chunks of many lengths the last ones fit to the token
        assert share.chunks == sum(counts.values())
        assert share.repeats == given / available
        for doc in original:  # evenly: a chunk comes as often as there are full passes, or once more
            assert counts.get(doc, 0) in (wanted // available, wanted // available + 1)
        assert json.loads((data.local / MANIFEST).read_text())["sources"][name]["repeats"] == round(share.repeats, 6)
    assert summary.sources["notes"].repeats > 3 and summary.sources["web"].repeats < 1
    for shard in range(data.num_shards):  # whole chunks, token for token
        for index in range(data.samples[shard]):
            sample = data.sample(shard, index)
            assert np.array_equal(sample["tokens"], data.chunk(shard, index))
            assert len(sample["tokens"]) == data.sample_lengths(shard)[index]


@pytest.mark.parametrize("tokens", [40, 61, 500, 12_345])
def test_even_a_budget_of_few_chunks_is_met(sets, tokens):
    assert build(sets, sets={"web": {"set": "sets/web", "tokens": tokens}}).tokens == tokens


def test_budget_that_whole_chunks_cannot_meet_is_refused_and_leaves_nothing(sets):
    write_set(sets / "even", {"even": [np.full(300, 62)] * 3})
    even = {"even": {"set": "sets/even", "tokens": 62 * 200 + 20}}  # 0.16% from the nearest number of chunks
    with pytest.raises(ValueError, match="sets.even: a budget of 12,420 .* to within 20 tokens.*Raise the budget"):
        build(sets, sets=even)
    assert sorted(os.listdir(sets.parent)) == ["mix.yaml", "sets"]
    assert build(sets, sets=even, tolerance=0.002).tokens == 62 * 200
    even["even"]["tokens"] = 62 * 200 + 42
    assert build(sets, "above", sets=even, tolerance=0.002).tokens == 62 * 201


def test_mixture_holds_no_text_and_refers_to_sets_by_relative_paths(sets):
    build(sets)
    mix = sets.parent / "mix"
    files = sorted(path.relative_to(mix).as_posix() for path in mix.rglob("*") if path.is_file())
    assert files == ["tokenizer/tokenizer.json", "train/manifest.json", "validation/manifest.json"]
    manifest = (mix / "train" / MANIFEST).read_text()
    assert str(sets.parent) not in manifest and len(manifest) < 10_000
    assert [entry["path"] for entry in json.loads(manifest)["sets"]] == ["../sets/web", "../sets/code", "../sets/both"]
    before = chunks_of(open_split(mix / "train"))
    moved = sets.parent / "elsewhere" / "deeper"
    moved.parent.mkdir()
    os.mkdir(moved)
    shutil.move(sets, moved / "sets")
    shutil.move(mix, moved / "mix")
    assert chunks_of(open_split(moved / "mix" / "train")) == before


def test_choice_is_a_function_of_seed_and_source_alone(sets):
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        build(sets, name, seed)
    first, again, other = ((sets.parent / name / "train" / MANIFEST).read_bytes() for name in ("one", "again", "two"))
    assert first == again != other
    build(sets, "fewer", 1, sets={"web": {**ENTRIES["web"], "tokens": BUDGETS["web"]}})
    fewer, full = (Counter(pair for pair in chunks_of(open_split(sets.parent / name / "train")) if pair[0] == "web")
                   for name in ("fewer", "one"))
    assert fewer == full
    seeds = [Counter(chunks_of(open_split(sets.parent / name / "train"))) for name in ("one", "two")]
    assert open_split(sets.parent / "one" / "train").fingerprint != open_split(sets.parent / "two" / "train").fingerprint
    assert seeds[0] != seeds[1] and len(seeds[0]) > 100
    whole = {"set": "sets/web", "tokens": 7000}
    build(sets, "twins", 1, sets={"first": whole, "second": whole})
    runs = [json.loads((sets.parent / name / "train" / MANIFEST).read_text())["runs"] for name in ("twins", "one", "two")]
    chosen = [[run["shards"] for run in of if run["source"] in ("first", "second", "web")] for of in runs]
    assert chosen[0][0] != chosen[0][1] and chosen[1] != chosen[2]  # sources and seeds choose shards of their own
    data = open_split(sets.parent / "one" / "train")
    for part in np.flatnonzero(data._part >= 0):  # what is taken of a shard stays in stored order
        numbers = [int(data.sample(int(part), index)["doc"].rpartition("-")[2]) for index in range(data.samples[part])]
        assert numbers == sorted(numbers)


def test_mixture_of_one_whole_set_reads_as_the_set_itself(sets):
    available = int(MDSSplit(sets / "web" / "train").tokens.sum())
    build(sets, sets={"web": {"set": "sets/web", "tokens": available}})
    mine, its = open_split(sets.parent / "mix" / "train"), open_split(sets / "web" / "train")
    assert isinstance(mine, MixtureSplit) and isinstance(its, MDSSplit)
    assert (mine.num_shards, mine.sources, mine.split, mine.chunk_length) == (9, its.sources, "train", 62)
    assert mine.tokenizer == its.tokenizer
    for name in ("samples", "tokens"):
        assert np.array_equal(getattr(mine, name), getattr(its, name))
    assert np.array_equal(mine.rows(T), its.rows(T)) and mine.rows(77) is None
    for shard in range(9):
        for method in ("lengths", "sample_lengths", "last"):
            assert np.array_equal(getattr(mine, method)(shard), getattr(its, method)(shard))
        assert [mine.sample(shard, i)["doc"] for i in range(3)] == [its.sample(shard, i)["doc"] for i in range(3)]
    settings = {"packing": True, "shuffle": True, "seed": 21, "window": 3}
    orders = [Order(data, T, **settings) for data in (mine, its)]
    assert [orders[0].row(n) for n in range(300)] == [orders[1].row(n) for n in range(300)]


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
def test_an_epoch_of_a_mixture_has_every_chunk_as_often_as_it_is_taken_and_passes_in_turn(sets, packing):
    summary = build(sets)
    data = open_split(sets.parent / "mix" / "train")
    order = Order(data, T, packing=packing, shuffle=True, seed=3, window=4)
    found, passes, tokens = Counter(), [], 0
    for row in range(order.rows_per_epoch):
        _, shard, samples = order.row(row)
        assert order.tokens_before(row) == tokens
        tokens += sum(len(data.chunk(shard, sample)) + 2 for sample in samples)
        found.update((data.sources[shard], data.sample(shard, sample)["doc"]) for sample in samples)
        if data.sources[shard] == "notes":
            passes.append(int(data.passes[shard]))
    assert found == Counter(chunks_of(data))
    assert tokens == order.tokens_per_epoch == data.tokens.sum() + 2 * data.samples.sum()
    assert passes == sorted(passes) and set(passes) == set(range(summary.sources["notes"].tokens // summary.sources[
        "notes"].available + 1))


def test_loader_reads_a_mixture_and_resumes_in_it(tmp_path, tokenizer_dir):
    from ettin_foundry.data.loader import build_ettin_loader
    from ettin_foundry.data.tokenizer import fingerprint, load

    tokenizer = load(tokenizer_dir)
    text = {"tokenizer": fingerprint(tokenizer), "tokens": np.arange(300)}  # its special tokens are the last of 512
    write_set(tmp_path / "sets" / "web", {"web": shards(9, seed=1)}, **text)
    write_set(tmp_path / "sets" / "notes", {"notes": shards(2, seed=5)}, **text)
    entries = {name: {"set": f"sets/{name}", "tokens": tokens} for name, tokens in (("web", 7000), ("notes", 10_500))}
    build(tmp_path / "sets", sets=entries)
    settings = {"objective": "clm", "max_seq_len": T, "shuffle_window": 3,
                "dataset": {"local": str(tmp_path / "mix"), "split": "train"}}
    loader = build_ettin_loader(tokenizer, 4, **settings).dataloader
    data, order = open_split(tmp_path / "mix" / "train"), loader.dataset.order
    steps = order.rows_per_epoch // 4 + 5  # beyond the end of the epoch
    batches = list(itertools.islice(iter(loader), steps))
    for step, batch in enumerate(batches):
        assert batch["tokens_before"] == order.tokens_before(4 * step)
        for at in range(4):
            _, shard, samples = order.row(4 * step + at)
            for piece, sample in enumerate(samples):
                found = batch["input_ids"][at][batch["sequence_id"][at] == piece]
                assert found[1:-1].tolist() == data.chunk(shard, sample).tolist()
            assert batch["sequence_id"][at].max() == len(samples) - 1
    resumed = build_ettin_loader(tokenizer, 4, **settings).dataloader
    resumed.dataset.load_state_dict(loader.dataset.state_dict(4 * (steps - 8), True))
    for batch, expected in zip(itertools.islice(iter(resumed), 8), batches[-8:], strict=True):
        assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
    build(tmp_path / "sets", "other", seed=22, sets=entries)
    other = {**settings, "dataset": {"local": str(tmp_path / "other"), "split": "train"}}
    with pytest.raises(ValueError, match="fingerprint"):
        build_ettin_loader(tokenizer, 4, **other).dataloader.dataset.load_state_dict(resumed.dataset.state_dict(0, False))


def test_validation_is_that_of_all_sets_each_once(sets):
    summary = build(sets)  # books and notes share a set, code has no validation
    data = open_split(sets.parent / "mix" / "validation")
    originals = [open_split(sets / name / "validation") for name in ("web", "both")]
    assert sorted(doc for _, doc in chunks_of(data)) == sorted(doc for one in originals for _, doc in chunks_of(one))
    assert summary.validation_chunks == data.samples.sum() and set(data.sources) == {"web", "books", "notes"}
    shutil.rmtree(sets.parent / "mix")
    whole = {"set": "sets/both", "tokens": 3000}
    build(sets, sets={"first": whole, "second": whole})  # a set behind two sources
    assert sorted(doc for _, doc in chunks_of(open_split(sets.parent / "mix" / "validation"))) == sorted(
        doc for _, doc in chunks_of(originals[1]))
    shutil.rmtree(sets.parent / "mix")
    build(sets, sets={"code": {"set": "sets/code", "tokens": 3000}})
    assert not (sets.parent / "mix" / "validation").exists()


# ---------------------------------------------------------------- specifications

WEB = {"web": {"set": "sets/web", "tokens": 3000}}
ARXIV = {"phase": "decay", "sets": {"arxiv": "sets/web"},
         "leave_out": [name for name in read_catalogue()["phases"]["decay"] if name != "arxiv"]}
WRONG = [
    ({"sets": None}, "sets: None given; at least one"), ({"sets": {1: "x"}}, "sets: .* given; at least one"),
    ({"stes": 1}, "'stes' given; possible are phase, .*Did you mean sets"),
    ({"sets": {"web": {"set": "sets/web", "token": 3}}}, "sets.web: 'token' given.*Did you mean tokens"),
    ({"sets": {"web": "sets/web"}}, "sets.web: .* given without phase; .*tokens"),
    ({"sets": {"web": {"tokens": 3}}}, "sets.web: .* a folder or URL of a converted set is needed"),
    ({"sets": {"web": {**WEB["web"], "tokens": -1}}}, "sets.web.tokens: -1 given; a number above 0"),
    ({"sets": {"web": {**WEB["web"], "tokens": float("nan")}}}, "sets.web.tokens: nan given"),
    ({"sets": {"web": {**WEB["web"], "source": "wbe"}}}, "sets.web: source: 'wbe' given; the set .* holds 'web'"),
    ({"sets": WEB, "scale": 2}, "scale: 2 given without phase, where it has no effect"),
    ({"sets": WEB, "tolerance": 0}, "tolerance: 0 given"),
    ({"sets": {"web": {**WEB["web"], "set": "sets"}}}, "sets.web: .* holds no manifest"),
    ({"phase": "deccay"}, "phase: 'deccay' given; possible are pretrain.*Did you mean decay"),
    ({"phase": "decay"}, "sets, for phase decay: 'web' given"),
    ({**ARXIV, "leave_out": None}, "sets: nothing given for dclm_dolmino, .*leave_out"),
    ({**ARXIV, "sets": {"arxiv": {"set": "sets/web", "tokens": 3}}}, "arxiv.tokens: 3 given with phase"),
    ({**ARXIV, "scale": 1, "tokens": 3}, "scale: 1 and tokens: 3 given"),
    ({**ARXIV, "scale": "much"}, "scale: 'much' given"), ({**ARXIV, "tokens": True}, "tokens: True given"),
    ({**ARXIV, "leave_out": ["arxiv"]}, "arxiv stands in sets and in leave_out"),
    ({**ARXIV, "leave_out": ["moon"]}, "leave_out, for phase decay: 'moon' given"),
    ({**ARXIV, "leave_out": "books"}, "leave_out: 'books' given; a list"),
    ({**ARXIV, "catalogue": "nothing.yaml"}, "nothing.yaml: no such file; a catalogue"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_specification_is_refused_naming_the_key(sets, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build(sets, **changes)
    assert sorted(os.listdir(sets.parent)) == ["mix.yaml", "sets"]


def test_unreadable_specification_and_a_used_folder_are_refused(sets):
    with pytest.raises(FileNotFoundError, match="nothing.yaml: no such file"):
        build_mix(sets / "nothing.yaml", sets.parent / "mix")
    for text in ("{", "- a\n", "3"):
        (sets / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"bad.yaml: (is not YAML|holds)"):
            build_mix(sets / "bad.yaml", sets.parent / "mix")
    with pytest.raises(FileExistsError, match="a new or an empty folder"):
        build(sets, "sets")
    with pytest.raises(ValueError, match="out: s3://bucket/mix given; a local folder"):
        build_mix(write_spec(sets.parent), "s3://bucket/mix")
    with pytest.raises(ValueError, match="seed: -1 given"):
        build(sets, seed=-1)


def test_phase_of_the_catalogue_is_scaled_or_given_a_total(sets):
    budgets = read_catalogue()["phases"]["decay"]
    kept = {"dclm_dolmino": "sets/web", "code_repos": "sets/code", "books": {"set": "sets/both", "source": "books"}}
    changes = {"phase": "decay", "sets": kept, "leave_out": [name for name in budgets if name not in kept]}
    scaled = build(sets, "scaled", scale=2e-7, **changes)
    assert {name: share.wanted for name, share in scaled.sources.items()} == {
        name: round(budgets[name] * 200) for name in ("dclm_dolmino", "code_repos", "books")}
    total = build(sets, "total", tokens="1e4", **changes)
    assert abs(total.tokens - 10_000) <= 1  # three budgets, each rounded to a whole token
    assert total.sources["books"].wanted / total.sources["code_repos"].wanted == pytest.approx(
        budgets["books"] / budgets["code_repos"], rel=1e-3)  # budgets are whole tokens
    manifest = json.loads((sets.parent / "total" / "train" / MANIFEST).read_text())
    assert manifest["phase"] == "decay" and manifest["scale"] == pytest.approx(10_000 / 56.7e9)
    assert read_spec(write_spec(sets.parent, **changes)).budgets["books"] == 10_500_000_000


def test_link_in_a_tokenizer_folder_is_not_followed(sets):
    secret = sets / "secret"
    secret.write_text("secret")
    (sets / "web" / "tokenizer" / "more.json").symlink_to(secret)
    with pytest.raises(ValueError, match="more.json.*plain file"):
        build(sets)
    shutil.rmtree(sets / "web" / "tokenizer")
    with pytest.raises(FileNotFoundError, match="holds no file; the tokenizer"):
        build(sets)


# ---------------------------------------------------------------- data_prep/sources.yaml

PUBLISHED = """
    Arxiv 28.0 4.1 3.0 | Books 5.3 0.8 10.5 | CC Head 356.6 - - | CC News 7.3 - - | Code_Repos - - 20.2 | DCLM 837.2 - - |
    DCLM (Dolmino) - 175.5 26.0 | Math (Dolmino) - 10.4 5.0 | OpenWebMath 12.7 - - | Algebraic StackExchange 12.6 - - |
    PeS2o 57.3 8.3 - | Reddit 80.3 6.2 - | StackExchange 19.6 - - | StackExchange (Dolmino) - 2.7 4.0 | Textbooks - - 0.5 |
    Starcoder 263.9 38.4 - | Tulu Flan 16.6 2.4 4.1 | Wikipedia 7.3 0.5 3.0"""


def test_catalogue_states_the_published_mixtures_and_every_fact_or_why_there_is_none():
    catalogue = read_catalogue()
    phases = catalogue["phases"]
    assert list(phases) == ["pretrain", "extend", "decay"]
    titles = {name: facts["title"] for name, facts in catalogue["sources"].items()}
    rows = [row.split() for row in PUBLISHED.split("|")]
    for column, phase in enumerate(phases):
        stated = {" ".join(row[:-3]): float(row[column - 3]) for row in rows if row[column - 3] != "-"}
        assert {titles[name]: billions for name, billions in phases[phase].items()} == stated
    assert [round(sum(budgets.values()), 1) for budgets in phases.values()] == [1704.7, 249.3, 76.3]  # as published
    assert set(titles) == set().union(*phases.values())
    for name, facts in catalogue["sources"].items():
        assert set(facts) == {"title", "hub", "config", "urls", "text_field", "id_field", "licence"}, name
        for pattern in facts["urls"] or []:
            assert pattern.startswith("https://olmo-data.org/dolma-v1_7/") and pattern.endswith(".json.gz")
        assert not (facts["hub"] and facts["urls"])
    for line in CATALOGUE.read_text().splitlines():
        assert "#" in line or ": null" not in line or line.strip() == "config: null", line
