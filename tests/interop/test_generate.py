"""Greedy and beam search give the ids of `generate` in both libraries.

T5X and Hugging Face penalise length by different formulas, and end a sequence that
reaches the longest length differently: hypotheses here end earlier, and neither side
has a penalty. Two hypotheses of one score could come in either order, so the
models are peaked, and the scores' distance is looked at.
"""

import functools
import json
import re

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from bart_t5x import checkpoints, model, network, tokenization, vocabularies
from bart_t5x.hf import convert
from t5x import decoding

FRAMEWORKS = [
  # FlaxBart's searches take long to compile.
  pytest.param('flax', marks=[pytest.mark.flax_peer, pytest.mark.slow]),
  pytest.param('torch', marks=pytest.mark.torch_peer),
]
LENGTH = 39  # most tokens, the start not counted
ROWS = 16
SHAPE = {'num_encoder_layers': 1, 'num_decoder_layers': 2}


@pytest.fixture(params=FRAMEWORKS)
def framework(request):
  return request.param


@pytest.fixture
def peer(request, framework):
  return request.getfixturevalue(f'{framework}_folder_peer')


def make_peaked(run):
  """Sharpens a random model, and makes an end likelier the longer a text is.

  Random weights as they are say one token for ever, or end at once. Here positions
  have a component along the end token's embedding, which grows with the position.
  The model is written anew, run.checkpoint then names it.
  """
  flat = flatten_dict(run.params, sep='/')
  for path in flat:
    if path.endswith('embedding'):
      flat[path] *= 3
    if 'encoder_decoder_attention/query' in path:
      flat[path] *= 4
    if path.startswith('decoder') and re.search('/(out|wo)/', path):
      flat[path] *= 0.4
  end = np.resize(np.float32([1, -1]), run.config.emb_dim)
  flat['token_embedder/embedding'][tokenization.EOS_ID] = 1.5 * end
  positions = flat['decoder/position_embedder/embedding']
  positions += (np.arange(len(positions), dtype=np.float32)[:, None] - 14) / 4 * end
  checkpoints.write_params(run.model_dir / 'peaked/checkpoint_0', run.params)
  run.checkpoint = run.model_dir / 'checkpoint_1'
  (run.model_dir / 'peaked/checkpoint_0').rename(run.checkpoint)


def rows():
  """Rows of 3 to 18 tokens, padded, in inside ids."""
  random = np.random.default_rng(8)
  inputs = np.zeros((ROWS, 18), np.int64)
  for row in range(ROWS):
    length = 3 + row % 16
    inputs[row, :length] = [1, *random.integers(5, 301, length - 2), 2]
  return inputs


def up_to_end(sequences):
  """Lists of ids, each cut behind its first end token or before the last position.

  At the last position Hugging Face forces an end, and T5X does not.
  """
  ends = [row.index(2) + 1 if 2 in row else LENGTH for row in sequences.tolist()]
  return [
    row[: min(end, LENGTH - 1)]
    for row, end in zip(sequences.tolist(), ends, strict=True)
  ]


def decoded(run, decode_fn, forced_first_id=None, **options):
  """Sequences and scores of all decodes by BartModel, the best last."""
  vocabulary = vocabularies.load_vocabulary(str(run.corpus))
  bart = model.BartModel(
    network.Transformer(run.config),
    vocabulary,
    vocabulary,
    optimizer_def=None,
    decode_fn=decode_fn,
    forced_first_id=forced_first_id,
  )
  inputs = rows()
  batch = {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': np.zeros((ROWS, LENGTH), np.int32),
  }
  predict = jax.jit(
    functools.partial(bart.predict_batch_with_aux, return_all_decodes=True, **options)
  )
  sequences, aux = predict(run.params, batch, rng=jax.random.key(0))
  return np.asarray(sequences), np.asarray(aux['scores'])


def generated(run, forced_first_id=None):
  """Ids by greedy and by beam search, and the smallest distance of two beams."""
  greedy, _ = decoded(
    run,
    functools.partial(decoding.temperature_sample, temperature=0.0),
    forced_first_id,
    num_decodes=1,
  )
  beams, scores = decoded(
    run,
    functools.partial(decoding.beam_search, alpha=0.0),
    forced_first_id,
    num_decodes=4,
  )
  distance = (scores[:, -1] - scores[:, -2]).min()
  return up_to_end(greedy[:, -1]), up_to_end(beams[:, -1]), distance


def by_peer(peer, framework, folder):
  inputs = rows()
  answer = peer(
    {
      'folder': np.array(str(folder)),
      'framework': np.array(framework),
      'input_ids': tokenization.to_hf_ids(inputs),
      'attention_mask': (inputs != 0).astype(np.int64),
      'texts': np.array('[]'),
      'max_length': np.array(LENGTH + 1),
    }
  )
  # Theirs begin with the start, </s>.
  return [
    up_to_end(tokenization.from_hf_ids(answer[kind][:, 1:]))
    for kind in ('greedy', 'beams')
  ]


def exported(run, folder):
  assert convert.main([
      'export', f'--checkpoint={run.checkpoint}', f'--corpus_dir={run.corpus}',
      f'--output_dir={folder}',
  ]) == 0  # fmt: skip


def test_same_ids_as_generate(peer, framework, make_run, tmp_path):
  run = make_run(tmp_path / 'a', seed=10, **SHAPE)
  make_peaked(run)
  exported(run, tmp_path / 'out')
  greedy, beams, distance = generated(run)
  assert by_peer(peer, framework, tmp_path / 'out') == [greedy, beams]
  # It was no trivial comparison.
  assert distance > 1e-4
  assert greedy != beams
  lengths = {len(row) for row in beams}
  assert len(lengths) > 4 and max(lengths) < LENGTH - 1


def test_forced_bos_of_an_imported_model(peer, framework, make_run, tmp_path):
  """Honoured here as there, and not a part of what is exported."""
  run = make_run(tmp_path / 'a', seed=10, **SHAPE)
  make_peaked(run)
  folder = tmp_path / 'out'
  exported(run, folder)
  plain = generated(run)
  for name in ('config.json', 'generation_config.json'):
    content = json.loads((folder / name).read_text())
    assert 'forced_bos_token_id' not in content
    (folder / name).write_text(json.dumps(content | {'forced_bos_token_id': 0}))
  greedy, beams, _ = generated(run, tokenization.BOS_ID)
  assert by_peer(peer, framework, folder) == [greedy, beams]
  assert all(row[0] == tokenization.BOS_ID for row in greedy + beams)
  assert (greedy, beams) != plain[:2]
