"""Trains a model: merges recipe and overlays, prints what will run, and hands it to LLM-Foundry.

    composer train.py RECIPE.yaml [OVERLAY.yaml ...] [KEY=VALUE ...] [--dry-run]

Later files win over earlier ones, and key=value wins over files. `--dry-run` stops before any work. `ettin recipes`
lists the recipes; each says at its top what `variables` a person sets.

Example: composer train.py yamls/nano.yaml yamls/options/decoder.yaml max_duration=200_000tok
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf as om

import ettin_foundry
from ettin_foundry.tools import plan
from ettin_foundry.training import checks, sources
from ettin_foundry.training.run_config import configure, merge, read

__all__ = ["configure", "main", "merge", "read"]


def main(argv: list[str]) -> int:
    """Runs the command line; 1 and one line on standard error when the configuration is refused, 0 when all is done."""
    # what protects a run is in training/checks.py, which stock `llmfoundry train` reaches too
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    dry_run = "--dry-run" in argv
    try:
        config = configure([arg for arg in argv if arg != "--dry-run"])
        plain: Any = om.to_container(config, resolve=True)
        checks.check_settings(plain)
        checks.check_loggers(plain)
        if os.environ.get("RANK", "0") == "0" and plain.get("model", {}).get("name") == "ettin":
            print(plan.text([plan.plan_run(plain)]), flush=True)
        try:
            checks.check_machine(plain)
        except (ValueError, OSError) as error:
            if not dry_run:
                raise
            print(f"not on this machine: {error}", flush=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    if not dry_run:
        warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)  # LLM-Foundry imports it
        from llmfoundry.command_utils import train

        ettin_foundry.register()
        try:
            train(config)
        except sources.Finished as reason:
            if os.environ.get("RANK", "0") == "0":
                print(f"finished: {reason}", flush=True)
        except (ValueError, OSError) as error:
            # raised by ours: bad data, tokenizer or checkpoint, said in full; from elsewhere the traceback matters
            raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
            if Path(ettin_foundry.__file__).parent not in raised_in.parents:
                raise
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
