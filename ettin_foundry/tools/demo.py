"""`make demo`: real text to a trained encoder and decoder, crossed both ways, exported, with a table and a picture.

Every step is the path a real run takes: the converter, the recipe yamls/nano.yaml with its phase overlay, LLM-Foundry's
`train`, the exporter. What is particular to the demo is only the order of steps and the report.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Stage", "run_demo"]

log = logging.getLogger(__name__)

STAGES = ("encoder", "decoder", "decoder-from-encoder", "encoder-from-decoder")
COLORS: dict[str, str] = dict(zip(STAGES, ("tab:blue", "tab:orange", "tab:red", "tab:cyan")))
PROMPTS = ["def __init__(self", "import ", "The function returns"]
MASKED = ["import [MASK]", "def [MASK](self):", "raise ValueError([MASK])"]


@dataclass
class Stage:
    """One training run and what came out of it."""

    name: str
    objective: str
    overrides: list[str]
    overlays: list[str] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    """(tokens, training loss in nats) per step."""
    metrics: dict[str, float] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    """Training alone, without start-up and evaluation."""
    folder: str = ""
    rows: dict[str, Any] = field(default_factory=dict)
    """What was read: how many rows, of which data, in which order."""


def run_demo(out: str | Path = "runs/demo", *, short: bool = False, recipes: str | Path = "yamls") -> dict[str, Any]:
    """Runs the whole demo; what exists already from a finished or killed demo in `out` is used again.

    Args:
        out: folder for data, checkpoints, exports and the report.
        short: about a tenth of the tokens and a quarter of the text, to see that everything works.
        recipes: folder with nano.yaml and phases/.

    Returns:
        the report that is also written to `out`/report.json.

    Raises:
        FileNotFoundError: `recipes` has no nano.yaml (the demo is run from a clone of the repository).
        ValueError: `out` holds a demo with other settings.
    """
    out, recipes = Path(out), Path(recipes)
    if not (recipes / "nano.yaml").is_file():
        raise FileNotFoundError(f"{recipes / 'nano.yaml'} does not exist; run the demo in a clone of the repository, or "
                                "name the folder of recipes with --recipes")
    started = time.perf_counter()
    data = _convert(out, short)
    stages = _stages(out, data, short)
    for stage in stages:
        _train(stage, recipes, out)
    report = _report(stages, out, time.perf_counter() - started)
    _picture(stages, out / "losses.png")
    _print(report, out)
    return report


def _convert(out: Path, short: bool) -> Path:
    from ettin_foundry.corpus.convert import ConvertOptions, convert

    data = out / "data"
    if not (data / "train" / "manifest.json").exists():
        convert(ConvertOptions(sources=["python-stdlib"], out=data, train_tokenizer=8192, chunk_length=254, validation=0.03,
                               limit_bytes=3_000_000 if short else None))
    return data


def _stages(out: Path, data: Path, short: bool) -> list[Stage]:
    pretrain, cross = (200_000, 100_000) if short else (2_000_000, 700_000)
    common = [f"variables.data={data}", f"variables.save_root={out / 'runs'}", f"variables.warmup={pretrain // 20}tok",
              f"save_interval={pretrain}tok", f"eval_interval={pretrain // 4}tok", "loggers.inmemory={}",
              f"max_duration={pretrain}tok"]
    decoder = ["variables.objective=clm", "variables.mask_rate=0.0", "variables.decay_mask_rate=0.0",
               "variables.cross_objective=clm", "variables.source_objective=mlm"]
    # theta is the source's: here crossing follows pretraining, not extend and decay
    crossed = [*common[:4], "variables.rope_theta=10000.0", f"variables.cross_tokens={cross}tok",
               f"variables.cross_warmup={cross // 16}tok", f"variables.cross_decay={cross // 5}tok",
               f"variables.cross_save_interval={cross}tok", f"eval_interval={cross // 4}tok", "loggers.inmemory={}",
               f"max_duration={cross}tok"]

    def source(name: str) -> str:
        return f"variables.source={out / 'runs' / name}"

    return [
        Stage("encoder", "mlm", [*common, "run_name=encoder"]),
        Stage("decoder", "clm", [*common, *decoder, "run_name=decoder"]),
        Stage("decoder-from-encoder", "clm",
              [*crossed, *decoder, source("encoder"), "run_name=decoder-from-encoder"], ["phases/cross.yaml"]),
        Stage("encoder-from-decoder", "mntp",
              [*crossed, source("decoder"), "run_name=encoder-from-decoder"], ["phases/cross.yaml"]),
    ]


def _train(stage: Stage, recipes: Path, out: Path) -> None:
    """Trains and exports one stage, or reads back what an earlier demo in this folder finished."""
    import importlib.util

    done = out / "runs" / stage.name / "stage.json"
    stage.folder = str(out / "models" / stage.name)
    if done.is_file():
        found = json.loads(done.read_text())
        if found["overrides"] != stage.overrides:
            raise ValueError(f"--out: {out} holds a demo with other settings (another length?), which would be reported as "
                             "this one; delete that folder or name another")
        vars(stage).update(found)
        log.info("%s: done already (%s)", stage.name, done)
        return
    spec = importlib.util.spec_from_file_location("train", recipes.resolve().parent / "train.py")
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    config = program.configure([str(recipes / "nano.yaml"), *(str(recipes / o) for o in stage.overlays), *stage.overrides])

    from composer.loggers import InMemoryLogger
    from llmfoundry.command_utils import train

    log.info("%s: training %s", stage.name, stage.objective)
    trainer = train(config)
    stage.seconds = trainer.state.timestamp.total_wct.total_seconds()
    memory = next(d for d in trainer.logger.destinations if isinstance(d, InMemoryLogger))
    stage.curve = [(int(stamp.token), float(value)) for stamp, value in memory.data["loss/train/total"]]
    stage.tokens = int(trainer.state.timestamp.token)
    model: Any = trainer.state.model
    loader: Any = trainer.state.train_dataloader
    stage.rows = loader.dataset.state_dict(int(trainer.state.timestamp.sample), True)
    evals = trainer.state.eval_metrics  # crossed stages are evaluated under the source's objective too
    own = evals[f"eval/{stage.objective}"] if len(evals) > 1 else evals["eval"]
    stage.metrics = {name: float(metric.compute()) for name, metric in own.items()}
    if model.config.causal:
        stage.samples = [f"{p}{c}" for p, c in zip(PROMPTS, model.generate(PROMPTS, max_new_tokens=24))]
    else:
        stage.samples = [f"{text} -> {', '.join(repr(token) for token, _ in best[:4])}"
                         for text, best in zip(MASKED, model.fill_mask(MASKED))]
    _export(stage, model, out)
    trainer.close()
    done.write_text(json.dumps(vars(stage)))


def _export(stage: Stage, model: Any, out: Path) -> None:
    from ettin_foundry.model.weights import export_model

    export_model(model, model.config, model.tokenizer, Path(stage.folder), objective=stage.objective, overwrite=True)


def _report(stages: list[Stage], out: Path, seconds: float) -> dict[str, Any]:
    rows = []
    for stage in stages:
        rows.append({
            "model": stage.name, "objective": stage.objective, "tokens": stage.tokens,
            "seconds": round(stage.seconds, 1), "tokens_per_second": round(stage.tokens / stage.seconds),
            "first_loss": round(stage.curve[0][1], 3), "last_loss": round(_smooth(stage.curve)[-1][1], 3),
            "validation_loss": round(stage.metrics["TargetCrossEntropy"], 3),
            "validation_perplexity": round(stage.metrics["TargetPerplexity"], 1),
            "validation_accuracy": round(stage.metrics["TargetAccuracy"], 3),
            "samples": stage.samples, "huggingface_folder": stage.folder,
        })
    encoder, decoder = stages[:2]
    report = {"seconds": round(seconds, 1), "data": str(out / "data"), "models": rows, "rows": encoder.rows,
              "encoder_and_decoder_read_the_same_rows": encoder.rows == decoder.rows and encoder.tokens == decoder.tokens}
    (out / "report.json").write_text(json.dumps(report, indent=1))
    return report


def _smooth(curve: list[tuple[int, float]], span: int = 15) -> list[tuple[int, float]]:
    """Running mean over `span` steps, so that four curves can be told apart."""
    return [(tokens, sum(v for _, v in curve[max(0, i - span + 1):i + 1]) / min(i + 1, span))
            for i, (tokens, _) in enumerate(curve)]


def _picture(stages: list[Stage], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 1.4))
    before = {"decoder-from-encoder": "encoder", "encoder-from-decoder": "decoder"}
    for stage in stages:
        offset = next((s.tokens for s in stages if s.name == before.get(stage.name)), 0)
        points = _smooth(stage.curve)
        left.plot([(t + offset) / 1e6 for t, _ in points], [v for _, v in points], color=COLORS[stage.name],
                  label=f"{stage.name} ({stage.objective})", linewidth=1.4)
    left.set(xlabel="tokens seen since initialisation (millions)", ylabel="training loss (nats per target)",
             title="Same text, same order: two objectives, then crossed")
    left.legend(frameon=False)
    left.grid(alpha=0.25)
    bars = [s.metrics["TargetAccuracy"] for s in stages]
    right.barh(range(len(stages)), bars, color=[COLORS[s.name] for s in stages])
    right.set(yticks=range(len(stages)), title="validation accuracy", xlabel="share of targets predicted")
    right.set_yticklabels([f"{s.name}\n({s.objective})" for s in stages])
    right.invert_yaxis()
    for i, value in enumerate(bars):
        right.text(value, i, f" {value:.3f}", va="center")
    right.set_xlim(0, max(bars) * 1.25)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _print(report: dict[str, Any], out: Path) -> None:
    """The table on the terminal and, the same, in table.md."""
    from rich.console import Console
    from rich.table import Table

    columns = {"model": "model", "objective": "objective", "tokens": "tokens", "tokens_per_second": "tokens/s",
               "first_loss": "first loss", "last_loss": "last loss", "validation_loss": "val. loss",
               "validation_accuracy": "val. accuracy", "validation_perplexity": "val. perplexity"}
    table = Table(title="ettin_foundry demo: one corpus, one order, two objectives, crossed both ways")
    for title in columns.values():
        table.add_column(title)
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    for row in report["models"]:
        cells = [f"{row[key]:,}" if isinstance(row[key], int) else str(row[key]) for key in columns]
        table.add_row(*cells)
        lines.append("| " + " | ".join(cells) + " |")
    console = Console(width=140)
    console.print(table)
    lines.append("")
    for row in report["models"]:
        console.print(f"[bold]{row['model']}[/bold]", highlight=False)
        lines += [f"**{row['model']}**", ""]
        for sample in row["samples"]:
            console.print(f"  {sample!r}", markup=False, highlight=False)
            lines.append(f"- `{sample!r}`")
        lines.append("")
    (out / "table.md").write_text("\n".join(lines))
    if report["encoder_and_decoder_read_the_same_rows"]:
        console.print(f"encoder and decoder read the same {report['rows']['rows']:,} rows in the same order (data "
                      f"{report['rows']['fingerprint'][:12]}, seed {report['rows']['shuffle_seed']})", highlight=False)
    places = [("data (MDS)", report["data"]), ("checkpoints", out / "runs"), ("Hugging Face folders", out / "models"),
              ("picture", out / "losses.png"), ("table", out / "table.md"), ("everything", out / "report.json")]
    for what, where in places:
        console.print(f"{what:22}{where}", markup=False, highlight=False)
    console.print(f"demo finished in {report['seconds']:.0f} s", markup=False, highlight=False)
