"""Prints the commands of one README section: `python tests/readme_commands.py "Train on your text" | bash -e`."""

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def commands(text: str) -> list[str]:
    """The command lines of all bash blocks, continuation lines joined and comments removed."""
    lines = "".join(re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S)).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+", " ", line.split(" #")[0]).strip() for line in lines if line.strip()]


if __name__ == "__main__":
    section = README.read_text().partition(f"\n## {sys.argv[1]}\n")[2].partition("\n## ")[0]
    print("\n".join(commands(section)))
