"""The passes of `prepare` in Apache Beam, on as many machines as its runner has.

The functions are those of `corpus_build`, and so are the bytes of the corpus.
"""

import contextlib
import dataclasses
import functools
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import fsspec
import numpy as np
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
from apache_beam.pvalue import AsDict, AsIter, AsSingleton, TaggedOutput
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.transforms.window import GlobalWindows

from bart_t5x import cli, corpus_build, corpus_format, text_sources, tokenization
from bart_t5x.corpus_build import Plan, Totals


def build(
  source: text_sources.Source,
  folder: str,
  settings: Mapping[str, Any],
  options: Sequence[str] = (),
  tokenizer: tokenization.Tokenizer | None = None,
) -> None:
  """Writes a corpus into an empty folder, corpus.json last.

  Args:
    source: the text.
    folder: path or URL that every worker can write to.
    settings: arguments of `prepare` that affect the content.
    options: of the pipeline, such as '--runner=FlinkRunner'; by default Beam's local
      FnApiRunner.
    tokenizer: None to train one.

  Raises:
    ValueError: bad options, or an error that a worker reported.
    RuntimeError: the runner failed.
    OSError: the workers do not share the folder.
  """
  if wrong := [option for option in options if not option.startswith('--')]:
    raise cli.UsageError(f'--pipeline_options: {wrong[0]!r} does not begin with --.')
  parsed = PipelineOptions(list(options))
  runner = parsed.view_as(StandardOptions).runner
  known = parsed.get_all_options()
  unknown = parsed.get_all_options(retain_unknown_options=True).keys() - known.keys()
  if unknown and not runner:  # other runners have options that only they know
    raise cli.UsageError(
      f'--pipeline_options: the local runner has no {", ".join(sorted(unknown))}.'
    )
  if runner and 'dask' in runner.lower():
    raise cli.UsageError(
      "Beam's DaskRunner reports success without running this pipeline. Use another "
      'runner.'
    )
  fs = fsspec.url_to_fs(folder)[0]
  error = posixpath.join(folder, corpus_format.ERROR_FILE)
  pipeline = beam.Pipeline(runner or FnApiRunner(), options=parsed)
  _add_passes(pipeline, source, folder, settings, tokenizer)
  result = None
  try:
    result = pipeline.run()
    result.wait_until_finish()
  except KeyboardInterrupt:
    if result:
      result.cancel()
    raise
  except Exception as e:  # runners raise many types
    fs.invalidate_cache()
    if fs.exists(error):
      raise ValueError(fs.cat(error).decode('utf-8')) from e
    raise RuntimeError(f'The Beam pipeline failed: {type(e).__name__}: {e}') from e
  fs.invalidate_cache()
  if fs.exists(error):  # of an attempt that was repeated
    fs.rm(error)
  if not fs.exists(posixpath.join(folder, corpus_format.CORPUS_FILE)):
    raise OSError(
      f'The workers have written no corpus to {folder!r}. It must be a folder or '
      'bucket that they share with this machine.'
    )


def _add_passes(
  pipeline: beam.Pipeline,
  source: text_sources.Source,
  folder: str,
  settings: Mapping[str, Any],
  tokenizer: tokenization.Tokenizer | None,
) -> None:
  def once(name: str, transform: beam.PTransform) -> beam.PCollection:
    return pipeline | f'{name}Once' >> beam.Create([None]) | name >> transform

  # The source, without duplicates.
  read, empty = (
    pipeline
    | 'Parts' >> beam.Create(source.parts)
    | beam.Reshuffle()
    | 'Read' >> beam.FlatMap(_read, folder)
    | beam.Partition(lambda document, _: int(document is None), 2)
  )
  documents = read | 'Distinct' >> beam.CombinePerKey(_any_of)
  sizes = AsIter(documents | 'Sizes' >> beam.MapTuple(_size))
  num_read = AsSingleton(read | 'Documents' >> beam.combiners.Count.Globally())
  num_empty = AsSingleton(empty | 'Empty' >> beam.combiners.Count.Globally())
  count = beam.Map(_count, folder, settings, sizes, num_read, num_empty)
  plan = AsSingleton(once('Count', count))

  # The tokenizer.
  if tokenizer is None:
    sample = AsIter(documents | 'Sample' >> beam.Filter(_in_sample, plan))
    trained = once('Train', beam.Map(_train, folder, settings, sample, plan))
  else:
    trained = pipeline | 'Tokenizer' >> beam.Create([tokenizer.content])
  content = AsSingleton(trained)

  # The shards.
  encode = beam.ParDo(_Encode(folder), content, plan)
  records, totals = documents | 'Encode' >> encode.with_outputs(
    'totals', main='records'
  )
  shard_bytes = (
    (records, once('Shards', beam.FlatMap(_empty_shards, plan)))
    | beam.Flatten()
    | beam.GroupByKey()
    | 'Write' >> beam.Map(_write_shard, folder, plan)
  )
  totals = AsDict(totals | 'Totals' >> beam.CombinePerKey(_merged))
  source = dataclasses.replace(source, parts=())
  describe = (folder, source, settings, content, plan, totals, AsDict(shard_bytes))
  once('Describe', beam.Map(_describe, *describe))


