"""The bridge to Hugging Face, from the command line.

    python -m bart_t5x.hf.convert export --checkpoint=RUN/checkpoint_N --output_dir=OUT
"""

import argparse
import pathlib
import shlex
import sys
from collections.abc import Sequence


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
      prog='python -m bart_t5x.hf.convert', description=__doc__.split('\n')[0]
  )
  commands = parser.add_subparsers(dest='command', required=True)
  export = commands.add_parser(
      'export', help='write a checkpoint as a folder that transformers loads'
  )
  export.add_argument(
      '--checkpoint', type=pathlib.Path, required=True, help='MODEL_DIR/checkpoint_N'
  )
  export.add_argument('--output_dir', type=pathlib.Path, required=True)
  export.add_argument(
      '--config', type=pathlib.Path, help="the run's config.gin, if it lies elsewhere"
  )
  export.add_argument(
      '--corpus_dir',
      type=pathlib.Path,
      help="the folder with the tokenizer; by default that of the run's task",
  )
  export.add_argument('--dtype', choices=['float32', 'bfloat16'], default='float32')
  export.add_argument(
      '--overwrite', action='store_true', help='replace what is in output_dir'
  )
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  argv = list(sys.argv[1:] if argv is None else argv)
  args = _parser().parse_args(argv)
  from bart_t5x.hf import export  # late, so that --help answers at once

  try:
    export.export(
        args.checkpoint,
        args.output_dir,
        'python -m bart_t5x.hf.convert ' + shlex.join(argv),
        args.config,
        args.corpus_dir,
        args.dtype,
        args.overwrite,
    )
  except (OSError, ValueError) as e:
    print(f'error: {e}', file=sys.stderr)
    return 1
  print(f'exported {args.checkpoint} to {args.output_dir}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
