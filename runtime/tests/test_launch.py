"""Command lines, as a user gives them, and how a program ends."""

import logging
import os
import subprocess
import sys
import weakref

import gin
import pytest
import tensorflow as tf
from absl import flags

from t5x import checkpoints, launch, trainer


def call(script, *args):
  """Runs `python -m t5x.<script>` and returns (exit code, stdout, stderr)."""
  done = subprocess.run(
    [sys.executable, '-m', f't5x.{script}', *args],
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize('script', ['train', 'eval', 'infer', 'main'])
def test_help_explains_itself_without_heavy_imports(script):
  code, out, err = call(script, '--help')
  assert (code, err) == (0, '')
  assert f'python -m t5x.{script}' in out
  for flag in ('gin_file', 'gin.NAME=VALUE', 'gin_search_paths', 'tfds_data_dir'):
    assert f'--{flag}' in out
  assert ('--shard_id' in out) == (script in ('infer', 'main'))
  assert '--process_count' in out


def test_help_imports_neither_jax_nor_tensorflow():
  code = (
    'import sys, runpy\n'
    'sys.argv = ["t5x.train", "--help"]\n'
    'try:\n  runpy.run_module("t5x.train", run_name="__main__")\n'
    'except SystemExit: pass\n'
    'sys.exit(any(name in sys.modules for name in ("jax", "tensorflow", "seqio")))'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, check=False)
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
  'args, message',
  [
    ((), 'at least one --gin_file'),
    (('--gin_fil=x.gin',), "Unknown command line flag 'gin_fil'"),
    (('--gin_file=x.gin',), '--gin_file=x.gin does not exist'),
    (('--gin_file=x.gin', 'extra'), 'Unexpected arguments: extra'),
  ],
)
def test_a_wrong_command_line_is_one_message_and_no_traceback(args, message):
  code, out, err = call('train', *args)
  assert code != 0
  assert out == ''
  assert err.startswith('ERROR: ') and message in err
  assert 'Traceback' not in err
  assert len(err.splitlines()) <= 2


@pytest.fixture
def ended(monkeypatch):
  """Catches the exit code that the program would end with."""
  codes = []
  monkeypatch.setattr(launch, 'leave', codes.append)
  if not launch.FLAGS.is_parsed():
    launch.FLAGS(['test'])
  monkeypatch.delenv(launch.TRACEBACK_VARIABLE, raising=False)
  return codes


def fail_with(error):
  with launch.reported_errors():
    raise error


def test_wrong_input_is_one_message(ended, capsys):
  fail_with(ValueError("batch_size is 3.\n  In call to configurable 'train' (<x>)"))
  err = capsys.readouterr().err
  assert ended == [1]
  assert err.startswith('ERROR: batch_size is 3.\n(raised in test_launch.py:')
  assert 'configurable' not in err and 'Traceback' not in err


@pytest.mark.parametrize(
  'error, text',
  [
    (KeyError('inputs'), 'KeyError: inputs'),
    (FileNotFoundError(2, 'No such file', 'a/b'), "No such file: 'a/b'"),
    (ValueError(), 'ValueError'),
  ],
)
def test_messages_are_those_of_the_exception(ended, capsys, error, text):
  fail_with(error)
  assert text in capsys.readouterr().err.splitlines()[0]


def test_bugs_get_a_traceback_and_other_errors_on_request(ended, capsys, monkeypatch):
  fail_with(AttributeError('no x'))
  err = capsys.readouterr().err
  assert 'Traceback' in err and 'ERROR: AttributeError: no x' in err
  monkeypatch.setenv(launch.TRACEBACK_VARIABLE, '1')
  fail_with(ValueError('bad'))
  assert 'Traceback' in capsys.readouterr().err
  assert ended == [1, 1]


def test_a_bug_in_code_that_gin_calls_gets_its_traceback(ended, capsys):
  gin.clear_config()
  broken = gin.external_configurable(
    lambda part: part.missing, 'broken', module='launch_test'
  )
  with launch.reported_errors():
    broken('x')
  err = capsys.readouterr().err
  assert 'Traceback' in err and "ERROR: AttributeError: 'str' object has" in err
  assert ended == [1]


