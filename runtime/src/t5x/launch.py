"""Command line, logging, error reporting and exit of the scripts.

A script calls `prepare` before its heavy imports, so that `--help`, a misspelt flag or
a missing gin file gets an immediate answer, then `run` with the function to configure.
"""

import contextlib
import ctypes
import fcntl
import gc
import importlib
import logging as py_logging
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import textwrap
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import util as importlib_util
from typing import Any, NoReturn

import gin
from absl import flags, logging

import t5x
from t5x import gin_utils

FLAGS = flags.FLAGS

# Paths of run files are relative to this folder: t5x/configs/runs/pretrain.gin.
GIN_SEARCH_PATHS = (str(pathlib.Path(__file__).resolve().parent.parent),)

TRACEBACK_VARIABLE = 'T5X_TRACEBACK'

# Raised by wrong input (the last one: by a non-finite loss). Anything else is a bug and
# gets its traceback.
_USER_ERRORS = (
  ValueError, LookupError, OSError, ImportError, SyntaxError, FloatingPointError
)  # fmt: skip
# TensorFlow's file errors, which are not OSErrors; the last one is that of a full disk.
_FILE_ERRORS = (
  'NotFoundError', 'PermissionDeniedError', 'DataLossError', 'ResourceExhaustedError'
)  # fmt: skip

# Libraries of which only errors are shown.
_CHATTY = (
  'absl', 'clu', 'etils', 'flax', 'gin', 'grain', 'jax', 'orbax', 'seqio', 'tensorflow',
  'tensorflow_datasets', 'tensorstore', 'tf_keras',
)  # fmt: skip

# See `_make_temporary_folder`; None where no script runs.
_temporary_folder: str | None = None
# See `keep_to_the_end`; None where no script runs.
_kept: list[Any] | None = None
# See `exit_with`.
_exit_code = 0


# ---- Command line ----


def define_flags(
  multiprocess: bool = False,
  shard: bool = False,
  run_mode: bool = False,
  plan: bool = False,
) -> None:
  """Defines the flags of all scripts and the requested groups of flags."""
  text, boolean, integer = (
    flags.DEFINE_string, flags.DEFINE_boolean, flags.DEFINE_integer
  )  # fmt: skip
  flags.DEFINE_multi_string(
    'gin_file', [], 'A gin file; repeat the flag for several. Later files win.'
  )
  flags.DEFINE_multi_string(
    'gin_bindings',
    [],
    'A gin binding, applied after all files. --gin.NAME=VALUE is short for '
    '--gin_bindings=NAME=VALUE.',
  )
  flags.DEFINE_list(
    'gin_search_paths',
    ['.'],
    'Comma-separated folders to search for gin files and their includes; the first '
    'that has the file wins.',
  )
  text('tfds_data_dir', None, 'Folder of TensorFlow Datasets, for all tasks.')
  flags.DEFINE_list(
    'seqio_additional_cache_dirs', [], 'Additional folders of cached seqio tasks.'
  )
  if run_mode:
    modes = ['train', 'eval', 'infer', 'precompile']
    flags.DEFINE_enum('run_mode', None, modes, 'The script to run.')
    boolean('dry_run', False, 'Check the configuration and stop.')
  if shard:
    help_text = 'Shard of the data to infer, from 0; overrides gin.'
    integer('shard_id', None, help_text)
  if multiprocess:
    boolean(
      'multiprocess_gpu',
      False,
      'Join several processes into one run. Their number and addresses are detected '
      '(Slurm, Open MPI, TPU VMs, Kubernetes) unless set by the flags below.',
    )
    text('coordinator_address', None, 'HOST:PORT of process 0; implies joining.')
    integer('process_count', None, 'Number of processes.')
    integer('process_index', None, 'Index of this process, from 0.')
    help_text = 'Seconds to wait for the other processes (default: 300).'
    integer('initialization_timeout', None, help_text)
  if plan:
    known = 'v2-8, v3-8, v4-8, v5e-8, v5p-8, v6e-8, cpu:8'
    text('topology', None, f'Devices to compile for: {known}.')
    flags.DEFINE_enum('step', 'train', ['train', 'eval', 'decode'], 'Step to compile.')
    boolean('find_batch', False, 'Find the largest batch that fits.')
    text('json', None, 'File for the results as JSON.')


