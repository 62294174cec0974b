"""The data card of a dataset: README.md as the Hugging Face Hub reads it, and lengths.svg, the picture in it.

Both are pure functions of the dataset's small files: the same dataset gives the same bytes anywhere. A comment at the
end of the card holds a sha256 of every small file, which `ettin verify` compares.
"""

from __future__ import annotations

import hashlib
import io
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
PICTURE = "lengths.svg"
_MARK = "<!-- ettin-set "
_NOTE = "written by ettin finalize, read by ettin verify; a card without this comment is never replaced"
_HEAD_KEYS = ("chunk_length", "compression", "tokenizer", "options", "code_version", "sources")
_MAX_CARD_BYTES = 16 << 20
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
    """Writes README.md and lengths.svg of splits whose manifests are in the storage already.

    A README.md that is not one of ours is left alone, with a warning. `lengths` are (chunk_length + 1,) chunks of each
    length, by split.
    """
    storage.write_bytes(PICTURE, picture(lengths))
    if storage.exists(CARD) and _MARK.encode() not in storage.read_bytes(CARD):
        log.warning("%s was written by hand and stays; move it away and run ettin finalize", storage.where(CARD))
    else:
        storage.write_bytes(CARD, card_text(storage, manifests, lengths).encode())


def card_text(storage: Storage, manifests: Manifests, lengths: Lengths) -> str:
    """The text of README.md; arguments as of `write_card`, lengths.svg already written."""
    # named after its sources, not its folder: the same conversion gives the same bytes wherever it is done
    names = list(dict.fromkeys(name for manifest in manifests.values() for name in manifest["sources"]))
    name = ", ".join(names[:4]) + f" and {len(names) - 4} more" * (len(names) > 4)
    small = [file for file, _ in storage.list("tokenizer/")] + [f"{split}/{MANIFEST}" for split in manifests]
    files = {file: hashlib.sha256(storage.read_bytes(file)).hexdigest() for file in sorted([PICTURE, *small])}
    heads = {split: {key: manifest[key] for key in _HEAD_KEYS} for split, manifest in manifests.items()}
    comment = json.dumps({"note": _NOTE, "files": files, "splits": heads})
    for special, escaped in (("<", "\\u003c"), (">", "\\u003e"), ("--", "-\\u002d")):
        comment = comment.replace(special, escaped)  # nothing in it ends the comment
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
        "## Lengths\n", f"![Chunks and tokens by length of the chunk]({PICTURE})\n",
        _table(("split", "mean", "10%", "median", "90%", "of full length"),
               [(split, *length_cells(found)) for split, found in lengths.items()]),
        "## Made with\n", _table(("", ""), made_with), "## Read it\n", _READ,
        "Stock `streaming.StreamingDataset` reads the same folders. `ettin verify` checks every byte, `ettin show` "
        "prints statistics and decoded samples.\n",
        "## Identity\n", "A manifest holds the hash of every shard, so its own hash stands for the whole split.\n",
        _table(("file", "sha256"), [(f"`{file}`", f"`{value}`") for file, value in files.items()]),
        f"{_MARK}{comment} -->\n"])


def read_block(storage: Storage) -> dict[str, dict[str, Any]] | None:
    """The comment in a dataset's card: {"files": {name: sha256}, "splits": {...}}; None without one.

    Raises ValueError for one that cannot be read, or names files outside the dataset.
    """
    if not storage.exists(CARD) or storage.size(CARD) > _MAX_CARD_BYTES:
        return None
    text = storage.read_bytes(CARD).decode(errors="replace")
    if (at := text.rfind(_MARK)) < 0:
        return None
    try:
        block, _ = json.JSONDecoder().raw_decode(text, at + len(_MARK))
        if not all(isinstance(block[key], dict) for key in ("files", "splits")):
            raise ValueError("files and splits must be mappings")
        for name in block["files"]:
            check_name(name)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{storage.where(CARD)}: its last comment must be what ettin finalize wrote, got "
                         f"{error!r:.200}; run ettin finalize, or remove the comment") from None
    return block


def picture(lengths: Lengths) -> bytes:
    """lengths.svg: shares of chunks and of tokens by length; the largest split filled, others as an outline."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    # text as text: legible in any viewer, a tenth of the bytes, and no dependence on the version of a font
    style: Any = {**matplotlib.rcParamsDefault, "backend": "agg", "svg.fonttype": "none", "svg.hashsalt": "ettin",
                  "font.size": 9.0, "font.family": "sans-serif", "axes.spines.top": False, "axes.spines.right": False}
    longest = max(len(counts) for counts in lengths.values()) - 1
    edges = np.unique(np.linspace(1, longest + 1, min(48, longest) + 1).round().astype(np.int64))
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.0, 2.6))
        panels = figure.subplots(1, 2)
        figure.subplots_adjust(left=0.08, right=0.99, bottom=0.18, top=0.96, wspace=0.2)
        for number, split in enumerate(sorted(lengths, key=lambda split: -int(lengths[split].sum()))):
            counts = np.asarray(lengths[split], np.int64)
            for axes, weights in zip(panels, (counts, counts * np.arange(len(counts)))):
                shares = np.add.reduceat(np.append(weights, 0)[:edges[-1]], edges[:-1]) / max(1, int(weights.sum()))
                axes.stairs(shares, edges, fill=not number, label=split, color=f"C{number}", linewidth=1.2)
        for axes, title in zip(panels, ("chunks", "tokens")):
            axes.set(xlabel="tokens in the chunk", ylabel=f"share of all {title}", xlim=(1, longest + 1))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        panels[0].legend(frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


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
    cells = [[cell if cell[:1] == cell[-1:] == "`" else _clean(cell) for cell in row]
             for row in (header, ("---",) * len(header), *rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)
