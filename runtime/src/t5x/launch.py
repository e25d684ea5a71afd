"""How a script starts and ends: flags, quiet logs, gin, error messages, exit.

A script calls `prepare` before it imports anything heavy, so that `--help`, a misspelt
flag or a missing gin file are answered at once; and `run` with the function that gin
configures.
"""

import contextlib
import os
import pathlib
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from absl import flags, logging

import t5x
from t5x import fast_imports, quiet

FLAGS = flags.FLAGS

# Run files are named from here: t5x/configs/runs/pretrain.gin.
GIN_SEARCH_PATHS = (str(pathlib.Path(__file__).resolve().parent.parent),)

TRACEBACK_VARIABLE = 'T5X_TRACEBACK'

# What wrong input raises; the last is a loss that is not finite. Anything else is a
# fault of the code, shown in full.
_INPUT_ERRORS = (ValueError, LookupError, OSError, ImportError, FloatingPointError)
# TensorFlow's for files; it makes them no OSErrors.
_FILE_ERRORS = ('NotFoundError', 'PermissionDeniedError', 'DataLossError')

_GIN_TRAIL = '\n  In call to configurable'

# See `keep_to_the_end`; None where no script runs.
_kept: list[Any] | None = None


def define_flags(
  multiprocess: bool = False,
  shard: bool = False,
  run_mode: bool = False,
  plan: bool = False,
) -> None:
  """Defines the command line of a script.

  Args:
    multiprocess: also the flags by which several processes find each other.
    shard: also `--shard_id`.
    run_mode: also `--run_mode` and `--dry_run`.
    plan: also the flags of `precompile`.
  """
  if run_mode:
    flags.DEFINE_enum(
      'run_mode',
      None,
      ['train', 'eval', 'infer', 'precompile', 'export'],
      'What to run: train, eval, infer or precompile.',
    )
    flags.DEFINE_boolean('dry_run', False, 'Read the configuration and stop.')
  flags.DEFINE_multi_string(
    'gin_file', [], 'A gin file; give the flag again for more. Later files win.'
  )
  flags.DEFINE_multi_string(
    'gin_bindings',
    [],
    'One more gin binding, after all files. --gin.NAME=VALUE is '
    'short for --gin_bindings=NAME=VALUE.',
  )
  flags.DEFINE_list(
    'gin_search_paths',
    ['.'],
    'Folders in which gin files and what they include are '
    'looked for, separated by commas; the first that has the file wins.',
  )
  flags.DEFINE_string(
    'tfds_data_dir', None, 'Where TensorFlow Datasets are, for all tasks.'
  )
  flags.DEFINE_list(
    'seqio_additional_cache_dirs',
    [],
    'Further folders in which seqio looks for cached tasks.',
  )
  if shard:
    flags.DEFINE_integer(
      'shard_id',
      None,
      'Which share of the data to work on, from 0; wins over --gin.infer.shard_id.',
    )
  if multiprocess:
    _define_multiprocess_flags()
  if plan:
    _define_plan_flags()


def _define_plan_flags() -> None:
  flags.DEFINE_string(
    'topology',
    None,
    'What to compile for: v2-8, v3-8, v4-8, v5e-8, v5p-8, v6e-8, cpu:8.',
  )
  flags.DEFINE_enum(
    'step', 'train', ['train', 'eval', 'decode'], 'Which step of the run.'
  )
  flags.DEFINE_boolean('find_batch', False, 'Look for the largest batch that fits.')
  flags.DEFINE_string('json', None, 'Also write the figures to this file.')


def _define_multiprocess_flags() -> None:
  flags.DEFINE_boolean(
    'multiprocess_gpu',
    False,
    'Join several processes into one run. Their number and '
    'addresses are detected (Slurm, Open MPI, TPU VMs, Kubernetes) unless given below.',
  )
  flags.DEFINE_string(
    'coordinator_address', None, 'HOST:PORT of process 0; joins the processes.'
  )
  flags.DEFINE_integer('process_count', None, 'How many processes there are.')
  flags.DEFINE_integer('process_index', None, 'Which of them this one is, from 0.')
  flags.DEFINE_integer(
    'initialization_timeout', None, 'Seconds to wait for the other processes (300).'
  )


