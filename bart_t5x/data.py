"""Tasks by name, prepared corpora as seqio sources, and tasks that count epochs.

`CorpusSource` reads the shards that `bart_t5x.prepare` writes. `EpochTask` is a seqio
task that adds the seed and the epoch to each document. With a plain `seqio.Task`, noise
that is reproducible and new in each epoch would depend on the position in the stream,
and so on the number of hosts.
"""

import copy
import difflib
import importlib
import os
import sys
from collections.abc import Mapping, Sequence

import gin
import seqio
import tensorflow as tf

from bart_t5x import corpus_format
from bart_t5x.corpus_format import TRAIN, VALIDATION
from bart_t5x.tensors import do_not_convert

# Features that `EpochTask` adds.
EPOCH = 'epoch'
SEED = 'seed'

# Evaluation always has the same noise.
EVALUATION_SEED = 0

# Files read at a time, and records read from one before the next.
_OPEN_FILES = 16
_RECORDS_PER_TURN = 16
# Shards have the same order in each epoch (in corpora of format 1 that of the source),
# so documents are shuffled, in a buffer of this size, before they become examples.
_SHUFFLED_DOCUMENTS = 8192
# With this many files per host, hosts read whole files: shares differ by at most 1/16.
_FILES_PER_HOST = 16
# Preprocessors get batches, as a dataset's element costs more than a short document.
_DOCUMENTS_PER_BATCH = 64
# Difference of the seeds that order the files in successive epochs.
_EPOCH_STEP = 0x5851F42D4C957F2D

_RECORD = {
  'tokens': tf.io.RaggedFeature(tf.int64, row_splits_dtype=tf.int32),
  'sentence_starts': tf.io.RaggedFeature(tf.int64, row_splits_dtype=tf.int32),
  'example_id': tf.io.FixedLenFeature([], tf.int64),
}


def data_root() -> str:
  """Returns the folder with the corpora: BART_T5X_DATA, by default `data`."""
  return os.environ.get('BART_T5X_DATA', 'data')


def import_tasks(module: str, setting: str = 'MIXTURE_OR_TASK_MODULE') -> None:
  """Imports a module that registers tasks; errors mention the setting that names it."""
  if not all(name.isidentifier() for name in module.split('.')):
    raise ValueError(
      f'{setting} must be a module as in `import`, such as my_tasks. Got: {module!r}.'
    )
  try:
    # Gin may be locked by now, but the module may still register configurables.
    with gin.unlock_config():
      importlib.import_module(module)
  except ModuleNotFoundError as e:
    if not f'{module}.'.startswith(f'{e.name}.'):
      raise  # an import inside the module failed
    raise ModuleNotFoundError(
      f'{setting} names {module!r}, which was not found in the current folder, on '
      'PYTHONPATH or among the installed packages',
      name=e.name,
    ) from e


def find_task(
  mixture_or_task_name: str,
  module: str | None = None,
  hint: str = 'Set MIXTURE_OR_TASK_NAME, and name the module that registers the task '
  'as MIXTURE_OR_TASK_MODULE, or import it in the gin file (`import tasks`).',
) -> seqio.Task | seqio.Mixture:
  """Returns a registered task or mixture, after importing `module` if given.

  Raises:
    ValueError: the name is unknown; the message has the nearest names and the hint.
  """
  if module:
    import_tasks(module)
  known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
  if mixture_or_task_name not in known:
    near = difflib.get_close_matches(str(mixture_or_task_name), sorted(known))
    if 'tasks' in sys.modules and 'tasks.pretrain' not in sys.modules:
      found = getattr(sys.modules['tasks'], '__file__', 'Another module')
      hint = f'{found} takes the place of the package `tasks` of bart-t5x. Rename it.'
    raise ValueError(
      f'Unknown task or mixture {mixture_or_task_name!r}. '
      + (f'Nearest: {", ".join(near)}. ' if near else '')
      + hint
    )
  return seqio.get_mixture_or_task(mixture_or_task_name)


