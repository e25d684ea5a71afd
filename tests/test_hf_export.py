"""Checkpoints exported as model folders, whole or not at all, with their cards."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import yaml
from flax.traverse_util import flatten_dict

from bart_t5x import checkpoints, report
from bart_t5x.hf import convert, mapping, weights

FILES = {
    'README.md', 'config.json', 'flax_model.msgpack', 'generation_config.json',
    'model.safetensors', 'special_tokens_map.json', 'tokenizer.json',
    'tokenizer_config.json',
}  # fmt: skip


@pytest.fixture
def run(make_run, tmp_path):
  return make_run(tmp_path)


def export_command(run, output_dir, *more):
  return convert.main([
      'export', f'--checkpoint={run.checkpoint}', f'--corpus_dir={run.corpus}',
      f'--output_dir={output_dir}', *more,
  ])  # fmt: skip


def names(folder):
  return {path.name for path in folder.iterdir()}


def test_the_whole_folder(run, tmp_path, capsys):
  output = tmp_path / 'out' / 'norbart'
  assert export_command(run, output) == 0
  assert names(output) == FILES and names(output.parent) == {'norbart'}
  assert f'to {output}' in capsys.readouterr().out
  config = json.loads((output / 'config.json').read_text())
  assert (config['vocab_size'], config['d_model']) == (301, 24)
  assert (config['encoder_layers'], config['decoder_layers']) == (2, 3)
  with safetensors.safe_open(output / weights.SAFETENSORS, 'np') as file:
    assert not set(file.keys()) & set(mapping.TORCH_ALIASES)


@pytest.mark.parametrize('kind', [weights.SAFETENSORS, weights.MSGPACK])
def test_weights_are_bit_exact(run, tmp_path, kind):
  output = tmp_path / 'out'
  assert export_command(run, output) == 0
  for other in {weights.SAFETENSORS, weights.MSGPACK} - {kind}:
    (output / other).unlink()
  tensors, _ = weights.read_weights(output)
  framework = 'flax' if kind == weights.MSGPACK else 'torch'
  back = flatten_dict(mapping.from_hf(tensors, run.config, framework), sep='/')
  for path, array in flatten_dict(run.params, sep='/').items():
    if path in ('token_embedder/embedding', 'final_logits_bias'):
      array[301:] = 0
    np.testing.assert_array_equal(back[path], array)


def assert_exported(run, output):
  tensors, _ = weights.read_weights(output)
  expected = mapping.to_hf(run.params, run.config, 'torch')
  assert set(tensors) == set(expected)
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(tensor, expected[name])


def test_scanned_layers(make_run, tmp_path):
  run = make_run(tmp_path / 'a', scan_layers=True, num_decoder_layers=11)
  assert export_command(run, tmp_path / 'out') == 0
  assert_exported(run, tmp_path / 'out')


def test_bfloat16(run, tmp_path):
  assert export_command(run, tmp_path / 'out', '--dtype=bfloat16') == 0
  config = json.loads((tmp_path / 'out/config.json').read_text())
  assert config['torch_dtype'] == 'bfloat16'
  tensors, _ = weights.read_weights(tmp_path / 'out')
  exact = mapping.to_hf(run.params, run.config, 'torch')
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(tensor, exact[name].astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_checkpoint_in_bfloat16(run, tmp_path, dtype):
  """As `utils.SaveCheckpointConfig.dtype = 'bfloat16'` writes it."""
  kept = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), run.params)
  checkpoints.write_params(tmp_path / 'b/checkpoint_0', kept)
  run.checkpoint = run.model_dir / 'checkpoint_5'
  (tmp_path / 'b/checkpoint_0').rename(run.checkpoint)
  assert export_command(run, tmp_path / 'out', f'--dtype={dtype}') == 0
  tensors, _ = weights.read_weights(tmp_path / 'out')
  for name, array in mapping.to_hf(kept, run.config, 'torch').items():
    assert tensors[name].dtype == np.dtype(getattr(ml_dtypes, dtype, dtype))
    np.testing.assert_array_equal(tensors[name], array)
  (tmp_path / 'out' / weights.SAFETENSORS).unlink()
  for name, tensor in weights.read_weights(tmp_path / 'out')[0].items():
    assert tensor.dtype == np.float32, name


@pytest.mark.slow
def test_checkpoint_of_two_processes(run, tmp_path):
  """Each process wrote its part of every parameter; the export has the whole."""
  given = tmp_path / 'params.npz'
  np.savez(given, **flatten_dict(run.params, sep='/'))
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    port = probe.getsockname()[1]
  script = pathlib.Path(__file__).with_name('two_process_save.py')
  flags = '--xla_force_host_platform_device_count=2'
  processes = [
    subprocess.Popen(
      [sys.executable, script, str(port), str(i), given, run.model_dir],
      env={**os.environ, 'XLA_FLAGS': flags},
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  for process in processes:
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
  run.checkpoint = run.model_dir / 'checkpoint_3'
  assert list(run.checkpoint.glob('state/ocdbt.process_*'))
  assert export_command(run, tmp_path / 'out') == 0
  assert_exported(run, tmp_path / 'out')


def card_of(folder):
  """The front matter and the text."""
  _, front, text = (folder / 'README.md').read_text().split('---\n', 2)
  return yaml.safe_load(front), text


def test_card_of_a_pretrained_model(run, tmp_path):
  output = tmp_path / 'norbart'
  assert export_command(run, output) == 0
  front, text = card_of(output)
  assert front == {
    'language': 'no',
    'license': 'cc-by-4.0',
    'library_name': 'transformers',
    'pipeline_tag': 'fill-mask',
    'tags': ['bart', 't5x', 'norwegian'],
  }
  tensors = mapping.to_hf(run.params, run.config, 'flax').values()
  for line in (
    '# norbart',
    f'| parameters | {sum(leaf.size for leaf in tensors) - 301:,} |',
    '| layers | 2 + 3 |',
    '| licence | CC BY 4.0: "Bjørner", Ås |',
    '| train, documents | 1,234 |',
    '| train, tokens | 56,789 |',
    '| validation, documents | 7 |',
    '| BATCH_SIZE | 8 |',
    '| noise: infill_ratio | 0.3 |',
    "BartForConditionalGeneration.from_pretrained('norbart')",
    "FlaxBartForConditionalGeneration.from_pretrained('norbart')",
    'python -m bart_t5x.hf.convert export --checkpoint=',
  ):
    assert line in text


def test_card_of_a_finetuned_model(run, tmp_path, monkeypatch):
  start = tmp_path / 'imported/checkpoint_0'
  start.mkdir(parents=True)
  (start.parent / 'config.gin').write_text(
    '# facebook/bart-base, imported from the Hugging Face Hub.\n'
  )
  config = run.model_dir / 'config.gin'
  text = config.read_text().replace('noise.Recipe.infill_ratio = 0.3', '')
  config.write_text(text + f"INITIAL_CHECKPOINT_PATH = '{start}'\n")
  (run.model_dir / 'inference_eval/bjorner/eval').mkdir(parents=True)
  monkeypatch.setattr(report, 'read_curves', lambda folder: {'macro_f1': [(0, 71.5)]})
  assert export_command(run, tmp_path / 'out') == 0
  front, text = card_of(tmp_path / 'out')
  assert 'license' not in front and 'pipeline_tag' not in front
  assert front['base_model'] == 'facebook/bart-base'
  (result,) = front['model-index'][0]['results']
  assert result['dataset']['name'] == 'bjorner'
  assert result['metrics'] == [
    {'type': 'macro_f1', 'value': 71.5, 'name': 'generated, macro_f1'}
  ]
  assert f'fine-tuned on `bjorner` from `{start}` to step 0' in text
  assert 'pre-trained' not in text
  assert '| generated, macro_f1 | 71.5 |' in text


def test_card_of_an_imported_model(run, tmp_path):
  config = run.model_dir / 'config.gin'
  lines = [
    line for line in config.read_text().splitlines() if line.startswith('network')
  ]
  config.write_text('\n'.join(['# /tmp/a/b, imported from Hugging Face.', *lines]))
  assert export_command(run, tmp_path / 'out') == 0
  front, text = card_of(tmp_path / 'out')
  assert 'imported by bart-t5x' in text
  assert not {'license', 'language', 'base_model', 'pipeline_tag'} & front.keys()


@pytest.mark.parametrize(
  ('stated', 'license_id', 'name'),
  [
    ('CC0 1.0', 'cc0-1.0', None),
    ('CC0-1.0', 'cc0-1.0', None),
    ('ODC-By 1.0', 'odc-by', None),
    ('Apache 2.0', 'apache-2.0', None),
    ('NLOD 2.0, CC BY 4.0: "to" av dem', 'other', 'nlod-2.0-cc-by-4.0'),
  ],
)
def test_licences_and_datasets_have_ids_of_the_hub(
  run, tmp_path, stated, license_id, name
):
  corpus = json.loads((run.corpus / 'corpus.json').read_text())
  corpus |= {'license': stated, 'source': 'hf', 'settings': {'dataset': 'org/texts'}}
  (run.corpus / 'corpus.json').write_text(json.dumps(corpus))
  assert export_command(run, tmp_path / 'out') == 0
  front, _ = card_of(tmp_path / 'out')
  assert (front['license'], front.get('license_name')) == (license_id, name)
  assert front['datasets'] == ['org/texts']


def test_card_has_the_metrics_of_the_checkpoints_step(run, tmp_path, monkeypatch):
  (run.model_dir / 'training_eval/bjorner').mkdir(parents=True)
  curves = {
    'accuracy': [(0, 0.125), (50, 0.5)],
    'loss': [(100, 1.0)],
    'timing/seconds': [(0, 3.0)],
  }
  monkeypatch.setattr(report, 'read_curves', lambda folder: curves)
  assert export_command(run, tmp_path / 'out') == 0
  front, text = card_of(tmp_path / 'out')
  assert '| accuracy | 0.125 |' in text and '| loss' not in text
  (result,) = front['model-index'][0]['results']
  assert result['metrics'] == [{'type': 'accuracy', 'value': 0.125, 'name': 'accuracy'}]


def test_folder_is_replaced_only_with_overwrite(run, tmp_path, capsys):
  output = tmp_path / 'out'
  output.mkdir()
  assert export_command(run, output, '--overwrite') == 0
  (output / 'mine').write_text('')
  assert export_command(run, output) == 1
  assert '--overwrite' in capsys.readouterr().err
  assert names(output) == FILES | {'mine'}
  assert export_command(run, output, '--overwrite') == 0
  assert names(output) == FILES


def test_runs_and_folders_of_models_are_never_replaced(run, tmp_path, capsys):
  models = tmp_path / 'models'
  assert export_command(run, models / 'one') == 0
  (run.model_dir / 'train').mkdir()
  for folder in (run.model_dir, models, tmp_path):
    before = names(folder)
    assert export_command(run, folder, '--overwrite') == 1
    assert 'other files' in capsys.readouterr().err
    assert names(folder) == before


def test_failed_export_keeps_the_earlier_folder(run, tmp_path, monkeypatch, capsys):
  parent = tmp_path / 'parent'
  (parent / 'out').mkdir(parents=True)
  (parent / 'out/config.json').write_text('mine')

  def full(*args):
    raise OSError('No space left on device')

  monkeypatch.setattr(weights, 'write_msgpack', full)
  assert export_command(run, parent / 'out', '--overwrite') == 1
  assert capsys.readouterr().err == 'error: No space left on device\n'
  assert names(parent) == {'out'} and names(parent / 'out') == {'config.json'}


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
  'binds no network.BartConfig.vocab_size': other_model,
  'num_experts': newer_config,
  'cannot be read': damaged,
  'no tokenizer in': lambda run: (run.corpus / 'tokenizer.json').unlink(),
  'It describes the model': lambda run: (run.model_dir / 'config.gin').unlink(),
  'There are: checkpoint_0': lambda run: setattr(
    run, 'checkpoint', run.model_dir / 'checkpoint_7'
  ),
  'is not a checkpoint': lambda run: setattr(run, 'checkpoint', run.model_dir),
}


@pytest.mark.parametrize('message', FAULTS)
def test_bad_input_is_one_error_and_writes_nothing(run, tmp_path, capsys, message):
  FAULTS[message](run)
  assert export_command(run, tmp_path / 'parent/out') == 1
  error = capsys.readouterr().err
  assert message in error and error.startswith('error: ')
  parent = tmp_path / 'parent'
  assert not parent.exists() or not names(parent)


def test_sentencepiece_tokenizer_becomes_a_tokenizer_json(make_run, tmp_path):
  run = make_run(tmp_path, tokenizer='unigram')
  assert export_command(run, tmp_path / 'out') == 0
  written = json.loads((tmp_path / 'out/tokenizer.json').read_text())
  assert written['model']['type'] == 'Unigram'
  assert len(written['model']['vocab']) == run.config.vocab_size
