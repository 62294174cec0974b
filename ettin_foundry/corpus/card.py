"""The data card of a converted set: README.md as the Hugging Face Hub reads it, and lengths.svg, the picture in it.

Both are pure functions of the set's small files: the same set gives the same bytes, without dates or machines in them.
At its end the card holds, in an HTML comment, sources, licences, options, tokenizer, and a sha256 of every small file, so
that verify.py can tell a changed manifest from a good one.
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

from ettin_foundry.data.manifest import MANIFEST
from ettin_foundry.data.storage import Storage, check_name

__all__ = ["CARD", "HEAD_KEYS", "PICTURE", "card_text", "picture", "read_block", "write_card"]

log = logging.getLogger(__name__)

CARD = "README.md"
PICTURE = "lengths.svg"
HEAD_KEYS = ("chunk_length", "compression", "tokenizer", "options", "code_version", "sources")
"""Keys of a manifest that cannot be counted again in the shards; the card's comment repeats them for each split."""

_MARK = "<!-- ettin-set "
_NOTE = "written by ettin finalize, read by ettin verify and ettin repair; a card without this comment is never replaced"
_MAX_HASHED = 64 << 20  # a larger file in tokenizer/ is none of a tokenizer's
_BINS = 48
_SPLIT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_NAMED = 4  # sources in the title
# https://huggingface.co/docs/hub/repositories-licenses; the Hub refuses a card that names any other
_LICENCES = frozenset("""
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m afl-3.0
    artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
    cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1
    lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    """.split())
_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B", "10B<n<100B",
          "100B<n<1T", "n>1T")

_READ = '''\
from ettin_foundry.data.shards import MDSSplit

data = MDSSplit("train")                # every file is checked before use
tokens = data.chunk(0, 0)             # first chunk of the first shard: uint16, no special tokens
'''


def write_card(storage: Storage, manifests: Mapping[str, Mapping[str, Any]], lengths: Mapping[str, np.ndarray]) -> None:
    """Writes README.md and lengths.svg. A README.md that is not one of ours is left alone, with a warning.

    Args:
        storage: of the set; the manifests are already in it.
        manifests: split -> manifest. lengths: split -> (chunk_length + 1,) chunks of each length.
    """
    image = picture(lengths)
    storage.write_bytes(PICTURE, image)
    if storage.exists(CARD) and _MARK.encode() not in storage.read_bytes(CARD):
        log.warning("%s: was written by hand and stays as it is; move it away and run ettin finalize to have a data card",
                    storage.where(CARD))
        return
    storage.write_bytes(CARD, card_text(storage, manifests, lengths).encode())


def card_text(storage: Storage, manifests: Mapping[str, Mapping[str, Any]], lengths: Mapping[str, np.ndarray]) -> str:
    """The text of README.md; arguments as of `write_card`, lengths.svg already written."""
    # named after its sources, not its folder: the same conversion gives the same bytes wherever it is done
    names = list(dict.fromkeys(name for manifest in manifests.values() for name in manifest["sources"]))
    name = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
    files = _hash_files(storage, manifests)
    first = next(iter(manifests.values()))
    parts = [_front_matter(name, manifests), f"# {_clean(name)}\n", _summary(manifests),
             "## Sources\n", *(_source_table(split, manifest) for split, manifest in manifests.items()),
             "## Lengths\n", f"![Chunks and tokens by length of the chunk]({PICTURE})\n", _length_table(lengths),
             "## Made with\n", _options_table(first),
             "## Read it\n", f"```python\n{_READ}```\n",
             "Stock `streaming.StreamingDataset` reads the same folders. `ettin verify` checks every byte, `ettin show` "
             "prints statistics and decoded samples.\n",
             "## Identity\n", "A manifest holds the hash of every shard, so its own hash stands for the whole split.\n",
             _table(("file", "sha256"), [(f"`{file}`", f"`{value}`") for file, value in files.items()]),
             _block(manifests, files)]
    return "\n".join(parts)


