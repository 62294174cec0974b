"""Speed of conversion: ours beside LLM-Foundry's two converters and the bare tokenizer, same text and tokenizer, in
one run.

    python benchmarks/convert.py [--megabytes 100] [--scaling-megabytes 400] [--repeats 5] [--work DIR]

The text is the running Python's standard library as .jsonl, with varied copies of it up to the size asked
(corpora.py); the tokenizer is Ettin's (ETTIN_TOKENIZER, or ../shared/data/ettin-tokenizer). Contenders:
  ours, 1 worker       ettin_foundry.corpus.convert.convert, which data_prep/convert.py calls, on one core
  ours, 2 workers      the same on two cores
  convert_text_to_mds  LLM-Foundry's, one process, on one core; each document a .txt file, since it reads nothing else
  convert_dataset_json LLM-Foundry's, on one core, the same .jsonl
  fast tokenizer       fastokens on the same texts in memory, in batches, on one core: nothing read, cut or written
  fast tokenizer twice the same in two processes on two cores at once: what the second core of this machine is worth

Each measurement is a fresh process, pinned to its cores, one of each contender in turn; reported are medians. The
clock runs from the call of the converter to its return: every import that the contenders share has been made before.
`whole process` is the time from its start to its end, imports and all. Tokens are the text's, as the bare tokenizer
counts them; ours must write exactly as many. LLM-Foundry's converters write int32 tokens in rows of 1,024, ours
uint16 in chunks of 1,022 with hashes, lengths and a manifest; none compresses.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

ROW_LENGTH = 1024
BATCH_CHARACTERS = 1 << 18
OURS, TWO, TEXT, JSONL = "ours, 1 worker", "ours, 2 workers", "convert_text_to_mds", "convert_dataset_json"
BARE, BARE_TWICE = "fast tokenizer", "fast tokenizer twice"
CONTENDERS = (OURS, TWO, TEXT, JSONL, BARE, BARE_TWICE)
CORES = {TWO: 2, BARE_TWICE: 2}
SCALING = (OURS, TWO, BARE, BARE_TWICE)
"""Also measured on the larger text, where the start of a process weighs little."""


def ours(request: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    from transformers import AutoTokenizer  # noqa: F401  # as LLM-Foundry's modules do when they are imported

    from ettin_foundry.corpus.convert import ConvertOptions, convert

    options = ConvertOptions(sources=[request["jsonl"]], out=request["out"], tokenizer=request["tokenizer"],
                             chunk_length=ROW_LENGTH - 2, workers=CORES.get(request["contender"], 1),
                             unit_size=request["unit_size"])
    return lambda: {"tokens": sum(each["totals"]["tokens"] for each in convert(options).manifests.values())}


def text_to_mds(request: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    from llmfoundry.command_utils.data_prep.convert_text_to_mds import convert_text_to_mds

    def run() -> dict[str, Any]:
        convert_text_to_mds(tokenizer_name=request["tokenizer"], output_folder=request["out"],
                            input_folder=request["txt"],
                            concat_tokens=ROW_LENGTH, eos_text="", bos_text="", no_wrap=False,
                            compression=None,  # type: ignore  # its stub says str, MDSWriter takes None
                            processes=1, args_str="", reprocess=False, trust_remote_code=False)
        return {}

    return run


def dataset_json(request: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    os.environ["HF_DATASETS_CACHE"] = request["cache"]  # a first conversion finds nothing in it
    from llmfoundry.command_utils.data_prep.convert_dataset_json import convert_dataset_json

    def run() -> dict[str, Any]:
        convert_dataset_json(path=request["jsonl"], out_root=request["out"], compression=None, concat_tokens=ROW_LENGTH,
                             split="train", tokenizer=request["tokenizer"])
        return {}

    return run


def bare(request: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    import fastokens
    import numpy as np

    tokenizer = fastokens.Tokenizer.from_file(str(Path(request["tokenizer"]) / "tokenizer.json"))
    with open(request["jsonl"], encoding="utf-8") as stream:
        texts = [json.loads(line)["text"] for line in stream]
    batches: list[list[str]] = [[]]
    size = 0
    for text in texts:
        if size >= BATCH_CHARACTERS:
            batches.append([])
            size = 0
        batches[-1].append(text)
        size += len(text)
    tokenizer.encode_batch_flat(batches[0], False, True)  # its own warming up

    def run() -> dict[str, Any]:
        found = (tokenizer.encode_batch_flat(batch, False, True)[0] for batch in batches)
        return {"tokens": sum(len(np.frombuffer(ids, dtype="<u4")) for ids in found)}

    return run


PREPARE = {OURS: ours, TWO: ours, TEXT: text_to_mds, JSONL: dataset_json, BARE: bare, BARE_TWICE: bare}


def child(request: dict[str, Any]) -> None:
    """One measurement: prepares, says so, waits for a line, runs, answers."""
    os.sched_setaffinity(0, request["cores"])
    run = PREPARE[request["contender"]](request)
    print("ready", flush=True)
    sys.stdin.readline()
    begin, cpu = time.perf_counter(), time.process_time()
    answer = run()
    answer |= {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
    usage = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print("\n" + json.dumps({**answer, "peak_mb": usage / 1024}), flush=True)


def start(request: dict[str, Any], errors: Path) -> subprocess.Popen:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "FASTOKENS_BPE_THREADS": "1"}
    with errors.open("w") as stream:
        return subprocess.Popen([sys.executable, __file__, "--child", json.dumps(request)], env=env, text=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream)


def measure_once(contender: str, corpus: dict[str, Any], args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """One measurement in fresh processes, whose output is removed."""
    folder = Path(tempfile.mkdtemp(dir=work))
    cores = args.cores[:CORES.get(contender, 1)]
    request = {**corpus, "contender": contender, "out": str(folder / "out"), "cache": str(folder / "cache"),
               "tokenizer": args.tokenizer, "unit_size": args.unit_size}
    shares = [[core] for core in cores] if contender == BARE_TWICE else [cores]
    begin, processes = time.perf_counter(), []
    try:
        for number, share in enumerate(shares):
            processes.append(start({**request, "cores": share}, folder / f"errors-{number}"))
        for process in processes:
            _line(process, "ready", folder)
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = [json.loads(_line(process, "{", folder)) for process in processes]
        for process in processes:
            process.wait()
        whole = time.perf_counter() - begin
    finally:
        for process in processes:
            process.kill()
            process.wait()
        shutil.rmtree(folder)
    return {"seconds": max(a["seconds"] for a in answers), "whole": whole,
            "peak_mb": max(a["peak_mb"] for a in answers),
            "cpu_seconds": sum(a["cpu_seconds"] for a in answers), "copies": len(shares),
            "tokens": sum(a["tokens"] for a in answers) if "tokens" in answers[0] else None}


def _line(process: subprocess.Popen, begin: str, folder: Path) -> str:
    """The next line of a child's output that begins so: converters print things of their own."""
    assert process.stdout
    for line in process.stdout:
        if line.startswith(begin):
            return line
    errors = "\n".join(path.read_text(errors="replace")[-2000:] for path in sorted(folder.glob("errors-*")))
    raise SystemExit(f"a contender's process ended before its time; its last messages:\n{errors}")


