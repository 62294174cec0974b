"""Datasets, from their files to batches. Here: names and limits of the format, which cost no import."""

FORMAT = "ettin-mds"
VERSION = 1
MANIFEST = "manifest.json"
INDEX = "index.json"
LENGTHS = "lengths.npy"
COLUMNS = {"tokens": "ndarray:uint16", "doc": "str", "part": "int", "last": "int", "source": "str"}
"""Column name -> MDS encoding. No other column or encoding is read, so nothing is ever unpickled."""
MAX_CHUNK_LENGTH = 65_535  # a chunk's length is stored in at most two bytes
