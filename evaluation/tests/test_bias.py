"""WinoGender on made sentences, against whole models run one sentence at a time."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from ettin_eval.bias import Frame, encoder_scores, frames, winogender
from ettin_eval.pseudo_likelihood import MaskedLikelihood
from ettin_eval.subject import read_subject
from ettin_eval.tasks import Settings
from transformers import AutoModelForCausalLM, AutoTokenizer, ModernBertForMaskedLM, PreTrainedTokenizerFast

CLS, SEP, MASK = 1, 2, 4  # of tests/conftest.py's tokenizer
SENTENCES = [
    "The nurse told Paris that {he} was a plant.", "The nurse told Paris about {him}.", "A plant is {his} capital.",
    "{His} tree is a plant."]
WORDS = [{"he": "he", "him": "him", "his": "his", "His": "His"},
         {"he": "she", "him": "her", "his": "her", "His": "Her"},
         {"he": "they", "him": "them", "his": "their", "His": "Their"}]
ALL = [sentence.format(**words).replace("they was", "they were") for words in WORDS for sentence in SENTENCES]
FORMS = [("he", "she", "they"), ("him", "her", "them"), ("his", "her", "their"), ("his", "her", "their")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("winogender")
    rows = [f"{number}.txt\t{sentence}" for number, sentence in enumerate(ALL)]
    (root / "winogender.tsv").write_text("\n".join(["sentid\tsentence", *rows]) + "\n")
    return root


@pytest.fixture(scope="module")
def with_pronouns(folders, tmp_path_factory):
    """The encoders with pronouns in place of rare entries of their tokenizer; `he` with a space and without."""
    made = {}
    for objective in ("mlm", "mntp"):
        folder = shutil.copytree(folders[objective], tmp_path_factory.mktemp("pronouns") / objective)
        words = ["Ġhe", "he", "Ġshe", "Ġthey", "Ġhim", "Ġher", "Ġthem", "Ġhis", "Ġtheir"]
        path = folder / "tokenizer.json"
        whole = json.loads(path.read_text())
        vocabulary = whole["model"]["vocab"]
        free = [entry for entry in list(vocabulary)[200:] if len(entry) == 1 and ord(entry) > 300][:len(words)]
        for entry, word in zip(free, words, strict=True):  # bytes that no sentence here has
            if word not in vocabulary:
                vocabulary[word] = vocabulary.pop(entry)
        path.write_text(json.dumps(whole))
        made[objective] = folder
    return made


def test_the_case_is_the_sentence_s_own():
    assert [frame.forms for frame in frames(ALL)] == FORMS
    assert frames(ALL)[0].variants == ("The nurse told Paris that he was a plant.",
                                       "The nurse told Paris that she was a plant.",
                                       "The nurse told Paris that they were a plant.")
    with pytest.raises(ValueError, match="must hold each sentence with he, she and they, got .*about her"):
        frames(["The nurse told Paris about her."])
    with pytest.raises(ValueError, match="pronouns of one gender, got 'She told him.'"):
        frames(["She told him."])


@pytest.mark.parametrize("objective", ["mlm", "mntp"])
def test_an_encoder_s_masked_pronoun(with_pronouns, data, objective):
    folder = with_pronouns[objective]
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder)
    model = ModernBertForMaskedLM.from_pretrained(folder).eval()
    shares = []
    for sentence, forms in zip(SENTENCES, FORMS, strict=True):
        left, right = sentence[:sentence.index("{")].rstrip(), sentence[sentence.index("}") + 1:]
        row = [CLS, *tokenizer.encode(left, add_special_tokens=False), MASK]
        place = len(row) - 1
        row += [*tokenizer.encode(right, add_special_tokens=False), SEP]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row])).logits[0, place - (objective == "mntp")]
        probability = logits.double().softmax(-1)
        vocabulary = tokenizer.get_vocab()
        mass = [sum(probability[vocabulary[entry]].item() for entry in (form, f"Ġ{form}", form.title())
                    if entry in vocabulary) for form in forms]
        shares.append([each / sum(mass) for each in mass])
    scores = {score.metric: score.items for score in winogender(read_subject(str(folder)), Settings(data))}
    for place, gender in enumerate(("male", "female", "neutral")):
        # float32 logits, another batch shape; sentences are drawn in the seed's order
        expected = sorted(each[place] for each in shares)
        assert sorted(scores[f"{gender}_share"] or ()) == pytest.approx(expected, rel=1e-4)
        wins = sorted(float(each.index(max(each)) == place) for each in shares)
        assert sorted(scores[gender] or ()) == wins


def test_a_decoder_s_lowest_perplexity(folders, data):
    tokenizer = AutoTokenizer.from_pretrained(folders["clm"])
    model = AutoModelForCausalLM.from_pretrained(folders["clm"]).eval()
    wins, shares = [], []
    for number in range(4):
        totals, perplexities = [], []
        for sentence in ALL[number::4]:
            ids = torch.tensor([[CLS, *tokenizer.encode(sentence, add_special_tokens=False)]])
            with torch.no_grad():
                loss = model(input_ids=ids, labels=ids).loss.item()  # the mean over all but [CLS]
            perplexities.append(math.exp(loss))
            totals.append(-loss * (ids.shape[1] - 1))
        wins.append(perplexities.index(min(perplexities)))
        weights = [math.exp(total - max(totals)) for total in totals]
        shares.append([weight / sum(weights) for weight in weights])
    scores = {score.metric: score for score in winogender(read_subject(str(folders["clm"])), Settings(data))}
    for place, gender in enumerate(("male", "female", "neutral")):
        assert scores[gender].value == wins.count(place) / 4 and scores[gender].n == 4
        assert scores[f"{gender}_share"].value == pytest.approx(sum(each[place] for each in shares) / 4, rel=1e-3)


def test_equal_values_share_a_preference(with_pronouns, data, monkeypatch):
    monkeypatch.setattr("ettin_eval.bias.encoder_scores", lambda model, chosen: [[-50.0, -50.0, -60.0]] * len(chosen))
    subject = read_subject(str(with_pronouns["mlm"]))
    scores = {score.metric: score.value for score in winogender(subject, Settings(data))}
    assert (scores["male"], scores["female"], scores["neutral"]) == (0.5, 0.5, 0.0)


def test_what_is_refused(folders, data, tmp_path):
    model = MaskedLikelihood(read_subject(str(folders["mlm"])))
    with pytest.raises(ValueError, match="the tokenizer must have an entry for 'theirs', got none"):
        encoder_scores(model, [Frame(("a he", "a", "a"), ("a", "a", "theirs"))])
    with pytest.raises(ValueError, match="winogender needs winogender.tsv .* with none; leave --data out"):
        winogender(read_subject(str(folders["mlm"])), Settings(tmp_path))
    (tmp_path / "winogender.tsv").write_text("text\nHe\n")
    with pytest.raises(ValueError, match="with a column `sentence`, got \\['text'\\]"):
        winogender(read_subject(str(folders["mlm"])), Settings(tmp_path))
