"""Text to vectors, and classifiers on them: one policy for both kinds of models.

Head: a fresh one for both, dense -> GELU -> LayerNorm -> linear on one pooled state of the trunk. transformers' own
classes are not symmetric: ModernBertForSequenceClassification begins with the pretrained prediction head,
ModernBertDecoderForSequenceClassification with a fresh one. A fresh head also asks nothing of the model but a trunk
that AutoModel loads.
Pooling: in the suites `glue` and `retrieval`, the mean of the states for encoders and the last token for decoders, as
the paper's retrieval does: the last token is the only one that has seen the whole text. On frozen states and in the
small tasks (some dozens to hundreds of steps), the mean for both: nothing has taught a decoder's last token to sum a
text up, and so few steps do not. On docstring_to_function_tuned a nano decoder of 200k tokens reached nDCG@10 0.010
(chance) by its last token and 0.136 by the mean: the pooling would decide, not the objective.
Pairs: both texts with the separator ([SEP], else the end token) between them, for both kinds, because a tokenizer for
decoders may have no template of pairs; what stands before and after is the tokenizer's own.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from transformers import AutoModel, PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.utils import logging as transformers_logging

from ettin_eval.subject import Subject
from ettin_eval.tasks import Settings

HEAD = "fresh dense, GELU, LayerNorm, linear"


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained. Linear decay to 0 after a warm-up of 6% of the steps; AdamW, betas 0.9, 0.98.

    wd: what a step at the peak learning rate takes off a weight, as Composer's DecoupledAdamW counts it (ModernBERT's
    grid); torch's AdamW multiplies by the learning rate, so it gets wd / lr.
    """

    lr: float
    wd: float
    epochs: int
    batch: int = 16

    def facts(self) -> dict[str, Any]:
        """For Score.settings."""
        return asdict(self)


def small_recipe(subject: Subject, settings: Settings, epochs: int) -> Recipe:
    """For a few hundred items and a model of any width: 8e-5 at 768, growing as the width shrinks (--lr overrides)."""
    lr = settings.lr or 8e-5 * 768 / subject.config.hidden_size
    return Recipe(lr, lr / 10, epochs)


