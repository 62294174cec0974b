"""Prints what CI runs of README and docs: `python tests/readme_commands.py | bash -e`.

Blocks in bash and Python run once each, README first and then the pages in the order of the site, so that a page can
use what an earlier one made. A block with a title, such as ```bash title="needs GPUs", is not run.
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAV = re.findall(r"\S+\.md", (ROOT / "mkdocs.yml").read_text())
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", *(f"docs/{page}" for page in NAV))}
# (language, title or "", text) of each block, in order
BLOCKS = re.findall(r'^```(bash|python)(?: title="([^"]*)")?\n(.*?)^```', "".join(PAGES.values()), re.M | re.S)


def commands(text: str) -> list[str]:
    """Command lines, continuation lines joined and comments removed."""
    lines = text.replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+", " ", line.split(" #")[0]).strip() for line in lines if line.strip()]


def script() -> list[str]:
    """What runs, in order; CI itself runs the targets of make."""
    parts = [part for language, title, text in BLOCKS if not title
             for part in ([f"python - <<'END'\n{text}END"] if language == "python" else commands(text))]
    return [part for part in dict.fromkeys(parts) if not part.startswith("make ")]


if __name__ == "__main__":
    print(*script(), sep="\n")
