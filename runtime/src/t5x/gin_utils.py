"""Gin for T5X's scripts: flags, files, bindings, and the record of a configuration."""

import contextlib
import difflib
import graphlib
import importlib.util
import inspect
import numbers
import os
import sys
import tokenize
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import gin
from absl import app, logging
from gin import config as gin_config
from gin import config_parser

# jax and etils are imported where they are used, so that `--help` needs neither.


def nearest(name: str, known: Iterable[str]) -> str:
  """Returns " Did you mean '...'?" with the known name closest to `name`, or ''."""
  close = difflib.get_close_matches(name, sorted(set(known)), n=1)
  return f' Did you mean {close[0]!r}?' if close else ''


# ---- Command-line bindings ----
#
# Gin resolves `models.EncoderDecoderModel` through the imports of the file it is in. A
# command-line binding is in no file, so it gets the imports of all files. Gin has no
# public API for that, nor for reading what is bound: hence its private names below.

_COMMAND_LINE = config_parser.Location(None, 0, None, '')
_DYNAMIC_REGISTRATION = config_parser.ImportStatement(
  '__gin__.dynamic_registration', is_from=True, alias=None, location=_COMMAND_LINE
)
# Importing one of these would load the running script a second time.
_SCRIPTS = ('train', 'eval', 'infer', 'precompile', 'main')
# A clone of T5X supplies them.
_OF_CLONE = ('t5x.examples', 't5x.contrib')


def _imports_of(root: str) -> list[config_parser.ImportStatement]:
  """Imports of gin files that bind `root`, otherwise that of the module `t5x.root`."""
  found = {s.module: s for s in gin_config._IMPORTS if s.bound_name() == root}
  if not found and root not in _SCRIPTS and importlib.util.find_spec(f't5x.{root}'):
    module = f't5x.{root}'
    return [config_parser.ImportStatement(module, True, None, _COMMAND_LINE)]
  return [found[module] for module in sorted(found)]


@contextlib.contextmanager
def _scope_of(name: str) -> Iterator[gin_config.Configurable | None]:
  """Opens a scope in which `name` resolves through the imports of all gin files.

  Yields None if no file imports its first part: only gin's registry can know it then.
  """
  root, *parts = name.split('.')
  imports = _imports_of(root) if parts else []
  if not imports:
    yield None
    return
  direct = any(s.is_from or s.alias for s in imports)
  if direct:  # Several modules may share a name. Otherwise `import a.b`.
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
  """Resolves references in values through the imports of all gin files."""

  def configurable_reference(self, scoped_selector: str, evaluate: bool) -> Any:
    with _scope_of(scoped_selector.rpartition('/')[2]):
      return super().configurable_reference(scoped_selector, evaluate)


def _bind(
  text: str, skip_unknown: bool | Sequence[str]
) -> Iterator[tuple[str, gin_config.Configurable | None]]:
  """Applies a binding; yields (macro name, None) or ('', configurable)."""
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
  """Applies bindings in order; returns (text, macro name or '', configurable)."""
  if any(text.startswith(('import ', 'from ', 'include ')) for text in bindings):
    gin.parse_config(list(bindings), skip_unknown)  # As in a file.
    return []
  applied = []
  for text in bindings:
    try:
      applied += [(text, *bound) for bound in _bind(text, skip_unknown)]
    except (SyntaxError, tokenize.TokenError) as error:
      raise ValueError(
        f'The binding {text!r} cannot be parsed. Write NAME = VALUE with a Python '
        'literal, @reference or %MACRO; strings need their own quotes inside those of '
        f'the shell: --gin.NAME="\'text\'".'
      ) from error
    except ValueError as error:
      raise ValueError(f'The binding {text!r}: {error}') from error
  return applied


def _check_macros() -> set[str]:
  """Checks that all used macros have a value; returns their names."""
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
      f'Macros are used but never defined: {", ".join(undefined)}.'
      f'{nearest(undefined[0], bound)} Set them with --gin.{undefined[0]}=VALUE.'
    )
  uses = {
    name: ['/'.join(r.scopes) for r in gin_config.iterate_references(value, to=macro)]
    for name, value in bound.items()
  }
  try:
    graphlib.TopologicalSorter(uses).prepare()
  except graphlib.CycleError as error:
    cycle = ' -> '.join(error.args[1])
    raise ValueError(
      f'Macros refer to themselves: {cycle}. Set one of them to a value.'
    ) from None
  if unset := sorted(n for n, value in bound.items() if str(value) == '%gin.REQUIRED'):
    raise ValueError(
      f'Required and not set: {", ".join(unset)}. Set them in a gin file or with '
      f'--gin.{unset[0]}=VALUE.'
    )
  return used


def _fits(value: Any, annotation: Any) -> bool:
  """Whether a literal fits; types other than unions of plain ones take everything."""
  kind = typing.get_origin(annotation) or annotation
  args = typing.get_args(annotation)
  if kind in (types.UnionType, typing.Union):
    return any(_fits(value, choice) for choice in args)
  if kind is Mapping and args and isinstance(value, Mapping):
    return all(_fits(item, args[1]) for item in value.values())
  if kind is int:  # Gin files may have 1e5.
    return isinstance(value, numbers.Real) and value % 1 == 0
  if kind is float:
    return isinstance(value, numbers.Real)
  if kind in (str, bool, type(None), Mapping, Sequence):
    return isinstance(value, kind)
  return True


