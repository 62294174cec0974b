"""Holds our models to transformers: exports small random models and compares logits. Run once per transformers version.

`make parity` runs this with each version in front of PYTHONPATH. Weights are wide (logits up to 15), since near zero
anything would agree; as a control, one key more or fewer in the window, or another local rotary base, must NOT agree.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import logging
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ettin_foundry.data.tokenizer import fingerprint, train_bpe
from ettin_foundry.hub.folder import export_model
from ettin_foundry.hub.parity import Parity, compare, own_logits
from ettin_foundry.model.config import EttinConfig
from ettin_foundry.model.transformer import Ettin
from ettin_foundry.model.weights import import_folder, weights_checkpoint
from ettin_foundry.objectives.schedule import ObjectiveSchedule

CONTROL = 1e-2  # what a wrong window or base must at least change, at 200 tokens and more
VOCAB = 600

# name -> size, causal, overrides, lowest transformers version that can express it
CASES: dict[str, tuple[str, bool, dict[str, Any], tuple[int, int]]] = {
    "enc-nano-10k": ("nano", False, {}, (4, 48)),
    "enc-17m-160k": ("17m", False, {"global_rope_theta": 160_000.0, "local_rope_theta": 160_000.0}, (4, 48)),
    "enc-nano-160k/10k": ("nano", False, {"global_rope_theta": 160_000.0}, (4, 48)),
    "dec-nano-10k-w63": ("nano", True, {}, (4, 56)),
    "dec-17m-160k-w63": ("17m", True, {"global_rope_theta": 160_000.0, "local_rope_theta": 160_000.0}, (4, 56)),
    "dec-17m-10k-w64": ("17m", True, {"window_left": 64}, (4, 56)),
    "dec-nano-160k/10k": ("nano", True, {"global_rope_theta": 160_000.0}, (5, 0)),
}


def random_model(config: EttinConfig, seed: int = 0) -> Ettin:
    """A model whose matrices keep the scale of what passes through them, with norms and bias away from 1 and 0."""
    model = Ettin(config, attn_impl="reference").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(noise if name == "output_bias" else 1 + 0.2 * noise)
            else:
                parameter.copy_(noise * (0.2 if "tok_embeddings" in name else parameter.shape[1] ** -0.5))
    return model


def nano(objective: str, seed: int = 0, **fields: Any) -> Ettin:
    """A random model of two layers, of which one attends to all and one to a window, as large as `tiny_tokenizer`."""
    small = {"vocab_size": 320, "num_hidden_layers": 2, **fields}
    return random_model(EttinConfig.for_size("nano", causal=objective == "clm", **small), seed)


def equal_states(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def our_logits(model: Ettin, ids: torch.Tensor) -> torch.Tensor:
    """(N,) token ids of one document to (N, V) logits."""
    return own_logits(model, ids[None], torch.ones(1, len(ids), dtype=torch.bool))


def control_models(model: Ettin) -> list[Ettin]:
    """The same weights in two slightly wrong models: another window (one key), and another local base."""
    config = model.config
    window = {"window_left": config.window_left - 1} if config.causal else {
        "local_attention": config.local_attention + 2, "window_left": -1}
    wrong_base = {"local_rope_theta": 10_000.0 if config.local_rope_theta != 10_000.0 else 160_000.0}
    models = [Ettin(dataclasses.replace(config, **change), "reference").eval() for change in (window, wrong_base)]
    for wrong in models:
        wrong.load_state_dict(model.state_dict())
    return models


def tiny_tokenizer() -> Any:
    """A byte-level tokenizer that fits the vocabulary of the cases."""
    return train_bpe(["def add(a, b):\n    return a + b  # the sum of two numbers, and then some more text\n"], 300)


def save(path: Path, model: Ettin, objective: str, *, place: object = "t", schedule: Any = None, **record: Any) -> Path:
    """Saves a checkpoint as a run's clock describes itself (`clock.Clock.state_dict`); place: of `tiny_tokenizer`."""
    record = {"tokens": 10 * (record.get("batch") or 0), "batch": 0, "phase": "pretrain", "run_name": "r",
              "run_hash": "a" * 64, "run_config": "{}", "tokenizer": str(place),
              "tokenizer_fingerprint": fingerprint(tiny_tokenizer()),
              "objective_schedule": ObjectiveSchedule.parse(schedule or objective).plain(), **record}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights_checkpoint(model.state_dict(), model.config, objective=objective, **record), path)
    return path


