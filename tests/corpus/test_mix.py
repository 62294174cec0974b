"""Claims of corpus/mix.py and data_prep/sources.yaml, and of reading what was built, on small datasets."""

import itertools
import json
import os
import shutil
from collections import Counter

import numpy as np
import pytest
from memory_set import write_set
from mix_sets import BUDGETS, ENTRIES, build, chunks_of, make_sets, shards, write_spec

from ettin_foundry.corpus.mix import CATALOGUE, Catalogue, build_mix, read_yaml
from ettin_foundry.data.manifest import MANIFEST
from ettin_foundry.data.mixture import MixtureSplit, open_split
from ettin_foundry.data.order import Order
from ettin_foundry.data.shards import MDSSplit

T = 64
PHASES = read_yaml(CATALOGUE, Catalogue).phases


@pytest.fixture
def sets(tmp_path):
    """Datasets that a test may spoil; mixtures are built beside them."""
    return make_sets(tmp_path / "sets")


def test_budgets_are_met_to_the_nearest_chunk_and_repeats_are_counted(sets):
    summary = build(sets)
    data = open_split(sets.parent / "mix" / "train")
    taken = Counter(chunks_of(data))
    for name, wanted in BUDGETS.items():
        origin = open_split(sets / ENTRIES[name]["set"].removeprefix("sets/") / "train")
        original = {origin.sample(shard, index)["doc"]: len(origin.chunk(shard, index)) for shard in range(origin.num_shards)
                    for index in range(origin.samples[shard]) if origin.sources[shard] in (name, "github", "web")}
        counts = {doc: number for (source, doc), number in taken.items() if source == name}
        given, available = sum(number * original[doc] for doc, number in counts.items()), sum(original.values())
        assert abs(given - wanted) <= 62 / 2
        assert summary.sources[name] == {"chunks": sum(counts.values()), "tokens": given, "wanted": wanted,
                                         "available": available, "repeats": round(given / available, 6),
                                         "licence": f"licence of {'github' if name == 'code' else name}"}
        for doc in original:  # evenly: a chunk comes as often as there are full passes, or once more
            assert counts.get(doc, 0) in (wanted // available, wanted // available + 1)
    assert summary.sources["notes"]["repeats"] > 3 and summary.sources["web"]["repeats"] < 1
    assert json.loads((data.local / MANIFEST).read_text())["sources"] == summary.sources


@pytest.mark.parametrize("tokens,expected", [(62 * 200 + 20, 200), (62 * 200 + 42, 201), (40, 1), (62 * 900, 900),
                                             (62 * 1000, 1000)])
def test_even_a_budget_of_few_chunks_is_met(sets, tokens, expected):
    write_set(sets / "even", {"even": [np.full(300, 62)] * 3})
    assert build(sets, sets={"even": {"set": "sets/even", "tokens": tokens}}).sources["even"]["chunks"] == expected


def test_budget_below_half_a_chunk_is_refused_and_leaves_nothing(sets):
    write_set(sets / "even", {"even": [np.full(300, 62)] * 3})
    with pytest.raises(ValueError, match="sets.even: its budget must be at least half a chunk"):
        build(sets, sets={"even": {"set": "sets/even", "tokens": 30}})
    assert sorted(os.listdir(sets.parent)) == ["mix.yaml", "sets"]


def test_mixture_holds_no_text_and_refers_to_datasets_by_relative_paths(sets):
    build(sets)
    mix = sets.parent / "mix"
    files = sorted(path.relative_to(mix).as_posix() for path in mix.rglob("*") if path.is_file())
    assert files == ["tokenizer/tokenizer.json", "train/manifest.json", "validation/manifest.json"]
    manifest = (mix / "train" / MANIFEST).read_text()
    assert str(sets.parent) not in manifest and len(manifest) < 10_000
    assert [entry["path"] for entry in json.loads(manifest)["sets"]] == ["../sets/web", "../sets/code", "../sets/both"]
    before = chunks_of(open_split(mix / "train"))
    moved = sets.parent / "elsewhere" / "deeper"
    moved.mkdir(parents=True)
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
    whole = {"set": "sets/web", "tokens": 7000}
    build(sets, "twins", 1, sets={"first": whole, "second": whole})
    runs = [json.loads((sets.parent / name / "train" / MANIFEST).read_text())["runs"] for name in ("twins", "one", "two")]
    chosen = [[run["shards"] for run in of if run["source"] in ("first", "second", "web")] for of in runs]
    assert chosen[0][0] != chosen[0][1] and chosen[1] != chosen[2]  # sources and seeds choose shards of their own


def test_mixture_of_one_whole_dataset_reads_as_the_dataset_itself(sets):
    available = int(MDSSplit(sets / "web" / "train").tokens.sum())
    build(sets, sets={"web": {"set": "sets/web", "tokens": available}})
    mine, its = open_split(sets.parent / "mix" / "train"), open_split(sets / "web" / "train")
    assert isinstance(mine, MixtureSplit) and isinstance(its, MDSSplit)
    settings = {"packing": True, "shuffle": True, "seed": 21, "window": 3}
    orders = [Order(data, T, **settings) for data in (mine, its)]
    assert [orders[0].row(n) for n in range(300)] == [orders[1].row(n) for n in range(300)]
    assert [doc for _, doc in chunks_of(mine)] == [doc for _, doc in chunks_of(its)]


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
    assert passes == sorted(passes) and max(passes) == int(summary.sources["notes"]["repeats"])


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
    order = loader.dataset.order
    steps = order.rows_per_epoch // 4 + 5  # beyond the end of the epoch
    batches = list(itertools.islice(iter(loader), steps))
    assert [batch["tokens_before"] for batch in batches] == [order.tokens_before(4 * step) for step in range(steps)]
    resumed = build_ettin_loader(tokenizer, 4, **settings).dataloader
    resumed.dataset.load_state_dict(loader.dataset.state_dict(4 * (steps - 8), True))
    for batch, expected in zip(itertools.islice(iter(resumed), 8), batches[-8:], strict=True):
        assert batch["input_ids"].tolist() == expected["input_ids"].tolist()
    build(tmp_path / "sets", "other", seed=22, sets=entries)
    other = {**settings, "dataset": {"local": str(tmp_path / "other"), "split": "train"}}
    with pytest.raises(ValueError, match="fingerprint"):
        build_ettin_loader(tokenizer, 4, **other).dataloader.dataset.load_state_dict(resumed.dataset.state_dict(0, False))


def test_validation_is_that_of_all_datasets_each_once(sets):
    summary = build(sets)  # books and notes share a dataset, code has no validation
    data = open_split(sets.parent / "mix" / "validation")
    originals = [open_split(sets / name / "validation") for name in ("web", "both")]
    assert sorted(doc for _, doc in chunks_of(data)) == sorted(doc for one in originals for _, doc in chunks_of(one))
    assert summary.validation_chunks == data.samples.sum() and set(data.sources) == {"web", "books", "notes"}
    whole = {"set": "sets/both", "tokens": 3000}
    build(sets, "twice", sets={"first": whole, "second": whole})  # a dataset behind two sources
    assert sorted(doc for _, doc in chunks_of(open_split(sets.parent / "twice" / "validation"))) == sorted(
        doc for _, doc in chunks_of(originals[1]))
    build(sets, "none", sets={"code": {"set": "sets/code", "tokens": 3000}})
    assert not (sets.parent / "none" / "validation").exists()


# ---------------------------------------------------------------- specifications

WEB = {"web": {"set": "sets/web", "tokens": 3000}}
ARXIV = {"phase": "decay", "sets": {"arxiv": "sets/web"}, "leave_out": [name for name in PHASES["decay"] if name != "arxiv"]}
WRONG = [
    ({"sets": None}, "sets: Field required"), ({"sets": {1: "x"}}, "sets"), ({"sets": {}}, "sets"),
    ({"stes": 1}, "stes: .*possible keys are sets, phase"),
    ({"sets": {"web": {"set": "sets/web", "token": 3}}}, "sets.web.token: "),
    ({"sets": {"web": "sets/web"}}, "without phase, sets must be .*tokens"),
    ({"sets": {"web": {"tokens": 3}}}, "sets.web.set: Field required"),
    ({"sets": {"web": {**WEB["web"], "tokens": -1}}}, "sets.web.tokens: .*greater than 0, got -1"),
    ({"sets": {"web": {**WEB["web"], "tokens": float("nan")}}}, "sets.web.tokens: "),
    ({"sets": {"web": {**WEB["web"], "source": "wbe"}}}, "sets.web.source must be one of web, got 'wbe'"),
    ({"sets": WEB, "scale": 2}, "without phase"), ({"sets": WEB, "tolerance": 0.1}, "tolerance: "),
    ({"sets": {"web": {**WEB["web"], "set": "sets"}}}, "sets.web: .* holds no manifest"),
    ({"phase": "deccay"}, "phase must be one of pretrain, extend, decay, got 'deccay'"),
    ({"phase": "decay"}, "source of phase decay .* see .*web"),
    ({**ARXIV, "leave_out": None}, "see .*dclm_dolmino"), ({**ARXIV, "leave_out": [*PHASES["decay"]]}, "see arxiv"),
    ({**ARXIV, "leave_out": [*ARXIV["leave_out"], "moon"]}, "see moon"),
    ({**ARXIV, "sets": {"arxiv": {"set": "sets/web", "tokens": 3}}}, "with phase, .* no tokens in sets"),
    ({**ARXIV, "scale": 1, "tokens": 3}, "not both"), ({**ARXIV, "scale": "much"}, "scale: .*'much'"),
    ({**ARXIV, "leave_out": "books"}, "leave_out: "), ({**ARXIV, "catalogue": "nothing.yaml"}, "nothing.yaml"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_specification_is_refused_naming_the_key(sets, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build(sets, **changes)
    assert sorted(os.listdir(sets.parent)) == ["mix.yaml", "sets"]


def test_unreadable_specification_and_a_used_folder_are_refused(sets):
    for text in ("{", "- a\n", "3"):
        (sets / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"bad.yaml"):
            build_mix(sets / "bad.yaml", sets.parent / "mix")
    with pytest.raises(FileExistsError, match="a new or an empty folder"):
        build(sets, "sets")
    for out, seed in (("s3://bucket/mix", 0), (sets.parent / "mix", -1)):
        with pytest.raises(ValueError, match="out must be a local folder and seed"):
            build_mix(write_spec(sets.parent), out, seed=seed)
    (sets.parent / "empty").mkdir()
    build(sets, "empty")


def test_phase_of_the_catalogue_is_scaled_or_given_a_total(sets):
    budgets = PHASES["decay"]
    kept = {"dclm_dolmino": "sets/web", "code_repos": "sets/code", "books": {"set": "sets/both", "source": "books"}}
    changes = {"phase": "decay", "sets": kept, "leave_out": [name for name in budgets if name not in kept]}
    scaled = build(sets, "scaled", scale=2e-7, **changes)
    assert {name: facts["wanted"] for name, facts in scaled.sources.items()} == {
        name: round(budgets[name] * 200) for name in kept}
    total = build(sets, "total", tokens="1e4", **changes)  # YAML reads 1e4 as text
    wanted = {name: facts["wanted"] for name, facts in total.sources.items()}
    assert abs(sum(wanted.values()) - 10_000) <= 1  # three budgets, each rounded to a whole token
    assert wanted["books"] / wanted["code_repos"] == pytest.approx(budgets["books"] / budgets["code_repos"], rel=1e-3)
    manifest = json.loads((sets.parent / "total" / "train" / MANIFEST).read_text())
    assert manifest["phase"] == "decay" and manifest["scale"] == pytest.approx(10_000 / 56.7e9)


def test_link_in_a_tokenizer_folder_is_not_followed(sets):
    (sets / "secret").write_text("secret")
    (sets / "web" / "tokenizer" / "more.json").symlink_to(sets / "secret")
    with pytest.raises(ValueError, match="more.json.*plain file"):
        build(sets)
    shutil.rmtree(sets / "web" / "tokenizer")
    with pytest.raises(FileNotFoundError, match="tokenizer holds no file"):
        build(sets)


# ---------------------------------------------------------------- data_prep/sources.yaml

PUBLISHED = """
    Arxiv 28.0 4.1 3.0 | Books 5.3 0.8 10.5 | CC Head 356.6 - - | CC News 7.3 - - | Code_Repos - - 20.2 | DCLM 837.2 - - |
    DCLM (Dolmino) - 175.5 26.0 | Math (Dolmino) - 10.4 5.0 | OpenWebMath 12.7 - - | Algebraic StackExchange 12.6 - - |
    PeS2o 57.3 8.3 - | Reddit 80.3 6.2 - | StackExchange 19.6 - - | StackExchange (Dolmino) - 2.7 4.0 | Textbooks - - 0.5 |
    Starcoder 263.9 38.4 - | Tulu Flan 16.6 2.4 4.1 | Wikipedia 7.3 0.5 3.0"""


def test_catalogue_states_the_published_mixtures_and_every_fact_or_why_there_is_none():
    sources = read_yaml(CATALOGUE, Catalogue).sources
    titles = {name: facts["title"] for name, facts in sources.items()}
    rows = [row.split() for row in PUBLISHED.split("|")]
    for column, phase in enumerate(("pretrain", "extend", "decay")):
        stated = {" ".join(row[:-3]): float(row[column - 3]) for row in rows if row[column - 3] != "-"}
        assert {titles[name]: billions for name, billions in PHASES[phase].items()} == stated
    assert [round(sum(budgets.values()), 1) for budgets in PHASES.values()] == [1704.7, 249.3, 76.3]  # as published
    for name, facts in sources.items():
        assert set(facts) == {"title", "hub", "config", "urls", "text_field", "id_field", "licence"}, name
        assert not (facts["hub"] and facts["urls"])
    for line in CATALOGUE.read_text().splitlines():
        assert "#" in line or ": null" not in line or line.strip() == "config: null", line
