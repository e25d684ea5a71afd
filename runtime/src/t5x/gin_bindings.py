"""Bindings from the command line, and what gin lets pass in silence.

Gin resolves a name such as `models.EncoderDecoderModel.z_loss` by the imports of the
file in which it stands. A binding on the command line stands in no file; here it gets
the imports of the files that were parsed before it. The whole configuration is then
checked for what gin ignores without a word.

Gin offers no public way to either, so this module, and no other, reads gin's own
tables (those of gin-config 0.5).
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator, Sequence

import gin
from absl import logging
from gin import config as gin_config
from gin import config_parser

_COMMAND_LINE = config_parser.Location(None, 0, None, '')
_DYNAMIC_REGISTRATION = config_parser.ImportStatement(
  '__gin__.dynamic_registration', is_from=True, alias=None, location=_COMMAND_LINE
)
_Import = config_parser.ImportStatement
# Where scripts are run from; their own functions are called without any reference.
_MAIN = '__main__'
# Where Python's own message shows an object by its place in memory.
_ADDRESS = re.compile(r': <ast\.\w+ object at 0x\w+>')
# What run files bind in the script that they are for.
_ENTRIES = ('train', 'evaluate', 'infer', 'precompile')
# Importing one of these would load the running script a second time.
_SCRIPTS = ('train', 'eval', 'infer', 'precompile', 'main')


@dataclasses.dataclass(frozen=True)
class Binding:
  """A binding of the command line, as it was understood.

  Attributes:
    text: what the user wrote.
    scope: the scopes before the name, joined by '/'; of a macro its name.
    selector: the configurable's full name in gin's registry.
    parameter: the parameter that is bound ('value' of a macro).
  """

  text: str
  scope: str
  selector: str
  parameter: str


def did_you_mean(wrong: str, candidates: Iterable[str]) -> str:
  """Returns " Did you mean '...'?" if a candidate is near, else ''."""
  near = difflib.get_close_matches(wrong, sorted(set(candidates)), n=1)
  return f' Did you mean {near[0]!r}?' if near else ''


def _exists(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except (ValueError, ModuleNotFoundError):  # No spec (`__main__`), or no parent.
    return False


# ---- Errors that say what was meant ----


def _members_of(owner: str) -> list[str]:
  """Names in the module or class whose repr gin puts into its message."""
  match = re.match(r"<(module|class) '([\w.]+)'", owner)
  if not match:
    return []
  if match[1] == 'module':
    return dir(sys.modules.get(match[2]))
  module, _, name = match[2].rpartition('.')
  return dir(getattr(sys.modules.get(module), name, None))


def _parameters_of(selector: str) -> list[str]:
  matching = gin_config._REGISTRY.matching_selectors(selector)
  if len(matching) != 1:
    return []
  return list(inspect.signature(gin_config._REGISTRY[matching[0]].wrapped).parameters)


def _imports_by_name() -> dict[str, list[_Import]]:
  """The imports of all gin files so far, by the name that each binds."""
  by_name = {}
  for statement in sorted(gin_config._IMPORTS, key=lambda s: (s.module, s.alias or '')):
    if not statement.module.startswith('__gin__'):
      by_name.setdefault(statement.bound_name(), []).append(statement)
  return by_name


def _known_selectors() -> Iterator[str]:
  """Every registered name, from its last component up: 'f', 'm.f', 'p.m.f'."""
  for selector, _ in gin_config._REGISTRY.items():
    parts = selector.split('.')
    for start in range(len(parts)):
      yield '.'.join(parts[start:])


def _missing_member(owner: str, name: str) -> str:
  """What to add where a module or class, given by its repr, lacks a name."""
  if owner == repr(sys.modules[_MAIN]) and name in _ENTRIES:
    return f'\nThe running script has no {name!r}: the gin file is for another script.'
  return did_you_mean(name, _members_of(owner)) or ' No name in it is near.'


def _hint(message: str) -> str:
  """What to add to one of gin's messages about a wrong name."""
  if match := re.search(
    r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", message
  ):
    known = _parameters_of(match[1])
    listing = f' It has: {", ".join(known)}.' if known else ''
    return did_you_mean(match[2], known) + listing
  if match := re.search(r'selector \S+; (<.+>) has no attribute (\w+)', message):
    return _missing_member(*match.groups())
  if match := re.search(r"'(\w+)' was not provided by an import", message):
    if _exists(f't5x.{match[1]}'):
      return f' Add `from t5x import {match[1]}` to the gin file.'
    by_name = _imports_by_name()
    if found := by_name.get(match[1]):
      return f" Add `{found[0].format()}` here: an included file's do not count."
    return did_you_mean(match[1], by_name)
  if match := re.search(r"No configurable matching (reference )?'@?([\w.]+)", message):
    return did_you_mean(match[2], _known_selectors())
  if match := re.search(
    r"Method (\w+) in class <class '.*?'> \(([\w.]+)\) was registered with a custom "
    r'module \(([\w.]+)\)',
    message,
  ):
    method, used, bound = match.groups()
    return (
      f'\nA binding names {bound}.{method}, and the class in use is {used}: gin '
      'gives a binding to the class it names, not to its subclasses. Bind '
      f'{used}.{method} instead.'
    )
  return ''