def _fail(message: str, code: int = 1) -> NoReturn:
  """Ends the program with one message on stderr."""
  print(f'ERROR: {message}', file=sys.stderr, flush=True)
  raise SystemExit(code)


def show_help(description: str) -> NoReturn:
  """Prints what the script does and its own flags, and ends the program."""
  texts = {
    f'--{flag.name}' + ('' if flag.boolean else '=...'): flag.help.partition(';\n')[0]
    for flag in FLAGS.flags_by_module_dict()[__name__]
  }
  texts['--gin.NAME=VALUE'] = (
    'Binds a macro or a parameter: --gin.TRAIN_STEPS=1000, '
    '--gin.train.eval_period=100. Strings keep their quotes: '
    '--gin.MODEL_DIR="\'runs/mine\'".'
  )
  texts['-v=1'] = (
    'Also show what the libraries log, and where an error came from (so does '
    f'{TRACEBACK_VARIABLE}=1 in the environment).'
  )
  print(description.strip())
  print('\nFlags:')
  for flag, text in texts.items():
    print(f'\n  {flag}')
    print(textwrap.fill(text, 84, initial_indent=' ' * 6, subsequent_indent=' ' * 6))
  raise SystemExit(0)


def _gin_flags_as_bindings(argv: Sequence[str]) -> list[str]:
  """Writes --gin.NAME=VALUE as --gin_bindings=NAME=VALUE."""
  if not any(arg.startswith('--gin.') for arg in argv):
    return list(argv)  # Without an import that takes two seconds.
  from t5x import gin_utils

  return list(gin_utils.rewrite_gin_args(argv))


def _check_gin_files() -> None:
  """Stops at once where a gin file given on the command line is not there."""
  roots = [*FLAGS.gin_search_paths, *GIN_SEARCH_PATHS]
  for name in FLAGS.gin_file:
    if '://' in name or any(os.path.exists(os.path.join(root, name)) for root in roots):
      continue
    from t5x import gin_utils  # Takes two seconds, which most names do without.

    if gin_utils.in_packages(name) is None:
      _fail(
        f'--gin_file={name} is not there. Looked in: {", ".join(roots)}, and for a '
        'package of that name.'
      )


def prepare(
  description: str,
  argv: Sequence[str] | None = None,
  **flags_wanted: bool,
) -> None:
  """Reads the command line and gets ready for the heavy imports.

  Args:
    description: what `--help` prints first.
    argv: the command line, sys.argv by default.
    **flags_wanted: arguments of `define_flags`.
  """
  argv = list(sys.argv if argv is None else argv)
  define_flags(**flags_wanted)
  if {'--help', '-help', '-h', '-?'} & set(argv[1:]):
    show_help(description)
  if any(arg.lstrip('-').startswith('jax_') for arg in argv[1:]):
    import jax

    jax.config.config_with_absl()
  try:
    rest = FLAGS(_gin_flags_as_bindings(argv))
  except (flags.Error, ValueError) as error:
    _fail(f'{error}\nTry --help.', 2)
  if rest[1:]:
    _fail(f'Unexpected arguments: {" ".join(rest[1:])}. Try --help.', 2)
  if not FLAGS.gin_file and not FLAGS.gin_bindings:
    _fail('Nothing to do: give at least one --gin_file. Try --help.', 2)
  _check_gin_files()
  quiet.set_up_logging(verbose=FLAGS.verbosity > 0)
  logging.info('%s from %s', _script_name(), t5x.__file__)
  _be_the_named_module()
  with quiet.hidden_stderr():
    fast_imports.import_tensorflow_and_seqio()


def _script_name() -> str:
  spec = sys.modules['__main__'].__spec__
  return spec.name if spec else os.path.basename(sys.argv[0])


def _be_the_named_module() -> None:
  """Lets `import t5x.train` find the running script instead of loading it again."""
  main = sys.modules['__main__']
  if main.__spec__ is not None:
    sys.modules.setdefault(main.__spec__.name, main)


def join_processes() -> None:
  """Joins this process with the others of the run, if there are others."""
  from t5x import multihost

  multihost.initialize(
    coordinator_address=FLAGS.coordinator_address,
    process_count=FLAGS.process_count,
    process_index=FLAGS.process_index,
    multiprocess_gpu=FLAGS.multiprocess_gpu,
    initialization_timeout=FLAGS.initialization_timeout,
  )
  import jax

  quiet.name_process(jax.process_index(), jax.process_count())


