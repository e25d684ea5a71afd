"""A tiny model over-fits 32 examples with gin/finetune.gin, and answers inputs."""

import json
import pathlib
import random
import sys

import gin
import jax
import numpy as np
import pytest
import seqio

from t5x import eval as eval_script
from t5x import gin_utils, launch
from t5x import infer as infer_script
from t5x import train as train_script
from tasks import prompts, text_to_text

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = 32
WORDS = 'barna leser bok huset fjord sjø snø kake ser gutten liker står'.split()


@pytest.fixture(autouse=True)
def clean_gin():
  gin.clear_config()
  yield
  gin.clear_config()


@pytest.fixture
def task(corpus_dir):
  """A classification task of 32 examples, the same in all splits."""
  draw = random.Random(1)
  records = [
    {
      'text': ' '.join(draw.sample(WORDS, 4)),
      'label': draw.choice(['positive', 'neutral', 'negative']),
    }
    for _ in range(EXAMPLES)
  ]
  yield text_to_text.add_text_to_text_task(
    'runs_test_class',
    read=lambda split: records,
    corpus_dir=corpus_dir,
    to_text=prompts.sentiment_to_text,
    labels=prompts.SENTIMENTS,
  )
  seqio.TaskRegistry.remove('runs_test_class')


def call(monkeypatch, function, files, task, **macros):
  """Calls a script as its command line would, on a tiny model in float32."""
  name = function.__name__
  monkeypatch.setattr(sys.modules['__main__'], name, function, raising=False)
  gin.clear_config()
  gin.configurable(function, module='__main__')
  macros = {
    'MIXTURE_OR_TASK_NAME': task.name,
    'TASK_FEATURE_LENGTHS': {'inputs': 48, 'targets': 32},
    'COMPUTE_DTYPE': 'float32',
    'DROPOUT_RATE': 0.0,
    'network.BartConfig.vocab_size': task.output_features[
      'targets'
    ].vocabulary.vocab_size,
    **macros,
  }
  gin_utils.parse_gin_flags(
    [str(ROOT), *launch.GIN_SEARCH_PATHS],
    [f'gin/{file}.gin' for file in (*files, 'models/tiny')],
    [f'{name} = {value!r}' for name, value in macros.items()],
  )
  return gin.get_configurable(function)()


def train(monkeypatch, task, model_dir, steps, checkpoint=(), **macros):
  macros = {
    'INITIAL_CHECKPOINT_PATH': checkpoint or [],
    'MODEL_DIR': str(model_dir),
    'TRAIN_STEPS_RELATIVE': steps,
    'BATCH_SIZE': EXAMPLES,
    'EVAL_STEPS': 1,
    'EVAL_PERIOD': 100,
    'LEARNING_RATE': 5e-3,
    'WARMUP_STEPS': min(20, steps - 1),
    'LOSS_NORMALIZING_FACTOR': 256,
    **macros,
  }
  return call(monkeypatch, train_script.train, ['finetune'], task, **macros)


def evaluations(folder, task):
  path = folder / 'inference_eval' / f'{task.name}-metrics.jsonl'
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_from_a_checkpoint_to_answers(task, tmp_path, monkeypatch):
  """Over-fits from a checkpoint, stops early, keeps the best, evaluates, answers."""
  assert train(monkeypatch, task, tmp_path / 'first', 3)[0] == 3
  checkpoint = str(tmp_path / 'first' / 'checkpoint_3')
  run = tmp_path / 'second'
  settings = {'EVAL_PERIOD': 50, 'PATIENCE': 3, 'DECAY': 'constant'}
  step, state = train(monkeypatch, task, run, 1000, checkpoint, **settings)
  # The optimizer starts afresh, though the checkpoint has its states.
  counts = {
    int(np.asarray(leaf))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.param_states)
    if 'count' in jax.tree_util.keystr(path)
  }
  assert counts == {step - 3}

  # Stopped by the action: the last three values did not rise.
  scores = {e['step']: e['macro_f1'] for e in evaluations(run, task)}
  assert step == max(scores) < 1003
  last = list(scores.values())[-3:]
  assert last == sorted(last, reverse=True)
  # The best checkpoint is kept, and the newest.
  best = max(scores, key=lambda step: (scores[step], -step))
  assert scores[best] >= 95
  there = {int(path.name.removeprefix('checkpoint_')) for path in run.glob('check*')}
  assert step in there and len(there) <= 2
  assert max(scores[s] for s in there) == scores[best]

  # The test split, by the run's best checkpoint.
  output = tmp_path / 'eval'
  paths = {'CHECKPOINT_PATH': str(run), 'EVAL_OUTPUT_DIR': str(output)}
  call(monkeypatch, eval_script.evaluate, ['finetune_eval'], task, **paths)
  (result,) = evaluations(output, task)
  assert result['macro_f1'] == pytest.approx(scores[best], abs=0.01)

  # A file of inputs, without the prompt that the task puts before them.
  examples = list(task.source.get_dataset('test', shuffle=False).as_numpy_iterator())
  inputs = [
    e['inputs_pretokenized'].decode().removeprefix('stemning: ') for e in examples
  ]
  (tmp_path / 'inputs.txt').write_text('\n'.join(inputs[:8]) + '\n')
  macros = {
    'CHECKPOINT_PATH': str(run),
    'INFER_OUTPUT_DIR': str(tmp_path / 'infer'),
    'INPUT_FILE': str(tmp_path / 'inputs.txt'),
    'PROMPT': 'stemning: ',
  }
  call(monkeypatch, infer_script.infer, ['finetune_infer'], task, **macros)
  (file,) = (tmp_path / 'infer').glob('*.jsonl-00000-of-00001')
  answers = [json.loads(line) for line in file.read_text().splitlines()]
  assert [a['inputs']['inputs_pretokenized'] for a in answers] == [
    f'stemning: {text}' for text in inputs[:8]
  ]
  right = sum(
    answer['prediction'] == example['targets_pretokenized'].decode()
    for answer, example in zip(answers, examples[:8], strict=True)
  )
  assert right >= 7
  assert all(answer['aux']['scores'] < 0 for answer in answers)
