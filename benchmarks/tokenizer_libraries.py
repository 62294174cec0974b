"""Which library should turn text into tokens: equality with `tokenizers`, speed on one core, memory, licence, upkeep.

    python benchmarks/tokenizer_libraries.py [--texts 60000] [--megabytes 240] [--rounds 5]

Every library runs in a process of its own, pinned to one core and told to use one thread, and answers one request at
a time:
  equality    on odd texts (tests/odd_texts.py) and on every file of the standard library, with Ettin's vocabulary
              (ETTIN_TOKENIZER, or ../shared/data/ettin-tokenizer) and two that are trained here; a text counts as wrong
              if one id differs from `tokenizers`, or if the library fails on it. Special tokens must stay text
  speed       tokens per second of the core's time on the standard library's modules, as one flat array of numbers, in
              batches of 16 files, Ettin's vocabulary; one round of each library in turn, medians
  memory      resident memory above that of the loaded library after 10 MB, half and all of a text in which hardly a
              word comes twice, which a cache without bounds would keep for ever
  the rest    from the installed package: version, licence, when it was built, what it says of its future

The libraries that read special tokens in a text as such without a way to turn it off get a tokenizer.json in which
those have names that no text holds. The file is not called tokenizers.py: programs beside it would import it in place
of the library.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import xxhash  # noqa: E402
from corpora import ettin_tokenizer, library_texts, machine  # noqa: E402

REFEREE = "tokenizers"
LIBRARIES = (REFEREE, "fastokens", "tokie", "snaptokens", "gigatoken")
ONE_THREAD = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "FASTOKENS_BPE_THREADS": "1"}
TRAINED = (8192, 512)
LICENCES = {"Apache License": "Apache-2.0", "MIT License": "MIT"}

Encode = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]
"""Texts to ids (N,) uint32 and lengths (texts,)."""


def open_library(name: str, path: str) -> Encode:
    """A library's function from texts to ids, as flat as it can give them."""
    content = Path(path).read_text(encoding="utf-8")
    if name == "fastokens":
        import fastokens

        fast = fastokens.Tokenizer.from_json_str(content)
        return lambda texts: _from_bytes(fast.encode_batch_flat(list(texts), False, True))
    if name == REFEREE:
        return _from_lists(_hugging_face(content))
    return _open_without_specials(name, content)


def _open_without_specials(name: str, content: str) -> Encode:
    """The libraries that cannot be told to read special tokens as text: tokenizer.json with other names for them."""
    data = json.loads(content)
    vocab = data["model"]["vocab"]
    for token in data["added_tokens"]:
        if token["special"]:  # renamed in both places, not left out: tokie numbers those that are not in the vocabulary
            renamed = f"\U0010ffff{token['id']}\U0010fffe"
            if token["content"] in vocab:
                vocab[renamed] = vocab.pop(token["content"])
            token["content"] = renamed
    content = json.dumps({**data, "post_processor": None, "truncation": None, "padding": None})
    if name == "snaptokens":
        import snaptokens  # type: ignore

        snap = snaptokens.Tokenizer.from_json_str(content)
        return lambda texts: _from_bytes(snap.encode_batch_flat(list(texts), False))
    if name == "tokie":
        import tokie  # type: ignore

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "tokenizer.json"
            file.write_text(content, encoding="utf-8")
            tok = tokie.Tokenizer.from_json(str(file))
        return _from_lists(lambda texts: [tok.encode(text, False).ids for text in texts])
    import gigatoken  # type: ignore
    from tokenizers import Tokenizer

    giga = gigatoken.Tokenizer(Tokenizer.from_str(content)).as_hf()
    return _from_lists(lambda texts: [getattr(found, "ids", found) for found in giga.encode_batch(list(texts))])


