"""Fill-in: text with `<mask>` in, the text that BART makes of it out.

What a pre-trained BART does out of the box, with no fine-tuning. The inputs are those
of a file (see `input_file`), which gin names (`gin/infer.gin` does, as INPUT_FILE).
"""

import os

import seqio
import tensorflow as tf

from bart_t5x import preprocessors, vocabularies
from bart_t5x.data import data_root
from tasks import input_file
from tasks.text_to_text import TextTask


def _inputs(
  split: str, shuffle_files: bool = False, seed: int | None = None
) -> tf.data.Dataset:
  """The only split there is: the file that gin names."""
  del split, shuffle_files, seed
  return input_file.dataset()


def add_fill_in_task(name: str, corpus_dir: str) -> seqio.Task:
  """Registers a fill-in task with the vocabulary of a corpus.

  Args:
    name: of the task.
    corpus_dir: the folder that `prepare` made, of which the vocabulary is used.

  Returns:
    The task, registered; importing needs no file.
  """
  return seqio.TaskRegistry.add(
    name,
    task_cls=TextTask,
    source=seqio.FunctionDataSource(dataset_fn=_inputs, splits=['test']),
    preprocessors=[preprocessors.tokenize_for_bart],
    output_features={
      # Here `<mask>` is the token; in a corpus it would be five characters.
      'inputs': seqio.Feature(
        vocabularies.load_vocabulary(corpus_dir, templates=True), add_eos=True
      ),
      'targets': seqio.Feature(vocabularies.load_vocabulary(corpus_dir), add_eos=True),
    },
    metric_fns=[],
  )


add_fill_in_task('norwegian_fill_in', os.path.join(data_root(), 'no'))
add_fill_in_task('norwegian_fill_in_mini', os.path.join(data_root(), 'mini'))
