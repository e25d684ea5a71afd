"""Which way imports run, late and typing-only imports included."""

import ast
import graphlib
import pathlib

ROOT = pathlib.Path(__file__).parent.parent


def modules(folder, package):
  """{dotted name: file} of a package."""
  root = ROOT / folder / package
  return {
    '.'.join((package, *path.relative_to(root).with_suffix('').parts)): path
    for path in root.rglob('*.py')
  }


ALL = modules('runtime/src', 't5x') | modules('', 'bart_t5x') | modules('', 'tasks')


def imports(path):
  """The modules of this project that a file imports."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names |= {node.module} | {f'{node.module}.{alias.name}' for alias in node.names}
  return names & ALL.keys()


GRAPH = {name: imports(path) for name, path in ALL.items()}


def package(name):
  return name.split('.')[0]


def test_nothing_is_imported_in_a_circle():
  graphlib.TopologicalSorter(GRAPH).prepare()


def test_packages_import_downwards():
  above = {'t5x': {'bart_t5x', 'tasks'}, 'bart_t5x': {'tasks'}, 'tasks': set()}
  wrong = [
    (name, other)
    for name, others in GRAPH.items()
    for other in others
    if package(other) in above[package(name)]
  ]
  assert not wrong


def test_the_runtime_does_not_import_its_facade():
  users = [name for name, others in GRAPH.items() if 't5x.utils' in others]
  assert not [name for name in users if package(name) == 't5x']


def test_gin_is_not_a_package():
  assert not (ROOT / 'gin' / '__init__.py').exists()  # It would hide gin-config.
