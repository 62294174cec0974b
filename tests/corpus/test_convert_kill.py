"""Killed with SIGKILL at random moments and started again, a conversion ends with the bytes of an undisturbed one."""

from __future__ import annotations

import pytest
from converting import write_corpus

from benchmarks.killing import Killer, scenarios


@pytest.mark.parametrize("name, kills", [("array", 4), ("append", 4)])
def test_kills_lose_nothing_double_nothing_and_change_no_byte(tmp_path, tokenizer_dir, name, kills):
    texts = write_corpus(tmp_path / "corpus", files=6, documents=25)
    more = write_corpus(tmp_path / "more", files=3, documents=20, seed=4, first=6) * (name == "append")
    steps = scenarios(tmp_path / "corpus", tmp_path / "more", tokenizer_dir)[name]
    killer = Killer(tmp_path, seed=len(name))
    assert killer.undisturbed(name, steps) <= len(texts + more)
    assert killer.convert(name, steps, kills) == [] and killer.killed.total() >= 1
