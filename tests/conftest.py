"""What every test may use: a small tokenizer, a corpus and its dataset, made once per session from a word list.

Everything is seeded, offline and in pytest's temporary folder. Fixtures import torch and transformers themselves, so
that a single fast test is collected fast.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a forked loader worker must not inherit its threads
# before torch is imported: more threads only fight on small machines, and two pytest processes have a core each
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), *(str(p) for p in (ROOT / "tests").iterdir() if p.is_dir())]

SEED, VOCAB_SIZE = 20251, 512
CHUNK_LENGTH = 62  # of the `data_set` fixture: rows of 64

_SYLLABLES = "ka lo mi ter an dre ous ing con fer el ist ra pu ne vol sta ge quo hy".split()
_UNICODE = ["\u00e9t\u00e9", "na\u00efve", "\u4f60\u597d", "\u043c\u0438\u0440", "\u03b1\u03b2\u03b3", "\U0001f600",
            "stra\u00dfe", "e\u0301"]


def make_documents(number: int, *, seed: int = SEED, longest: int = 400) -> list[str]:
    """Pseudo-random prose of 3 to `longest` words; lengths spread over the orders of magnitude, some with Unicode."""
    rng = random.Random(seed)
    words = ["".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(1, 3))) for _ in range(300)]
    documents = []
    for index in range(number):
        length = int(3 * (longest / 3) ** rng.random())
        text = [rng.choice(_UNICODE) if index % 5 == 0 and rng.random() < 0.2 else
                words[min(int(rng.expovariate(0.02)), len(words) - 1)] for _ in range(length)]
        documents.append(" ".join(text).capitalize() + rng.choice([".", "!", "?\n", " (end)"]))
    return documents


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The global generators start alike in every test, so that no test depends on the one before it."""
    random.seed(SEED)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(SEED)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(SEED)


@pytest.fixture
def ettin(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command `ettin` here: (exit code, standard output, standard error)."""
    from ettin_foundry.cli.main import main

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        return ended.value.code or 0, *capfd.readouterr()  # type: ignore[return-value]

    return run


@pytest.fixture
def no_process_group() -> None:
    """A run in this process leaves the host's process group of one behind; a test that begins its own needs none."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one .jsonl of 200 documents, with ids doc-0, doc-1, ..."""
    folder = tmp_path_factory.mktemp("texts") / "corpus"
    folder.mkdir()
    records = [json.dumps({"id": f"doc-{i}", "text": text}) + "\n" for i, text in enumerate(make_documents(200))]
    (folder / "texts.jsonl").write_text("".join(records), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tokenizer of 512 entries, special tokens last, trained on text of the same kind as `corpus`."""
    from ettin_foundry.data.tokenizer import save, train_bpe

    folder = tmp_path_factory.mktemp("vocabulary") / "tokenizer"
    save(train_bpe(make_documents(300, seed=SEED + 1), VOCAB_SIZE), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of `parity.nano` models, saved."""
    import parity

    parity.tiny_tokenizer().save_pretrained(str(folder := tmp_path_factory.mktemp("tiny")))
    return folder


@pytest.fixture(scope="session")
def data_set(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_dir: Path) -> Path:
    """`corpus` converted: train/ and validation/ with chunks of at most 62 tokens in several shards, and tokenizer/."""
    from ettin_foundry.corpus.convert import ConvertOptions, convert

    out = tmp_path_factory.mktemp("data") / "set"
    convert(ConvertOptions(sources=[str(corpus)], out=out, tokenizer=tokenizer_dir, chunk_length=CHUNK_LENGTH,
                           cut_window=0.1, validation=0.1, shard_size="12kb"))  # golden losses are of these cuts
    return out


@pytest.fixture(scope="session")
def capture() -> Any:
    """The callback of `nano_run`: what it saw of the last run."""
    import nano_run

    return nano_run.register_capture()


@pytest.fixture(scope="session")
def rising_run(tmp_path_factory: pytest.TempPathFactory, data_set: Path, capture: Any) -> tuple[Path, dict[str, list]]:
    """A nano encoder's run of `data_set` that nothing interrupts, its batches going up from 2 rows to 8.

    Its save folder, with a checkpoint every three steps, and what `nano_run`'s capture saw of it.
    """
    import nano_run

    out = tmp_path_factory.mktemp("rising")
    nano_run.run(data_set, out, *nano_run.RISING, "callbacks.capture={}").close()
    return next(out.iterdir()), {key: list(getattr(capture, key)) for key in ("losses", "lrs", "tokens", "batches")}


@pytest.fixture(scope="session")
def ettin_tokenizer_dir() -> Path:
    """The real Ettin vocabulary, which is large data kept outside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data" / "ettin-tokenizer"
    folder = Path(os.environ.get("ETTIN_TOKENIZER", beside))
    if not folder.is_dir():
        pytest.skip("the Ettin tokenizer is not here: set ETTIN_TOKENIZER to a folder of it to run this test")
    return folder
