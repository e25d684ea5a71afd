"""Fill-in: a pre-trained BART completes texts with `<mask>`, from an `input_file`."""

import os

import seqio

from bart_t5x import preprocessors
from bart_t5x.data import data_root
from bart_t5x.vocabularies import load_vocabulary
from tasks import input_file
from tasks.text_to_text import TextSource, TextTask


def add_fill_in_task(name: str, corpus_dir: str) -> seqio.Task:
  """Registers a fill-in task with a prepared corpus's vocabulary."""
  features = {
    # Here `<mask>` is the token; in a corpus it is plain text.
    'inputs': seqio.Feature(load_vocabulary(corpus_dir, templates=True), add_eos=True),
    'targets': seqio.Feature(load_vocabulary(corpus_dir), add_eos=True),
  }
  return seqio.TaskRegistry.add(
    name,
    task_cls=TextTask,
    source=TextSource(lambda split: input_file.dataset(), ['test'], features),
    preprocessors=[preprocessors.add_ends],
    output_features=features,
    metric_fns=[],
  )


add_fill_in_task('norwegian_fill_in', os.path.join(data_root(), 'no'))
add_fill_in_task('norwegian_fill_in_mini', os.path.join(data_root(), 'mini'))
