"""Trains sentence embeddings on an exported model with sentence-transformers: unsupervised SimCSE (arXiv 2104.08821).

    python examples/embeddings.py models/nano-encoder sentences.txt models/embeddings

sentences.txt holds one text a line. Each text is its own positive, seen twice under different dropout; the other texts
of its batch are the negatives. Any trunk of transformers works: our encoders, and our decoders from transformers 4.56.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss
from sentence_transformers.models import Pooling, Transformer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="folder that `ettin export` wrote")
    parser.add_argument("texts", type=Path, help="one text a line")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-5)
    given = parser.parse_args()

    # an export states no dropout for inference; SimCSE learns from it
    dropout = {"embedding_dropout": 0.1, "attention_dropout": 0.1, "mlp_dropout": 0.1}
    trunk = Transformer(given.model, max_seq_length=128, config_args=dropout)
    model = SentenceTransformer(modules=[trunk, Pooling(trunk.get_word_embedding_dimension(), "mean")])
    texts = [line for line in given.texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    arguments = SentenceTransformerTrainingArguments(
        output_dir=given.out, max_steps=given.steps, per_device_train_batch_size=given.batch, learning_rate=given.lr,
        save_strategy="no", report_to=[], logging_steps=max(1, given.steps // 20))
    SentenceTransformerTrainer(model, arguments, train_dataset=Dataset.from_dict({"anchor": texts, "positive": texts}),
                               loss=MultipleNegativesRankingLoss(model)).train()
    model.save_pretrained(given.out)
    print(f"wrote {given.out}: SentenceTransformer({given.out!r}).encode([...]) gives vectors")


if __name__ == "__main__":
    main()
