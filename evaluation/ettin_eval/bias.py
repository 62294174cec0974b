"""Bias: which gender a model's pronouns take (WinoGender, Rudinger et al. 2018), by the Ettin paper's two protocols.

Encoders: the pronoun is masked, and the words of its grammatical case (he, she, they; him, her, them; his, her, their)
share the probability. Decoders: of the sentence's three variants the one of lowest perplexity is preferred.
The released code differs: it takes each "her" for a possessive, counts a sentence without a pronoun among the 20
likeliest words as male, and reads mntp at the wrong place. Here the case is that of the sentence's male variant, no
word is left out, equal values share a preference, and mntp is shifted.
The paper names the subset `gotcha`: of each sentence the variant whose gender goes against the occupation's majority.
With the pronoun masked, or all variants compared, that subset is the whole set, each sentence once.
"""

from __future__ import annotations

import csv
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from ettin_eval.data import held, load, splits
from ettin_eval.generative import language_model
from ettin_eval.pseudo_likelihood import MaskedLikelihood
from ettin_eval.results import Score, mean_score
from ettin_eval.subject import Subject
from ettin_eval.tasks import Settings, Task

SET = ("oskarvanderwal/winogender", "all", "test")
TSV = "winogender.tsv"
GENDERS = ("male", "female", "neutral")
CASES = {"he": ("he", "she", "they"), "him": ("him", "her", "them"), "his": ("his", "her", "their")}
PRONOUN = re.compile(r"\b(he|him|his|she|her|they|them|their)\b", re.IGNORECASE)


class Frame(NamedTuple):
    """A sentence in its three variants, in the order of GENDERS, and the three pronouns of its case."""

    variants: tuple[str, str, str]
    forms: tuple[str, str, str]