def run_card(folder: Path) -> str:
    """Runs the code block of the folder's model card and returns what it printed."""
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code.replace('folder = "."', f"folder = {str(folder)!r}"), str(folder / "README.md"), "exec"), {})
    return printed.getvalue()


def check_tokenizer(folder: Path, tokenizer: Any, causal: bool) -> bool:
    """The running transformers reads the exported tokenizer with the template, padding and keys of the model's kind."""
    from transformers import AutoTokenizer

    short, long = "def add(a, b):", "    return a + b  # the sum of two numbers"
    plain = [tokenizer.encode(text, add_special_tokens=False) for text in (short, long)]
    cls, sep, pad = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
    ids = [[cls, *p] if causal else [cls, *p, sep] for p in plain]
    padding = [pad] * (len(ids[1]) - len(ids[0]))
    ids[0] = padding + ids[0] if causal else ids[0] + padding
    got = AutoTokenizer.from_pretrained(str(folder))([short, long], padding=True)
    return set(got) == {"input_ids", "attention_mask"} and got["input_ids"] == ids


def run_case(name: str, tokenizer: Any, folder: Path) -> Iterator[str]:
    """Exports one model and holds it to the running transformers; yields lines of figures.

    Raises:
        AssertionError: something differs.
    """
    size, causal, overrides, _ = CASES[name]
    config = EttinConfig.for_size(size, causal=causal, vocab_size=VOCAB, max_position_embeddings=2048, **overrides)
    model = random_model(config)
    path = export_model(model, config, tokenizer, folder / name.replace("/", "_"), objective="clm" if causal else "mlm")
    state, read, _ = import_folder(path)
    assert read == config and equal_states(state, model.state_dict()), "not bit-equal"
    held = Parity(path)
    for check in itertools.islice(held.run(), 2 if overrides else None):  # the first two are of whole logits
        yield f"{check.name:20}{check.worst:.1e} of {check.limit:.1e}  {check.note}"
        assert check.ok, check.name
    control = min(compare(wrong, held.theirs(path), (200,))[0] for wrong in control_models(model))
    yield f"{'control':20}{control:.1e}"
    assert control > CONTROL, "the control agrees"
    assert run_card(path).strip() and check_tokenizer(path, tokenizer, causal), "the card's code or the tokenizer"


def main() -> int:
    """Prints what each case gives; exit code 1 when one of them fails."""
    import transformers

    parser = argparse.ArgumentParser()
    parser.add_argument("--expect", help="fail unless this version of transformers is running")
    expected, version = parser.parse_args().expect, transformers.__version__
    if expected not in (None, version):
        sys.exit(f"transformers {version} is running, {expected} was expected")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("ettin_foundry").setLevel(logging.ERROR)  # the notes on windows and bases are expected here
    tokenizer, failed = tiny_tokenizer(), False
    with tempfile.TemporaryDirectory() as folder:
        for name, (_, _, _, lowest) in CASES.items():
            if tuple(int(part) for part in version.split(".")[:2]) < lowest:
                print(f"{version:9}{name:19}not expressible before {lowest[0]}.{lowest[1]}")
                continue
            try:
                for line in run_case(name, tokenizer, Path(folder)):
                    print(f"{version:9}{name:19}{line}")
            except AssertionError as error:
                failed = True
                print(f"{version:9}{name:19}FAILED: {error}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
