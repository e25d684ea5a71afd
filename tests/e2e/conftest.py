"""A corpus for all tests here, and two ways to call a script.

`helpers.Process` starts it as a user does, which takes ten seconds to import
TensorFlow; `call_script` calls its function in this process.
"""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import types

import gin
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent

# Values of gin/models/tiny.gin.
VOCAB_SIZE = 512
LENGTH = 64
BATCH_SIZE = 8
STEPS = 240
PERIOD = 60


def made_up_norwegian(documents=400, seed=3):
  """Lines of sentences from some 200 words, one document per line."""
  random = np.random.default_rng(seed)
  heads = 'fjord fjell snø sjø by barne skole bokmål vinter båt kirke hav'.split()
  tails = 'et en ene veien huset boka laget turen folk dagen'.split()
  words = [head + tail for head, tail in itertools.product(heads, tails)]
  words += 'og i på det er som til av for med å ikke ærlig østlig Åse'.split() * 4

  def sentence():
    chosen = ' '.join(random.choice(words, random.integers(3, 12)))
    return chosen[0].upper() + chosen[1:] + '.'

  return [
    f'Sak {number}: ' + ' '.join(sentence() for _ in range(random.integers(1, 9)))
    for number in range(documents)
  ]


@dataclasses.dataclass
class Outcome:
  """Exit code and output of a command."""

  code: int
  text: str

  def assert_one_error(self, *parts):
    """The command failed with one message with these parts and no traceback."""
    assert self.code != 0, self.text
    assert 'Traceback' not in self.text
    marks = sum(self.text.count(mark) for mark in ('ERROR: ', 'error: '))
    assert marks == 1, self.text
    for part in parts:
      assert part in self.text, f'{part!r} is not in:\n{self.text}'


def gin_flags(files, bindings):
  """Flags for gin files and {name: Python value}."""
  return [
    *(f'--gin_file={name}' for name in files),
    *(f'--gin.{name}={value!r}' for name, value in bindings.items()),
  ]


def scalars(folder, tag='loss'):
  """{step: value} of a scalar in a folder's TensorBoard files."""
  from tensorboard.backend.event_processing import event_accumulator
  from tensorboard.util import tensor_util

  events = event_accumulator.EventAccumulator(str(folder), size_guidance={'tensors': 0})
  events.Reload()
  return {
    event.step: float(tensor_util.make_ndarray(event.tensor_proto))
    for event in events.Tensors(tag)
  }


def saved_state(checkpoint):
  """Parameters, optimizer state and step of a checkpoint, as NumPy arrays."""
  import jax
  import orbax.checkpoint as ocp

  reader = ocp.PyTreeCheckpointer()
  tree = reader.metadata(checkpoint / 'state').item_metadata.tree
  plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
  return reader.restore(
    checkpoint / 'state', args=ocp.args.PyTreeRestore(item=tree, restore_args=plain)
  )


TRAIN_FILES = ('gin/bart_mini_no.gin', 'gin/models/tiny.gin')


def tiny_training(model_dir, **changes):
  """Bindings that reduce the quickstart's run."""
  return {
    'MODEL_DIR': str(model_dir),
    'TASK_FEATURE_LENGTHS': {'inputs': LENGTH, 'targets': LENGTH},
    'BATCH_SIZE': BATCH_SIZE,
    'LOSS_NORMALIZING_FACTOR': BATCH_SIZE * LENGTH,
    'TRAIN_STEPS': STEPS,
    'WARMUP_STEPS': 20,
    'COMPUTE_DTYPE': 'float32',
    'train.eval_period': PERIOD,
    'train.eval_steps': 4,
    'train.stats_period': 20,
    'utils.SaveCheckpointConfig.period': PERIOD,
    **changes,
  }


_ONE_DEVICE = '--xla_force_host_platform_device_count=1'


