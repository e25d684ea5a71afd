"""Checkpoints exported as model folders, with their cards."""

import json
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import yaml
from flax.traverse_util import flatten_dict

from bart_t5x import checkpoints
from bart_t5x.hf import convert, export, mapping, weights

FILES = {
    'README.md', 'config.json', 'flax_model.msgpack', 'generation_config.json',
    'model.safetensors', 'tokenizer.json', 'tokenizer_config.json',
}  # fmt: skip


@pytest.fixture
def run(default_run, tmp_path):
  return default_run.copy(tmp_path / 'a')


def names(folder):
  return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize('kind', [weights.SAFETENSORS, weights.MSGPACK])
def test_weights_are_bit_exact(run, tmp_path, kind):
  output = tmp_path / 'out/norbart'
  assert run.export(output) == 0
  assert names(output) == FILES and names(output.parent) == {'norbart'}
  for other in {weights.SAFETENSORS, weights.MSGPACK} - {kind}:
    (output / other).unlink()
  tensors, _ = weights.read_weights(output)
  framework = 'flax' if kind == weights.MSGPACK else 'torch'
  back = flatten_dict(mapping.from_hf(tensors, run.config, framework), sep='/')
  for path, array in flatten_dict(run.params, sep='/').items():
    if path in ('token_embedder/embedding', 'final_logits_bias'):
      array[301:] = 0
    np.testing.assert_array_equal(back[path], array)


def assert_exported(params, run, output, dtype=np.float32):
  tensors, _ = weights.read_weights(output)
  expected = mapping.to_hf(params, run.config, 'torch')
  assert set(tensors) == set(expected)
  for name, tensor in tensors.items():
    assert tensor.dtype == dtype
    np.testing.assert_array_equal(tensor, expected[name].astype(dtype))


def test_scanned_layers(make_run, tmp_path):
  run = make_run(tmp_path / 'a', scan_layers=True, num_decoder_layers=11)
  assert run.export(tmp_path / 'out') == 0
  assert_exported(run.params, run, tmp_path / 'out')


def test_bfloat16_weights_of_a_float32_checkpoint(run, tmp_path):
  assert run.export(tmp_path / 'out', '--dtype=bfloat16') == 0
  config = json.loads((tmp_path / 'out/config.json').read_text())
  assert config['torch_dtype'] == 'bfloat16'
  assert_exported(run.params, run, tmp_path / 'out', ml_dtypes.bfloat16)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_bfloat16_checkpoint(run, tmp_path, dtype):
  """As `utils.SaveCheckpointConfig.dtype = 'bfloat16'` writes it."""
  kept = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), run.params)
  run.checkpoint = tmp_path / 'b/checkpoint_0'
  checkpoints.write_params(run.checkpoint, kept)
  (tmp_path / 'b/config.gin').write_bytes((run.model_dir / 'config.gin').read_bytes())
  assert run.export(tmp_path / 'out', f'--dtype={dtype}') == 0
  assert_exported(
    kept, run, tmp_path / 'out', np.dtype(getattr(ml_dtypes, dtype, dtype))
  )
  (tmp_path / 'out' / weights.SAFETENSORS).unlink()
  for name, tensor in weights.read_weights(tmp_path / 'out')[0].items():
    assert tensor.dtype == np.float32, name


def write_metrics(run, source):
  # The checkpoint is of step 0; later values are not its metrics.
  reports = [
    {'step': step, 'source': source, 'values': {'accuracy': value}}
    for step, value in ((0, 0.125), (50, 0.5))
  ]
  lines = [json.dumps(report) + '\n' for report in reports]
  (run.model_dir / 'metrics.jsonl').write_text(''.join(lines))


def pretrained(run, tmp_path):
  corpus = json.loads((run.corpus / 'corpus.json').read_text())
  corpus |= {
    'source': 'hf',
    'settings': {'dataset': 'org/texts', 'config': 'nob_Latn'},
  }
  (run.corpus / 'corpus.json').write_text(json.dumps(corpus))
  write_metrics(run, 'training_eval/bjorner')
  metric = {'type': 'accuracy', 'value': 0.125, 'name': 'accuracy'}
  return {
    'language': 'nb',
    'license': 'cc-by-4.0',
    'datasets': ['org/texts'],
    'library_name': 'transformers',
    'pipeline_tag': 'fill-mask',
    'tags': ['bart', 't5x', 'norwegian'],
  }, [metric]


def finetuned(run, tmp_path):
  start = tmp_path / 'imported/checkpoint_0'
  start.mkdir(parents=True)
  (start.parent / 'config.gin').write_text(
    f'# facebook/bart-base, imported from {export.HUB_ORIGIN}.\n'
  )
  config = run.model_dir / 'config.gin'
  text = config.read_text().replace('noise.Recipe.infill_ratio = 0.3', '')
  config.write_text(
    f"{text}INITIAL_CHECKPOINT_PATH = '{start}'\n"
    'model.BartModel.predict_batch_with_aux.num_decodes = 4\n'
  )
  write_metrics(run, 'inference_eval/bjorner/eval')
  front = {
    'base_model': 'facebook/bart-base',
    'language': 'no',
    'library_name': 'transformers',
    'tags': ['bart', 't5x', 'norwegian'],
  }
  name = 'generated, accuracy'
  return front, [{'type': 'accuracy', 'value': 0.125, 'name': name}]


