"""The data card of a dataset: README.md as the Hugging Face Hub reads it.

It is a pure function of the dataset's small files: the same dataset gives the same bytes anywhere. Its table of their
sha256 is what `ettin verify` compares them with.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ettin_foundry.data import MANIFEST
from ettin_foundry.data.inspect import length_cells
from ettin_foundry.data.storage import Storage, check_name

log = logging.getLogger(__name__)

Manifests = Mapping[str, Mapping[str, Any]]
Lengths = Mapping[str, np.ndarray]

CARD = "README.md"
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
    hashes = [(file, hashlib.sha256(storage.read_bytes(file)).hexdigest()) for file in small]
    first = next(iter(manifests.values()))
    made_with = [("ettin_foundry", first["code_version"]),
                 ("tokenizer", f"{first['tokenizer'].get('name')}, {first['tokenizer']['vocab_size']:,} entries"),
                 *((key.replace("_", " "), json.dumps(value)) for key, value in first["options"].items()
                   if value not in (None, False, [], {}, ""))]
    splits = [(split, *(f"{manifest['totals'][key]:,}" for key in ("documents", "samples", "tokens")),
               f"{len(manifest['shards']):,}", *length_cells(lengths[split])) for split, manifest in manifests.items()]
    return "\n".join([
        _front_matter(name, manifests), f"# {_clean(name)}\n",
        f"Text, tokenized and cut into chunks of at most {first['chunk_length']:,} tokens, as MDS shards that are read "
        "without being trusted. No special tokens inside; a document's last chunk is marked.\n",
        _table(("split", "documents", "chunks", "tokens", "shards", "length", "10%", "median", "90%", "full"), splits),
        "## Sources\n", *(_source_table(split, manifest) for split, manifest in manifests.items()),
        "## Made with\n", _table(("", ""), made_with),
        "`ettin_foundry.data.shards.MDSSplit` and stock `streaming.StreamingDataset` read these folders. "
        "`ettin verify` checks every byte, `ettin show` prints statistics and samples.\n",
        "## Identity\n", "A manifest holds the hash of every shard, so its own hash stands for the whole split.\n",
        _table(("file", "sha256"), ()) + "".join(f"| `{file}` | `{digest}` |\n" for file, digest in hashes),
        f"{_MARK}written by ettin finalize, which replaces no card without this line -->\n"])


def read_hashes(storage: Storage) -> dict[str, str]:
    """Name -> sha256 of the small files, as a dataset's card states them; nothing without a card of `write_card`.

    Raises ValueError for a name outside of the dataset.
    """
    text = storage.read_bytes(CARD, at_most=16 << 20).decode(errors="replace") if storage.exists(CARD) else ""
    return {check_name(name): digest for name, digest in _HASH.findall(text)} if _MARK in text else {}


def _front_matter(name: str, manifests: Manifests) -> str:
    licences = sorted({str(source.get("licence") or "unknown") for manifest in manifests.values()
                       for source in manifest["sources"].values()})
    others = [licence for licence in licences if not _LICENCES.fullmatch(licence.lower())]
    known = sorted({"other" if licence in others else licence.lower() for licence in licences})
    entries: dict[str, Any] = {"pretty_name": name, "license": known if len(known) > 1 else known[0]}
    if others:
        entries["license_name"] = re.sub(r"[^a-z0-9.]+", "-", " ".join(others).lower()).strip("-.")[:96] or "other"
    entries |= {"task_categories": ["text-generation", "fill-mask"], "tags": ["ettin", "mds", "pretraining"],
                "viewer": False}  # it reads no MDS, and would take the JSON files beside the shards for the data
    # JSON is YAML: quoting is safe whatever a name holds
    return "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in entries.items()) + "---\n"


def _source_table(split: str, manifest: Mapping[str, Any]) -> str:
    total = max(1, manifest["totals"]["tokens"])
    header = "documents", "chunks", "tokens", "share", "bytes of text", "dropped", "licence", "revision"
    return _table((f"{split}: source", *header), [
        (name, *(f"{source[key]:,}" for key in header[:3]), f"{source['tokens'] / total:.1%}", f"{source['bytes']:,}",
         ", ".join(f"{number:,} {reason}" for reason, number in source["dropped"].items()) or "none",
         source.get("licence") or "unknown", source.get("revision") or "not recorded")
        for name, source in manifest["sources"].items()])


def _clean(text: str) -> str:
    """Foreign text as one line of Markdown: no markup of its own, no control characters."""
    text = "".join(character if character.isprintable() else " " for character in text)
    return re.sub(r"([\\|`*_<>\[\]#!])", r"\\\1", text)


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(map(_clean, row))} |\n" for row in (header, ("---",) * len(header), *rows))
