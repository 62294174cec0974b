"""Killed with SIGKILL at random moments and started again, a conversion ends with the bytes of an undisturbed one."""

from __future__ import annotations

from pathlib import Path

import pytest
from killing import Killer, scenarios, write_mixed_corpus


@pytest.mark.parametrize("name, kills", [("unique", 4), ("array", 3), ("append", 4)])
def test_kills_lose_nothing_double_nothing_and_change_no_byte(tmp_path: Path, tokenizer_dir: Path, name: str,
                                                              kills: int) -> None:
    texts = write_mixed_corpus(tmp_path / "corpus", documents=20)
    more = write_mixed_corpus(tmp_path / "more", documents=10, seed=4) * (name == "append")
    steps = scenarios(tmp_path / "corpus", tmp_path / "more", tokenizer_dir)[name]
    killer = Killer(tmp_path, seed=len(name))
    assert killer.undisturbed(name, steps) == len(set(texts) if name == "unique" else texts + more)
    killer.convert(name, steps, kills)
    tally = killer.tally
    assert tally.killed.total() >= 1 and (tally.lost, tally.doubled, tally.differing) == (0, 0, []), str(tally)
