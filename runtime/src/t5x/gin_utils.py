"""Gin for T5X's scripts: flags, files, bindings, and the record of a configuration."""

import contextlib
import difflib
import importlib.util
import inspect
import os
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import gin
from absl import app, logging
from gin import config as gin_config
from gin import config_parser

# jax and etils are imported where they are needed: `--help` is answered without them.


def nearest(name: str, known: Iterable[str]) -> str:
  """Returns " Did you mean '...'?" with the known name closest to `name`, or ''."""
  close = difflib.get_close_matches(name, sorted(set(known)), n=1)
  return f' Did you mean {close[0]!r}?' if close else ''


# ---- Bindings of the command line ----
#
# Gin resolves `models.EncoderDecoderModel` by the imports of the file it stands in. A
# binding on the command line stands in no file: it gets the imports of all files. Gin
# has no public way to that, nor to read what is bound: hence three private names of it,
# which are used in this file only.

_COMMAND_LINE = config_parser.Location(None, 0, None, '')
_DYNAMIC_REGISTRATION = config_parser.ImportStatement(
  '__gin__.dynamic_registration', is_from=True, alias=None, location=_COMMAND_LINE
)
# Importing one of these would load the running script a second time.
_SCRIPTS = ('train', 'eval', 'infer', 'precompile', 'main')


def _imports_of(root: str) -> list[config_parser.ImportStatement]:
  """The imports of gin files that bind a name, else the runtime's module of it."""
  found = {s.module: s for s in gin_config._IMPORTS if s.bound_name() == root}
  if not found and root not in _SCRIPTS and importlib.util.find_spec(f't5x.{root}'):
    module = f't5x.{root}'
    return [config_parser.ImportStatement(module, True, None, _COMMAND_LINE)]
  return [found[module] for module in sorted(found)]


@contextlib.contextmanager
def _scope_of(name: str) -> Iterator[gin_config.Configurable | None]:
  """Opens a scope in which a name resolves by the imports of all gin files.

  Yields:
    What the name means; None if its first part is not imported, so that only gin's
    registry can know it.

  Raises:
    ValueError: a module or class lacks the rest of the name, or several have it.
  """
  root, *parts = name.split('.')
  imports = _imports_of(root) if parts else []
  if not imports:
    yield None
    return
  direct = any(s.is_from or s.alias for s in imports)
  if direct:  # Modules of one name; otherwise `import a.b` and `import a.c`.
    fitting = [s for s in imports if hasattr(sys.modules.get(s.module), parts[0])]
    if len(fitting) > 1:
      raise ValueError(
        f'{name!r} is ambiguous: gin files import {root!r} from '
        f'{", ".join(s.module for s in fitting)}. Bind it in a gin file.'
      )
    imports = fitting or imports[:1]
  with gin_config._parse_scope() as context:
    for statement in (_DYNAMIC_REGISTRATION, *imports):
      context.process_import(statement)
    owner = sys.modules[imports[0].module if direct else root]
    for part in parts:
      if not hasattr(owner, part):
        raise ValueError(
          f'{name!r} does not exist: {owner!r} has no {part!r}.'
          f'{nearest(part, dir(owner))}'
        )
      owner = getattr(owner, part)
    yield context.get_configurable(name)
  gin_config._IMPORTS.update(context.imports)


class _ResolvingDelegate(gin_config.ParserDelegate):
  """Resolves references in values by the imports of all gin files."""

  def configurable_reference(self, scoped_selector: str, evaluate: bool) -> Any:
    with _scope_of(scoped_selector.rpartition('/')[2]):
      return super().configurable_reference(scoped_selector, evaluate)


def _bind(
  text: str, skip_unknown: bool | Sequence[str]
) -> Iterator[tuple[str, gin_config.Configurable | None]]:
  """Applies a binding; yields (macro's name, None) or ('', what was configured)."""
  for statement in config_parser.ConfigParser(text, _ResolvingDelegate(skip_unknown)):
    scope, selector, parameter, value, _ = statement
    if not parameter:
      macro = f'{scope}/{selector}' if scope else selector
      gin.bind_parameter((macro, 'gin.macro', 'value'), value)
      yield macro, None
      continue
    try:
      with _scope_of(selector) as found:
        function = found.wrapped if found else gin.get_configurable(selector)
    except ValueError:
      if skip_unknown is True or (skip_unknown and selector in skip_unknown):
        continue
      raise
    try:
      with _scope_of(selector):
        gin.bind_parameter((scope, selector, parameter), value)
    except ValueError as error:
      hint = nearest(parameter, inspect.signature(function).parameters)
      raise ValueError(f'{error}{hint}') from None
    yield '', found


