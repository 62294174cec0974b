"""lm-evaluation-harness from inside: its tasks with data of a folder, its `hf` class with one BOS in every row."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml

from ettin_eval.data import load, splits
from ettin_eval.subject import Subject

_HF: Any = HFLM  # its decorator's type hides the class


def read_yaml(path: Path) -> dict[str, Any]:
    """A task's YAML with what it includes; functions stay names."""
    return load_yaml(path, resolve_func=False)


def harness_task(path: Path, data: Path | None) -> Any:
    """The task of a YAML file of the harness, its items from the folder `data` or, if None, from the hub.

    Raises:
        ValueError: the folder does not hold the shots, or there is no item.
    """
    config = load_yaml(path)
    for key in ("tag", "group", "task_list"):  # of collections, not of one task
        config.pop(key, None)
    return _Task(config, data)


class _Task(ConfigurableTask):
    def __init__(self, config: dict[str, Any], data: Path | None) -> None:
        self._folder = data
        if data is not None:
            name = config["dataset_path"]
            there = splits(data, name, config.get("dataset_name"))
            shots, split = config.get("num_fewshot"), config.get("fewshot_split", config.get("training_split"))
            if shots and split not in there:
                raise ValueError(f"--data must hold the split {split} of {name}, for the {shots} shots, got "
                                 f"{', '.join(there)}; leave --data out to read the hub")
            for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
                if config.get(key) not in there:
                    config.pop(key, None)
        super().__init__(config=config)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Called by the harness before it looks at the first item."""
        name, config = self.config.dataset_path, self.config.dataset_name
        if self._folder is None:
            super().download(dataset_kwargs, **kwargs)
        else:
            self.dataset = datasets.DatasetDict({split: load(self._folder, name, config, split)
                                                 for split in splits(self._folder, name, config)})
        split = self.config.test_split or self.config.validation_split
        if not len(self.dataset[split]):
            raise ValueError(f"{self.config.task} must have at least one item, got none in {name}, split {split}")


def decoder(subject: Subject, device: str, batch_tokens: int) -> Any:
    """The subject through the harness's `hf` class."""
    return _Decoder(subject, device, batch_tokens)


class _Decoder(_HF):
    """HFLM with add_bos_token, whose rows begin with exactly one BOS, also when cut from the left (HFLM cuts it off).

    Batches hold at most `batch_tokens` positions in place of a number of rows.
    """

    def __init__(self, subject: Subject, device: str, batch_tokens: int) -> None:
        subject.needs("decoder", "the harness's `hf` class")
        tokenizer = subject.tokenizer
        ids = (tokenizer.bos_token_id, tokenizer.cls_token_id, subject.config.bos_token_id, tokenizer.eos_token_id)
        self._bos = next(each for each in ids if each is not None)
        self._batch_tokens = batch_tokens
        super().__init__(subject.name, backend="causal", revision=subject.revision or "main", tokenizer=tokenizer,
                         device=device, dtype="float32", max_length=subject.max_length, add_bos_token=True,
                         prefix_token_id=self._bos, batch_size=max(1, batch_tokens // subject.max_length))

    @property
    def max_gen_toks(self) -> int:
        """Of tasks that name none: at most half a row, so that the prompt has the other half."""
        return min(256, self.max_length // 2)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None,
                   **kwargs: Any) -> list[int]:
        """BOS and the text, whatever the tokenizer's template adds; the text alone where the harness says so."""
        ids = self.tokenizer.encode(string, add_special_tokens=False, verbose=False)
        if add_special_tokens is not False and self.add_bos_token and ids[:1] != [self._bos]:
            ids = [self._bos, *ids]
        return self._cut(ids, left_truncate_len or len(ids))

    def _cut(self, ids: list[int], room: int) -> list[int]:
        """At most `room` ids, cut from the left; a BOS stays."""
        if len(ids) <= room:
            return ids
        return [self._bos, *ids[len(ids) - room + 1:]] if ids[:1] == [self._bos] else ids[len(ids) - room:]

    def tok_batch_encode(self, strings: Sequence[str], padding_side: str = "left",
                         left_truncate_len: int | None = None,
                         truncation: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts to generate from: ids and attention mask, (rows, longest), padded on the left."""
        rows = [self.tok_encode(each, left_truncate_len=left_truncate_len) for each in strings]
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for line, row in enumerate(rows):
            ids[line, width - len(row):], mask[line, width - len(row):] = torch.tensor(row), 1
        return ids, mask

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As HFLM's, with its bars on terminals only."""
        return super().loglikelihood(requests, disable_tqdm=not sys.stderr.isatty())

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False,
                              override_bs: int | None = None) -> list[tuple[float, bool]]:
        """A continuation that is longer than a row is scored in parts of half a row, each with what precedes it."""
        parts, of = [], []
        for number, (texts, context, continuation) in enumerate(requests):
            whole = len(continuation) <= self.max_length
            for start in range(0, len(continuation), len(continuation) if whole else self.max_length // 2):
                part = continuation if whole else continuation[start:start + self.max_length // 2]
                before = self._cut([*context, *continuation[:start]], self.max_length + 1 - len(part))
                parts.append((texts if whole else None, before, part))
                of.append(number)
        width = max(len(context) + len(continuation) for _, context, continuation in parts)
        self.batch_size_per_gpu = max(1, self._batch_tokens // width)
        answers = [(0.0, True)] * len(requests)
        for number, (value, greedy) in zip(of, super()._loglikelihood_tokens(parts, disable_tqdm, override_bs),
                                           strict=True):
            answers[number] = (answers[number][0] + value, answers[number][1] and greedy)
        return answers

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Each window has its own first token: HFLM would score a second BOS."""
        self.add_bos_token = False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.add_bos_token = True
