"""Where a task's documents come from, and how they learn in which epoch they are read.

`CorpusSource` reads the shards that `bart_t5x.prepare` writes. `EpochTask` is a seqio
task that stamps each document with the seed and the epoch: a `seqio.Task` repeats its
source without telling anyone, so noise that is new in each epoch and yet reproducible
would have to follow the position in the stream, which depends on the number of hosts.
"""

import concurrent.futures
import copy
import difflib
import importlib
import os
import re
from collections.abc import Mapping, Sequence

import gin
import seqio
import tensorflow as tf

from bart_t5x import output_folder
from bart_t5x.tensors import do_not_convert

TRAIN = 'train'
VALIDATION = 'validation'

# What `EpochTask` adds to each example.
EPOCH = 'epoch'
SEED = 'seed'

# Evaluation sees the same noise whenever and wherever it runs.
EVALUATION_SEED = 0

# Files read at a time, and records of one before the next one's turn.
_OPEN_FILES = 16
_RECORDS_A_TURN = 16
# Documents from which the next one is drawn: shards keep the order of their
# source, so the examples' own shuffling would see neighbours only.
_SHUFFLED_DOCUMENTS = 8192
# Hosts take whole files if the shares then differ by at most one part in this many.
_FILES_A_HOST = 16

# Documents that preprocessors get at a time. Most of what a short one costs is the cost
# of an element of a dataset.
_DOCUMENTS_A_BATCH = 64

_FEATURES = {
  'tokens': tf.io.RaggedFeature(tf.int64, row_splits_dtype=tf.int32),
  'sentence_starts': tf.io.RaggedFeature(tf.int64, row_splits_dtype=tf.int32),
  'example_id': tf.io.FixedLenFeature([], tf.int64),
}

# From one epoch's order to the next one's.
_EPOCH_STEP = 0x5851F42D4C957F2D


