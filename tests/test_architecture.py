"""Which way imports run."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parent.parent


def imported(*folders):
  """(file, dotted name) of all imports, late and typing-only ones included."""
  for folder in folders:
    for path in sorted((ROOT / folder).rglob('*.py')):
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
          yield from ((path, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
          yield from ((path, f'{node.module}.{alias.name}') for alias in node.names)


def test_the_runtime_does_not_import_the_model():
  found = {
    (path, name)
    for path, name in imported('runtime/src')
    if name.split('.')[0] in ('bart_t5x', 'tasks')
  }
  assert not found


def test_nothing_in_the_runtime_imports_the_facade():
  assert not {path for path, name in imported('runtime/src') if name == 't5x.utils'}


def test_gin_is_not_a_package():
  assert not (ROOT / 'gin' / '__init__.py').exists()  # It would hide gin-config.
