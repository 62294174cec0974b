"""Encoders in lm-evaluation-harness: what an encoder gives to a continuation, read at masks.

Three protocols, which rank models differently; a figure always says which:

- `pseudo`: each token of the continuation is masked alone and predicted from everything else, on both sides
  (pseudo-log-likelihood as in Salazar et al. 2020; the other tokens of its word stay visible, so it is not the
  within-word variant of Kauf and Ivanova 2023). It is no likelihood: the sum over tokens does not normalise.
- `mask1`: [CLS] context, gold prefix, one [MASK], [SEP]: the code that Ettin released. Unlike that code, no
  end-of-text is scored after the continuation.
- `mask3`: the same with three [MASK], the first of which is read (Samuel 2024, which the Ettin paper cites).

Generation appends one mask (`mask3`: three), takes the likeliest token, and goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm
from transformers import ModernBertForMaskedLM

from ettin_eval.subject import Subject, read_subject

PROTOCOLS = ("pseudo", "mask1", "mask3")
CHUNK = 2048  # requests whose rows are held and sorted at a time: bounds memory; choices of an item are neighbours

Row = tuple[tuple[int, ...], int]  # the ids of a row, special ones included, and the position whose output is read


class MaskedLikelihood(TemplateLM):
    """An encoder (mlm or mntp) as a model of lm-evaluation-harness.

    All masked rows of a call are made first, equal ones once, and run sorted by length, at most `batch_tokens`
    positions a pass. The head and the vocabulary are computed at the one place a row that is read.
    A text longer than the model's row is cut from the left, [CLS] kept; under `pseudo` a continuation of more than
    half a row is seen through a window with the masked token in its middle.
    """

    def __init__(self, pretrained: str | Subject, *, protocol: str = "pseudo", device: str | None = "cpu",
                 batch_tokens: int = 8192, revision: str | None = None, objective: str | None = None,
                 **ignored: Any) -> None:
        """pretrained: a folder, a hub id, or the Subject read from one. ignored: batch_size of the harness.

        Raises:
            ValueError: a decoder, an unknown protocol, or mntp without a token before the text.
        """
        super().__init__()
        if isinstance(pretrained, str):
            pretrained = read_subject(pretrained, revision=revision, objective=objective)
        pretrained.needs("encoder", "scoring by masks")
        if protocol not in PROTOCOLS:
            raise ValueError(f"--protocol must be one of {', '.join(PROTOCOLS)}, got {protocol}")
        self.protocol, self.batch_tokens, self.max_length = protocol, batch_tokens, pretrained.max_length
        self.tokenizer, self._device = pretrained.tokenizer, torch.device(device or "cpu")
        self.head, self.tail = _template(self.tokenizer)
        self.shift = 1 if pretrained.objective == "mntp" else 0
        if self.shift > len(self.head):
            raise ValueError(f"the tokenizer of {pretrained.name} must put a token before the text, as mntp predicts a "
                             "token from the position before it; export the model with its [CLS] template")
        self.model = pretrained.model(device=str(self._device))

    @property
    def eot_token_id(self) -> int:
        """[SEP]: ends a generation."""
        return _first(self.tokenizer.sep_token_id, self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """[CLS]: stands for an empty context."""
        return _first(self.tokenizer.cls_token_id, self.tokenizer.bos_token_id, self.eot_token_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of the text alone: the harness splits context and continuation by counting them."""
        return self.tokenizer.encode(string, add_special_tokens=False, verbose=False)

    def row(self, text: Sequence[int], at: int) -> Row:
        """The row that predicts text[at], and the position whose output does (one earlier under mntp)."""
        mask = self.tokenizer.mask_token_id
        room = self.max_length - len(self.head) - len(self.tail)
        if self.protocol == "pseudo":
            start = max(min(len(text) - room, at - room // 2), 0)
            seen = [*text[start:at], mask, *text[at + 1:start + room]]
        else:
            masks = 1 if self.protocol == "mask1" else 3
            start = max(at + masks - room, 0)
            seen = [*text[start:at], *[mask] * masks]
        return (*self.head, *seen, *self.tail), len(self.head) + at - start - self.shift

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As the template's; its bar over the tokenizer is left out."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
                              **kwargs: Any) -> list[tuple[float, bool]]:
        """For each (texts, context, continuation): the sum over its tokens, and whether each was the likeliest."""
        answers = []
        with tqdm(total=len(requests), desc="scored by masks", disable=None) as bar:
            for first in range(0, len(requests), CHUNK):
                chunk = requests[first:first + CHUNK]
                answers += self._score([([] if context == [self.prefix_token_id] else context, continuation)
                                        for _, context, continuation in chunk])
                bar.update(len(chunk))
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts or (), answer)
        return answers

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        asked = [[(self.row([*context, *continuation], len(context) + place), token)
                  for place, token in enumerate(continuation)] for context, continuation in pairs]
        rows: dict[Row, dict[int, float]] = {}
        for each in asked:
            for row, token in each:
                rows.setdefault(row, {})[token] = 0.0
        likeliest = self.read(rows)
        return [(sum(rows[row][token] for row, token in each), all(likeliest[row] == token for row, token in each))
                for each in asked]

    def read(self, rows: Mapping[Row, dict[int, float]]) -> dict[Row, int]:
        """Fills in the log-probability of each token that is asked of a row; gives the likeliest token of each row."""
        likeliest = {}
        for batch in self._batches(sorted(rows, key=lambda row: len(row[0]), reverse=True)):
            scores = self.logits(batch).log_softmax(-1)
            likeliest.update(zip(batch, scores.argmax(-1).tolist(), strict=True))
            places = [(line, token) for line, row in enumerate(batch) for token in rows[row]]
            if not places:
                continue
            lines, tokens = torch.tensor(places, device=scores.device).T
            for (line, token), value in zip(places, scores[lines, tokens].tolist(), strict=True):
                rows[batch[line]][token] = value
        return likeliest

    def _batches(self, rows: list[Row]) -> Iterator[list[Row]]:
        """`rows`, longest first, in batches of at most `batch_tokens` positions, padding counted."""
        first = 0
        while first < len(rows):
            many = max(1, self.batch_tokens // len(rows[first][0]))
            yield rows[first:first + many]
            first += many

    @torch.inference_mode()
    def logits(self, batch: Sequence[Row]) -> torch.Tensor:
        """The output at the place of each row: (rows, vocabulary), float32."""
        width = max(len(ids) for ids, _ in batch)
        inputs = {"input_ids": torch.full((len(batch), width), self.tokenizer.pad_token_id),
                  "attention_mask": torch.zeros((len(batch), width), dtype=torch.long)}
        for line, (ids, _) in enumerate(batch):
            inputs["input_ids"][line, :len(ids)] = torch.tensor(ids)
            inputs["attention_mask"][line, :len(ids)] = 1
        inputs = {name: each.to(self._device) for name, each in inputs.items()}
        lines, places = torch.arange(len(batch)), torch.tensor([place for _, place in batch])
        if isinstance(self.model, ModernBertForMaskedLM):
            hidden = self.model.model(**inputs).last_hidden_state[lines, places]
            return self.model.decoder(self.model.head(hidden)).float()
        return self.model(**inputs).logits[lines, places].float()  # other classes name their heads differently

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The sum over all tokens of each text."""
        answers = self._loglikelihood_tokens([(None, [], self.tok_encode(request.args[0])) for request in requests])
        return [total for total, _ in answers]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy generation, one token of every request that is not finished a pass.

        Raises:
            ValueError: sampling is asked for.
        """
        mask, made = self.tokenizer.mask_token_id, [[] for _ in requests]
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        options: list[Any] = [normalize_gen_kwargs(dict(request.args[1])) for request in requests]
        stops = [handle_stop_sequences(each["until"], eos=self.tokenizer.decode([self.eot_token_id]))
                 for each in options]
        if any(each["do_sample"] for each in options):
            raise ValueError("do_sample must be false for encoders, got true: masks are filled greedily")
        going = [number for number, each in enumerate(options) if each["max_gen_toks"] > 0]
        while going:
            rows = {number: self.row([*contexts[number], *made[number], mask], len(contexts[number] + made[number]))
                    for number in going}
            likeliest = self.read({row: {} for row in rows.values()})
            for number, row in rows.items():
                made[number].append(likeliest[row])
            going = [number for number in going if len(made[number]) < options[number]["max_gen_toks"]
                     and made[number][-1] != self.eot_token_id
                     and not any(stop in self.tokenizer.decode(made[number]) for stop in stops[number])]
        return [postprocess_generated_text(self.tokenizer.decode(tokens), stop, None)
                for tokens, stop in zip(made, stops, strict=True)]


register_model("ettin-encoder")(MaskedLikelihood)  # no decorator: its type would hide the class


def _template(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special ids before and after one text."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    for start in range(len(whole) - len(plain) + 1):
        if whole[start:start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain):]
    raise ValueError(f"the tokenizer must keep the text whole between its special tokens, got {whole} for {plain}")


def _first(*ids: int | None) -> int:
    return next(each for each in ids if each is not None)
