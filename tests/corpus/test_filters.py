"""Claims of filters.py: which documents stay, for which reason they go, and which settings are refused."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from ettin_foundry.corpus.decontamination import NgramIndex
from ettin_foundry.corpus.filters import FilterChain, FilterOptions, build_filters

SECRET = "the answer to question number seven of the famous benchmark is of course forty two"
INDEX = NgramIndex.build([("bench/7", SECRET)])

PREDICATES = """
import functools

calls = []

def keep(text, id):
    calls.append((text, id))
    return "keep" in text

def named(text: str, id: str) -> bool:
    return id != "bad"

def fails(text, id):
    if id == "doc-7":
        raise ZeroDivisionError("division by zero")
    return True

def stops(text, id):
    raise StopIteration

def none(text, id):
    return None

def one(text, id):
    return 1

def compared(text, id):
    import numpy
    return numpy.float64(len(text)) > 3

async def later(text, id):
    return True

def short_list(text):
    return True

def three(text, id, language):
    return True

def defaults(text, id="", *, language="en"):
    return True

@functools.lru_cache
def cached(text, id):
    return True

def checked(function):
    @functools.wraps(function)
    def inner(*arguments):
        return function(*arguments)
    return inner

@checked
def wrapped(text, id):
    return True

anonymous = lambda text, id: True
number = 7

class Rule:
    def __call__(self, text, id):
        return True