class CorpusSource(seqio.DataSource):
  """Documents of a prepared corpus, whose folder need not exist yet.

  An example has `tokens` int32 [n], `sentence_starts` int32 [s] and `example_id` int64.
  """

  def __init__(self, corpus_dir: str):
    self.corpus_dir = os.fspath(corpus_dir)
    super().__init__(splits=(TRAIN, VALIDATION))

  def __repr__(self) -> str:
    return f'CorpusSource({self.corpus_dir!r})'

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def description(self) -> dict:
    """Returns the content of corpus.json, the last file that `prepare` writes."""
    files = tf.io.gfile
    if corpus := corpus_format.read(self.corpus_dir, files.exists, files.GFile):
      return corpus
    begun = tf.io.gfile.exists(self.corpus_dir) and tf.io.gfile.listdir(self.corpus_dir)
    state = 'is not complete (no corpus.json)' if begun else 'does not exist'
    raise FileNotFoundError(
      f'The corpus {self.corpus_dir!r} {state}. Make it with: python -m '
      f'bart_t5x.prepare --source=… --output_dir={self.corpus_dir}'
    )

  def list_shards(self, split: str) -> Sequence[str]:
    """Returns the split's files, after checking their sizes."""
    corpus = self.description()
    if split not in corpus['splits']:
      raise FileNotFoundError(
        f'The corpus {self.corpus_dir!r} has no split {split!r}. Got: '
        f'{list(corpus["splits"])}'
      )
    return corpus_format.check_shards(corpus, self.corpus_dir, split, _size)

  def num_input_examples(self, split: str) -> int | None:
    """Returns the number of documents; None if the corpus does not exist yet."""
    try:
      splits = self.description()['splits']
    except FileNotFoundError:
      return None
    return splits[split]['documents'] if split in splits else None

  def get_dataset(
    self,
    split: str = TRAIN,
    shuffle: bool = True,
    seed: int | tf.Tensor | None = None,
    shard_info: seqio.ShardInfo | None = None,
    *,
    sequence_length: Mapping[str, int] | None = None,
    use_cached: bool = False,
    num_epochs: int | None = 1,
  ) -> tf.data.Dataset:
    """Returns one pass over the documents, or over one host's share of them.

    Shares are disjoint and complete: whole files where there are enough for fair
    shares, else every n-th record of each file. `shuffle` orders the files by `seed`,
    a number or int64 scalar (None is 0). The last three parameters have no effect.
    """
    del sequence_length, use_cached, num_epochs
    records = self.records(split, shuffle, seed, shard_info)
    return records.map(_parse_one, num_parallel_calls=tf.data.AUTOTUNE)

  def records(
    self,
    split: str,
    shuffle: bool,
    seed: int | tf.Tensor | None,
    shard_info: seqio.ShardInfo | None,
  ) -> tf.data.Dataset:
    """Like `get_dataset`, but serialised records, for `parse_records`."""
    paths = self.list_shards(split)
    hosts = shard_info.num_shards if shard_info else 1
    host = shard_info.index if shard_info else 0
    whole_files = len(paths) % hosts == 0 or len(paths) >= hosts * _FILES_PER_HOST
    # A host's records depend on a file's number, not on the shuffled order.
    numbers = tf.range(len(paths), dtype=tf.int64)
    files = tf.constant(paths)
    if whole_files:
      numbers, files = numbers[host::hosts], files[host::hosts]
    if shuffle:
      pair = tf.stack([tf.cast(0 if seed is None else seed, tf.int64), 0])
      order = tf.argsort(tf.random.stateless_uniform([tf.size(files)], seed=pair))
      numbers, files = tf.gather(numbers, order), tf.gather(files, order)

    @do_not_convert
    def read(number, path):
      records = tf.data.TFRecordDataset(path)
      if not whole_files:
        records = records.shard(hosts, (host + number) % hosts)
      return records

    return tf.data.Dataset.from_tensor_slices((numbers, files)).interleave(
      read, cycle_length=_OPEN_FILES, block_length=_RECORDS_PER_TURN
    )


def _size(path: str) -> int | None:
  try:
    return tf.io.gfile.stat(path).length
  except tf.errors.NotFoundError:
    return None


@do_not_convert
def _parse_one(record: tf.Tensor) -> dict[str, tf.Tensor]:
  return _in_int32(tf.io.parse_single_example(record, _RECORD))


@do_not_convert
def parse_records(records: tf.Tensor) -> dict[str, tf.Tensor | tf.RaggedTensor]:
  """Parses documents [b] in a tenth of the time of single ones.

  Returns:
    `tokens` and `sentence_starts`, ragged int32 [b, (n)], and `example_id` int64 [b].
  """
  return _in_int32(tf.io.parse_example(records, _RECORD))


def _in_int32(document):
  vectors = {k: tf.cast(document[k], tf.int32) for k in ('tokens', 'sentence_starts')}
  return {**document, **vectors}


