"""Gin for T5X's scripts: flags, files, bindings, and the record of a configuration."""

import difflib
import importlib.util
import inspect
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import gin
import jax
from absl import app, logging
from etils import epath
from gin import config as gin_config
from gin import resource_reader

from t5x import gin_bindings as bindings_module


class _TextWriter(Protocol):
  """What `summarize_gin_config` needs of a `clu.metric_writers.MetricWriter`."""

  def write_texts(self, step: int, texts: dict[str, str]) -> None:
    """Writes texts by name."""

  def flush(self) -> None:
    """Returns when all is written."""


def nearest(name: str, known: Iterable[str]) -> str:
  """Returns " Did you mean '...'?" with the known name closest to `name`, or ''."""
  close = difflib.get_close_matches(name, sorted(set(known)), n=1)
  return f' Did you mean {close[0]!r}?' if close else ''


# ---- Files ----

_HERE = pathlib.Path(__file__).resolve().parent


def in_packages(path: str) -> str | None:
  """Finds 'package/folder/file.gin' in an importable package, without importing it."""
  package, _, rest = path.partition('/')
  if not rest or not package.isidentifier():
    return None
  if package == _HERE.name:
    folders = [str(_HERE)]  # The very package that runs, however it was installed.
  else:
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
  candidates = (os.path.join(folder, rest) for folder in folders)
  return next(filter(os.path.isfile, candidates), None)


def _find_files_in_packages() -> None:
  """Lets gin find files in packages that have folders without `__init__.py`.

  Gin's own reader imports every folder as a package, and raises a TypeError where one
  is not; this takes its place.
  """
  ours = (
    lambda path: open(in_packages(path), encoding='utf-8'),
    lambda path: bool(in_packages(path)),
  )
  readers = gin_config._FILE_READERS
  for i, (reader, _) in enumerate(readers):
    if reader is resource_reader.system_path_reader:
      readers[i] = ours


_find_files_in_packages()


def parse_gin_flags(
  gin_search_paths: Sequence[str],
  gin_files: Sequence[str],
  gin_bindings: Sequence[str],
  skip_unknown: bool | Sequence[str] = False,
  finalize_config: bool = True,
) -> None:
  """Parses files, then the bindings of the command line, which win.

  A file is looked for in the working folder, in the search paths, then in importable
  packages ('t5x/configs/runs/pretrain.gin'). Bindings may name whatever the files
  import, `t5x` modules, and whatever gin has registered.

  Args:
    gin_search_paths: folders in which files, and their includes, are looked for.
    gin_files: in order; later ones win.
    gin_bindings: 'scope/name.parameter = value' or 'MACRO = value'.
    skip_unknown: as for `gin.parse_config`.
    finalize_config: whether to lock the configuration. It is then also checked that
      nothing required is missing and that no binding is without effect.

  Raises:
    ValueError: a name is wrong, a required macro is not set, or a binding is without
      effect.
    OSError: a file is not found.
  """
  for folder in gin_search_paths:
    if folder not in gin_config._LOCATION_PREFIXES:
      gin.add_config_file_search_path(folder)
  for path in gin_files or ():
    with bindings_module.explained(path=path):
      gin.parse_config_file(path, skip_unknown)
  applied = bindings_module.apply_command_line(gin_bindings or (), skip_unknown)
  if finalize_config:
    bindings_module.check_macros(applied)
    bindings_module.check_parents()
    bindings_module.check_reached(applied)
    with bindings_module.explained():
      gin.finalize()
  logging.info(
    'Gin configuration from %s and %d bindings of the command line.',
    ', '.join(gin_files or ()) or 'no file',
    len(gin_bindings or ()),
  )
  logging.debug('%s', get_gin_config_str())


def rewrite_gin_args(args: Sequence[str]) -> list[str]:
  """Turns '--gin.NAME=VALUE' into '--gin_bindings=NAME = VALUE'; keeps the rest.

  Raises:
    ValueError: no '=' after '--gin.NAME'.
  """
  rewritten = []
  for arg in args:
    if arg.startswith('--gin.'):
      name, equals, value = arg.removeprefix('--gin.').partition('=')
      if not equals:
        raise ValueError(f'Write --gin.NAME=VALUE, with an equals sign. Got: {arg!r}.')
      arg = f'--gin_bindings={name} = {value}'
    rewritten.append(arg)
  return rewritten


def run_main(
  main: Callable[[Sequence[str]], Any],
  flags_parser: Callable[[Sequence[str]], Sequence[str]],
) -> None:
  """Runs `main` under absl, with the given parser of flags."""
  app.run(main, flags_parser=flags_parser)


def run(main: Callable[[Sequence[str]], Any]) -> None:
  """Runs `main` under absl, with '--gin.NAME=VALUE' understood."""
  run_main(
    main,
    flags_parser=lambda args: app.parse_flags_with_usage(rewrite_gin_args(args)),
  )


# ---- The record of a configuration ----


@gin.configurable
def get_gin_config_str(show_provenance: bool = False) -> str:
  """The configuration in gin's own syntax, bound parameters only.

  Args:
    show_provenance: whether to say where each binding comes from.

  Raises:
    ValueError: the installed gin cannot show provenance.
  """
  if not show_provenance:
    return gin.config_str()
  if 'show_provenance' not in inspect.signature(gin.config_str).parameters:
    raise ValueError(
      'get_gin_config_str.show_provenance is True, and the installed gin-config does '
      'not record where bindings come from. Set it to False.'
    )
  return gin.config_str(show_provenance=True)


def bound_values() -> dict[str, str]:
  """What gin files and the command line have set, to compare two configurations.

  Returns:
    {'MACRO' or 'scope/module.function.parameter': the value as gin would write it},
    without objects that Python code has bound.
  """
  found = {}
  for (scope, selector), values in gin_config._CONFIG.items():
    for parameter, value in values.items():
      name = '/'.join(filter(None, (scope, f'{selector}.{parameter}')))
      if gin_config._REGISTRY[selector].wrapped is gin_config.macro:
        name = scope
      if gin_config._is_literally_representable(value):
        found[name] = gin_config._format_value(value)
  return found


@gin.register
def summarize_gin_config(
  model_dir: str | os.PathLike, summary_writer: _TextWriter | None, step: int
) -> None:
  """Writes the configuration to MODEL_DIR/config.gin and to TensorBoard.

  Args:
    model_dir: the folder of the run, made if it is not there.
    summary_writer: where the text goes as 'config'; None for nowhere.
    step: the step at which TensorBoard shows it.
  """
  if jax.process_index() != 0:
    return
  text = get_gin_config_str()
  folder = epath.Path(model_dir)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.gin').write_text(text)
  if summary_writer is not None:
    summary_writer.write_texts(step, {'config': gin.markdown(text)})
    summary_writer.flush()


# ---- Functions for gin files, whose values are literals otherwise ----


@gin.configurable
def sum_fn(var1: Any = gin.REQUIRED, var2: Any = gin.REQUIRED) -> Any:
  """var1 + var2."""
  return var1 + var2


@gin.configurable
def bool_fn(var1: Any = gin.REQUIRED) -> bool:
  """Whether var1 is true."""
  return bool(var1)


@gin.configurable
def string_split_fn(
  text: str = gin.REQUIRED,
  separator: str = gin.REQUIRED,
  maxsplit: int = -1,
  index: int | None = None,
) -> list[str] | str:
  """The parts of a text between separators, or one of them."""
  parts = text.split(separator, maxsplit)
  return parts if index is None else parts[index]
