"""Greedy and beam search give the ids of `generate`, and greedy search CTranslate2's.

T5X and Hugging Face differ in length penalty and in sequences of the longest length, so
neither has a penalty and hypotheses end earlier. Peaked models avoid beams of equal
score.
"""

import functools
import json
import re

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from bart_t5x import checkpoints, model, network, tokenization, vocabularies
from t5x import decoding

pytestmark = pytest.mark.torch_peer

LENGTH = 39  # most tokens, the start not counted
ROWS = 16
SHAPE = {'num_encoder_layers': 1, 'num_decoder_layers': 2}


def make_peaked(run):
  """Sharpens a random model, saves it again, and makes long texts likelier to end.

  Plain random weights repeat one token or end at once. Here position embeddings have a
  component along the end token's embedding, which grows with the position.
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
  """Rows of 3 to 18 tokens, padded, in this project's ids."""
  random = np.random.default_rng(8)
  inputs = np.zeros((ROWS, 18), np.int64)
  for row in range(ROWS):
    length = 3 + row % 16
    inputs[row, :length] = [1, *random.integers(5, 301, length - 2), 2]
  return inputs


def up_to_end(sequences):
  """Cuts rows after the first end token, or before the last position.

  At the last position Hugging Face forces an end, and T5X does not.
  """
  ends = [row.index(2) + 1 if 2 in row else LENGTH for row in sequences.tolist()]
  return [
    row[: min(end, LENGTH - 1)]
    for row, end in zip(sequences.tolist(), ends, strict=True)
  ]


def decoded(run, decode_fn, forced_first_id=None, **options):
  """Returns sequences and scores of all decodes by BartModel, the best last."""
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


def greedy_search(run):
  sample = functools.partial(decoding.temperature_sample, temperature=0.0)
  sequences, _ = decoded(run, sample, num_decodes=1)
  return up_to_end(sequences[:, -1])


def beam_search(run, forced_first_id=None):
  """Returns ids of the best beams and their smallest margin."""
  search = functools.partial(decoding.beam_search, alpha=0.0)
  beams, scores = decoded(run, search, forced_first_id, num_decodes=4)
  return up_to_end(beams[:, -1]), (scores[:, -1] - scores[:, -2]).min()


def batch():
  inputs = rows()
  return {
    'input_ids': tokenization.to_hf_ids(inputs),
    'attention_mask': (inputs != 0).astype(np.int64),
  }


# Without the settings of beam search in the folder.
GREEDY = {'num_beams': 1, 'length_penalty': 1.0, 'early_stopping': False}


def by_peer(ask_peer, folder, *calls):
  """Ids for each dictionary of arguments to `generate`, and warnings."""
  answer = ask_peer(
    'torch', 'generate', folder=str(folder), calls=json.dumps(calls), **batch()
  )
  # Theirs begin with </s>.
  found = [
    up_to_end(tokenization.from_hf_ids(answer[str(i)][:, 1:]))
    for i in range(len(calls))
  ]
  return found, json.loads(str(answer['warnings']))


def test_same_ids_as_generate(ask_peer, make_run, tmp_path):
  run = make_run(tmp_path / 'a', seed=10, **SHAPE)
  make_peaked(run)
  with open(run.model_dir / 'config.gin', 'a') as file:
    file.write(
      'model.BartModel.predict_batch_with_aux.num_decodes = 4\n'
      'decoding.beam_search.alpha = 0.0\n'
    )
  folder = tmp_path / 'out'
  assert run.export(folder) == 0
  greedy, (beams, distance) = greedy_search(run), beam_search(run)
  (*found, short), warnings = by_peer(
    ask_peer, folder, GREEDY, {}, {**GREEDY, 'max_new_tokens': 5}
  )
  assert found == [greedy, beams] and max(map(len, short)) == 5 and not warnings
  # The comparison is not trivial.
  assert distance > 1e-4
  assert greedy != beams
  lengths = {len(row) for row in beams}
  assert len(lengths) > 4 and max(lengths) < LENGTH - 1
  answer = ask_peer(
    'torch', 'ctranslate2', folder=str(folder), length=LENGTH, **batch()
  )
  rows = [
    tokenization.from_hf_ids(row).tolist() for row in json.loads(str(answer['ids']))
  ]
  assert [row[: LENGTH - 1] for row in rows] == greedy
  # With a forced first token, which a run without one does not export.
  for name in ('config.json', 'generation_config.json'):
    content = json.loads((folder / name).read_text())
    assert 'forced_bos_token_id' not in content
    (folder / name).write_text(json.dumps(content | {'forced_bos_token_id': 0}))
  forced, _ = beam_search(run, tokenization.BOS_ID)
  (found,), _ = by_peer(ask_peer, folder, {})
  assert found == forced != beams
  assert all(row[0] == tokenization.BOS_ID for row in forced)
