"""The data card of a dataset: README.md as the Hugging Face Hub reads it.

It is a pure function of the dataset's small files: the same dataset gives the same bytes anywhere. Its table of their
sha256 is what `ettin verify` compares them with. dataset_card.md beside this file is its template.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from ettin_foundry.data import MANIFEST
from ettin_foundry.data.inspect import length_cells
from ettin_foundry.data.storage import Storage, check_name

log = logging.getLogger(__name__)

Manifests = Mapping[str, Mapping[str, Any]]
Lengths = Mapping[str, np.ndarray]

CARD = "README.md"
_TEMPLATE = Path(__file__).with_name("dataset_card.md")
_MARK = "<!-- ettin-set "  # a card without it was written by hand, and is never replaced
_HASH = re.compile(r"^\| `(.*)` \| `(.*)` \|$", re.MULTILINE)
# of https://huggingface.co/docs/hub/repositories-licenses those that text has; the Hub refuses words out of its list
_LICENCES = re.compile(r"apache-2\.0|mit|bsd-[23]-clause|mpl-2\.0|a?gpl-3\.0|gpl-2\.0|gfdl|unlicense|pddl|"
                       r"odc-by|odbl|cc0-1\.0|cc-by(-nc)?(-sa|-nd)?-4\.0|cc-by(-sa)?-3\.0|cdla-permissive-[12]\.0|unknown")


def write_card(storage: Storage, manifests: Manifests, lengths: Lengths) -> None:
    """Writes README.md of splits whose manifests are in the storage already; one written by hand stays, with a warning.

    `lengths` are (chunk_length + 1,) chunks of each length, by split.
    """
    if storage.exists(CARD) and _MARK.encode() not in storage.read_bytes(CARD):
        log.warning("%s was written by hand and stays; move it away and run ettin finalize", storage.where(CARD))
    else:
        storage.write_bytes(CARD, card_text(storage, manifests, lengths).encode())


def card_text(storage: Storage, manifests: Manifests, lengths: Lengths) -> str:
    """The text of README.md; arguments as of `write_card`."""
    # named after its sources, not its folder: the same conversion gives the same bytes wherever it is done
    names = list(dict.fromkeys(name for manifest in manifests.values() for name in manifest["sources"]))
    name = ", ".join(names[:4]) + f" and {len(names) - 4} more" * (len(names) > 4)
    small = sorted([file for file, _ in storage.list("tokenizer/")] + [f"{split}/{MANIFEST}" for split in manifests])
    hashes = {file: hashlib.sha256(storage.read_bytes(file)).hexdigest() for file in small}
    jinja = Environment(trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    jinja.filters.update(clean=_clean, commas="{:,}".format, json=json.dumps)
    return jinja.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        head=_front_matter(name, manifests), name=name, manifests=manifests, first=next(iter(manifests.values())),
        lengths={split: length_cells(lengths[split]) for split in manifests}, hashes=hashes, mark=_MARK)


def read_hashes(storage: Storage) -> dict[str, str]:
    """Name -> sha256 of the small files, as a dataset's card states them; nothing without a card of `write_card`.

    Raises ValueError for a name outside of the dataset.
    """
    text = storage.read_bytes(CARD, at_most=16 << 20).decode(errors="replace") if storage.exists(CARD) else ""
    return {check_name(name): digest for name, digest in _HASH.findall(text)} if _MARK in text else {}


def _front_matter(name: str, manifests: Manifests) -> dict[str, Any]:
    licences = sorted({str(source.get("licence") or "unknown") for manifest in manifests.values()
                       for source in manifest["sources"].values()})
    others = [licence for licence in licences if not _LICENCES.fullmatch(licence.lower())]
    known = sorted({"other" if licence in others else licence.lower() for licence in licences})
    entries: dict[str, Any] = {"pretty_name": name, "license": known if len(known) > 1 else known[0]}
    if others:
        entries["license_name"] = re.sub(r"[^a-z0-9.]+", "-", " ".join(others).lower()).strip("-.")[:96] or "other"
    # the viewer reads no MDS, and would take the JSON files beside the shards for the data
    return entries | {"task_categories": ["text-generation", "fill-mask"], "tags": ["ettin", "mds", "pretraining"],
                      "viewer": False}


def _clean(text: str) -> str:
    """Foreign text as one line of Markdown: no markup of its own, no control characters."""
    text = "".join(character if character.isprintable() else " " for character in text)
    return re.sub(r"([\\|`*_<>\[\]#!])", r"\\\1", text)
