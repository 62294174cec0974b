"""Fine-tuning on MS MARCO and mteb's own tasks, on small made data in the layout of --data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from ettin_eval import retrieval
from ettin_eval.subject import read_subject
from ettin_eval.tasks import Settings
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

PLACES = [f"place {number:02d}" for number in range(40)]


def write_triplets(root: Path, rows: int = 40) -> Path:
    """MS MARCO's columns, in another order than the loss needs, and a number beside them."""
    Dataset.from_dict({
        "positive": [f"{place} is the capital" for place in PLACES[:rows]], "margin": [1.0] * rows,
        "query": [f"where is {place}" for place in PLACES[:rows]],
        "negative": [f"{place} is a tree" for place in PLACES[1:rows] + PLACES[:1]],
    }).save_to_disk(root / retrieval.SET.split("/")[-1] / "triplet-hard" / "train")
    return root


def write_repository(root: Path, repository: str, subset: str, split: str) -> list[tuple[str, str]]:
    """A copy of a retrieval set as the hub holds it: README.md with configurations, and a file for each."""
    folder = root / repository
    folder.mkdir(parents=True)
    found = [(f"find {place}", f"{place} is found here") for place in PLACES[:15]]
    tables = {"corpus": [{"_id": f"d{number}", "text": text, "title": ""} for number, (_, text) in enumerate(found)],
              "queries": [{"_id": f"q{number}", "text": text} for number, (text, _) in enumerate(found)],
              "qrels": [{"query-id": f"q{number}", "corpus-id": f"d{number}", "score": 1} for number in range(15)]}
    configurations = []
    for table, rows in tables.items():
        (folder / f"{table}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        configurations.append(f"- config_name: {subset}-{table}\n  data_files:\n  - split: {split}\n"
                              f"    path: {table}.jsonl\n")
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(configurations) + "---\n")
    return found


@pytest.mark.parametrize("name", ["mlm", "clm"])
def test_a_set_of_mteb_from_a_folder(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    found = write_repository(write_triplets(tmp_path), "mteb/MultiLongDocRetrieval", "en", "test")
    subject = read_subject(str(folders[name]))
    settings = Settings(data=tmp_path, work=tmp_path / "work", batch_tokens=2048)
    score, = retrieval.score_with_mteb("mldr", subject, settings)
    model = SentenceTransformer(str(tmp_path / "work" / "msmarco"), device="cpu")
    queries, documents = (model.encode([pair[side] for pair in found]) for side in (0, 1))
    ranks = [1 + sum(np.delete(documents, place, 0) @ query / np.linalg.norm(np.delete(documents, place, 0), axis=1)
                     > documents[place] @ query / np.linalg.norm(documents[place]))
             for place, query in enumerate(queries)]
    by_hand = np.mean([1 / np.log2(1 + rank) if rank <= 10 else 0.0 for rank in ranks])
    assert score.metric == "MultiLongDocRetrieval ndcg_at_10"
    assert score.value == pytest.approx(by_hand, abs=6e-6)   # mteb rounds to five digits
    assert score.settings["rows"] == 36 and score.settings["pooling"] == subject.pooling

    trained = (tmp_path / "work" / "msmarco" / "training.json").stat().st_mtime_ns
    cached = [path.stat().st_mtime_ns for path in (tmp_path / "work" / "mteb").rglob("MultiLong*.json")]
    assert retrieval.score_with_mteb("mldr", subject, settings)[0] == score and len(cached) == 1
    assert trained == (tmp_path / "work" / "msmarco" / "training.json").stat().st_mtime_ns
    assert cached == [path.stat().st_mtime_ns for path in (tmp_path / "work" / "mteb").rglob("MultiLong*.json")]
    other = Settings(data=tmp_path, work=tmp_path / "work", lr=1e-5)
    with pytest.raises(ValueError, match=r"was trained with lr 0.0003, got 1e-05"):
        retrieval.tuned(subject, other)


def test_contrastive_training_learns_and_a_killed_one_goes_on(
        folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "EVERY", 4)
    subject, settings = read_subject(str(folders["mlm"])), Settings()
    rows = Dataset.load_from_disk(str(write_triplets(tmp_path) / retrieval.SET.split("/")[-1] / "triplet-hard" /
                                      "train")).select_columns(list(retrieval.COLUMNS))

    def train(folder: Path) -> np.ndarray:   # 9 steps, checkpoints at 4 and 8
        model = retrieval.embedder(subject, settings)
        retrieval.train(model, rows, folder, settings, lr=1e-3, batch=14, mini_batch=7, epochs=3)
        return model.encode(rows["query"][:5])

    whole = train(tmp_path / "whole")
    real, calls = SentenceTransformer.forward, []

    def killed(self: SentenceTransformer, *args: Any, **options: Any) -> Any:
        calls.append(0)
        if len(calls) > 12 * 6:   # 3 columns, 2 mini-batches, 2 passes: in step 7
            raise KeyboardInterrupt
        return real(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(SentenceTransformer, "forward", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "killed")
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-4"]
    np.testing.assert_array_equal(train(tmp_path / "killed"), whole)
    start = retrieval.embedder(subject, settings).encode(rows["query"][:5])
    assert not np.allclose(whole, start, atol=1e-3)


def test_pooling_is_the_kinds_or_the_models_own(folders: dict[str, Path], tmp_path: Path,
                                                caplog: pytest.LogCaptureFixture) -> None:
    for name, pooling in (("mlm", "mean"), ("mntp", "mean"), ("clm", "lasttoken")):
        model = retrieval.embedder(read_subject(str(folders[name])), Settings())
        assert retrieval.pooling_of(model) == pooling
    trunk = Transformer(str(folders["mlm"]))
    own = SentenceTransformer(modules=[trunk, Pooling(trunk.get_embedding_dimension(), "cls")])
    own.save_pretrained(str(tmp_path / "own"))
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    (tmp_path / "own" / "config.json").write_text(json.dumps({**config, "architectures": ["ModernBertForMaskedLM"]}))
    model = retrieval.embedder(read_subject(str(tmp_path / "own")), Settings())
    assert retrieval.pooling_of(model) == "cls" and "its own modules.json decides the pooling: cls" in caplog.text


def test_the_papers_settings_and_mtebs_lists() -> None:
    assert (retrieval.ROWS, retrieval.HELD_OUT, retrieval.HELD_OUT_SEED) == (1_250_000, 1000, 12)
    assert (retrieval.BATCH, retrieval.SCALE, retrieval.WARMUP) == (1024, 20.0, 0.05)
    assert len(retrieval.mteb_tasks("mteb_eng_v2")) == 41
    for name, languages in (("codesearchnet", 6), ("mldr", 1)):
        task, = retrieval.mteb_tasks(name)
        assert len(task.hf_subsets) == languages and task.eval_splits == ["test"]


def test_missing_sets_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    subject = read_subject(str(folders["mlm"]))
    with pytest.raises(ValueError, match=r"must hold mteb/CodeSearchNetRetrieval, a copy"):
        retrieval.score_with_mteb("codesearchnet", subject, Settings(data=tmp_path, work=tmp_path))
    with pytest.raises(ValueError, match=r"triplet-hard/train"):
        retrieval.tuned(subject, Settings(data=tmp_path, work=tmp_path))
    with pytest.raises(ValueError, match=r"at least 10 rows, got 5"):
        retrieval.tuned(subject, Settings(data=write_triplets(tmp_path, 5), work=tmp_path))
