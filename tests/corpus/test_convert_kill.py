"""Killed with SIGKILL at random moments and started again, a conversion ends with the bytes of an undisturbed one."""

from __future__ import annotations

from pathlib import Path

import pytest
from killing import Killer, scenarios, write_mixed_corpus
from warm_python import shared


@pytest.mark.parametrize("number, kills", [(2, 3), (3, 2), (4, 2)], ids=["workers", "array", "append"])
def test_kills_lose_nothing_double_nothing_and_change_no_byte(tmp_path: Path, tokenizer_dir: Path, number: int,
                                                              kills: int) -> None:
    texts = write_mixed_corpus(tmp_path / "corpus", documents=20)
    more = write_mixed_corpus(tmp_path / "more", documents=10, seed=4)
    scenario = scenarios(tmp_path / "corpus", tmp_path / "more", tokenizer_dir, array=2)[number]
    killer = Killer(shared(), tmp_path, seed=number)
    killer.undisturbed(scenario, texts + more * (scenario.name == "append"))
    killer.convert(scenario, kills)
    tally = killer.tally
    assert tally.kills >= 1 and tally.starts >= 1, str(tally)
    assert (tally.lost, tally.doubled, tally.differing) == (0, 0, []), str(tally)