def _hugging_face(content: str) -> Callable[[Sequence[str]], list[list[int]]]:
    from tokenizers import Tokenizer

    backend: Any = Tokenizer.from_str(content)
    backend.encode_special_tokens = True
    return lambda texts: [found.ids for found in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def _from_bytes(found: tuple[bytes, bytes]) -> tuple[np.ndarray, np.ndarray]:
    return np.frombuffer(found[0], dtype="<u4"), np.diff(np.frombuffer(found[1], dtype="<u8").astype(np.int64))


def _from_lists(encode: Callable[[Sequence[str]], list[list[int]]]) -> Encode:
    def flat(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        arrays = [np.array(ids, dtype=np.uint32) for ids in encode(texts)]
        return (np.concatenate([np.zeros(0, np.uint32), *arrays]),
                np.array([len(array) for array in arrays], dtype=np.int64))

    return flat


def fingerprints(encode: Encode, texts: Sequence[str]) -> list[str]:
    """A hash of each text's ids, or the name of the failure."""
    found: list[str] = []
    for begin in range(0, len(texts), 500):
        batch = texts[begin:begin + 500]
        try:
            found += _hashes(encode(batch))
        except Exception:
            found += [_hash_or_failure(encode, text) for text in batch]
    return found


def _hashes(flat: tuple[np.ndarray, np.ndarray]) -> list[str]:
    return [xxhash.xxh64_hexdigest(ids.tobytes()) for ids in np.split(flat[0], np.cumsum(flat[1])[:-1])]


def _hash_or_failure(encode: Encode, text: str) -> str:
    try:
        return _hashes(encode([text]))[0]
    except Exception as error:
        return type(error).__name__


def fresh_words(megabytes: int) -> Iterator[list[str]]:
    """Batches of 10 MB of texts of 50 kB, made of chance words of 3 to some 20 letters."""
    rng = np.random.default_rng(0)
    for _ in range(megabytes // 10):
        letters = rng.integers(97, 123, 10_000_000, dtype=np.uint8)
        letters[rng.random(len(letters)) < 0.13] = ord(" ")
        letters[rng.random(len(letters)) < 0.01] = ord("\n")
        text = letters.tobytes().decode()
        yield [text[i:i + 50_000] for i in range(0, len(text), 50_000)]


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


class Worker:
    """One library in its own process: answers requests, each a JSON line."""

    def __init__(self, name: str) -> None:
        self.name = name

    def load(self, path: str) -> dict[str, float]:
        begin, before = time.process_time(), resident_mb()
        self.encode = open_library(self.name, path)
        self.encode(["some text"])
        return {"seconds": time.process_time() - begin, "mb": resident_mb() - before}

    def equality(self, texts: int) -> list[str]:
        from odd_texts import odd_texts

        return fingerprints(self.encode, [*odd_texts(texts), *library_texts(everything=True)])

    def speed(self) -> dict[str, float]:
        texts = library_texts()
        begin, tokens = time.process_time(), 0  # of one thread: what other programs take is not counted
        for i in range(0, len(texts), 16):
            tokens += len(self.encode(texts[i:i + 16])[0])
        return {"tokens": tokens, "seconds": time.process_time() - begin}

    def memory(self, megabytes: int) -> list[float]:
        before = resident_mb()
        grown = []
        for texts in fresh_words(megabytes):
            self.encode(texts)
            del texts
            grown.append(resident_mb() - before)
        return grown


def serve(name: str) -> None:
    worker = Worker(name)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"answer": getattr(worker, request["do"])(*request["with"])}
        except BaseException as error:  # a panic of a Rust library derives from BaseException alone
            answer = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(answer), flush=True)


class Remote:
    """The parent's end of a worker."""

    def __init__(self, name: str, core: int) -> None:
        env = {**os.environ, **ONE_THREAD}
        self.name = name
        self.process = subprocess.Popen([sys.executable, __file__, "--worker", name], env=env, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        os.sched_setaffinity(self.process.pid, {core})

    def __call__(self, do: str, *arguments: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"do": do, "with": arguments}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or '{"error": "the process ended"}')
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {do} failed: {answer['error']}")
        return answer["answer"]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def vocabularies(folder: Path) -> dict[str, str]:
    """Name and path of each tokenizer.json that equality is tried with; Ettin's first where it is here."""
    from ettin_foundry.data.tokenizer import train_bpe

    ettin = ettin_tokenizer()
    found = {"Ettin's, 50,368": str(ettin / "tokenizer.json")} if ettin else {}
    texts = library_texts()[:150]
    for size in TRAINED:
        train_bpe(texts, size).save_pretrained(folder / str(size))
        found[f"trained, {size:,}"] = str(folder / str(size) / "tokenizer.json")
    return found


def measure(args: argparse.Namespace, names: list[str], paths: dict[str, str]) -> dict[str, dict[str, Any]]:
    workers = {name: Remote(name, args.core) for name in names}
    found: dict[str, dict[str, Any]] = {name: {"wrong": {}, "seconds": []} for name in names}
    try:
        for vocabulary, path in reversed(paths.items()):  # the first one last: it stays loaded for speed and memory
            expected: list[str] = []
            for name, worker in workers.items():
                found[name]["load"] = worker("load", path)
                hashes = worker("equality", args.texts)
                expected = expected or hashes
                found[name]["wrong"][vocabulary] = sum(a != b for a, b in zip(hashes, expected))
                found[name]["texts"] = len(hashes)
                print(f"{name}: {vocabulary}: {found[name]['wrong'][vocabulary]} of {len(hashes)} differ", flush=True)
        for number in range(args.rounds + 1):
            for name, worker in workers.items():
                answer = worker("speed")
                found[name]["tokens"] = answer["tokens"]
                found[name]["seconds"] += [answer["seconds"]] if number else []  # the first one warms up
        for name, worker in workers.items():
            size = args.megabytes if name != REFEREE else max(10, args.megabytes // 8)  # it takes ten times as long
            found[name]["memory"] = worker("memory", size)
    finally:
        for worker in workers.values():
            worker.end()
    for name, row in found.items():
        row |= {"tokens_per_second": row["tokens"] / statistics.median(row["seconds"]), **package_facts(name)}
    return found


def package_facts(name: str) -> dict[str, Any]:
    """What the installed package says of itself."""
    package = importlib.metadata.distribution(name)
    about: Any = package.metadata
    files = package.files or []
    licence = about.get("License-Expression") or about.get("License") or "; ".join(
        text.rpartition(" :: ")[2] for text in about.get_all("Classifier") or () if text.startswith("License"))
    for file in files:
        if not licence and "LICENSE" in file.name:
            head = file.read_text()[:300]
            licence = next((short for text, short in LICENCES.items() if text in head), head.strip().partition("\n")[0])
    built = [json.loads(file.read_text())["metadata"].get("timestamp", "")[:10]
             for file in files if file.name.endswith(".cyclonedx.json")]
    payload = about.get_payload()
    warning = re.findall(r"[^.!\n]*\barchived?\b[^.!\n]*[.!]", payload if isinstance(payload, str) else "")
    urls = [about.get("Home-page") or "", *(about.get_all("Project-URL") or ())]
    return {"version": package.version, "licence": licence, "built": built[0] if built else "",
            "home": next((url.rpartition(" ")[2] for url in urls if url), ""), "warning": " ".join(warning).strip(),
            "library_mb": sum(Path(str(file.locate())).stat().st_size for file in files if file.suffix == ".so") / 1e6}


def table(results: dict[str, Any]) -> str:
    rows = results["libraries"]
    paths = list(next(iter(rows.values()))["wrong"])[::-1]
    lines = ["| library | version | " + " | ".join(f"differ: {name}" for name in paths) +
             " | M tokens/s | load, s | MB after 10, half, all | licence | built | library, MB |",
             "|---" * (8 + len(paths)) + "|"]
    for name, row in rows.items():
        grown = row["memory"]
        lines.append(f"| {name} | {row['version']} | " + " | ".join(f"{row['wrong'][path]:,}" for path in paths) +
                     f" | {row['tokens_per_second'] / 1e6:.2f} | {row['load']['seconds']:.2f} | "
                     f"{grown[0]:.0f}, {grown[len(grown) // 2]:.0f}, {grown[-1]:.0f} (of {10 * len(grown)}) | "
                     f"{row['licence']} | {row['built']} | {row['library_mb']:.1f} |")
    texts = next(iter(rows.values()))["texts"]
    lines += ["", f"`differ`: of {texts:,} texts, those with ids other than `tokenizers` gives."]
    lines += [f"{name} says of itself: \"{row['warning']}\"" for name, row in rows.items() if row["warning"]]
    lines += [f"Not installed, left out: {', '.join(results['left_out'])}."] if results["left_out"] else []
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=60_000, help="odd texts for each vocabulary")
    parser.add_argument("--megabytes", type=int, default=240, help="of text for the measurement of memory")
    parser.add_argument("--rounds", type=int, default=5, help="of the measurement of speed")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="that all libraries run on")
    parser.add_argument("--out", help="folder of the results; benchmarks/results if left out")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        return serve(args.worker)
    from streams import results_path

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    names = [name for name in LIBRARIES if importlib.util.find_spec(name)]
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, names, vocabularies(Path(folder)))
    command = "python benchmarks/tokenizer_libraries.py " + " ".join(sys.argv[1:] if argv is None else argv)
    results = {"command": command.strip(), "machine": machine(), "libraries": found,
               "left_out": [name for name in LIBRARIES if name not in names]}
    path = results_path("tokenizers", args.out)
    text = f"# {path.name}\n\n`{results['command']}`\n\n{json.dumps(results['machine'])}\n\n{table(results)}\n"
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
