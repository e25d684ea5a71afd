"""Command lines, error reports, logs and exit of the scripts."""

import logging
import os
import subprocess
import sys
import weakref

import gin
import pytest
import tensorflow as tf
from absl import flags
from clu import asynclib

from t5x import checkpoints, launch, trainer


def call(*args):
  """Runs `python ARGS` and returns (exit code, stdout, stderr)."""
  done = subprocess.run(
    [sys.executable, *args], capture_output=True, text=True, timeout=120, check=False
  )
  return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize('script', ['train', 'eval', 'infer', 'main'])
def test_help_lists_the_flags(script):
  code, out, err = call('-m', f't5x.{script}', '--help')
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
  returned, _, err = call('-c', code)
  assert returned == 0, err


@pytest.mark.parametrize(
  'args, message',
  [
    ((), 'at least one --gin_file'),
    (('--gin_fil=x.gin',), "Unknown command line flag 'gin_fil'"),
    (('--gin_file=x.gin',), '--gin_file=x.gin does not exist'),
    (('--gin_file=x.gin', 'extra'), 'Unexpected arguments: extra'),
  ],
)
def test_a_wrong_command_line_is_one_message_without_traceback(args, message):
  code, out, err = call('-m', 't5x.train', *args)
  assert code != 0
  assert out == ''
  assert err.startswith('ERROR: ') and message in err
  assert 'Traceback' not in err
  assert len(err.splitlines()) <= 2


def test_a_platform_that_is_not_there_is_one_message(tmp_path, monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', 'no_such_platform')
  (tmp_path / 'x.gin').write_text('')
  code, _, err = call('-m', 't5x.train', f'--gin_file={tmp_path / "x.gin"}')
  assert code == 1
  assert 'no_such_platform' in err and 'Traceback' not in err


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
    (SyntaxError('bad', ('a/b.gin', 5, 0, 'x')), 'bad (a/b.gin, line 5)'),
  ],
)
def test_the_message_is_that_of_the_exception(ended, capsys, error, text):
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


def test_errors_of_gin_are_messages_and_bugs_in_configurables_are_not(ended, capsys):
  gin.clear_config()
  function = gin.external_configurable(
    lambda part: part.missing, 'function', module='launch_test'
  )
  with launch.reported_errors():
    function()
  err = capsys.readouterr().err
  assert err.startswith('ERROR: TypeError:') and 'missing 1 required' in err
  with launch.reported_errors():
    function('x')
  err = capsys.readouterr().err
  assert 'Traceback' in err and "ERROR: AttributeError: 'str' object has" in err
  assert ended == [1, 1]


@pytest.mark.parametrize(
  'error',
  [
    tf.errors.NotFoundError(None, None, 'a/b is gone'),
    tf.errors.ResourceExhaustedError(None, None, 'a/b; No space left on device'),
    asynclib.AsyncError('a/b cannot be written'),
    checkpoints.DamagedCheckpointError('a/b is unreadable'),
    checkpoints.CheckpointSaveError('a/b is full'),
    trainer.NonFiniteLossError(3, None),
  ],
)
def test_errors_about_files_and_losses_are_one_message(ended, capsys, error):
  fail_with(error)
  assert 'Traceback' not in capsys.readouterr().err
  assert ended == [1]


def test_an_interrupt_exits_with_130(ended):
  fail_with(KeyboardInterrupt())
  assert ended == [130]


def test_objects_are_kept_until_a_script_exits(ended, monkeypatch):
  alive = []

  def main(argv):
    thing = tf.Module()
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


def test_temporary_files_do_not_outlive_the_scripts(tmp_path):
  code = (
    'import tempfile\nfrom t5x import launch\nlaunch._make_temporary_folder()\n'
    'print(tempfile.mkdtemp(), flush=True)\ninput()\nlaunch.leave(0)'
  )

  def start():
    process = subprocess.Popen(
      [sys.executable, '-c', code],
      env={**os.environ, 'TMPDIR': str(tmp_path)},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    return process, process.stdout.readline().strip()

  (first, kept), (killed, left) = start(), start()
  killed.kill()
  killed.communicate()
  assert os.path.isdir(kept) and os.path.isdir(left)
  third, _ = start()
  assert os.path.isdir(kept) and not os.path.isdir(left)
  for process in (first, third):
    process.communicate('\n')
    assert process.returncode == 0
  assert not list(tmp_path.iterdir())


# ---- Logs ----

SITE = os.path.join(os.sep, 'x', 'lib', 'python3.11', 'site-packages')


def record(path, level=logging.INFO, name='absl'):
  return logging.LogRecord(name, level, path, 1, 'hello', None, None)


@pytest.mark.parametrize(
  'line, shown',
  [
    (record(f'{SITE}/orbax/checkpoint/x.py', logging.WARNING), False),
    (record(f'{SITE}/orbax/checkpoint/x.py', logging.ERROR), True),
    (record(f'{SITE}/seqio/dataset_providers.py'), False),
    (record(f'{SITE}/seqio/loggers.py'), True),
    (record(f'{SITE}/t5x/train.py'), True),
    (record(f'{SITE}/somebodys_task/x.py'), True),
    (record('/home/me/tasks.py'), True),
    (record('/home/me/jax/_src/x.py', logging.WARNING, 'jax._src.x'), False),
  ],
)
def test_only_libraries_are_silent(line, shown):
  assert launch._OwnLines().filter(line) is shown


def test_log_lines_have_the_time_and_the_level_of_warnings():
  line = launch._Line('[1/2] ')
  assert line.format(record('a.py'))[8:] == ' [1/2] hello'
  warning = record('a.py', logging.WARNING)
  assert line.format(warning)[8:] == ' [1/2] WARNING: hello'


def test_stderr_is_hidden_unless_imports_fail():
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
  returned, _, err = call('-c', code)
  assert returned == 0
  assert err.splitlines() == ['between', 'reason', 'after']