# Each of the following runs in a worker.


@contextlib.contextmanager
def _reported(folder: str) -> Iterator[None]:
  """Writes the message of an error to a file in the folder.

  What a runner does with the exception, and whether its message arrives, varies.
  """
  try:
    yield
  except Exception as e:
    message = str(e) if isinstance(e, ValueError | OSError) else repr(e)
    with fsspec.open(posixpath.join(folder, corpus_format.ERROR_FILE), 'wb') as f:
      f.write(message.encode('utf-8'))
    raise


def _read(part, folder: str) -> Iterator[tuple[int, bytes] | None]:
  """Yields digest and text of each document, None for one without text."""
  with _reported(folder):
    yield from corpus_build.keyed(part())


def _any_of(texts: Iterable[bytes]) -> bytes:
  return next(iter(texts))  # with one digest, they are equal


def _size(digest: int, text: bytes) -> tuple[int, int]:
  return digest, len(text)


def _count(_, folder, settings, sizes, read: int, empty: int) -> Plan:
  with _reported(folder):
    table = np.fromiter(sizes, [('digest', np.uint64), ('bytes', np.uint64)])
    table = table[np.argsort(table['digest'])]
    return corpus_build.count(map(np.void.item, table), read, empty, settings)


def _in_sample(document: tuple[int, bytes], plan: Plan) -> bool:
  return plan.in_sample(document[0])


def _train(_, folder, settings, sample, plan: Plan) -> bytes:
  with _reported(folder):
    texts = (text for _, text in sorted(sample))
    return corpus_build.train_tokenizer(texts, plan, settings).content


@functools.lru_cache(maxsize=1)
def _tokenizer(content: bytes) -> tokenization.Tokenizer:
  return tokenization.read_tokenizer('the tokenizer', content)


class _Encode(beam.DoFn):
  """Yields (split, shard), (digest, record); `totals` has those of each split."""

  def __init__(self, folder: str):
    self._folder = folder

  def start_bundle(self):
    self._totals = {}

  def process(self, document, content: bytes, plan: Plan):
    with _reported(self._folder):
      tokenizer = _tokenizer(content)
      (encoded,) = corpus_build.encode(tokenizer, [document])
      split, shard = plan.shard_of(encoded.digest)
      if split not in self._totals:
        self._totals[split] = Totals(tokenizer.vocab_size)
      self._totals[split].add(encoded)
      yield (split, shard), (encoded.digest, encoded.record)

  def finish_bundle(self):
    for item in self._totals.items():
      yield TaggedOutput('totals', GlobalWindows.windowed_value(item))


def _merged(totals: Iterable[Totals]) -> Totals:
  first, *others = totals
  result = Totals(first.histogram.size)
  for total in (first, *others):
    result.merge(total)
  return result


def _empty_shards(_, plan: Plan) -> Iterator[tuple[tuple[str, int], None]]:
  for split, shards in plan.shards.items():
    for shard in range(shards):
      yield (split, shard), None


def _write_shard(
  shard_and_records: tuple[tuple[str, int], Iterable[tuple[int, bytes] | None]],
  folder: str,
  plan: Plan,
) -> tuple[tuple[str, int], int]:
  """Writes a file and returns its size in bytes."""
  (split, number), records = shard_and_records
  path = corpus_format.shard_paths(folder, split, plan.shards[split])[number]
  with _reported(folder), fsspec.open(path, 'wb') as f:
    for _, record in sorted(filter(None, records)):
      f.write(record)
    return (split, number), f.tell()


def _describe(
  _,
  folder: str,
  source: text_sources.Source,
  settings: Mapping[str, Any],
  content: bytes,
  plan: Plan,
  totals: Mapping[str, Totals],
  shard_bytes: Mapping[tuple[str, int], int],
) -> None:
  with _reported(folder):
    tokenizer = _tokenizer(content)
    sizes = {
      split: [shard_bytes[split, shard] for shard in range(shards)]
      for split, shards in plan.shards.items()
    }
    last = corpus_build.last_files(source, settings, plan, tokenizer, totals, sizes)
    for name, written in last.items():
      with fsspec.open(posixpath.join(folder, name), 'wb') as f:
        f.write(written)
