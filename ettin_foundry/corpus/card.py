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
from ettin_foundry.data.quantities import length_cells
from ettin_foundry.data.storage import Storage, check_name

log = logging.getLogger(__name__)

Manifests = Mapping[str, Mapping[str, Any]]
Lengths = Mapping[str, np.ndarray]

CARD = "README.md"
_MARK = "<!-- ettin-set "  # a card without it was written by hand, and is never replaced
_HASH = re.compile(r"^\| `(.*)` \| `(.*)` \|$", re.MULTILINE)
# https://huggingface.co/docs/hub/repositories-licenses; the Hub refuses a card that names any other
_LICENCES = frozenset("""
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 cc bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
    lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib
    pddl lgpl-lr""".split())
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B",
          "10B<n<100B", "100B<n<1T", "n>1T")
_READ = '''\
```python
from ettin_foundry.data.shards import MDSSplit

data = MDSSplit("train")              # every file is checked before use
tokens = data.chunk(0, 0)             # first chunk of the first shard: uint16, no special tokens
```
'''


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
                 ("tokenizer", f"{first['tokenizer']['name']}, {first['tokenizer']['vocab_size']:,} entries"),
                 ("chunk length", f"{first['chunk_length']:,}"), ("compression", first["compression"] or "none")]
    made_with += [(key.replace("_", " "), json.dumps(value)) for key, value in first["options"].items()
                  if key not in ("chunk_length", "compression") and value not in (None, False, [], {}, "")]
    counts = [(split, *(f"{manifest['totals'][key]:,}" for key in ("documents", "samples", "tokens")),
               f"{len(manifest['shards']):,}") for split, manifest in manifests.items()]
    return "\n".join([
        _front_matter(name, manifests), f"# {_clean(name)}\n",
        f"Text, tokenized and cut into chunks of at most {first['chunk_length']:,} tokens, as MDS shards that are read "
        "without being trusted. No special tokens inside; a document's last chunk is marked.\n",
        _table(("split", "documents", "chunks", "tokens", "shards"), counts),
        "## Sources\n", *(_source_table(split, manifest) for split, manifest in manifests.items()),
        "## Lengths\n",
        _table(("split", "mean", "10%", "median", "90%", "of full length"),
               [(split, *length_cells(found)) for split, found in lengths.items()]),
        "## Made with\n", _table(("", ""), made_with), "## Read it\n", _READ,
        "Stock `streaming.StreamingDataset` reads the same folders. `ettin verify` checks every byte, `ettin show` "
        "prints statistics and decoded samples.\n",
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
    others = [licence for licence in licences if licence.lower() not in _LICENCES and licence != "unknown"]
    known = sorted({"other" if licence in others else licence.lower() for licence in licences})
    chunks = sum(manifest["totals"]["samples"] for manifest in manifests.values())
    entries: dict[str, Any] = {"pretty_name": name, "license": known if len(known) > 1 else known[0]}
    if others:
        entries["license_name"] = re.sub(r"[^a-z0-9.]+", "-", " ".join(others).lower()).strip("-.")[:96] or "other"
    entries |= {"size_categories": [_SIZES[min(max(len(str(chunks)) - 3, 0), len(_SIZES) - 1)]],
                "task_categories": ["text-generation", "fill-mask"],
                "tags": ["ettin", "mds", "tokenized", "pretraining"],
                "viewer": False}  # it reads no MDS, and would take the JSON files beside the shards for the data
    # JSON is YAML: quoting is safe whatever a name holds
    return "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in entries.items()) + "---\n"


def _source_table(split: str, manifest: Mapping[str, Any]) -> str:
    total = max(1, manifest["totals"]["tokens"])
    header = "documents", "chunks", "tokens", "share", "bytes of text", "dropped", "licence", "revision"
    return _table((f"{split}: source", *header), [
        (name, *(f"{source[key]:,}" for key in header[:3]), f"{source['tokens'] / total:.1%}", f"{source['bytes']:,}",
         ", ".join(f"{number:,} {reason}" for reason, number in source["dropped"].items()) or "none",
         source["licence"] or "unknown", source["revision"] or "not recorded")
        for name, source in manifest["sources"].items()])


def _clean(text: str) -> str:
    """Foreign text as one line of Markdown: no markup of its own, no control characters."""
    text = "".join(character if character.isprintable() else " " for character in text)
    return re.sub(r"([\\|`*_<>\[\]#!])", r"\\\1", text)


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(map(_clean, row))} |\n" for row in (header, ("---",) * len(header), *rows))