class EpochTask(seqio.Task):
  """A task whose preprocessors get batches of documents with `seed` and `epoch`.

  The seed is that of `get_dataset` (in T5X `DatasetConfig.seed`; None is 0), epochs
  count from 0; both are int64 [documents]. Splits other than train always have epoch 0
  and `EVALUATION_SEED`. Vectors are ragged tensors, and the preprocessors after a
  `seqio.CacheDatasetPlaceholder` must unbatch.

  Each epoch reads the files of a `CorpusSource` in a new order. Documents are shuffled
  before the preprocessors, examples after them. Iterators can be saved.
  """

  def get_dataset(
    self,
    sequence_length: Mapping[str, int] | None = None,
    split: str = TRAIN,
    use_cached: bool = False,
    shuffle: bool = True,
    shuffle_buffer_size: int | None = None,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    num_epochs: int | None = 1,
    trim_output_features: bool = True,
    try_in_mem_cache: bool = True,
  ) -> tf.data.Dataset:
    """See `seqio.Task.get_dataset`; `try_in_mem_cache` has no effect."""
    del try_in_mem_cache
    seed = int(seed or 0)
    source = self._source_for(split, use_cached)
    source.list_shards(split)  # report a missing corpus here rather than in a graph
    training = split == TRAIN
    ours = isinstance(source, CorpusSource)
    in_records = ours and not self._cache_step_idx

    def read(epoch):
      order = tf.constant(seed, tf.int64) + epoch * _EPOCH_STEP
      if in_records:
        documents = source.records(split, shuffle, order, shard_info)
      else:
        documents = source.get_dataset(
          split=split,
          # Iterators over seqio's own shuffled sources cannot be saved.
          shuffle=shuffle and ours,
          seed=order,
          shard_info=shard_info,
        )
      if not use_cached:
        documents = self.preprocess_precache(documents, seed=seed)
      epochs = tf.data.Dataset.from_tensors(epoch if training else tf.zeros_like(epoch))
      return tf.data.Dataset.zip(documents, epochs.repeat())

    @do_not_convert
    def stamp(batch, epoch):
      documents = parse_records(batch) if in_records else dict(batch)
      noise_seed = tf.constant(seed if training else EVALUATION_SEED, tf.int64)
      return {**documents, SEED: tf.fill(tf.shape(epoch), noise_seed), EPOCH: epoch}

    epochs = tf.data.Dataset.range(tf.int64.max if num_epochs is None else num_epochs)
    ds = epochs.flat_map(do_not_convert(read) if ours else read)
    if shuffle:
      ds = ds.shuffle(_SHUFFLED_DOCUMENTS, seed=seed)
    ds = ds.ragged_batch(_DOCUMENTS_PER_BATCH)
    ds = ds.map(stamp, num_parallel_calls=tf.data.AUTOTUNE)
    ds = self.preprocess_postcache(ds, sequence_length=sequence_length, seed=seed)
    ds = self._validate_preprocessing(ds)
    if trim_output_features:
      ds = self._trim_output_features(ds, sequence_length)
    if shuffle:
      ds = ds.shuffle(shuffle_buffer_size or self.shuffle_buffer_size, seed=seed)
    return ds.prefetch(tf.data.AUTOTUNE)

  def _source_for(self, split: str, use_cached: bool) -> seqio.DataSource:
    if use_cached:
      if not self.supports_caching:
        raise ValueError(
          f'Task {self.name!r} cannot be cached by seqio. Set use_cached=False.'
        )
      return self._get_cached_source(split)
    if self.requires_caching:
      raise ValueError(
        f'Task {self.name!r} reads text, which seqio_cache_tasks must tokenize first. '
        'Run it and set USE_CACHED_TASKS = True.'
      )
    return self.source

  def _trim_output_features(
    self, dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None
  ) -> tf.data.Dataset:
    lengths = {k: (sequence_length or {}).get(k) for k in self.output_features}

    @do_not_convert  # AutoGraph's conversion of seqio's function is slow
    def trim(example):
      return {k: v[: lengths[k]] if lengths.get(k) else v for k, v in example.items()}

    return dataset.map(trim, num_parallel_calls=tf.data.AUTOTUNE)

  def replace(self, **kwargs) -> 'EpochTask':
    changed = copy.copy(self)
    changed.__dict__ = super().replace(**kwargs).__dict__
    return changed
