"""The console command `bart-t5x`: prepare, inspect, report, restack, convert."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib import metadata

# Each is also `python -m MODULE`.
_MODULES = {
  'prepare': 'bart_t5x.prepare',
  'inspect': 'bart_t5x.inspect',
  'report': 'bart_t5x.report',
  'restack': 'bart_t5x.restack',
  'convert': 'bart_t5x.hf.convert',
}


def _versions() -> str:
  found = [d for d in metadata.distributions() if (d.name or '').startswith('bart-t5x')]
  return ', '.join(sorted({f'{d.name} {d.version}' for d in found}))


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command; returns its exit status."""
  parser = argparse.ArgumentParser(
    prog='bart-t5x',
    epilog='`bart-t5x COMMAND --help` describes a command. Training, evaluation and '
    'inference: `python -m t5x.{train,eval,infer} --help`.',
  )
  parser.add_argument('--version', action='version', version=_versions())
  parser.add_argument('command', choices=_MODULES)
  parser.add_argument('arguments', nargs=argparse.REMAINDER)
  args = parser.parse_args(argv)
  return importlib.import_module(_MODULES[args.command]).main(args.arguments)


if __name__ == '__main__':
  sys.exit(main())