def read_block(text: str) -> dict[str, Any] | None:
    """What the comment at the end of a card holds: {"files": {name: sha256}, "splits": {split: head}}; None without one.

    Names are plain and stay inside the set; all else is as untrusted as the file, and whoever uses it checks it.

    Raises:
        ValueError: there is such a comment, but it cannot be read.
    """
    at = text.rfind(_MARK)
    if at < 0:
        return None
    advice = "Run ettin finalize, or remove the comment"
    try:
        block, _ = json.JSONDecoder().raw_decode(text, at + len(_MARK))
        if not all(isinstance(block[key], dict) for key in ("files", "splits")):
            raise ValueError("files or splits is missing")
        if not all(isinstance(value, str) for value in block["files"].values()):
            raise ValueError("a hash is no text")
        for name in block["files"]:
            check_name(name)
        if not all(isinstance(head, dict) and _SPLIT.fullmatch(name) for name, head in block["splits"].items()):
            raise ValueError("a split is no mapping, or its name no plain one")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{CARD}: its last comment cannot be read ({error!r:.200}); the JSON that ettin finalize wrote is "
                         f"needed. {advice}") from None
    return block


def picture(lengths: Mapping[str, np.ndarray]) -> bytes:
    """lengths.svg: the share of chunks, and of tokens, by length of the chunk, for each split."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    # text as text: legible in any viewer, a tenth of the bytes, and no dependence on the version of a font
    style = {"svg.fonttype": "none", "svg.hashsalt": "ettin", "font.size": 9.0, "axes.spines.top": False,
             "axes.spines.right": False, "font.family": "sans-serif"}
    defaults: Any = {**matplotlib.rcParamsDefault, **style, "backend": "agg"}  # whatever this machine's settings are
    with matplotlib.rc_context(defaults):
        figure = Figure(figsize=(8.0, 2.6))
        panels = figure.subplots(1, 2, gridspec_kw={"left": 0.08, "right": 0.99, "bottom": 0.18, "top": 0.96, "wspace": 0.2})
        draw_lengths(panels, lengths)
        for axes in panels:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def draw_lengths(panels: Any, lengths: Mapping[str, np.ndarray]) -> None:
    """Draws both histograms on a pair of matplotlib axes: the largest split filled, others as an outline."""
    longest = max(len(counts) for counts in lengths.values()) - 1
    edges = np.unique(np.linspace(1, longest + 1, min(_BINS, longest) + 1).round().astype(np.int64))
    for number, (split, counts) in enumerate(sorted(lengths.items(), key=lambda item: -int(item[1].sum()))):
        counts = np.asarray(counts, np.int64)
        label = (" " * split.startswith("_") + split).replace("$", "\\$")  # matplotlib hides the one, typesets the other
        for axes, weights, title in ((panels[0], counts, "chunks"), (panels[1], counts * np.arange(len(counts)), "tokens")):
            shares = np.add.reduceat(np.append(weights, 0)[:edges[-1]], edges[:-1]) / max(1, int(weights.sum()))
            axes.stairs(shares, edges, fill=not number, label=label, color=f"C{number}", linewidth=1.2)
            axes.set(xlabel="tokens in the chunk", ylabel=f"share of all {title}", xlim=(1, longest + 1))
    panels[0].legend(frameon=False)


def _hash_files(storage: Storage, manifests: Mapping[str, Any]) -> dict[str, str]:
    """sha256 of every small file that determines the set or belongs to the card."""
    sizes = dict(storage.list("tokenizer/"))
    names = [name for name in sorted(sizes) if sizes[name] <= _MAX_HASHED]
    names += [name for name in (PICTURE,) if storage.exists(name)]
    names += [f"{split}/{MANIFEST}" for split in manifests]
    return {name: hashlib.sha256(storage.read_bytes(name)).hexdigest() for name in sorted(names)}


def _block(manifests: Mapping[str, Mapping[str, Any]], files: Mapping[str, str]) -> str:
    splits = {split: {key: manifest[key] for key in HEAD_KEYS if key in manifest} for split, manifest in manifests.items()}
    text = json.dumps({"note": _NOTE, "files": files, "splits": splits})
    return _MARK + text.replace("<", "\\u003c").replace(">", "\\u003e").replace("--", "-\\u002d") + " -->\n"


def _front_matter(name: str, manifests: Mapping[str, Mapping[str, Any]]) -> str:
    # JSON is YAML: quoting is safe whatever a name holds
    licences = sorted({str(source.get("licence") or "unknown") for manifest in manifests.values()
                       for source in manifest["sources"].values()})
    known = [licence.lower() if licence.lower() in _LICENCES or licence == "unknown" else "other" for licence in licences]
    entries: dict[str, Any] = {"pretty_name": name, "license": sorted(set(known)) if len(set(known)) > 1 else known[0]}
    others = [licence for licence, identifier in zip(licences, known) if identifier == "other"]
    if others:
        entries["license_name"] = re.sub(r"[^a-z0-9.]+", "-", " ".join(others).lower()).strip("-.")[:96] or "other"
    chunks = sum(int(manifest["totals"]["samples"]) for manifest in manifests.values())
    entries |= {
        "size_categories": [_SIZES[min(max(len(str(chunks)) - 3, 0), len(_SIZES) - 1)]],
        "task_categories": ["text-generation", "fill-mask"],
        "tags": ["ettin", "mds", "tokenized", "pretraining"],
        "viewer": False,  # the Hub's viewer reads no MDS, and would take the JSON files beside it for the data
    }
    return "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in entries.items()) + "---\n"


def _summary(manifests: Mapping[str, Mapping[str, Any]]) -> str:
    first = next(iter(manifests.values()))
    rows = [(split, *(f"{manifest['totals'][key]:,}" for key in ("documents", "samples", "tokens")),
             f"{len(manifest['shards']):,}") for split, manifest in manifests.items()]
    return (f"Text, tokenized and cut into chunks of at most {first['chunk_length']:,} tokens, as MDS shards that are read "
            f"without being trusted. No special tokens inside; a document's last chunk is marked.\n\n"
            + _table(("split", "documents", "chunks", "tokens", "shards"), rows))


def _source_table(split: str, manifest: Mapping[str, Any]) -> str:
    rows = []
    for name, source in manifest["sources"].items():
        dropped = ", ".join(f"{number:,} {reason}" for reason, number in source.get("dropped", {}).items()) or "none"
        share = source["tokens"] / max(1, manifest["totals"]["tokens"])
        rows.append((name, *(_number(source.get(key)) for key in ("documents", "chunks", "tokens")), f"{share:.1%}",
                     _number(source.get("bytes")), dropped, source.get("licence") or "unknown",
                     source.get("revision") or "not recorded"))
    header = (f"{split}: source", "documents", "chunks", "tokens", "share", "bytes of text", "dropped", "licence",
              "revision")
    return _table(header, rows)


def _length_table(lengths: Mapping[str, np.ndarray]) -> str:
    rows = []
    for split, counts in lengths.items():
        counts = np.asarray(counts, np.int64)
        total, below = max(1, int(counts.sum())), counts.cumsum()
        # the smallest length that a share of the chunks does not exceed
        quantiles = [int(np.searchsorted(below, share * int(counts.sum()))) for share in (0.1, 0.5, 0.9)]
        rows.append((split, f"{int(counts @ np.arange(len(counts))) / total:,.1f}", *(f"{value:,}" for value in quantiles),
                     f"{int(counts[-1]) / total:.1%}"))
    return _table(("split", "mean", "10%", "median", "90%", "of full length"), rows)


def _options_table(manifest: Mapping[str, Any]) -> str:
    tokenizer = manifest["tokenizer"]
    rows = [("ettin_foundry", str(manifest.get("code_version", "not recorded"))),
            ("tokenizer", f"{tokenizer.get('name', 'unnamed')}, {tokenizer['vocab_size']:,} entries"),
            ("chunk length", f"{manifest['chunk_length']:,}"), ("compression", str(manifest.get("compression") or "none"))]
    rows += [(key.replace("_", " "), json.dumps(value)) for key, value in manifest["options"].items()
             if key not in ("chunk_length", "compression") and value not in (None, False, [], {}, "")]
    return _table(("", ""), rows)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "not recorded"


def _clean(text: str) -> str:
    """Foreign text as one line of Markdown: no markup of its own, no control characters."""
    text = "".join(character if character.isprintable() else " " for character in text)
    return re.sub(r"([\\|`*_<>\[\]#!])", r"\\\1", text)


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell if cell[:1] == cell[-1:] == "`" else _clean(cell) for cell in cells) + " |\n"

    return line(header) + line("---" for _ in header) + "".join(line(row) for row in rows)