class CorpusSource(seqio.DataSource):
  """The documents of a corpus folder; reads nothing until it is asked for some.

  An example holds `tokens` int32 [n], `sentence_starts` int32 [s] and `example_id`
  int64 scalar.
  """

  def __init__(self, corpus_dir: str):
    """Names a folder, which need not exist yet.

    Args:
      corpus_dir: output folder of `python -m bart_t5x.prepare`.
    """
    self.corpus_dir = os.fspath(corpus_dir)
    super().__init__(splits=(TRAIN, VALIDATION))

  def __repr__(self) -> str:
    return f'CorpusSource({self.corpus_dir!r})'

  @property
  def supports_arbitrary_sharding(self) -> bool:
    return True

  def description(self) -> dict:
    """What `prepare` wrote about the corpus in corpus.json, its last file.

    Raises:
      FileNotFoundError: there is no corpus, or `prepare` has not finished it.
      ValueError: the file is damaged.
    """
    path = os.path.join(self.corpus_dir, output_folder.CORPUS_FILE)
    if tf.io.gfile.exists(path):
      with tf.io.gfile.GFile(path) as f:
        return output_folder.parse(f.read(), path)
    begun = tf.io.gfile.exists(self.corpus_dir) and tf.io.gfile.listdir(self.corpus_dir)
    state = 'is not complete (no corpus.json)' if begun else 'does not exist'
    raise FileNotFoundError(
      f'The corpus {self.corpus_dir!r} {state}. Make it with: python -m '
      f'bart_t5x.prepare --source=… --output_dir={self.corpus_dir}'
    )

  def list_shards(self, split: str) -> Sequence[str]:
    """The split's files, sorted."""
    splits = self.description()['splits']
    if split not in splits:
      raise FileNotFoundError(
        f'The corpus {self.corpus_dir!r} has no split {split!r}. Got: {list(splits)}'
      )
    pattern = os.path.join(self.corpus_dir, f'{split}-*-of-*.tfrecord')
    files = sorted(tf.io.gfile.glob(pattern))
    if len(files) != splits[split]['shards']:
      raise FileNotFoundError(
        f'The corpus {self.corpus_dir!r} should have {splits[split]["shards"]} files '
        f'{split}-*.tfrecord, but has {len(files)}. Prepare it again with --overwrite.'
      )
    _check_sizes(files, splits[split].get('shard_bytes'))
    return files

  def num_input_examples(self, split: str) -> int | None:
    """Documents in the split; None as long as there is no corpus."""
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
    """One pass over the documents, or over one host's share of them.

    The shares of all hosts are disjoint and together complete: whole files where there
    are enough of them to be fair, else every so-manieth record of each file.

    Args:
      split: 'train' or 'validation'.
      shuffle: whether the files come in an order drawn with `seed`.
      seed: a number or an int64 scalar tensor; None for 0.
      shard_info: which share; None for all.
      sequence_length, use_cached, num_epochs: of no use here; `EpochTask` repeats.
    """
    del sequence_length, use_cached, num_epochs
    records = self.records(split, shuffle, seed, shard_info)
    return records.map(parse_record, num_parallel_calls=tf.data.AUTOTUNE)

  def records(
    self,
    split: str,
    shuffle: bool,
    seed: int | tf.Tensor | None,
    shard_info: seqio.ShardInfo | None,
  ) -> tf.data.Dataset:
    """The same as scalar strings, which `parse_records` reads many at a time.

    Args:
      split, shuffle, seed, shard_info: as for `get_dataset`.
    """
    paths = self.list_shards(split)
    hosts = shard_info.num_shards if shard_info else 1
    host = shard_info.index if shard_info else 0
    whole_files = len(paths) % hosts == 0 or len(paths) >= hosts * _FILES_A_HOST
    # With the files' numbers: which records a host takes must not follow the order.
    numbers = tf.range(len(paths), dtype=tf.int64)
    files = tf.constant(paths)
    if whole_files:
      numbers, files = numbers[host::hosts], files[host::hosts]
    if shuffle:
      order = _random_order(tf.size(files), 0 if seed is None else seed)
      numbers, files = tf.gather(numbers, order), tf.gather(files, order)

    @do_not_convert
    def read(number, path):
      records = tf.data.TFRecordDataset(path)
      if not whole_files:
        records = records.shard(hosts, (host + number) % hosts)
      return records

    return tf.data.Dataset.from_tensor_slices((numbers, files)).interleave(
      read, cycle_length=_OPEN_FILES, block_length=_RECORDS_A_TURN
    )


def _check_sizes(files: Sequence[str], sizes: Sequence[int] | None) -> None:
  """Refuses files that were cut off or changed since `prepare` wrote them."""
  if sizes is None:  # a corpus of an earlier version
    return
  with concurrent.futures.ThreadPoolExecutor(16) as pool:  # they may lie far away
    found = list(pool.map(lambda file: tf.io.gfile.stat(file).length, files))
  for file, size, wanted in zip(files, found, sizes, strict=True):
    if size != wanted:
      raise ValueError(
        f'{file!r} has {size:,} bytes, but `prepare` wrote {wanted:,}. Copy it again, '
        'or prepare the corpus again with --overwrite.'
      )


def check_records(files: Sequence[str]) -> None:
  """Reads TFRecord files to their ends.

  For when reading them in a pipeline has failed: TensorFlow does not say which file is
  damaged.

  Raises:
    ValueError: one of them is damaged; says which.
  """
  for file in files:
    try:
      for _ in tf.data.TFRecordDataset(file):
        pass
    except tf.errors.DataLossError as e:
      place = re.search(r'record at \d+', str(e))
      raise ValueError(
        f'{file!r} is damaged{place and f" (the {place.group()})" or ""}: it was '
        'changed since it was written. Copy it again, or prepare the corpus again with '
        '--overwrite.'
      ) from e


def _random_order(size: tf.Tensor, seed: int | tf.Tensor) -> tf.Tensor:
  """The numbers below `size` in an order that depends on the seed alone."""
  pair = tf.stack([tf.cast(seed, tf.int64), 0])
  return tf.argsort(tf.random.stateless_uniform([size], seed=pair))