def imported(run, tmp_path):
  config = run.model_dir / 'config.gin'
  lines = [line for line in config.read_text().splitlines() if 'BartConfig' in line]
  config.write_text('\n'.join(['# /tmp/a/b, imported from Hugging Face.', *lines]))
  return {'library_name': 'transformers', 'tags': ['bart', 't5x']}, None


@pytest.mark.parametrize('origin', [pretrained, finetuned, imported])
def test_front_matter_of_cards(run, tmp_path, origin):
  expected, metrics = origin(run, tmp_path)
  assert run.export(tmp_path / 'out') == 0
  _, front, text = (tmp_path / 'out/README.md').read_text().split('---\n', 2)
  front = yaml.safe_load(front)
  if metrics:
    (result,) = front.pop('model-index')[0]['results']
    assert result['dataset']['name'] == 'bjorner' and result['metrics'] == metrics
  assert front == expected
  assert ('beam search with 4 beams' in text) == ('base_model' in expected)
  size = sum(w.size for w in mapping.to_hf(run.params, run.config, 'flax').values())
  assert f'| parameters | {size - 301:,} |' in text


@pytest.mark.parametrize(
  ('stated', 'license_id', 'name'),
  [
    ('CC0-1.0', 'cc0-1.0', None),
    ('ODC-By 1.0', 'odc-by', None),
    ('Apache 2.0', 'apache-2.0', None),
    ('NLOD 2.0, CC BY 4.0: "to" av dem', 'other', 'nlod-2.0-cc-by-4.0'),
  ],
)
def test_licences_have_ids_of_the_hub(stated, license_id, name):
  found = export._license({'license': stated})
  assert (found['license'], found.get('license_name')) == (license_id, name)


def test_existing_model_is_replaced_only_with_overwrite(run, tmp_path, capsys):
  output = tmp_path / 'out'
  assert run.export(output) == 0
  (output / 'mine').write_text('')
  assert run.export(output) == 1
  assert '--overwrite' in capsys.readouterr().err
  assert names(output) == FILES | {'mine'}
  assert run.export(output, '--overwrite') == 0
  assert names(output) == FILES


def test_runs_and_folders_of_models_are_never_replaced(run, tmp_path, capsys):
  models = tmp_path / 'models'
  assert run.export(models / 'one') == 0
  (run.model_dir / 'train').mkdir()
  for folder in (run.model_dir, models):
    before = names(folder)
    assert run.export(folder, '--overwrite') == 1
    assert 'other files' in capsys.readouterr().err
    assert names(folder) == before


def test_failed_export_keeps_the_earlier_folder(run, tmp_path, monkeypatch, capsys):
  parent = tmp_path / 'parent'
  (parent / 'out').mkdir(parents=True)
  (parent / 'out/config.json').write_text('mine')

  def full(*args):
    raise OSError('No space left on device')

  monkeypatch.setattr(weights, 'write_msgpack', full)
  assert run.export(parent / 'out', '--overwrite') == 1
  assert capsys.readouterr().err == 'error: No space left on device\n'
  assert names(parent) == {'out'} and names(parent / 'out') == {'config.json'}


def test_modules_that_a_run_names_are_not_imported(run, tmp_path, monkeypatch, capsys):
  (tmp_path / 'a_module.py').write_text('raise SystemExit(7)')
  monkeypatch.syspath_prepend(tmp_path)
  with open(run.model_dir / 'config.gin', 'a') as file:
    file.write("import a_module\nMIXTURE_OR_TASK_MODULE = 'a_module'\n")
  flags = [f'--checkpoint={run.checkpoint}', f'--output_dir={tmp_path / "out"}']
  assert convert.main(['export', *flags]) == 1
  assert '--corpus_dir' in capsys.readouterr().err
  assert 'a_module' not in sys.modules
  assert convert.main(['export', *flags, f'--corpus_dir={run.corpus}']) == 0


def other_vocabulary(run):
  config = run.model_dir / 'config.gin'
  config.write_text(config.read_text().replace('vocab_size = 301', 'vocab_size = 300'))


def other_model(run):
  (run.model_dir / 'config.gin').write_text("MIXTURE_OR_TASK_NAME = 'x'")


def newer_config(run):
  with open(run.model_dir / 'config.gin', 'a') as file:
    file.write('network.BartConfig.num_experts = 2\n')


def damaged(run):
  for file in run.checkpoint.rglob('*'):
    if file.is_file() and file.stat().st_size > 2000:
      file.write_bytes(file.read_bytes()[:1000])


FAULTS = {
  'has 301 ids, the model 300': other_vocabulary,
  'network.BartConfig.vocab_size': other_model,
  'num_experts': newer_config,
  'cannot be read': damaged,
  'no tokenizer in': lambda run: (run.corpus / 'tokenizer.json').unlink(),
  'config.gin not found': lambda run: (run.model_dir / 'config.gin').unlink(),
  'no checkpoint in': lambda run: setattr(
    run, 'checkpoint', run.model_dir / 'checkpoint_7'
  ),
  'is not a checkpoint': lambda run: setattr(run, 'checkpoint', run.model_dir),
}


@pytest.mark.parametrize('message', FAULTS)
def test_bad_input_is_one_error_and_writes_nothing(run, tmp_path, capsys, message):
  FAULTS[message](run)
  assert run.export(tmp_path / 'parent/out') == 1
  error = capsys.readouterr().err
  assert message in error and error.startswith('error: ')
  parent = tmp_path / 'parent'
  assert not parent.exists() or not names(parent)
