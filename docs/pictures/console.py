"""Draws console.svg: what a terminal shows of a short nano run, once its bar is past a percentage.

Needs pyte (`pip install pyte`).

    python docs/pictures/console.py 70 python train.py yamls/nano.yaml max_duration=400_000tok eval_interval=200_000tok
"""

from __future__ import annotations

import fcntl
import itertools
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path

import pyte
from rich.console import Console
from rich.text import Text

COLUMNS, LINES = 120, 26


def style(cell: pyte.screens.Char) -> str:
    colour = f"#{cell.fg}" if re.fullmatch("[0-9a-f]{6}", cell.fg) else cell.fg.replace("bright", "bright_")
    return f"{'bold ' * cell.bold}{colour.replace('brown', 'yellow')}"  # pyte's name for it


def rendered(screen: pyte.Screen) -> Text:
    """The screen in its colours, without the empty lines at its end."""
    text = Text()
    for row in range(screen.lines):
        cells = [screen.buffer[row][column] for column in range(screen.columns)]
        for colours, same in itertools.groupby(cells, style):
            text.append("".join(cell.data for cell in same), colours)
        text.append("\n")
    text.rstrip()
    return text


def main(percent: int, command: list[str]) -> None:
    screen = pyte.Screen(COLUMNS, LINES)
    stream, chosen = pyte.ByteStream(screen), Text()
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(command[0], command, {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS)})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    while True:
        try:
            stream.feed(os.read(terminal, 65536))
        except OSError:  # the program has ended
            break
        shares = re.findall(r"━.* ([0-9]+)%.*tokens", "\n".join(screen.display))
        if shares and int(shares[-1]) >= percent and not chosen:
            chosen = rendered(screen)
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), color_system="truecolor")
    console.print(chosen)
    console.save_svg(str(Path(__file__).with_suffix(".svg")), title=" ".join(command[:3]))
    print("\n".join(screen.display).rstrip())


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