def _fail(message: str, code: int = 1) -> NoReturn:
  print(f'ERROR: {message}', file=sys.stderr, flush=True)
  raise SystemExit(code)


def _show_help(description: str) -> NoReturn:
  texts = {
    f'--{flag.name}' + ('' if flag.boolean else '=...'): flag.help.partition(';\n')[0]
    for flag in FLAGS.flags_by_module_dict()[__name__]
  }
  texts['--gin.NAME=VALUE'] = (
    'Binds a macro or a parameter: --gin.TRAIN_STEPS=1000, '
    '--gin.train.eval_period=100. Strings need their own quotes: '
    '--gin.MODEL_DIR="\'runs/mine\'".'
  )
  texts['-v=1'] = (
    'Show logs of libraries and tracebacks of all errors (tracebacks only: set '
    f'{TRACEBACK_VARIABLE}=1 in the environment).'
  )
  print(description.strip())
  print('\nFlags:')
  for flag, text in texts.items():
    print(f'\n  {flag}')
    print(textwrap.fill(text, 84, initial_indent=' ' * 6, subsequent_indent=' ' * 6))
  raise SystemExit(0)


def _is_in_package(name: str) -> bool:
  """Whether gin will find 'package/folder/file.gin' in an importable package."""
  folder, file = os.path.split(name)
  try:
    spec = importlib_util.find_spec(folder.replace('/', '.'))
  except (ImportError, ValueError):
    return False
  origin = spec and spec.origin
  return bool(origin) and os.path.isfile(os.path.join(os.path.dirname(origin), file))


def _check_gin_files() -> None:
  roots = [*FLAGS.gin_search_paths, *GIN_SEARCH_PATHS]
  for name in FLAGS.gin_file:
    found = '://' in name or any(os.path.exists(os.path.join(r, name)) for r in roots)
    if not found and not _is_in_package(name):
      _fail(
        f'--gin_file={name} does not exist. Searched: {", ".join(roots)} and packages.'
      )


def prepare(
  description: str,
  argv: Sequence[str] | None = None,
  **flags_wanted: bool,
) -> None:
  """Parses the command line, sets up logging and imports TensorFlow and seqio.

  Args:
    description: first part of the `--help` text.
    argv: the command line; sys.argv by default.
    **flags_wanted: arguments of `define_flags`.
  """
  argv = list(sys.argv if argv is None else argv)
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Until `run_main`, ends at once.
  define_flags(**flags_wanted)
  if {'--help', '-help', '-h', '-?'} & set(argv[1:]):
    _show_help(description)
  if any(arg.lstrip('-').startswith('jax_') for arg in argv[1:]):
    import jax

    jax.config.config_with_absl()
  try:
    rest = FLAGS(gin_utils.rewrite_gin_args(argv))
  except (flags.Error, ValueError) as error:
    _fail(f'{error}\nTry --help.', 2)
  if rest[1:]:
    _fail(f'Unexpected arguments: {" ".join(rest[1:])}. Try --help.', 2)
  if not FLAGS.gin_file and not FLAGS.gin_bindings:
    _fail('Nothing to do: give at least one --gin_file. Try --help.', 2)
  _check_gin_files()
  _set_up_logging(verbose=FLAGS.verbosity > 0)
  main = sys.modules['__main__']
  name = main.__spec__.name if main.__spec__ else os.path.basename(sys.argv[0])
  logging.info('%s from %s', name, t5x.__file__)
  # `import t5x.train` finds the running script instead of loading it again.
  sys.modules.setdefault(name, main)
  _keep_freed_memory()
  _make_temporary_folder()
  with _hidden_stderr():
    _import_tensorflow_and_seqio()


