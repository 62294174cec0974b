"""The plan's hours beside the original's, for all six sizes: `python benchmarks/plan_hours.py`.

Pretrain, extend and decay of our recipes on 4x H100 at the original's share of the peak. Our 1b recipes have 1.8T
tokens (extend and decay are a third of the others'), so hours are also given for 2T tokens, which the original's are
for. The share in useful work is that of full rows of one document each, for an encoder and for a decoder; shorter
documents lower it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from streams import results_path  # noqa: E402

from ettin_foundry.tools.plan import ORIGINAL_HOURS, ORIGINAL_TOKENS, Plan, plan_runs, totals  # noqa: E402
from ettin_foundry.training.run_config import resolved  # noqa: E402


def chain(size: str, member: str) -> list[Plan]:
    """The three phases of one member."""
    stages = []
    for phase in ("pretrain", "extend", "decay"):
        overlay = [] if phase == "pretrain" else [str(ROOT / f"yamls/phases/{phase}.yaml"), "variables.source=before"]
        stages.append((phase, resolved([str(ROOT / f"yamls/ettin-{member}-{size}.yaml"), *overlay])))
    return plan_runs(stages, gpus="4xH100")


def main() -> None:
    parser = argparse.ArgumentParser(description="planned hours beside the original's", epilog=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="folder for the result; benchmarks/results without it")
    args = parser.parse_args()
    lines = ["| size | tokens | original's hours for 2T | plan's hours | plan's for 2T | "
             "MFU, 6 per parameter and token | MFU, useful work: encoder / decoder |", "|---|---|---|---|---|---|---|"]
    for size, original in ORIGINAL_HOURS.items():
        runs = {member: chain(size, member) for member in ("enc", "dec")}
        sums = {member: totals(runs[member]) for member in runs}
        tokens, hours = sums["enc"]["num_tokens"], sums["enc"]["hours"]
        assert tokens and hours and runs["enc"][0].mfu
        useful = {member: runs[member][0].mfu * sums[member]["flops"]
                  / sum(6 * run.parameters * run.num_tokens for run in runs[member]) for member in runs}
        whole = hours * ORIGINAL_TOKENS / tokens
        lines.append(f"| {size} | {tokens / 1e12:.3f}T | {original:,} | {hours:,.1f} | {whole:,.1f} | "
                     f"{runs['enc'][0].mfu:.1%} | {useful['enc']:.1%} / {useful['dec']:.1%} |")
    path = results_path("plan-hours", args.out).with_suffix(".md")
    path.write_text("`python benchmarks/plan_hours.py`\n\n" + "\n".join(lines) + "\n")
    print(*lines, f"written to {path}", sep="\n")


if __name__ == "__main__":
    main()
