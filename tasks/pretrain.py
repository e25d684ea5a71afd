"""The denoising tasks, and how to register one for a corpus of one's own.

Importing this needs no file: corpus and tokenizer are read when data is asked for.
"""

import functools
import os
from collections.abc import Sequence

import seqio

from bart_t5x import metrics, noise, preprocessors
from bart_t5x.data import CorpusSource, EpochTask, data_root
from bart_t5x.vocabularies import load_vocabulary

# Examples kept to draw from: noised pieces, about 11 kB each at length 1024.
SHUFFLE_BUFFER_SIZE = 2048


def add_denoising_task(
  name: str,
  corpus_dir: str,
  recipe: noise.Recipe | None = None,
  source: seqio.DataSource | None = None,
  shuffle_buffer_size: int = SHUFFLE_BUFFER_SIZE,
  metric_fns: Sequence = (metrics.denoising,),
) -> seqio.Task:
  """Registers a seqio task that denoises a prepared corpus.

  Args:
    name: of the task.
    corpus_dir: output folder of `python -m bart_t5x.prepare`; may come later.
    recipe: the noise. None for the one that gin binds (`noise.Recipe`), so that the
      run's gin files decide.
    source: of examples with a scalar string `text`, for a corpus too large for one
      machine: `seqio_cache_tasks` tokenizes it, with the tokenizer in `corpus_dir`,
      and training then needs USE_CACHED_TASKS = True. None for the prepared corpus.
    shuffle_buffer_size: examples from which the next one is drawn.
    metric_fns: for evaluation by generation; predictions are texts, targets
      `metrics.Parts`.

  Returns:
    The task, with features `inputs`, `targets` and `targets_noised`.
  """
  vocabulary = load_vocabulary(corpus_dir)
  text = seqio.Feature(vocabulary, add_eos=False)
  if source is None:
    source = CorpusSource(corpus_dir)
    before_noise = [seqio.CacheDatasetPlaceholder()]
  else:
    before_noise = [
      preprocessors.tokenize_documents,
      seqio.CacheDatasetPlaceholder(required=True),
    ]
  return seqio.TaskRegistry.add(
    name,
    task_cls=EpochTask,
    source=source,
    preprocessors=[
      *before_noise,
      preprocessors.split_documents,
      functools.partial(preprocessors.denoise, recipe=recipe),
    ],
    output_features={
      'inputs': text,
      'targets': text,
      # Codes, not ids: see `noise`.
      'targets_noised': seqio.Feature(
        seqio.PassThroughVocabulary(size=noise.END + 1), add_eos=False
      ),
    },
    postprocess_fn=functools.partial(metrics.keep_parts, vocabulary=vocabulary),
    metric_fns=metric_fns,
    shuffle_buffer_size=shuffle_buffer_size,
  )


def _add_norwegian_tasks() -> None:
  for name, corpus in (
    ('norwegian_denoising', 'no'),
    ('norwegian_denoising_mini', 'mini'),
    ('norwegian_denoising_nb', 'nb'),
    ('norwegian_denoising_nn', 'nn'),
  ):
    add_denoising_task(name, os.path.join(data_root(), corpus))
  # Both corpora must have one vocabulary: `prepare --tokenizer_file` sees to it.
  # Nynorsk, of which there is less, is a quarter of the examples.
  seqio.MixtureRegistry.add(
    'norwegian_denoising_nb_nn',
    [('norwegian_denoising_nb', 3), ('norwegian_denoising_nn', 1)],
  )


_add_norwegian_tasks()