def _keep_freed_memory() -> None:
  """Has glibc keep freed memory, where a run is on CPUs.

  XLA allocates the temporary arrays of a step in every step. Returned to the kernel and
  mapped again page by page, they take up to a third of a small model's step.
  """
  libc = ctypes.CDLL(None)
  if os.environ.get('JAX_PLATFORMS') != 'cpu' or not hasattr(libc, 'mallopt'):
    return
  m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # of malloc.h
  libc.mallopt(m_trim_threshold, 2**31 - 1)
  libc.mallopt(m_mmap_max, 0)
  # Other arenas would return it all the same.
  libc.mallopt(m_arena_max, 1)


def _lock(folder: str | os.PathLike) -> None:
  """Locks a folder until this process ends; OSError if another one has locked it."""
  handle = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    os.close(handle)
    raise


def _make_temporary_folder() -> None:
  """Puts Python's temporary files in a folder that `leave` removes.

  TensorFlow writes a module for each function that it traces. If a process is killed,
  the next one removes its folder, which is no longer locked.
  """
  root = pathlib.Path(tempfile.gettempdir())
  for folder in root.glob('t5x_run_*'):
    with contextlib.suppress(OSError):  # In use, or another user's.
      _lock(folder)
      shutil.rmtree(folder)
  # Has its name once it is locked.
  unlocked = tempfile.mkdtemp(prefix='t5x_new_')
  with contextlib.suppress(OSError):  # Some file systems have no locks.
    _lock(unlocked)
  global _temporary_folder
  _temporary_folder = tempfile.tempdir = unlocked.replace('t5x_new_', 't5x_run_')
  os.rename(unlocked, _temporary_folder)


# ---- Logs ----


class _OwnLines(py_logging.Filter):
  """Passes log records of our and the user's code, and errors of libraries."""

  def filter(self, record: py_logging.LogRecord) -> bool:
    file = record.pathname.rpartition(f'-packages{os.sep}')[2]
    if file == os.path.join('gin', 'resource_reader.py'):
      return False  # Reports each search path without the file as an error.
    # PyLoggingLogger, which gin files ask for, logs results from there.
    if record.levelno >= py_logging.ERROR or file == os.path.join(
      'seqio', 'loggers.py'
    ):
      return True
    if file != record.pathname:
      return file.partition(os.sep)[0] not in _CHATTY
    # Code outside of the installed packages logs through absl.
    return record.name == 'absl' or record.name.partition('.')[0] not in _CHATTY


class _Line(py_logging.Formatter):
  """Formats records as `12:34:56 message`, with the level of warnings and errors."""

  def __init__(self, process: str = ''):
    super().__init__(f'%(asctime)s {process}%(level)s%(message)s', '%H:%M:%S')

  def format(self, record: py_logging.LogRecord) -> str:
    above_info = record.levelno > py_logging.INFO
    record.level = f'{record.levelname}: ' if above_info else ''
    return super().format(record)


def _set_up_logging(verbose: bool) -> None:
  handler = logging.get_absl_handler()
  logging.use_absl_handler()
  logging.use_python_logging(quiet=True)
  if verbose:
    return
  logging.set_verbosity(logging.INFO)
  # Read by C++ libraries when they are loaded.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  os.environ.setdefault('GRPC_VERBOSITY', 'NONE')
  handler.setFormatter(_Line())
  handler.addFilter(_OwnLines())
  for library in _CHATTY[1:]:
    warnings.filterwarnings('ignore', module=rf'{library}(\.|$)')