def test_a_missing_argument_of_a_configurable_is_one_message(ended, capsys):
  gin.clear_config()
  needy = gin.external_configurable(lambda part: part, 'needy', module='launch_test')
  with launch.reported_errors():
    needy()
  err = capsys.readouterr().err
  assert 'Traceback' not in err
  assert err.startswith('ERROR: TypeError:') and 'missing 1 required' in err
  assert ended == [1]


@pytest.mark.parametrize(
  'error',
  [
    tf.errors.NotFoundError(None, None, 'a/b is gone'),
    checkpoints.DamagedCheckpointError('a/b is unreadable'),
    checkpoints.CheckpointSaveError('a/b is full'),
    trainer.NonFiniteLossError(3, None),
  ],
)
def test_errors_about_files_and_losses_are_one_message(ended, capsys, error):
  fail_with(error)
  assert 'Traceback' not in capsys.readouterr().err
  assert ended == [1]


def test_interrupting_ends_with_130(capsys):
  with pytest.raises(SystemExit) as end:
    fail_with(KeyboardInterrupt())
  assert end.value.code == 130


def test_the_gin_files_of_the_package_are_found_from_anywhere():
  (root,) = launch.GIN_SEARCH_PATHS
  for name in ('pretrain', 'finetune', 'eval', 'infer', 'precompile'):
    assert os.path.isfile(os.path.join(root, f't5x/configs/runs/{name}.gin'))


def test_objects_are_kept_until_a_script_exits(ended, monkeypatch):
  """Outside of a script nothing is kept: a library would only leak it."""

  class Thing:
    pass

  alive = []

  def main(argv):
    thing = Thing()
    alive.append(weakref.ref(thing))
    launch.keep_to_the_end(thing)

  monkeypatch.setattr(launch, '_kept', None)
  main([])
  for name in ('tfds_data_dir', 'seqio_additional_cache_dirs'):
    if name not in launch.FLAGS:
      flags.DEFINE_string(name, None, '')
  launch.FLAGS(['test'])
  launch.run_main(main)
  assert ended == [0]
  assert [ref() is None for ref in alive] == [True, False]


# ---- Logs ----

SITE = os.path.join(os.sep, 'x', 'lib', 'python3.11', 'site-packages')


def record(path, level=logging.INFO, name='absl', text='hello'):
  return logging.LogRecord(name, level, path, 1, text, None, None)


@pytest.mark.parametrize(
  'path, level, shown',
  [
    (f'{SITE}/orbax/checkpoint/x.py', logging.INFO, False),
    (f'{SITE}/orbax/checkpoint/x.py', logging.WARNING, False),
    (f'{SITE}/orbax/checkpoint/x.py', logging.ERROR, True),
    (f'{SITE}/seqio/dataset_providers.py', logging.INFO, False),
    (f'{SITE}/seqio/loggers.py', logging.INFO, True),
    (f'{SITE}/t5x/train.py', logging.INFO, True),
    (f'{SITE}/somebodys_task/x.py', logging.INFO, True),
    ('/home/me/t5x/train.py', logging.INFO, True),
    ('/home/me/tasks.py', logging.WARNING, True),
  ],
)
def test_libraries_are_silent_and_others_are_not(path, level, shown):
  assert launch._OwnLines().filter(record(path, level)) is shown


def test_a_librarys_own_logger_is_silent_wherever_it_is():
  line = record('/home/me/jax/_src/x.py', logging.WARNING, name='jax._src.x')
  assert not launch._OwnLines().filter(line)


def test_a_line_has_the_time_and_the_level_where_it_matters():
  line = launch._Line('[1/2] ')
  assert line.format(record('a.py'))[8:] == ' [1/2] hello'
  warning = record('a.py', logging.WARNING)
  assert line.format(warning)[8:] == ' [1/2] WARNING: hello'


def test_stderr_is_hidden_unless_something_fails():
  code = (
    'import os\nfrom t5x import launch\n'
    'with launch._hidden_stderr(): os.write(2, b"chatter\\n")\n'
    'os.write(2, b"between\\n")\n'
    'try:\n'
    '  with launch._hidden_stderr():\n'
    '    os.write(2, b"reason\\n")\n'
    '    raise ImportError("x")\n'
    'except ImportError: os.write(2, b"after\\n")\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert done.stderr.splitlines() == ['between', 'reason', 'after']
