"""Turns text into a dataset: `python data_prep/convert.py SOURCE [SOURCE ...] --out DIR --train-tokenizer 8192`.

A thin program over ettin_foundry/cli/convert.py; `--help` lists the options. It runs from a bare clone as well as
installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ettin_foundry.cli.convert import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