@contextlib.contextmanager
def _hidden_stderr() -> Iterator[None]:
  """Hides the stderr of C++ libraries while they are loaded, unless loading fails."""
  sys.stderr.flush()
  screen = os.dup(2)
  with tempfile.TemporaryFile() as kept:
    os.dup2(kept.fileno(), 2)
    try:
      yield
    except BaseException:
      kept.seek(0)
      os.write(screen, kept.read())
      raise
    finally:
      sys.stderr.flush()
      os.dup2(screen, 2)
      os.close(screen)


# ---- Imports ----


class _ImportedAtUse(types.ModuleType):
  """A module that is imported when one of its public names is used."""

  def __getattr__(self, name: str) -> Any:
    # TensorFlow looks for attributes such as _tf_decorator on all that it exports.
    if name.startswith('_'):
      raise AttributeError(name)
    if name == 'Callback':  # tensorboard looks it up when imported.
      return lambda *args, **kwargs: self._import().Callback(*args, **kwargs)
    return getattr(self._import(), name)

  def _import(self) -> types.ModuleType:
    if sys.modules.get(self.__name__) is self:
      del sys.modules[self.__name__]
    return importlib.import_module(self.__name__)


def _import_tensorflow_and_seqio() -> None:
  """Imports both without Keras, which takes seconds, and hides GPUs from TensorFlow.

  Keras is imported when it is first used.
  """
  if 'tensorflow' in sys.modules:
    return
  gc.disable()  # Imports allocate many objects and leave no garbage.
  before = os.environ.get('TF_USE_LEGACY_KERAS')
  # Keeps TensorFlow from importing Keras. `tf.keras` reads the variable on first use.
  os.environ['TF_USE_LEGACY_KERAS'] = '1'
  import tensorflow as tf

  for name in ('tensorflow_text.python.keras', 'tensorboard.plugins.hparams._keras'):
    if importlib_util.find_spec(name.partition('.')[0]):
      sys.modules.setdefault(name, _ImportedAtUse(name))
  import seqio  # noqa: F401  (for later imports to find it)

  tf.config.set_visible_devices([], 'GPU')
  del os.environ['TF_USE_LEGACY_KERAS']
  if before is not None:
    os.environ['TF_USE_LEGACY_KERAS'] = before
  gc.enable()
  gc.freeze()


# ---- Running a script ----


def configure(function: Callable[..., Any]) -> Callable[..., Any]:
  """Makes `function` configurable as `__main__.<name>` and reads the gin files."""
  configurable = gin.configurable(function, module='__main__')
  gin_utils.parse_gin_flags(
    [*FLAGS.gin_search_paths, *GIN_SEARCH_PATHS], FLAGS.gin_file, FLAGS.gin_bindings
  )
  return configurable


def _message(error: BaseException) -> str:
  # str() of a KeyError is the repr of its argument.
  keyed = isinstance(error, KeyError) and len(error.args) == 1
  text = str(error.args[0] if keyed else error)
  text = text.partition('\n  In call to configurable')[0].strip()  # Gin's call stack.
  if isinstance(error, SyntaxError) and error.filename:  # Its text omits the folder.
    text = text.replace(f'({os.path.basename(error.filename)},', f'({error.filename},')
  if isinstance(error, ValueError | OSError) and text:
    return text
  return f'{type(error).__name__}: {text}' if text else type(error).__name__


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
  """Reports an exception as one message on stderr and exits with code 1.

  User errors get a traceback only on request; bugs always do.
  """
  try:
    yield
  except KeyboardInterrupt:
    write_to_stderr('ERROR: interrupted.')
    leave(130)
  except Exception as error:  # Everything: the program ends here.
    place = traceback.extract_tb(error.__traceback__)[-1]
    tensorflow = sys.modules.get('tensorflow')
    of_files = tuple(getattr(tensorflow.errors, e) for e in _FILE_ERRORS if tensorflow)
    if clu := sys.modules.get('clu.asynclib'):  # Writes event files in a thread.
      of_files += (clu.AsyncError,)
    # Gin raises TypeError for missing arguments, AttributeError for unknown names.
    by_gin = place.filename.endswith(os.path.join('gin', 'config.py'))
    expected = by_gin or isinstance(error, (*_USER_ERRORS, *of_files))
    wanted = FLAGS.verbosity > 0 or os.environ.get(TRACEBACK_VARIABLE, '0') != '0'
    if wanted or not expected:
      traceback.print_exc()
    hint = '' if wanted or not expected else f'; {TRACEBACK_VARIABLE}=1 for a traceback'
    logging.flush()
    print(
      f'ERROR: {_message(error)}\n'
      f'(raised in {os.path.basename(place.filename)}:{place.lineno}{hint})',
      file=sys.stderr,
      flush=True,
    )
    leave(1)