def _apply_command_line(
  bindings: Sequence[str], skip_unknown: bool | Sequence[str]
) -> list[tuple[str, str, gin_config.Configurable | None]]:
  """Applies bindings in order; returns (text, macro or '', configurable) of each."""
  if any(text.startswith(('import ', 'from ', 'include ')) for text in bindings):
    gin.parse_config(list(bindings), skip_unknown)  # Lines of a file.
    return []
  applied = []
  for text in bindings:
    try:
      applied += [(text, *bound) for bound in _bind(text, skip_unknown)]
    except (SyntaxError, tokenize.TokenError) as error:
      raise ValueError(
        f'The binding {text!r} cannot be read. Write NAME = VALUE with a Python '
        'literal, @reference or %MACRO; a string keeps quotes of its own inside the '
        f"shell's: --gin.NAME=\"'text'\"."
      ) from error
    except ValueError as error:
      raise ValueError(f'The binding {text!r}: {error}') from error
  return applied


def _check_macros() -> set[str]:
  """Checks that all used macros have a value; returns their names.

  Raises:
    ValueError: names all macros that are undefined, or required and not set.
  """
  config = gin_config._CONFIG
  bound = {
    scope: values['value']
    for (scope, selector), values in config.items()
    if selector == 'gin.macro'
  }
  macro = gin.get_configurable('gin.macro')
  used = {'/'.join(r.scopes) for r in gin_config.iterate_references(config, to=macro)}
  if undefined := sorted(used - set(bound)):
    raise ValueError(
      f'Macros are used and never defined: {", ".join(undefined)}.'
      f'{nearest(undefined[0], bound)} Set them with --gin.{undefined[0]}=VALUE.'
    )
  if unset := sorted(n for n, value in bound.items() if str(value) == '%gin.REQUIRED'):
    raise ValueError(
      f'Required and not set: {", ".join(unset)}. Set them in a gin file or with '
      f'--gin.{unset[0]}=VALUE.'
    )
  return used


def _check_command_line_acts(
  applied: Sequence[tuple[str, str, gin_config.Configurable | None]], used: set[str]
) -> None:
  """Checks that something uses what the command line binds.

  Raises:
    ValueError: no value refers to the macro, or to the function or class.
  """
  references = {
    r.configurable.selector for r in gin_config.iterate_references(gin_config._CONFIG)
  }
  for text, macro, configurable in applied:
    if macro and macro not in used:
      raise ValueError(f'No gin file uses the macro of {text!r}.{nearest(macro, used)}')
    # What is registered in Python, or belongs to the script, is called from Python.
    if (
      configurable is None
      or not configurable.import_source
      or configurable.import_source[0].module == '__main__'
    ):
      continue
    target = configurable.selector
    if configurable.is_method:
      target = target.rpartition('.')[0]
    if target not in references:
      raise ValueError(
        f'The binding {text!r} has no effect: no other binding refers to @{target}. '
        'Gin gives a binding to the very class it names, not to its subclasses.'
      )


# ---- Files and flags ----


def parse_gin_flags(
  gin_search_paths: Sequence[str],
  gin_files: Sequence[str],
  gin_bindings: Sequence[str],
  skip_unknown: bool | Sequence[str] = False,
  finalize_config: bool = True,
) -> None:
  """Parses files, then the bindings of the command line, which win.

  A file is looked for in the working folder, in importable packages
  ('t5x/configs/runs/pretrain.gin') and in the search paths. Bindings may name whatever
  the files import, `t5x` modules, and whatever gin has registered.

  Args:
    gin_search_paths: folders in which files, and their includes, are looked for.
    gin_files: in order; later ones win.
    gin_bindings: 'scope/name.parameter = value' or 'MACRO = value'.
    skip_unknown: as for `gin.parse_config`.
    finalize_config: whether to lock the configuration, after checks that nothing
      required is missing and that the command line's bindings have an effect.

  Raises:
    ValueError: a name is wrong, a required macro is not set, or a binding is without
      effect.
    SyntaxError: a file is not gin; has its name and the line.
    OSError: a file is not found.
  """
  for folder in gin_search_paths:
    gin.add_config_file_search_path(folder)
  for path in gin_files or ():
    try:
      gin.parse_config_file(path, skip_unknown)
    except tokenize.TokenError as error:
      raise ValueError(f'{path} cannot be read: {error}.') from None
  applied = _apply_command_line(gin_bindings or (), skip_unknown)
  if finalize_config:
    _check_command_line_acts(applied, _check_macros())
    gin.finalize()
  logging.info(
    'Gin configuration from %s and %d bindings of the command line.',
    ', '.join(gin_files or ()) or 'no file',
    len(gin_bindings or ()),
  )
  logging.debug('%s', gin.config_str())


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
  app.run(main, lambda args: app.parse_flags_with_usage(rewrite_gin_args(args)))


@gin.register
def summarize_gin_config(
  model_dir: str | os.PathLike, summary_writer: Any, step: int
) -> None:
  """Writes the configuration to MODEL_DIR/config.gin and to TensorBoard.

  Args:
    model_dir: the folder of the run, made if it does not exist.
    summary_writer: a `clu.metric_writers.MetricWriter` that gets the text as 'config';
      None for none.
    step: the step at which TensorBoard shows it.
  """
  import jax
  from etils import epath

  if jax.process_index() != 0:
    return
  text = gin.config_str()
  folder = epath.Path(model_dir)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.gin').write_text(text)
  if summary_writer is not None:
    summary_writer.write_texts(step, {'config': gin.markdown(text)})
    summary_writer.flush()
