"""Makes a picture (SVG) of what a command writes, colours included.

    python -m bart_t5x.inspect --task=norwegian_denoising_mini --color=always |
        python scripts/terminal_picture.py docs/noise.svg 'python -m bart_t5x.inspect'

The picture in the README is made like this.
"""

import io
import sys

from rich.console import Console
from rich.text import Text

WIDTH = 110  # columns


def main(path: str, title: str) -> None:
  console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
  console.print(Text.from_ansi(sys.stdin.read().rstrip('\n')))
  console.save_svg(path, title=title)


if __name__ == '__main__':
  main(*sys.argv[1:])