rule = Rule()
partial = functools.partial(three, language="en")
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an importable module that holds PREDICATES, new in every test."""
    name = f"rules_{hashlib.md5(str(tmp_path).encode()).hexdigest()}"
    (tmp_path / f"{name}.py").write_text(PREDICATES)
    (tmp_path / f"{name}_broken.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def reasons(options: FilterOptions, texts: list[str], ngrams: NgramIndex | None = None) -> list[str | None]:
    """Asked both ways, which must agree."""
    ids = [f"doc-{number}" for number in range(len(texts))]
    chains = build_filters(options, ngrams=ngrams), build_filters(options, ngrams=ngrams)
    together = chains[0].reasons(texts, ids)
    assert together == [chains[1].reason(text, id, num_characters=len(text)) for text, id in zip(texts, ids)]
    assert chains[0].take_reports() == chains[1].take_reports()
    return together


def test_nothing_is_on_by_default() -> None:
    options = FilterOptions()
    chain = build_filters(options)
    assert options.num_gates == 0 and not chain.needs_text and not chain.needs_pieces
    assert reasons(options, ["", "a", SECRET, "x" * 100_000]) == [None] * 4
    assert chain.reason(None, "d", num_characters=10**12) is None


def test_length_is_counted_in_characters_and_both_limits_are_kept() -> None:
    texts = ["\u00e9" * n for n in (0, 2, 3, 4, 5, 6, 7)]
    found = reasons(FilterOptions(min_characters=3, max_characters=5), texts)
    assert found == ["short", "short", None, None, None, "long", "long"]
    assert reasons(FilterOptions(max_characters=1), ["a", "\U0001f600", "ab"]) == [None, None, "long"]
    assert reasons(FilterOptions(min_characters=2), ["a", "ab"]) == ["short", None]


def test_a_predicate_gets_text_and_id_and_its_answer_decides(module: str) -> None:
    options = FilterOptions(predicates=[f"{module}:keep"])
    chain = build_filters(options)
    assert chain.needs_text and chain.needs_pieces
    assert chain.reasons(["keep me", "not me"], ["x", "y"]) == [None, f"predicate {module}:keep"]
    assert sys.modules[module].calls == [("keep me", "x"), ("not me", "y")]


def test_gates_are_asked_in_order_and_the_first_that_refuses_names_the_reason(module: str) -> None:
    options = FilterOptions(min_characters=4, max_characters=200, predicates=[f"{module}:keep", f"{module}:named"],
                            decontaminate=["bench.jsonl"], decontaminate_drop=True)
    assert options.num_gates == 5
    chain = build_filters(options, ngrams=INDEX)
    texts = ["a", "abcd", "keep", "keep", SECRET + " keep", SECRET, "keep " * 100]
    ids = ["0", "1", "2", "bad", "4", "5", "6"]
    found = chain.reasons(texts, ids)
    assert found == [chain.reason(text, id, num_characters=len(text)) for text, id in zip(texts, ids)]
    assert found == ["short", f"predicate {module}:keep", None, f"predicate {module}:named", "contaminated",
                     f"predicate {module}:keep", "long"]
    assert ("a", "0") not in sys.modules[module].calls  # a dropped document is not asked about again
    assert [report["doc"] for report in chain.take_reports()] == ["4", "4"]


@pytest.mark.parametrize("drop", [False, True])
def test_overlap_is_reported_always_and_dropped_on_demand(drop: bool) -> None:
    options = FilterOptions(decontaminate=["bench.jsonl"], decontaminate_drop=drop)
    chain = build_filters(options, ngrams=INDEX)
    assert not chain.needs_text and chain.needs_pieces
    texts = ["clean text", f"So: {SECRET.upper()}!", " ".join(SECRET.split()[:12])]
    assert chain.reasons(texts, ["a", "b", "c"]) == [None, "contaminated" if drop else None, None]
    words = SECRET.split()
    assert len(words) == 15
    report = {"doc": "b", "evaluation": "bench/7", "ngram": " ".join(words[:13]), "count": 3}
    assert chain.take_reports() == [report]
    assert chain.take_reports() == []
    json.dumps(report)


def test_a_long_document_is_searched_in_pieces_and_counted_by_its_stated_length(module: str) -> None:
    options = FilterOptions(max_characters=10**6, decontaminate=["bench.jsonl"], decontaminate_drop=True)
    chain = build_filters(options, ngrams=INDEX)
    pieces = ["clean words " * 1000, SECRET[:30], SECRET[30:], " clean words" * 1000]
    assert chain.reason(None, "d", num_characters=30_000, pieces=lambda: iter(pieces)) == "contaminated"
    assert chain.take_reports()[0]["count"] == 3
    assert chain.reason(None, "d", num_characters=30_000, pieces=lambda: iter(pieces[:2])) is None
    assert chain.reason(None, "d", num_characters=10**6 + 1) == "long"  # decided before the text is asked for
    with pytest.raises(ValueError, match="document 'd': neither text nor pieces given"):
        chain.reason(None, "d", num_characters=5)
    with pytest.raises(ValueError, match=f"document 'd': no text given; the predicate {module}:keep needs it"):
        build_filters(FilterOptions(predicates=[f"{module}:keep"])).reason(None, "d", num_characters=5)


@pytest.mark.parametrize(("name", "error"), [("fails", r"it raised ZeroDivisionError \(division by zero\)"),
                                             ("stops", r"it raised StopIteration \(\)"),
                                             ("none", r"it returned None \(NoneType\)"), ("one", r"it returned 1 \(int\)"),
                                             ("later", r"it returned <coroutine .* \(coroutine\)")])
@pytest.mark.filterwarnings("ignore:coroutine")
def test_a_predicate_that_fails_or_gives_no_truth_value_stops_with_its_name_and_the_documents(
        module: str, name: str, error: str) -> None:
    chain = build_filters(FilterOptions(predicates=[f"{module}:{name}"]))
    message = f"--filter {module}:{name}: {error} for the document 'doc-7'; True or False is needed.*Repair the function"
    with pytest.raises(ValueError, match=message):
        chain.reason("text", "doc-7", num_characters=4)
    with pytest.raises(ValueError, match=message):
        chain.reasons(["text"], ["doc-7"])


def test_an_interrupt_inside_a_predicate_is_not_taken_for_its_failure(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = build_filters(FilterOptions(predicates=[f"{module}:keep"]))
    monkeypatch.setattr(sys.modules[module], "calls", None)  # .append fails: an error of the predicate's
    with pytest.raises(ValueError, match="it raised AttributeError"):
        chain.reason("text", "d", num_characters=4)

    class Interrupted:
        def append(self, value: object) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[module], "calls", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        chain.reason("text", "d", num_characters=4)


@pytest.mark.parametrize("name", ["keep", "compared", "defaults", "cached", "wrapped"])
def test_functions_however_they_are_written_serve(module: str, name: str) -> None:
    assert reasons(FilterOptions(predicates=[f"{module}:{name}"]), ["keep this"]) == [None]


@pytest.mark.parametrize(("name", "error"), [
    ("{m}", "it is no dotted path"), ("{m}.keep", "it is no dotted path"), ("{m}:", "it is no dotted path"),
    (":keep", "it is no dotted path"), ("{m}:keep()", "it is no dotted path"), ("../{m}:keep", "it is no dotted path"),
    ("{m}:Rule.__call__", "it is no dotted path"), ("lambda text, id: True", "it is no dotted path"),
    ("{m}:keep\n", "it is no dotted path"),
    ("{m}:absent", "has no absent"),
    ("no_such_module_at_all:keep", r"cannot be imported \(ModuleNotFoundError: No module .*PYTHONPATH"),
    ("{m}_broken:keep", r"cannot be imported \(ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
    ("{m}:number", "it is a int, no function"), ("{m}:Rule", "it is a type, no function"),
    ("{m}:anonymous", "it is a lambda, .* Write it with def"),
    ("{m}:short_list", r"it cannot be called with \(text, id\): too many positional"),
    ("{m}:three", r"it cannot be called with \(text, id\): missing a required argument: 'language'"),
    ("{m}:rule", "it has no source file"), ("{m}:partial", "it has no source file"),
    ("operator:contains", "it has no source file"), ("builtins:isinstance", "it has no source file"),
])
def test_a_predicate_that_cannot_be_used_is_refused_when_it_is_named(module: str, name: str, error: str) -> None:
    name = name.format(m=module)
    with pytest.raises(ValueError, match=f"(?s)--filter .*{error}") as caught:
        FilterOptions(predicates=[name])
    assert "package.module:function of a function f(text, id) -> bool is needed" in str(caught.value)


@pytest.mark.parametrize(("settings", "error"), [
    ({"min_characters": 0}, "--min-characters: 0 given; a whole number of at least 2"),
    ({"min_characters": 1}, "--min-characters: 1 given; a whole number of at least 2"),
    ({"min_characters": -5}, "--min-characters: -5 given"), ({"min_characters": 2.5}, "--min-characters: 2.5 given"),
    ({"min_characters": True}, "--min-characters: True given"), ({"max_characters": 0}, "--max-characters: 0 given"),
    ({"max_characters": "9"}, "--max-characters: '9' given"),
    ({"min_characters": 9, "max_characters": 8}, "--min-characters 9 and --max-characters 8 given; the first may not be"),
    ({"predicates": "a:b"}, "--filter: 'a:b' given; a list of names"), ({"predicates": [len]}, "--filter: .*list of names"),
    ({"predicates": [""]}, r"--filter: \[''\] given"), ({"decontaminate": "file"}, "--decontaminate: 'file' given"),
    ({"decontaminate": ["a", "b", "a"]}, "--decontaminate: a given twice"),
    ({"decontaminate_drop": True}, "--drop-contaminated: given without --decontaminate, where it has no effect"),
    ({"decontaminate_field": "q"}, "--decontaminate-field: 'q' given without --decontaminate, where it has no effect"),
])
def test_a_setting_that_cannot_be_or_has_no_effect_is_refused(settings: dict, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        FilterOptions(**settings)


def test_a_predicate_named_twice_is_refused(module: str) -> None:
    with pytest.raises(ValueError, match=f"--filter: {module}:keep given twice; once has the whole effect"):
        FilterOptions(predicates=[f"{module}:keep", f"{module}:named", f"{module}:keep"])


def test_the_index_and_the_option_come_together_or_not_at_all() -> None:
    with pytest.raises(ValueError, match=r"ngrams: none given with decontaminate \['a'\]"):
        build_filters(FilterOptions(decontaminate=["a"]))
    with pytest.raises(ValueError, match=r"ngrams: an index given with decontaminate \[\]"):
        build_filters(FilterOptions(), ngrams=INDEX)


def test_the_record_holds_every_setting_and_no_place_of_this_machine(module: str, tmp_path: Path) -> None:
    options = FilterOptions(min_characters=2, max_characters=9, predicates=[f"{module}:keep", f"{module}:wrapped"],
                            decontaminate=[str(tmp_path / "glue.jsonl"), "mine=/data/x", "s3://bucket/evals/", "owner/name"],
                            decontaminate_drop=True, deduplicate=True)
    record = options.record(ngrams=INDEX)
    sha256 = hashlib.sha256(PREDICATES.encode()).hexdigest()
    assert record == {
        "min_characters": 2, "max_characters": 9,
        "predicates": [{"name": f"{module}:keep", "sha256": sha256}, {"name": f"{module}:wrapped", "sha256": sha256}],
        "decontaminate": ["glue.jsonl", "mine", "evals", "name"], "decontaminate_field": "text", "decontaminate_drop": True,
        "ngrams": INDEX.record(), "deduplicate": True}
    assert str(tmp_path) not in json.dumps(record)
    assert set(options.record()) == {"ngrams", *(name for name in options.__dataclass_fields__)}


@pytest.mark.parametrize("change", [
    {"min_characters": 3}, {"max_characters": 8}, {"predicates": ()}, {"decontaminate": ["b"]}, {"deduplicate": True},
    {"decontaminate_drop": True}, {"decontaminate_field": "question"}])
def test_another_setting_is_another_record(module: str, change: dict) -> None:
    settings = {"min_characters": 2, "max_characters": 9, "predicates": [f"{module}:keep"], "decontaminate": ["a"]}
    assert FilterOptions(**settings).record() == FilterOptions(**settings).record()
    assert FilterOptions(**{**settings, **change}).record() != FilterOptions(**settings).record()


def test_a_changed_predicate_or_evaluation_text_is_another_record(module: str, tmp_path: Path) -> None:
    options = FilterOptions(predicates=[f"{module}:keep"], decontaminate=["a"])
    before = options.record(ngrams=INDEX)
    assert options.record(ngrams=NgramIndex.build([("bench/7", SECRET + " or not")])) != before
    (tmp_path / f"{module}.py").write_text(PREDICATES.replace('"keep" in text', '"keep" not in text'))
    assert options.record(ngrams=INDEX) != before


def test_options_travel_to_a_process_that_has_the_module_only_by_pythonpath(module: str, tmp_path: Path) -> None:
    options = FilterOptions(predicates=[f"{module}:keep"], min_characters=2)
    assert pickle.loads(pickle.dumps(options)) == options
    (tmp_path / "options").write_bytes(pickle.dumps(options))
    program = ("import pickle, sys; from pathlib import Path; from ettin_foundry.corpus.filters import build_filters; "
               "chain = build_filters(pickle.loads(Path(sys.argv[1]).read_bytes())); "
               "print(chain.reasons(['keep', 'x', 'other'], ['1', '2', '3']))")
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", program, str(tmp_path / "options")]
    found = subprocess.run(command, capture_output=True, text=True, cwd=root, env={"PYTHONPATH": str(tmp_path)})
    assert found.stdout == f"[None, 'short', 'predicate {module}:keep']\n", found.stderr
    found = subprocess.run(command, capture_output=True, text=True, cwd=root, env={})
    assert f"--filter {module}:keep: {module} cannot be imported" in found.stderr and "PYTHONPATH" in found.stderr


def test_one_text_and_one_id_each() -> None:
    with pytest.raises(ValueError, match="zip"):
        FilterChain(FilterOptions(), [], None).reasons(["a", "b"], ["1"])
