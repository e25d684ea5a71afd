"""The notebook runs from top to bottom."""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_first_steps(tmp_path, monkeypatch):
  nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
  monkeypatch.setenv('XLA_FLAGS', '')
  notebook = nbformat.read(ROOT / 'notebooks' / 'first_steps.ipynb', as_version=4)
  settings = next(cell for cell in notebook.cells if cell.cell_type == 'code')
  for old, new in (
    ("'runs/first_steps'", repr(str(tmp_path))),
    ('steps = 300', 'steps = 5'),
  ):
    assert old in settings.source
    settings.source = settings.source.replace(old, new)
  client = nbclient.NotebookClient(notebook, timeout=600, startup_timeout=300)
  client.execute(cwd=ROOT / 'notebooks')
  assert 'model.safetensors' in str(notebook.cells[-1].outputs)
