"""Conversions killed with SIGKILL at random moments: `python benchmarks/kill_test.py --kills 200`.

A small corpus is converted in five ways (one process; two workers; with duplicates dropped
and zstd; an array of two tasks and finalize; in two parts by --append). Each conversion is killed about
`--per-conversion` times: everything that runs, the main process alone, or one worker; and started again until it
comes to its end. Then every file is compared with those of an undisturbed conversion, and the documents are
counted. The exit status is 1 if a document was lost or doubled or a file differs. About 1 to 2 s a kill on two cores.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from conftest import SEED, VOCAB_SIZE, make_documents  # noqa: E402
from converting import write_corpus  # noqa: E402
from killing import Killer, scenarios  # noqa: E402

from ettin_foundry.data.tokenizer import save, train_bpe  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--per-conversion", type=int, default=8)
    parser.add_argument("--documents", type=int, default=60, help="per file of the corpus")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    begin, wrong = time.monotonic(), list[str]()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save(train_bpe(make_documents(300, seed=SEED + 1), VOCAB_SIZE), folder / "tokenizer")
        write_corpus(folder / "corpus", files=8, documents=arguments.documents)
        write_corpus(folder / "more", files=4, documents=arguments.documents, seed=4, first=8)
        ways = scenarios(folder / "corpus", folder / "more", folder / "tokenizer")
        killer = Killer(folder, arguments.seed)
        for name, steps in ways.items():
            print(f"{name}: {killer.undisturbed(name, steps)} documents undisturbed", flush=True)
        while (kills := killer.killed.total()) < arguments.kills:
            name = list(ways)[killer.conversions % len(ways)]
            wrong += killer.convert(name, ways[name], min(arguments.per_conversion, arguments.kills - kills))
            print(f"{name}: {dict(killer.killed)} kills, {killer.conversions} conversions, {len(wrong)} wrong",
                  flush=True)
    print(*wrong[:20], sep="\n")
    print(f"kill test: {killer.killed.total()} kills {dict(killer.killed)}, {killer.conversions} conversions: "
          f"{len(wrong)} files or documents wrong; seed {arguments.seed}, {time.monotonic() - begin:.0f} s")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
