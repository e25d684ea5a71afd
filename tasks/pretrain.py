"""The denoising tasks, and `add_denoising_task` for other corpora."""

import functools
import os
from collections.abc import Sequence

import seqio

from bart_t5x import metrics, noise, preprocessors
from bart_t5x.data import CorpusSource, EpochTask, data_root
from bart_t5x.vocabularies import load_vocabulary

# Buffer of noised pieces, about 11 kB each at length 1024.
SHUFFLE_BUFFER_SIZE = 2048


def add_denoising_task(
  name: str,
  corpus_dir: str,
  recipe: noise.Recipe | None = None,
  source: seqio.DataSource | None = None,
  shuffle_buffer_size: int = SHUFFLE_BUFFER_SIZE,
  metric_fns: Sequence = (metrics.denoising,),
) -> seqio.Task:
  """Registers a denoising task with features `inputs`, `targets`, `targets_noised`.

  Args:
    name: of the task.
    corpus_dir: output folder of `python -m bart_t5x.prepare`; need not exist yet.
    recipe: the noise; None for `noise.Recipe` as gin binds it.
    source: of examples with a string `text`, instead of the prepared corpus:
      `seqio_cache_tasks` tokenizes it with the tokenizer in `corpus_dir`, and training
      needs USE_CACHED_TASKS = True.
    shuffle_buffer_size: of examples.
    metric_fns: seqio's; predictions are texts, targets `metrics.Parts`.
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


for _name, _corpus in {
  'norwegian_denoising': 'no',
  'norwegian_denoising_mini': 'mini',
  'norwegian_denoising_nb': 'nb',
  'norwegian_denoising_nn': 'nn',
}.items():
  add_denoising_task(_name, os.path.join(data_root(), _corpus))
# Both corpora must have the same vocabulary (`prepare --tokenizer_file`). A quarter of
# the examples is Nynorsk.
seqio.MixtureRegistry.add(
  'norwegian_denoising_nb_nn',
  [('norwegian_denoising_nb', 3), ('norwegian_denoising_nn', 1)],
)
