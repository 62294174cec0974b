"""What is read in place of a shard that cannot be read, under `on_bad_shard: skip`, and the note of it.

The substitute has the lengths of the lost chunks, which the manifest's histogram states, and tokens of another shard. So
every row, every token count and every clock stays what it was, on every rank, whether or not its node has the bad file.
Which shard is taken, and when, is decided in mds.py.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ettin_foundry.data.shards import Shard

__all__ = ["make_substitute", "note"]


def make_substitute(histogram: np.ndarray, donor: Shard, number: int) -> Shard:
    """Chunks of given lengths, ascending: chunk i has the tokens of the donor's chunk i modulo its chunks, cut or repeated.

    Args:
        histogram: (M + 1,) counts of chunk lengths. donor: a good shard. number: its number, kept with the result.

    Returns:
        A shard in memory; it ends no document, and its columns are the donor's.
    """
    lengths = np.repeat(np.arange(len(histogram)), histogram)  # (S,)
    ends = 2 * np.cumsum(lengths)
    content = bytearray(int(ends[-1]))
    for index, (length, end) in enumerate(zip(lengths.tolist(), ends.tolist())):
        at = index % len(donor.lengths)
        begin, held = int(donor.token_starts[at]), 2 * int(donor.lengths[at])
        tokens = donor.buffer[begin:begin + min(held, 2 * length)]
        content[end - 2 * length:end] = (tokens * -(-2 * length // held))[:2 * length]
    return Shard(content, ends - 2 * lengths, ends - 2 * lengths, lengths.astype(np.int32), np.zeros(len(lengths), bool),
                 np.zeros((len(lengths), 3), np.int64), number)


def note(path: Path, record: dict[str, Any]) -> None:
    """Adds a line to a file of substitutions, unless a process of any earlier or other rank has written the same one.

    Raises:
        OSError: it cannot be written; nothing may be substituted without a note.
    """
    line = json.dumps(record).encode() + b"\n"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OSError(error.errno, f"{path}: cannot be written ({error.strerror}), and no shard is replaced without a note "
                      "there. Make the folder writable, or set dataset.on_bad_shard: stop") from None
    with open(descriptor, "r+b") as stream:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if line not in stream:
            stream.write(line)
