"""Exports to and imports from Hugging Face.

python -m bart_t5x.hf.convert export --checkpoint=RUN/checkpoint_N --output_dir=OUT
python -m bart_t5x.hf.convert import --model=FOLDER_OR_HUB_ID --output_dir=OUT
"""

import argparse
import pathlib
import shlex
import sys
from collections.abc import Sequence

from bart_t5x import cli


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m bart_t5x.hf.convert', description=__doc__.split('\n')[0]
  )
  commands = parser.add_subparsers(dest='command', required=True)
  export = commands.add_parser(
    'export', help='write a checkpoint as a folder that transformers loads'
  )
  add = export.add_argument
  add('--checkpoint', type=pathlib.Path, required=True, help='MODEL_DIR/checkpoint_N')
  add('--config', type=pathlib.Path, help="the run's config.gin, if not in MODEL_DIR")
  add(
    '--corpus_dir',
    type=pathlib.Path,
    help='the folder with the tokenizer; needed for tasks other than those of `tasks`',
  )
  add('--dtype', choices=['float32', 'bfloat16'], default='float32')
  add(
    '--push_to_hub',
    metavar='ORG/NAME',
    help='upload the folder too; the token is that of `hf auth login` or HF_TOKEN',
  )
  add('--private', action='store_true', help='push to a private repository only')
  add('--with_logs', action='store_true', help="push the run's TensorBoard logs too")
  add('--revision', help='branch to push to; by default main')
  import_ = commands.add_parser(
    'import',
    help='write a BART of Hugging Face or fairseq as a checkpoint to start from',
  )
  add = import_.add_argument
  add(
    '--model',
    required=True,
    help="a folder, a .pt file of fairseq's next to its dict.txt, or an id on the Hub",
  )
  add('--revision', help='branch, tag or commit on the Hub')
  add('--skip_tokenizer', action='store_true', help='import the weights alone')
  for command in (export, import_):
    command.add_argument('--output_dir', type=pathlib.Path, required=True)
    command.add_argument(
      '--overwrite', action='store_true', help='replace an earlier model in output_dir'
    )
  return parser


def _export(args: argparse.Namespace, command: str) -> None:
  # Late, so that --help answers at once.
  from bart_t5x.hf import export, hub

  if args.push_to_hub:
    hub.check_login(args.push_to_hub)
  elif args.private or args.revision or args.with_logs:
    raise cli.UsageError(
      '--private, --revision and --with_logs belong to --push_to_hub=ORG/NAME'
    )
  export.export(
    args.checkpoint,
    args.output_dir,
    command,
    args.config,
    args.corpus_dir,
    args.dtype,
    args.overwrite,
    args.push_to_hub,
  )
  print(f'exported {args.checkpoint} to {args.output_dir}')
  if args.push_to_hub:
    url = hub.push(
      args.output_dir,
      args.push_to_hub,
      f'Export of {args.checkpoint.name}',
      args.private,
      args.revision,
      args.checkpoint.parent if args.with_logs else None,
    )
    print(f'pushed to {url}')


def _import(args: argparse.Namespace) -> None:
  from bart_t5x.hf import import_model

  import_model.import_model(
    args.model, args.output_dir, args.revision, args.skip_tokenizer, args.overwrite
  )
  print(f'imported {args.model} to {args.output_dir}')


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command; returns its exit status."""
  cli.set_up_libraries()
  argv = list(sys.argv[1:] if argv is None else argv)
  args = _parser().parse_args(argv)
  try:
    if args.command == 'export':
      _export(args, 'python -m bart_t5x.hf.convert ' + shlex.join(argv))
    else:
      _import(args)
  except (OSError, ValueError, ImportError) as e:
    return cli.fail(e)
  return 0


if __name__ == '__main__':
  sys.exit(main())
