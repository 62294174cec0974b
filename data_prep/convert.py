"""Turns text into a dataset: `python data_prep/convert.py SOURCE [SOURCE ...] --out DIR --train-tokenizer 8192`.

It is `ettin convert`, from a bare clone as well as installed; `--help` lists the options.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ettin_foundry.cli.main import main  # noqa: E402

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