def measure(args: argparse.Namespace, corpora: dict[str, dict[str, Any]], work: Path) -> dict[str, dict[str, Any]]:
    """Corpus -> contender -> its measurements; one of each in turn."""
    found: dict[str, dict[str, Any]] = {}
    for title, corpus in corpora.items():
        names = [name for name in corpus["contenders"] if name in args.contenders]
        rows: dict[str, Any] = {name: {"runs": []} for name in names}
        for number in range(args.repeats):
            for name in names:
                run = measure_once(name, corpus, args, work)
                rows[name]["runs"].append(run)
                print(f"{title}, {number + 1} of {args.repeats}: {name}: {run['seconds']:.2f} s", flush=True)
        counted = {run["tokens"] // run["copies"] for row in rows.values() for run in row["runs"] if run["tokens"]}
        if len(counted) != 1:
            raise SystemExit(f"{title}: contenders disagree on the number of tokens, {sorted(counted)}")
        tokens = counted.pop()
        for row in rows.values():
            row["median_seconds"] = statistics.median(run["seconds"] for run in row["runs"])
            row["tokens_per_second"] = row["runs"][0]["copies"] * tokens / row["median_seconds"]
        found[title] = {"tokens": tokens, **{key: corpus[key] for key in ("bytes", "documents")}, "contenders": rows}
    return found


def ratios(rows: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """What is claimed of each contender: (measured, goal)."""
    speed = {name: row["tokens_per_second"] for name, row in rows.items()}
    claims = {TEXT: (OURS, TEXT, "ours is {:.1f}x as fast", "8x"),
              JSONL: (OURS, JSONL, "ours is {:.1f}x as fast", "8x"),
              BARE: (OURS, BARE, "ours is {:.2f} of it", "0.5"), TWO: (TWO, OURS, "{:.2f}x one worker", "1.8x"),
              BARE_TWICE: (BARE_TWICE, BARE, "{:.2f}x once", "")}
    return {name: (text.format(speed[a] / speed[b]), goal)
            for name, (a, b, text, goal) in claims.items() if a in speed and b in speed}


def table(found: dict[str, Any]) -> str:
    lines = ["| text | contender | cores | seconds: median (min - max) | M tokens/s | MB/s | measured | goal | "
             "peak MB of a process | whole process, s |", "|---|---|---|---|---|---|---|---|---|---|"]
    for title, corpus in found.items():
        claims = ratios(corpus["contenders"])
        for name, row in corpus["contenders"].items():
            seconds = [run["seconds"] for run in row["runs"]]
            measured, goal = claims.get(name, ("", ""))
            rate = row["runs"][0]["copies"] * corpus["bytes"] / 1e6 / row["median_seconds"]
            lines.append(
                f"| {title} | {name} | {CORES.get(name, 1)} | {row['median_seconds']:.2f} ({min(seconds):.2f} - "
                f"{max(seconds):.2f}) | {row['tokens_per_second'] / 1e6:.2f} | {rate:.1f} | {measured} | {goal} | "
                f"{max(run['peak_mb'] for run in row['runs']):.0f} | "
                f"{statistics.median(run['whole'] for run in row['runs']):.1f} |")
    return "\n".join(lines)


def make_corpora(args: argparse.Namespace, work: Path) -> dict[str, dict[str, Any]]:
    from corpora import texts_of_size, write_jsonl, write_text_files

    found = {}
    for megabytes in dict.fromkeys((args.megabytes, args.scaling_megabytes)):
        if not megabytes:
            continue
        path = work / f"library-{megabytes}.jsonl"
        documents, size = write_jsonl(path, texts_of_size(megabytes * 1_000_000))
        txt = work / "txt" if megabytes == args.megabytes and TEXT in args.contenders else None
        if txt:
            write_text_files(txt, path)
        found[f"{megabytes} MB"] = {"jsonl": str(path), "txt": str(txt), "bytes": size, "documents": documents,
                                    "contenders": CONTENDERS if megabytes == args.megabytes else SCALING}
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100, help="of text for all contenders")
    parser.add_argument("--scaling-megabytes", type=int, default=400, help="for ours and the tokenizer; 0: none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS, metavar="NAME",
                        help="some of: " + "; ".join(CONTENDERS))
    parser.add_argument("--unit-size", default="8mb", help="of our converter: what workers share out")
    parser.add_argument("--work", help="folder for texts and outputs, which are removed; the system's if left out")
    parser.add_argument("--out", help="folder of the results; benchmarks/results if left out")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    if args.child:
        return child(json.loads(args.child))
    from corpora import ettin_tokenizer, machine
    from streams import results_path

    tokenizer = ettin_tokenizer()
    if tokenizer is None:
        raise SystemExit("Ettin's tokenizer is not here: set ETTIN_TOKENIZER to a folder of it")
    args.tokenizer, args.cores = str(tokenizer), sorted(os.sched_getaffinity(0))[:2]
    if len(args.cores) < 2:
        raise SystemExit("this process may use one core only; two are needed for the contenders with two")
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        found = measure(args, make_corpora(args, Path(folder)), Path(folder))
    command = " ".join(["python benchmarks/convert.py", *sys.argv[1:]])
    results = {"command": command, "machine": machine(), "texts": found}
    about = "; ".join(f"{title}: {corpus['documents']:,} documents, {corpus['tokens']:,} tokens"
                      for title, corpus in found.items())
    path = results_path("convert", args.out)
    text = f"# {path.name}\n\n`{command}`\n\n{json.dumps(results['machine'])}\n\n{about}\n\n{table(found)}\n"
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