class Process:
  """A script in a process of its own."""

  def __init__(self, data_root, module, *args, python=sys.executable, **variables):
    environment = {
      **os.environ,
      'BART_T5X_DATA': str(data_root),
      'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} {_ONE_DEVICE}',  # The last one counts.
      **variables,
    }
    self.lines = []
    self._grown = threading.Condition()
    self._process = subprocess.Popen(
      [python, '-m', module, *args],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    self._reader = threading.Thread(target=self._read, daemon=True)
    self._reader.start()

  def _read(self):
    for line in self._process.stdout:
      with self._grown:
        self.lines.append(line)
        self._grown.notify_all()

  def wait_for(self, condition, timeout=300):
    """Waits until condition(all lines so far) holds."""
    with self._grown:
      for _ in range(timeout * 20):
        if condition(''.join(self.lines)):
          return
        assert self._process.poll() is None, ''.join(self.lines)
        self._grown.wait(0.05)
    raise AssertionError(f'Timeout:\n{"".join(self.lines)}')

  def send(self, number: signal.Signals):
    self._process.send_signal(number)

  def end(self, timeout=400):
    """Waits for the process; returns its outcome."""
    code = self._process.wait(timeout)
    self._reader.join()
    return Outcome(code, ''.join(self.lines))


def interrupt(train, run, number, reached):
  """Ends a run by a signal once `reached(its output)` holds, then finishes it.

  `train` starts a run in folder `run` as a `Process`.
  """
  process = train(run)
  process.wait_for(reached)
  process.send(number)
  outcome = process.end()
  ended = -number if number == signal.SIGKILL else 128 + number
  assert outcome.code == ended, outcome.text
  saved = max(int(p.name.partition('_')[2]) for p in run.glob('checkpoint_*[0-9]'))
  outcome = train(run).end()
  assert outcome.code == 0, outcome.text
  assert re.search(rf'Resuming from \S*checkpoint_{saved} ', outcome.text)
  return saved


@pytest.fixture(scope='session')
def data_root(tmp_path_factory):
  """A BART_T5X_DATA folder with the corpus `mini`, made by `bart_t5x.prepare`."""
  folder = tmp_path_factory.mktemp('e2e')
  texts = folder / 'texts.txt'
  texts.write_text('\n'.join(made_up_norwegian()) + '\n', encoding='utf-8')
  outcome = Process(
      folder, 'bart_t5x.prepare', '--source=text', f'--input={texts}',
      f'--output_dir={folder / "mini"}', f'--vocab_size={VOCAB_SIZE}',
      '--min_validation_documents=40', '--num_workers=1', '--license=CC0-1.0',
  ).end()  # fmt: skip
  assert outcome.code == 0, outcome.text
  return folder


@pytest.fixture(scope='session')
def in_process_task(data_root):
  """Name of a task on the corpus, for tests in this process."""
  import seqio

  from tasks import pretrain

  name = 'e2e_denoising'
  yield pretrain.add_denoising_task(name, str(data_root / 'mini')).name
  seqio.TaskRegistry.remove(name)


@pytest.fixture
def call_script(monkeypatch, capfd):
  """Calls (function, gin files, bindings) as its script does; returns the outcome.

  Its `result` is the function's.
  """
  from t5x import gin_utils, launch

  class Left(BaseException):
    """Replaces the end of the program."""

  def leave(code):
    raise Left(code)

  monkeypatch.setattr(launch, 'leave', leave)
  monkeypatch.delenv(launch.TRACEBACK_VARIABLE, raising=False)

  def call(function, files, bindings):
    gin.clear_config()
    capfd.readouterr()
    monkeypatch.setattr(
      sys.modules['__main__'], function.__name__, function, raising=False
    )
    flags = gin_utils.rewrite_gin_args(gin_flags(files, bindings))
    split = [flag.removeprefix('--').partition('=') for flag in flags]
    values = types.SimpleNamespace(
      gin_search_paths=[str(ROOT)],
      gin_file=[value for name, _, value in split if name == 'gin_file'],
      gin_bindings=[value for name, _, value in split if name == 'gin_bindings'],
      verbosity=0,
    )
    monkeypatch.setattr(launch, 'FLAGS', values)
    outcome = Outcome(0, '')
    with contextlib.suppress(Left), launch.reported_errors():
      try:
        outcome.result = launch.configure(function)()
      except Exception:
        outcome.code = 1
        raise
    outcome.text = capfd.readouterr().err
    return outcome

  yield call
  gin.clear_config()


@pytest.fixture(scope='session')
def helpers():
  """The functions above, as test files cannot import a conftest."""
  return types.SimpleNamespace(
    Process=Process,
    Outcome=Outcome,
    TRAIN_FILES=TRAIN_FILES,
    gin_flags=gin_flags,
    tiny_training=tiny_training,
    scalars=scalars,
    saved_state=saved_state,
    interrupt=interrupt,
    made_up_norwegian=made_up_norwegian,
  )
