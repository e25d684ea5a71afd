"""Fill-in: text with `<mask>` in, the text that BART makes of it out.

What a pre-trained BART does out of the box, with no fine-tuning. The inputs are the
lines of a file, which gin names (`gin/infer.gin` does, as INPUT_FILE):

    fill_in.lines.path = 'sentences.txt'
"""

import os

import gin
import seqio
import tensorflow as tf

from bart_t5x import preprocessors, vocabularies
from tasks.pretrain import data_root


@gin.configurable(module='tasks.fill_in', denylist=['split', 'shuffle_files', 'seed'])
def lines(
  split: str, shuffle_files: bool = False, seed: int | None = None, path: str = ''
) -> tf.data.Dataset:
  """The lines of a file that are not empty, as examples {'inputs', 'targets'}.

  Args:
    split: unused: a file is the only split, 'test'.
    shuffle_files: unused: there is one file.
    seed: unused: nothing is shuffled.
    path: a UTF-8 text file, bound by gin.

  Returns:
    A dataset of scalar strings; targets are empty, since nothing is compared.

  Raises:
    ValueError: no path is bound.
    FileNotFoundError: there is no such file.
  """
  del split, shuffle_files, seed
  if not path:
    raise ValueError(
      'no input file is named. Write one sentence with <mask> a line into a file '
      'and name it: --gin.INPUT_FILE="\'sentences.txt\'"'
    )
  if not os.path.exists(path):
    raise FileNotFoundError(f'the input file {path!r} (INPUT_FILE) does not exist')
  dataset = tf.data.TextLineDataset(path)
  dataset = dataset.filter(lambda line: tf.strings.length(line) > 0)
  return dataset.map(lambda line: {'inputs': line, 'targets': ''})


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
    source=seqio.FunctionDataSource(dataset_fn=lines, splits=['test']),
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