@contextlib.contextmanager
def explained(source: str = '', path: str = '') -> Iterator[None]:
  """Adds the nearest match to gin's errors about wrong names, the place to others.

  Args:
    source: what the message is about, where gin itself does not name file and line.
    path: the gin file that is read, if it is one.

  Raises:
    ValueError: for a wrong name, and for a file that is no gin, whatever gin raised.
  """
  try:
    yield
  except (SyntaxError, tokenize.TokenError) as error:
    if not path or str(getattr(error, 'filename', '')).endswith('.py'):
      raise  # The caller names a binding; a module's line is in the traceback.
    raise ValueError(
      f'{path} cannot be read: {_ADDRESS.sub("", str(error))}. A line is NAME = VALUE, '
      'or includes one file, or imports one module.'
    ) from None
  except (ValueError, NameError, AttributeError) as error:
    hint = _hint(str(error))
    if not hint and not source:
      raise
    # With a hint the message says it all; without, the cause may be user code.
    raise ValueError(f'{source}{error}{hint}') from (None if hint else error)


# ---- Names on the command line ----


class _Names(config_parser.ParserDelegate):
  """Collects the names that a binding's value refers to, resolving nothing."""

  def __init__(self):
    self.references = []

  def configurable_reference(self, scoped_configurable_name, evaluate):
    self.references.append(scoped_configurable_name.rsplit('/', 1)[-1])

  def macro(self, macro_name):
    pass


def _names_in(text: str) -> tuple[list[config_parser.BindingStatement], set[str]]:
  """Parses a binding; returns its statements and every configurable they name."""
  delegate = _Names()
  statements = list(config_parser.ConfigParser(text, delegate))
  named = {
    s.selector
    for s in statements
    if isinstance(s, config_parser.BindingStatement) and s.arg_name
  }
  return statements, named | set(delegate.references)


def _imports_for(names: Iterable[str]) -> list[_Import]:
  """The imports that make names resolvable; a name in gin's registry needs none.

  In this order:
  1. the imports of the gin files that bind the name's first component;
  2. none, if gin's registry knows the whole name;
  3. the runtime's module of that name (`models` is `t5x.models`), or the package.

  Raises:
    ValueError: files bind the component to different modules, and the rest of the name
      does not tell which one is meant.
  """
  by_name, chosen = _imports_by_name(), {}
  for name in names:
    root, _, rest = name.partition('.')
    if root in by_name:
      chosen[root] = _unambiguous(name, rest, by_name[root])
    elif gin_config._REGISTRY.matching_selectors(name):
      continue
    elif root not in _SCRIPTS and _exists(f't5x.{root}'):
      chosen[root] = [_Import(f't5x.{root}', True, None, _COMMAND_LINE)]
    elif _exists(root):
      chosen[root] = [_Import(root, False, None, _COMMAND_LINE)]
  return [statement for group in chosen.values() for statement in group]


def _unambiguous(name: str, rest: str, statements: list[_Import]) -> list[_Import]:
  """Of imports that bind one name, those that can provide `rest` in it."""
  if all(not s.is_from and not s.alias for s in statements):
    return statements  # `import a.b` and `import a.c` both bind a, to the same module.
  modules = {s.module: s for s in statements}
  fitting = [
    s for s in modules.values() if hasattr(sys.modules[s.module], rest.split('.')[0])
  ] or list(modules.values())
  if len(fitting) > 1:
    raise ValueError(
      f'{name!r} is ambiguous on the command line: gin files import '
      f'{name.partition(".")[0]!r} from {", ".join(s.module for s in fitting)}. Set '
      'it in a gin file instead.'
    )
  return fitting