def keep_to_the_end(thing: Any) -> None:
  """Keeps an object alive until the script exits; does nothing outside of scripts.

  Destroying a tf.data iterator can take a minute: it waits for its autotuning thread.
  """
  if _kept is not None:
    _kept.append(thing)


def exit_with(code: int) -> None:
  """Sets the exit code of the script, which still runs to its end."""
  global _exit_code
  _exit_code = code


def write_to_stderr(line: str) -> None:
  """Prints a line; also from a signal handler, which may have interrupted a `print`."""
  with contextlib.suppress(OSError):  # The terminal may be gone (SIGHUP).
    os.write(2, f'{line}\n'.encode())


def leave(code: int) -> NoReturn:
  """Ends the program immediately, once everything is written and closed.

  A normal exit takes seconds: Python waits for idle threads of TensorFlow, Orbax and
  XLA and destroys millions of objects.
  """
  for flush in (logging.flush, sys.stdout.flush, sys.stderr.flush):
    try:
      flush()
    except OSError:  # A full disk, or the terminal is gone.
      code = code or 1
  if _temporary_folder is not None:
    shutil.rmtree(_temporary_folder, ignore_errors=True)
  os._exit(code)


def _join_processes() -> None:
  import jax

  from t5x import multihost

  multihost.initialize(
    coordinator_address=FLAGS.coordinator_address,
    process_count=FLAGS.process_count,
    process_index=FLAGS.process_index,
    multiprocess_gpu=FLAGS.multiprocess_gpu,
    initialization_timeout=FLAGS.initialization_timeout,
  )
  try:
    process_count = jax.process_count()
  except RuntimeError as error:  # JAX_PLATFORMS names an accelerator that is not there.
    raise OSError(f'JAX cannot start: {error}') from error
  handler = logging.get_absl_handler().python_handler
  if process_count > 1 and isinstance(handler.formatter, _Line):
    process = f'[{jax.process_index()}/{process_count}] '
    handler.setFormatter(_Line(process))


def run(function: Callable[..., Any], **overrides: Any) -> NoReturn:
  """Configures `function` with gin, calls it and ends the program.

  Args:
    **overrides: arguments of `function` that override gin's.
  """
  run_main(lambda argv: configure(function)(**overrides))


def run_main(main: Callable[[Sequence[str]], Any]) -> NoReturn:
  """Joins the processes, calls `main([program name])` and ends the program."""
  global _kept
  _kept = []
  exit_with(0)
  if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  with reported_errors():
    if 'multiprocess_gpu' in FLAGS:
      _join_processes()
    if FLAGS.tfds_data_dir or FLAGS.seqio_additional_cache_dirs:
      import seqio

      if FLAGS.tfds_data_dir:
        seqio.set_tfds_data_dir_override(FLAGS.tfds_data_dir)
      seqio.add_global_cache_dirs(FLAGS.seqio_additional_cache_dirs)
    main(sys.argv[:1])
    import jax

    # Waits for the other processes, so not after an error.
    if jax.distributed.is_initialized():
      jax.distributed.shutdown()
  leave(_exit_code)
