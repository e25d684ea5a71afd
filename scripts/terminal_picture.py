"""Makes a picture (SVG) of a command's output in a terminal, with colours.

    FORCE_COLOR=1 python -m bart_t5x.inspect --task=norwegian_denoising_mini |
        python scripts/terminal_picture.py FILE.svg TITLE

reads it from stdin. Pictures in README.md are made with it.
"""

import argparse
import io
import re
import sys

from rich.console import CONSOLE_SVG_FORMAT, Console
from rich.text import Text

WIDTH = 110  # columns
# Without rich's references to fonts on other servers.
SVG_FORMAT = re.sub(r'@font-face \{\{.*?\}\}', '', CONSOLE_SVG_FORMAT, flags=re.DOTALL)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('file')
  parser.add_argument('title')
  args = parser.parse_args()
  console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
  console.print(Text.from_ansi(sys.stdin.read().rstrip('\n')))
  console.save_svg(args.file, title=args.title, code_format=SVG_FORMAT)


if __name__ == '__main__':
  main()