@contextlib.contextmanager
def _scope_of_command_line(names: Iterable[str]) -> Iterator[gin_config.ParseContext]:
  """Opens a parse scope of gin's in which the given names resolve."""
  imports = _imports_for(names)
  roots = {statement.bound_name() for statement in imports} | {'gin'}
  with gin_config._parse_scope() as context:
    if imports:
      for statement in [_DYNAMIC_REGISTRATION, *imports]:
        context.process_import(statement)
    by_import = context.get_configurable

    def by_import_or_registry(selector):
      if imports and selector.partition('.')[0] in roots:
        return by_import(selector)
      return gin_config._REGISTRY.get_match(selector)

    context.get_configurable = by_import_or_registry
    yield context
  gin_config._IMPORTS.update(context.imports)


def _is_known(context: gin_config.ParseContext, selector: str) -> bool:
  try:
    return context.get_configurable(selector) is not None
  except (NameError, AttributeError):
    return False


def _apply(text: str, skip_unknown: bool | Sequence[str]) -> list[Binding]:
  applied = []
  skippable = [] if isinstance(skip_unknown, bool) else skip_unknown
  with _scope_of_command_line(_names_in(text)[1]) as context:
    delegate = gin_config.ParserDelegate(skip_unknown)
    for statement in config_parser.ConfigParser(text, delegate):
      scope, selector, parameter, value, _ = statement
      key = (scope, selector, parameter)
      if not parameter:
        key = (f'{scope}/{selector}' if scope else selector, 'gin.macro', 'value')
      elif skip_unknown is True or selector in skippable:
        if not _is_known(context, selector):
          continue
      key = gin_config.ParsedBindingKey.parse(key)
      gin.bind_parameter(key, value)
      applied.append(Binding(text, key.scope, key.complete_selector, key.arg_name))
  return applied


def apply_command_line(
  bindings: Sequence[str], skip_unknown: bool | Sequence[str] = False
) -> list[Binding]:
  """Applies bindings of the form 'scope/name.parameter = value' or 'MACRO = value'.

  Args:
    bindings: in order; later ones win. If one is an import, an include or a block, all
      are parsed as the lines of one gin file, which brings its own imports.
    skip_unknown: as for `gin.parse_config`.

  Returns:
    The bindings as understood (none for those that were parsed as a file's lines).

  Raises:
    ValueError: a name is wrong or ambiguous, or a value is not one of gin's.
  """
  applied = []
  try:
    text = ''
    statements = []
    for text in bindings:
      statements.extend(_names_in(text)[0])
    if not all(isinstance(s, config_parser.BindingStatement) for s in statements):
      text = '\n'.join(bindings)
      with explained():
        gin.parse_config(text, skip_unknown)
      return []
    for text in bindings:
      with explained(f'The binding {text!r}: '):
        applied.extend(_apply(text, skip_unknown))
  except (SyntaxError, tokenize.TokenError) as error:
    reason = _ADDRESS.sub('', str(error))
    raise ValueError(
      f'The binding {text!r} cannot be read. Write NAME = VALUE with a Python '
      'literal, @reference or %MACRO; a text keeps quotes of its own inside the '
      f"shell's: --gin.NAME=\"'text'\". ({reason})"
    ) from None
  return applied


# ---- What gin would ignore ----


def _references(kind: object = None) -> Iterator[gin_config.ConfigurableReference]:
  """The references in all bound values, to one function or to all."""
  for reference in gin_config.iterate_references(gin_config._CONFIG):
    if kind is None or reference.configurable.wrapped is kind:
      yield reference


def _used_macros() -> set[str]:
  return {'/'.join(r.scopes) for r in _references(gin_config.macro)}


def _bound_macros() -> dict[str, object]:
  return {
    scope: values['value']
    for (scope, selector), values in gin_config._CONFIG.items()
    if gin_config._REGISTRY[selector].wrapped is gin_config.macro
  }


def check_macros(bindings: Sequence[Binding]) -> None:
  """Checks that macros have a value, and that those of the command line are used.

  Raises:
    ValueError: a macro is used and not defined, required and not set, or set on the
      command line and not used. All of one kind are named at once.
  """
  bound, used = _bound_macros(), _used_macros()
  if undefined := sorted(used - set(bound)):
    name = undefined[0]
    raise ValueError(
      f'Macros are used and never defined: {", ".join(undefined)}.'
      f'{did_you_mean(name, bound)} Set them with --gin.{name}=VALUE.'
    )
  unused = [
    b
    for b in bindings
    if gin_config._REGISTRY[b.selector].wrapped is gin_config.macro
    and b.scope not in used
  ]
  if unused:
    raise ValueError(
      'No gin file uses what the command line sets: '
      + '; '.join(f'{b.text!r}.{did_you_mean(b.scope, used)}' for b in unused)
    )
  if unset := sorted(name for name, v in bound.items() if _is_required(v)):
    raise ValueError(
      f'Required and not set: {", ".join(unset)}. Set them in a gin file or with '
      f'--gin.{unset[0]}=VALUE.'
    )


