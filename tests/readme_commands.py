"""Prints the commands of one README section, for a shell to run: `python tests/readme_commands.py "By hand" | bash -e`."""

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def commands(section: str) -> list[str]:
    """The command lines of the section's bash blocks, continuation lines joined and comments removed."""
    text = README.read_text()
    found = re.search(rf"^## {re.escape(section)}$(.*?)(?=^## |\Z)", text, re.M | re.S)
    if not found:
        raise ValueError(f"README.md has no section {section!r}")
    blocks = re.findall(r"^```bash\n(.*?)^```", found[1], re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+", " ", line.split(" #")[0]).strip() for line in lines if line.strip()]


if __name__ == "__main__":
    print("\n".join(commands(sys.argv[1])))