@do_not_convert
def parse_record(record: tf.Tensor) -> dict[str, tf.Tensor]:
  """A document of its record: see `CorpusSource`."""
  return _in_int32(tf.io.parse_single_example(record, _FEATURES))


@do_not_convert
def parse_records(records: tf.Tensor) -> dict[str, tf.Tensor | tf.RaggedTensor]:
  """Documents of their records, a tenth of the work of parsing one after the other.

  Args:
    records: string [documents].

  Returns:
    `tokens` and `sentence_starts`, ragged int32 [documents, (n)], and `example_id`
    int64 [documents].
  """
  return _in_int32(tf.io.parse_example(records, _FEATURES))


def _in_int32(document):
  positions = {k: tf.cast(document[k], tf.int32) for k in ('tokens', 'sentence_starts')}
  return {**document, **positions}


class EpochTask(seqio.Task):
  """A task whose preprocessors see documents in batches, with `seed` and `epoch`.

  The seed is the one given to `get_dataset` (in T5X: `DatasetConfig.seed`), the epoch
  counts from 0; both are int64 [documents]. Only the training split has epochs: all
  others keep epoch 0 and `EVALUATION_SEED`, whatever seed orders them. Vectors come as
  ragged tensors, and the preprocessors (those behind a `seqio.CacheDatasetPlaceholder`)
  have to make single examples of them.

  The source is opened anew for each epoch, the files of a `CorpusSource` in a new
  order; documents are shuffled before the preprocessors, examples behind them.
  Everything is a plain `tf.data` operation, whose iterator can be saved.
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
    """See `seqio.Task.get_dataset`; differs in two points.

    A seed of None means 0: two runs without a seed are alike. `try_in_mem_cache` has no
    effect, since the documents of an epoch are read in an order of its own.
    """
    del try_in_mem_cache
    seed = 0 if seed is None else int(seed)
    documents = self._documents(
      split, use_cached, shuffle, seed, shard_info, num_epochs
    )
    examples = self.preprocess_postcache(
      documents, sequence_length=sequence_length, seed=seed
    )
    examples = self._validate_preprocessing(examples)
    if trim_output_features:
      examples = self._trim_output_features(examples, sequence_length)
    if shuffle:
      examples = examples.shuffle(
        shuffle_buffer_size or self.shuffle_buffer_size, seed=seed
      )
    return examples.prefetch(tf.data.AUTOTUNE)

  def _documents(
    self,
    split: str,
    use_cached: bool,
    shuffle: bool,
    seed: int,
    shard_info: seqio.ShardInfo | None,
    num_epochs: int | None,
  ) -> tf.data.Dataset:
    """Batches of stamped documents; arguments as for `get_dataset`."""
    source = self.source_of(split, use_cached)
    # Outside of the graph: a missing corpus is reported as it is.
    source.list_shards(split)
    training = split == TRAIN
    in_records = isinstance(source, CorpusSource) and not self._cache_step_idx

    def read(epoch):
      order = tf.constant(seed, tf.int64) + epoch * _EPOCH_STEP
      if in_records:
        documents = source.records(split, shuffle, order, shard_info)
      else:
        documents = source.get_dataset(
          split=split,
          # seqio's own sources shuffle by a dataset of files, which cannot be saved.
          shuffle=shuffle and isinstance(source, CorpusSource),
          seed=order,
          shard_info=shard_info,
        )
      if not use_cached:
        documents = self.preprocess_precache(documents, seed=seed)
      epochs = tf.data.Dataset.from_tensors(epoch if training else tf.zeros_like(epoch))
      return tf.data.Dataset.zip(documents, epochs.repeat())

    if isinstance(source, CorpusSource):
      read = do_not_convert(read)
    epochs = tf.data.Dataset.range(tf.int64.max if num_epochs is None else num_epochs)
    documents = epochs.flat_map(read)
    if shuffle:
      documents = documents.shuffle(_SHUFFLED_DOCUMENTS, seed=seed)
    documents = documents.ragged_batch(_DOCUMENTS_A_BATCH)

    @do_not_convert
    def stamp(batch, epoch):
      stamped = parse_records(batch) if in_records else dict(batch)
      stamped[SEED] = tf.fill(
        tf.shape(epoch), tf.constant(seed if training else EVALUATION_SEED, tf.int64)
      )
      stamped[EPOCH] = epoch
      return stamped

    return documents.map(stamp, num_parallel_calls=tf.data.AUTOTUNE)

  def _trim_output_features(
    self, dataset: tf.data.Dataset, sequence_length: Mapping[str, int] | None
  ) -> tf.data.Dataset:
    """See `seqio.Task._trim_output_features`, whose lambdas AutoGraph converts."""
    lengths = {k: (sequence_length or {}).get(k) for k in self.output_features}

    @do_not_convert
    def trim(example):
      return {k: v[: lengths[k]] if lengths.get(k) else v for k, v in example.items()}

    return dataset.map(trim, num_parallel_calls=tf.data.AUTOTUNE)

  def replace(self, **kwargs) -> 'EpochTask':
    """See `seqio.Task.replace`, which would forget the class."""
    plain = super().replace(**kwargs)
    changed = copy.copy(self)
    changed.__dict__ = plain.__dict__
    return changed

  def source_of(self, split: str, use_cached: bool) -> seqio.DataSource:
    """The corpus, or what `seqio_cache_tasks` made of the source.

    Raises:
      ValueError: the task must be cached or cannot be.
    """
    if not use_cached:
      if self.requires_caching:
        raise ValueError(
          f'Task {self.name!r} reads text: seqio_cache_tasks has to tokenize it first. '
          'Run it and set USE_CACHED_TASKS = True.'
        )
      return self.source
    if not self.supports_caching:
      raise ValueError(
        f'Task {self.name!r} has no step that seqio can cache. Set use_cached=False.'
      )
    return self._get_cached_source(split)


def import_tasks(module: str, setting: str = 'MIXTURE_OR_TASK_MODULE') -> None:
  """Imports a module for the tasks that it registers.

  As the runtime does where a data set names one; upstream T5X's does not say where it
  looked.

  Args:
    module: dotted name.
    setting: what names it, for the message.

  Raises:
    ImportError: there is no such module.
  """
  try:
    # Gin has read its files by now, and may still learn of the module's functions.
    with gin.unlock_config():
      importlib.import_module(module)
  except ModuleNotFoundError as e:
    if not f'{module}.'.startswith(f'{e.name}.'):
      raise  # One that the module itself imports.
    raise ModuleNotFoundError(
      f'{setting} names {module!r}, which Python does not find. It looks in the folder '
      'that the command runs in, on PYTHONPATH and among the installed packages.',
      name=e.name,
    ) from e


def find_task(
  mixture_or_task_name: str,
  module: str | None = None,
  remedy: str = 'Set MIXTURE_OR_TASK_NAME, and name the module that registers the task '
  'as MIXTURE_OR_TASK_MODULE, or import it in the gin file (`import tasks`).',
) -> seqio.Task | seqio.Mixture:
  """A registered task or mixture.

  Args:
    mixture_or_task_name: as registered with seqio.
    module: imported before, as it registers the task.
    remedy: what the message says there is to do where the name is wrong.

  Raises:
    ImportError: there is no such module.
    ValueError: there is no such task. The message lists the nearest names.
  """
  if module:
    import_tasks(module)
  known = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
  if mixture_or_task_name not in known:
    near = difflib.get_close_matches(mixture_or_task_name, sorted(known))
    raise ValueError(
      f'There is no task or mixture {mixture_or_task_name!r}. '
      + (f'Nearest: {", ".join(near)}. ' if near else '')
      + remedy
    )
  return seqio.get_mixture_or_task(mixture_or_task_name)


def data_root() -> str:
  """The folder with the corpora: BART_T5X_DATA, or `data`."""
  return os.environ.get('BART_T5X_DATA', 'data')