def _is_required(value: object) -> bool:
  return (
    isinstance(value, gin_config.ConfigurableReference)
    and value.configurable.wrapped is gin_config._retrieve_constant
    and value.scoped_configurable_fn() is gin.REQUIRED
  )


def _classes_in_use() -> list[gin_config.Configurable]:
  found = {r.configurable.selector: r.configurable for r in _references()}
  return [c for c in found.values() if inspect.isclass(c.wrapped)]


def _short(selector: str) -> str:
  """The shortest name gin knows a configurable by; of a method with its class."""
  registry = gin_config._REGISTRY
  if registry[selector].is_method:
    owner, _, method = selector.rpartition('.')
    return f'{registry.minimal_selector(owner)}.{method}'
  return registry.minimal_selector(selector)


def _binds(selector: str, parameters: Iterable[str]) -> bool:
  """Whether each parameter of a configurable is bound, in any scope."""
  bound = {
    parameter
    for (_, other), values in gin_config._CONFIG.items()
    if other == selector
    for parameter in values
  }
  return bound.issuperset(parameters)


def check_parents() -> None:
  """Looks for bindings on a parent class where only a subclass is used.

  Gin gives a binding to the class that it names, and to no subclass of it. For a
  method's parameter nothing else explains the binding; for a constructor's, a file may
  configure a model that another file replaces, so that is only a warning.

  Raises:
    ValueError: a method's binding has no effect.
  """
  in_use = _classes_in_use()
  for (_, selector), values in gin_config._CONFIG.items():
    configurable = gin_config._REGISTRY[selector]
    method = selector.rpartition('.')[2] if configurable.is_method else None
    holder = selector.rpartition('.')[0] if method else selector
    owner = gin_config._REGISTRY.get(holder)
    if owner is None or not inspect.isclass(owner.wrapped) or not owner.import_source:
      continue
    if owner.selector in {c.selector for c in in_use}:
      continue
    for user in in_use:
      if not issubclass(user.wrapped, owner.wrapped):
        continue
      instead = f'{user.selector}.{method}' if method else user.selector
      if _binds(instead, values):
        continue
      right = _short(user.selector) + (f'.{method}' if method else '')
      message = (
        f'{_short(selector)} is bound ({", ".join(values)}) to no effect: the class '
        f'in use is {_short(user.selector)}, and gin gives a binding to the class it '
        f'names, not to its subclasses. Bind {right} instead.'
      )
      if method:
        raise ValueError(message)
      logging.warning('%s', message)


def _subclass_in_use(selector: str) -> str:
  """Says which subclass of a class is used, if one is."""
  parent = gin_config._REGISTRY[selector].wrapped
  for user in _classes_in_use():
    if inspect.isclass(parent) and issubclass(user.wrapped, parent):
      return f' The class in use is {_short(user.selector)}: bind that.'
  return ''


def check_reached(bindings: Sequence[Binding]) -> None:
  """Checks that what the command line binds is referred to by some binding.

  Only where that can be told: a function that its own module makes configurable is
  called from Python, and so are those of the script that runs.

  Raises:
    ValueError: nothing refers to the configurable, or nothing in that scope.
  """
  for binding in bindings:
    configurable = gin_config._REGISTRY[binding.selector]
    if configurable.wrapped is gin_config.macro or not configurable.import_source:
      continue
    if _MAIN in (configurable.wrapped.__module__, configurable.import_source[0].module):
      continue
    target = binding.selector
    if configurable.is_method:
      target = target.rpartition('.')[0]
    scopes = [r.scopes for r in _references() if r.configurable.selector == target]
    if not scopes:
      raise ValueError(
        f'The binding {binding.text!r} has no effect: no other binding refers to '
        f'@{_short(target)}.{_subclass_in_use(target)}'
      )
    wanted = binding.scope.split('/') if binding.scope else []
    # A reference with scopes replaces those around it; one without inherits any.
    if all(s and s[: len(wanted)] != wanted for s in scopes):
      raise ValueError(
        f'The binding {binding.text!r} has no effect: @{_short(target)} is used '
        f'in the scopes {", ".join(sorted("/".join(s) for s in scopes))}.'
        f'{did_you_mean(binding.scope, map("/".join, scopes))}'
      )