def _check_types() -> None:
  """Checks literals bound to parameters of t5x and the script by their annotations."""
  config = gin_config._CONFIG
  for (scope, selector), bindings in config.items():
    configurable = gin_config._REGISTRY.get(selector)
    function = configurable and configurable.wrapped
    module = getattr(function, '__module__', None) or ''
    if module.partition('.')[0] not in ('t5x', '__main__'):
      continue
    parameters = inspect.signature(function).parameters
    for name, value in bindings.items():
      label = f'{scope}/{selector}.{name}'.lstrip('/')
      while isinstance(value, gin_config.ConfigurableReference):
        macro = '/'.join(value.scopes)
        bound = config.get((macro, 'gin.macro'))
        if bound is None or value.selector not in ('macro', 'gin.macro'):
          break
        label, value = macro, bound['value']
      literal = isinstance(value, str | numbers.Real | list | tuple | dict | None)
      if not literal or name not in parameters:
        continue
      annotation = parameters[name].annotation
      if value != parameters[name].default and not _fits(value, annotation):
        plain = isinstance(annotation, type)
        wanted = annotation.__name__ if plain else str(annotation)
        raise ValueError(f'{label} must be {wanted}. Got: {value!r}.')


def _check_command_line_acts(
  applied: Sequence[tuple[str, str, gin_config.Configurable | None]], used: set[str]
) -> None:
  """Checks that something uses what the command line binds."""
  references = {
    r.configurable.selector for r in gin_config.iterate_references(gin_config._CONFIG)
  }
  for text, macro, configurable in applied:
    if macro and macro not in used:
      raise ValueError(f'No gin file uses the macro of {text!r}.{nearest(macro, used)}')
    # Python code calls what it registered itself, and the script's own functions.
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
        'Gin applies a binding to the class it names, not to its subclasses.'
      )


# ---- Files and flags ----


def _hint_at_clone(text: str) -> str:
  absent = [name for name in _OF_CLONE if importlib.util.find_spec(name) is None]
  if not any(name in text.replace('/', '.') for name in absent):
    return ''
  own = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  return (
    f' {" and ".join(absent)} are not in bart-t5x-runtime: clone '
    f'https://github.com/google-research/t5x and set PYTHONPATH={own}:<the clone>.'
  )


def parse_gin_flags(
  gin_search_paths: Sequence[str],
  gin_files: Sequence[str],
  gin_bindings: Sequence[str],
  skip_unknown: bool | Sequence[str] = False,
  finalize_config: bool = True,
) -> None:
  """Parses gin files in order, then the command-line bindings, which win.

  Files and their includes are searched for in the working folder, in importable
  packages ('t5x/configs/runs/pretrain.gin') and in the search paths. Bindings
  ('scope/name.parameter = value', 'MACRO = value') may use whatever the files import,
  `t5x` modules, and whatever is registered with gin.

  Args:
    finalize_config: lock the configuration, after checking that required macros are
      set, that every command-line binding has an effect, and that values have the types
      of their parameters.

  Raises:
    ValueError: a name is wrong, a required macro unset, a value has the wrong type, or
      a binding has no effect.
    SyntaxError: a file is not valid gin; has file and line.
    OSError: a file is not found.
  """
  for folder in gin_search_paths:
    gin.add_config_file_search_path(folder)
  for path in gin_files or ():
    try:
      gin.parse_config_file(path, skip_unknown)
    except (OSError, ModuleNotFoundError) as error:
      if not (hint := _hint_at_clone(str(error))):
        raise
      kind = OSError if isinstance(error, OSError) else ImportError
      raise kind(f'{error}{hint}') from error
    except RecursionError:
      raise ValueError(f'{path} or a file that it includes includes itself.') from None
    except (tokenize.TokenError, UnicodeDecodeError) as error:
      raise ValueError(f'{path} or a file that it includes: {error}.') from None
  applied = _apply_command_line(gin_bindings or (), skip_unknown)
  if finalize_config:
    _check_command_line_acts(applied, _check_macros())
    _check_types()
    gin.finalize()
  logging.info(
    'Gin configuration from %s and %d command-line bindings.',
    ', '.join(gin_files or ()) or 'no file',
    len(gin_bindings or ()),
  )
  logging.debug('%s', gin.config_str())


def rewrite_gin_args(args: Sequence[str]) -> list[str]:
  """Rewrites '--gin.NAME=VALUE' as '--gin_bindings=NAME = VALUE'.

  Raises:
    ValueError: an argument has no '='.
  """
  rewritten = []
  for arg in args:
    if arg.startswith('--gin.'):
      name, equals, value = arg.removeprefix('--gin.').partition('=')
      if not equals:
        raise ValueError(f'Write --gin.NAME=VALUE with an equals sign. Got: {arg!r}.')
      arg = f'--gin_bindings={name} = {value}'
    rewritten.append(arg)
  return rewritten


def run_main(
  main: Callable[[Sequence[str]], Any],
  flags_parser: Callable[[Sequence[str]], Sequence[str]],
) -> None:
  """Runs `main` under absl with a custom flags parser."""
  app.run(main, flags_parser=flags_parser)


def run(main: Callable[[Sequence[str]], Any]) -> None:
  """Runs `main` under absl and accepts '--gin.NAME=VALUE' flags."""
  app.run(main, lambda args: app.parse_flags_with_usage(rewrite_gin_args(args)))


@gin.register
def summarize_gin_config(
  model_dir: str | os.PathLike, summary_writer: Any, step: int
) -> None:
  """Writes the configuration to `model_dir`/config.gin and to TensorBoard.

  Args:
    summary_writer: a `clu.metric_writers.MetricWriter` or None.
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