def _configure_seqio() -> None:
  import seqio

  if FLAGS.tfds_data_dir:
    seqio.set_tfds_data_dir_override(FLAGS.tfds_data_dir)
  if FLAGS.seqio_additional_cache_dirs:
    seqio.add_global_cache_dirs(FLAGS.seqio_additional_cache_dirs)


def configure(function: Callable[..., Any]) -> Callable[..., Any]:
  """Makes `function` configurable as `__main__.<name>` and reads the gin files."""
  import gin

  from t5x import gin_utils

  configurable = gin.configurable(function, module='__main__')
  gin_utils.parse_gin_flags(
    [*FLAGS.gin_search_paths, *GIN_SEARCH_PATHS], FLAGS.gin_file, FLAGS.gin_bindings
  )
  return configurable


def _gist(error: BaseException) -> str:
  """The message of an error, without gin's list of who called whom."""
  # KeyError's own text is the repr of its argument.
  keyed = isinstance(error, KeyError) and len(error.args) == 1
  text = str(error.args[0] if keyed else error).partition(_GIN_TRAIL)[0].strip()
  if isinstance(error, ValueError | OSError) and text:
    return text
  return f'{type(error).__name__}: {text}' if text else type(error).__name__


def _is_wrong_input(error: BaseException, raised_in: str) -> bool:
  """Whether an exception is about what the user gave, not a fault of the code.

  Its class tells; or gin raised it, which knows best which argument is missing.

  Args:
    error: the exception.
    raised_in: the file of the code that raised it.
  """
  tensorflow = sys.modules.get('tensorflow')
  of_files = tuple(getattr(tensorflow.errors, e) for e in _FILE_ERRORS if tensorflow)
  by_gin = raised_in.endswith(os.path.join('gin', 'config.py'))
  return by_gin or isinstance(error, (*_INPUT_ERRORS, *of_files))


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
  """Turns an exception into one message on stderr and exit code 1.

  Wrong input gets no traceback unless asked for; a fault of the code always does.
  """
  try:
    yield
  except KeyboardInterrupt:
    _fail('interrupted.', 130)
  except Exception as error:  # Everything: this is the end of the program.
    wanted = FLAGS.verbosity > 0 or os.environ.get(TRACEBACK_VARIABLE, '0') != '0'
    place = traceback.extract_tb(error.__traceback__)[-1]
    expected = _is_wrong_input(error, place.filename)
    if wanted or not expected:
      traceback.print_exc()
    hint = '' if wanted or not expected else f'; {TRACEBACK_VARIABLE}=1 shows more'
    logging.flush()
    print(
      f'ERROR: {_gist(error)}\n'
      f'(raised in {os.path.basename(place.filename)}:{place.lineno}{hint})',
      file=sys.stderr,
      flush=True,
    )
    leave(1)


def keep_to_the_end(thing: Any) -> None:
  """Spares a script the wait for a thing to be taken apart.

  An iterator of tf.data waits, now and then, until its tuning thread wakes up by
  itself: up to a minute, in which nobody else gets the interpreter.

  Args:
    thing: what `leave` may find still there. Ignored where no script runs.
  """
  if _kept is not None:
    _kept.append(thing)


def leave(code: int) -> NoReturn:
  """Ends the program at once: everything has been written and closed by now.

  Python's own way out waits for idle threads of TensorFlow, Orbax and XLA and takes
  apart some millions of objects, which takes seconds.
  """
  import jax

  if jax.distributed.is_initialized() and code == 0:
    jax.distributed.shutdown()
  logging.flush()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def run(function: Callable[..., Any], **overrides: Any) -> NoReturn:
  """Configures `function` by gin, calls it and ends the program.

  Args:
    function: `train`, `evaluate` or `infer`.
    **overrides: arguments from the command line, which win over gin's.
  """
  run_main(lambda argv: configure(function)(**overrides))


def run_main(main: Callable[[Sequence[str]], Any]) -> NoReturn:
  """Joins the processes, calls `main` with the program's name and ends the program.

  Args:
    main: configures and runs a script.
  """
  global _kept
  _kept = []
  with reported_errors():
    if 'multiprocess_gpu' in FLAGS:
      join_processes()
    _configure_seqio()
    main(sys.argv[:1])
  leave(0)