def frames(sentences: Sequence[str]) -> list[Frame]:
    """Brings the variants of each sentence together; `they were` and `he was` are variants of one.

    Raises:
        ValueError: a sentence without its three variants, or with pronouns of two genders.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for sentence in sentences:
        words = {each.lower() for each in PRONOUN.findall(sentence)}
        genders = [gender for gender, forms in zip(GENDERS, zip(*CASES.values(), strict=True), strict=True)
                   if words & set(forms)]
        if len(genders) != 1:
            raise ValueError(f"WinoGender's sentences must have pronouns of one gender, got {sentence!r}")
        found[re.sub("____ were", "____ was", PRONOUN.sub("____", sentence))][genders[0]] = sentence
    return [_frame(variants) for variants in found.values()]


def _frame(variants: dict[str, str]) -> Frame:
    if set(variants) != set(GENDERS):
        raise ValueError(f"WinoGender must hold each sentence with he, she and they, got {list(variants.values())}; "
                         f"give the config `all`: `gotcha` does not say the case of her")
    male, female, neutral = (variants[gender] for gender in GENDERS)
    forms = CASES[PRONOUN.findall(male)[0].lower()]
    return Frame((male, female, neutral), forms)


def winogender(subject: Subject, settings: Settings) -> list[Score]:
    """Preferences (the share of sentences in which a gender wins) and mean shares of probability, a gender each.

    Raises:
        ValueError: bad sentences, or an encoder's tokenizer without one entry for each pronoun.
    """
    if reason := missing(settings):
        raise ValueError(reason)
    chosen = frames(_sentences(settings.data))
    chosen = random.Random(settings.seed).sample(chosen, min(len(chosen), settings.limit or len(chosen)))
    if subject.kind == "encoder":
        masked = MaskedLikelihood(subject, device=settings.device, batch_tokens=settings.batch_tokens)
        totals = chosen_by = encoder_scores(masked, chosen)
    else:
        totals, chosen_by = decoder_scores(language_model(subject, settings), chosen)
    shares = torch.tensor(totals, dtype=torch.float64).softmax(-1).tolist()
    best = torch.tensor(chosen_by, dtype=torch.float64)
    wins = (best == best.max(-1, keepdim=True).values).double()
    wins = (wins / wins.sum(-1, keepdim=True)).tolist()
    facts = {"data": "/".join(SET), "protocol": "masked pronoun" if subject.kind == "encoder" else "lowest perplexity"}
    return [mean_score("winogender", f"{gender}{suffix}", [each[place] for each in values], **facts)
            for suffix, values in (("", wins), ("_share", shares)) for place, gender in enumerate(GENDERS)]


def encoder_scores(model: MaskedLikelihood, chosen: Sequence[Frame]) -> list[list[float]]:
    """Log-probability of each gender's pronoun at the mask, (frames, 3), the mean over a sentence's pronouns.

    A pronoun is every vocabulary entry that decodes to it, with or without a space before and in either case.
    """
    entries: dict[str, list[int]] = defaultdict(list)
    for token in range(len(model.tokenizer)):
        entries[model.tokenizer.decode([token]).strip().lower()].append(token)
    for form in dict.fromkeys(form for frame in chosen for form in frame.forms):
        if form not in entries:
            raise ValueError(f"the tokenizer must have an entry for {form!r}, got none; leave winogender out: it needs "
                             "a vocabulary of English words")
    rows: dict[Any, dict[int, float]] = {}
    places = []
    for frame in chosen:
        places.append([model.row(*each) for each in _masked(model, frame.variants[0])])
        for row in places[-1]:
            rows.setdefault(row, {}).update((token, 0.0) for form in frame.forms for token in entries[form])
    model.read(rows)
    return [[sum(_log_sum([rows[row][token] for token in entries[form]]) for row in there) / len(there)
             for form in frame.forms] for frame, there in zip(chosen, places, strict=True)]


def _masked(model: MaskedLikelihood, sentence: str) -> Iterator[tuple[list[int], int]]:
    """The ids of the sentence and the place of each pronoun among them, one id whatever its length in tokens."""
    for found in PRONOUN.finditer(sentence):
        left = model.tok_encode(sentence[:found.start()].rstrip())
        right = model.tok_encode(sentence[found.end():])
        yield [*left, model.tokenizer.mask_token_id, *right], len(left)


def decoder_scores(model: Any, chosen: Sequence[Frame]) -> tuple[list[list[float]], list[list[float]]]:
    """Log-likelihoods of the variants, (frames, 3), and the same a token: the highest has the lowest perplexity."""
    requests = [SimpleNamespace(args=("", each)) for frame in chosen for each in frame.variants]
    totals = [total for total, _ in model.loglikelihood(requests, disable_tqdm=True)]
    means = [total / len(model.tok_encode(request.args[1], add_special_tokens=False))
             for total, request in zip(totals, requests, strict=True)]
    return _threes(totals), _threes(means)


def _threes(values: Sequence[float]) -> list[list[float]]:
    return [list(values[start:start + 3]) for start in range(0, len(values), 3)]


def _log_sum(values: Sequence[float]) -> float:
    return torch.tensor(values, dtype=torch.float64).logsumexp(0).item()


def _sentences(data: Path | None) -> list[str]:
    if data and (data / TSV).is_file():
        with (data / TSV).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        if not rows or "sentence" not in rows[0]:
            raise ValueError(f"{data / TSV} must be the set's all_sentences.tsv with a column `sentence`, got "
                             f"{list(rows[0]) if rows else 'no row'}")
        return [row["sentence"] for row in rows]
    return list(load(data, *SET)["sentence"])


def missing(settings: Settings) -> str | None:
    """Why the task cannot be run; None where it can."""
    data = settings.data
    if data is None or (data / TSV).is_file() or SET[2] in splits(data, *SET[:2]):
        return None
    return (f"winogender needs {TSV} (data/all_sentences.tsv of github.com/rudinger/winogender-schemas), got {data} "
            f"with {held(data)}; leave --data out to read the hub")


TASKS: Sequence[Task] = [Task("winogender", winogender, "the gender of preferred pronouns in 240 sentences; shares",
                              missing=missing)]
QUICK: Sequence[Task] = []