def token_rows(subject: Subject, texts: Sequence[tuple[str, ...]], max_length: int = 256) -> list[list[int]]:
    """The ids of each text, or pair of texts, with the special ones of the model's tokenizer.

    texts: tuples of one or two. max_length: of a row in tokens, at most the model's; the longer text of a pair is cut.
    """
    tokenizer = subject.tokenizer
    around = tokenizer("").input_ids
    before = [each for each in around if each in (tokenizer.cls_token_id, tokenizer.bos_token_id)]
    after = around[len(before):]
    sep = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    between = after or [sep]
    room = min(max_length, subject.max_length) - len(before) - len(after)
    columns = [tokenizer(list(column), add_special_tokens=False, verbose=False).input_ids
               for column in zip(*texts, strict=True)]
    rows = []
    for parts in zip(*columns, strict=True):
        left = room - len(between) * (len(parts) - 1)
        if len(parts) == 2:
            first, second = (len(part) for part in parts)
            lengths = (max(left // 2, left - second), max(left - left // 2, left - first))
        else:
            lengths = (left,)
        cut = [part[:length] for part, length in zip(parts, lengths, strict=True)]
        rows.append([*before, *cut[0], *(cut[1:] and [*between, *cut[1]]), *after])
    return rows


def padded(rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask, (n, longest), int64. Padding stands right: no real token of a decoder sees it."""
    longest = max(map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows]), "attention_mask": mask}


def pooled(states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector a row, (n, width), of states (n, length, width); pooling: `mean` or `lasttoken`."""
    if pooling == "lasttoken":
        return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def trunk_of(subject: Subject, device: str) -> Any:
    """The model without its head."""
    with quiet():
        trunk = subject.model(AutoModel, device=device)
    trunk.config.use_cache = False  # a decoder makes none for rows that are read once
    return trunk


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' report of the head's weights, which a trunk leaves."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


class Classifier(nn.Module):
    """A trunk, its pooling and a fresh head. classes: 1 is a regression (mean squared error)."""

    def __init__(self, trunk: Any, pooling: str, classes: int) -> None:
        super().__init__()
        width = trunk.config.hidden_size
        self.trunk, self.pooling = trunk, pooling
        dense = nn.Linear(width, width, bias=False)
        self.head = nn.Sequential(dense, nn.GELU(), nn.LayerNorm(width))
        self.classifier = nn.Linear(width, classes)
        nn.init.normal_(dense.weight, std=0.02)  # ModernBERT's, as is the classifier's
        nn.init.normal_(self.classifier.weight, std=width ** -0.5)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor,
                labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """logits (n, classes), float32; loss where labels (n,) are given."""
        states = self.trunk(input_ids=input_ids, attention_mask=attention_mask)[0]
        logits = self.classifier(self.head(pooled(states, attention_mask, self.pooling))).float()
        if labels is None:
            return {"logits": logits}
        if logits.shape[1] == 1:
            return {"loss": nn.functional.mse_loss(logits[:, 0], labels.float()), "logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def fit(subject: Subject, settings: Settings, rows: Sequence[Sequence[int]], labels: Sequence[float], classes: int,
        recipe: Recipe, pooling: str | None = None) -> Classifier:
    """A classifier trained by transformers' Trainer. The seed gives its head and the order of the items.

    rows: from `token_rows`. labels: ints below classes; floats when classes is 1. pooling: None takes the
    kind's. bf16 on CUDA, else fp32.
    """
    set_seed(settings.seed)
    model = Classifier(trunk_of(subject, settings.device), pooling or subject.pooling, classes)

    def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {**padded([item["row"] for item in items]), "labels": torch.tensor([item["label"] for item in items])}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=recipe.batch, num_train_epochs=recipe.epochs,
            learning_rate=recipe.lr, weight_decay=recipe.wd / recipe.lr, adam_beta2=0.98, adam_epsilon=1e-6,
            max_grad_norm=0, lr_scheduler_type="linear", warmup_steps=0.06, seed=settings.seed,
            use_cpu=settings.device == "cpu", bf16=settings.device.startswith("cuda"), save_strategy="no",
            logging_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
            dataloader_pin_memory=False)
        items = [{"row": row, "label": label} for row, label in zip(rows, labels, strict=True)]
        trainer = Trainer(model, arguments, data_collator=collate, train_dataset=items)  # type: ignore[arg-type]
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return model.eval()


def predict(model: Classifier, rows: Sequence[Sequence[int]], batch_tokens: int) -> np.ndarray:
    """The logits, (n, classes), float32, in the order of rows."""
    device = model.classifier.weight.device
    return _batched(lambda batch: model(**{key: value.to(device) for key, value in batch.items()})["logits"],
                    rows, batch_tokens)


def embed(subject: Subject, settings: Settings, rows: Sequence[Sequence[int]], pooling: str = "mean") -> np.ndarray:
    """The frozen trunk's pooled states, (n, width), float32, in the order of rows."""
    trunk = trunk_of(subject, settings.device)

    def run(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        batch = {key: value.to(settings.device) for key, value in batch.items()}
        return pooled(trunk(**batch)[0], batch["attention_mask"], pooling)

    return _batched(run, rows, settings.batch_tokens)


def _batched(run: Any, rows: Sequence[Sequence[int]], batch_tokens: int) -> np.ndarray:
    """Rows of like length together, at most batch_tokens positions in one pass."""
    order = sorted(range(len(rows)), key=lambda each: -len(rows[each]))
    out: list[Any] = [None] * len(rows)
    with torch.inference_mode():
        while order:
            size = max(1, batch_tokens // len(rows[order[0]]))
            chosen, order = order[:size], order[size:]
            for place, values in zip(chosen, run(padded([rows[each] for each in chosen])), strict=True):
                out[place] = values.float().cpu().numpy()
    return np.stack(out)


def probe(train: np.ndarray, labels: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The classes of test (m, width) by a logistic regression on train (n, width): C = 1, features standardised."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return model.fit(train, labels).predict(test)
