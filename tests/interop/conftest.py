"""Fixtures of the tests against Hugging Face, whose libraries `peer.py` runs."""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
from collections.abc import Callable

import jax
import numpy as np
import pytest
from random_params import random_params

from bart_t5x import network, tokenization
from bart_t5x.hf import configs, mapping, weights

FRAMEWORKS = [
  pytest.param('flax', marks=pytest.mark.flax_peer),
  pytest.param('torch', marks=pytest.mark.torch_peer),
]


@pytest.fixture(params=FRAMEWORKS)
def framework(request) -> mapping.Framework:
  return request.param


class Peer:
  """A process of `peer.py`, which answers one question after another."""

  def __init__(self, python: str, framework: str, folder: pathlib.Path):
    self._folder = folder
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'CUDA_VISIBLE_DEVICES': ''}
    environment.pop('PYTHONPATH', None)
    script = pathlib.Path(__file__).with_name('peer.py')
    self.process = subprocess.Popen(
      [python, script, framework, script.parents[2]],
      env=environment,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def ask(self, question: str, **arguments) -> dict[str, np.ndarray]:
    np.savez(self._folder / 'given.npz', question=question, **arguments)
    print(self._folder, file=self.process.stdin, flush=True)
    outcome = self.process.stdout.readline().strip()
    assert outcome == 'done', json.loads(outcome or '"The peer ended."')
    return dict(np.load(self._folder / 'answer.npz'))


@pytest.fixture(scope='session')
def ask_peer(tmp_path_factory) -> Callable:
  """Asks `peer.py` in a framework's environment: arrays in, arrays out."""
  peers = {}

  def ask(framework: str, question: str, **arguments):
    if framework not in peers:
      variable = f'{framework.upper()}_PEER_PYTHON'
      if not (python := os.environ.get(variable)):
        pytest.skip(f'{variable} names no Python')
      peers[framework] = Peer(python, framework, tmp_path_factory.mktemp(framework))
    return peers[framework].ask(question, **arguments)

  with contextlib.ExitStack() as stack:
    yield ask
    for peer in peers.values():
      stack.enter_context(peer.process)  # Closes stdin, which ends it.


@dataclasses.dataclass
class Case:
  """A model with random weights, and a batch with padding, in this project's ids."""

  config: network.BartConfig
  params: dict
  inputs: np.ndarray  # [batch, length]
  decoder_inputs: np.ndarray  # [batch, target length]

  @property
  def module(self) -> network.Transformer:
    return network.Transformer(self.config)

  def logits(self) -> np.ndarray:
    """Logits of the full forward pass, without padded columns."""
    return self._logits(self.inputs, self.decoder_inputs)

  def packed_logits(self) -> np.ndarray:
    """Logits of the rows packed into one, as [batch, target length, vocabulary]."""
    lengths = (self.inputs != 0).sum(axis=1)
    batch, target_length = self.decoder_inputs.shape
    rows = self._logits(
      self.inputs[self.inputs != 0][None],
      self.decoder_inputs.reshape(1, -1),
      encoder_segment_ids=np.repeat(np.arange(batch) + 1, lengths)[None],
      decoder_segment_ids=np.repeat(np.arange(batch) + 1, target_length)[None],
      encoder_positions=np.concatenate([np.arange(n) for n in lengths])[None],
      decoder_positions=np.tile(np.arange(target_length), batch)[None],
    )
    return rows.reshape(batch, target_length, -1)

  def _logits(self, inputs, decoder_inputs, **rows):
    logits = jax.jit(self.module.apply, static_argnames='enable_dropout')(
      {'params': self.params},
      inputs,
      decoder_inputs,
      decoder_inputs,
      enable_dropout=False,
      **rows,
    )
    return self.hf_columns(logits)

  def hf_columns(self, logits) -> np.ndarray:
    """Reorders columns to Hugging Face's ids; drops padded ones."""
    order = tokenization.to_hf_ids(np.arange(self.config.vocab_size))
    return np.asarray(logits)[..., order]

  def batch(self) -> dict[str, np.ndarray]:
    """Returns the batch in Hugging Face's ids and names."""
    # T5X starts with id 0, BART with </s>.
    start = np.where(self.decoder_inputs == 0, 2, self.decoder_inputs)
    return {
      'input_ids': tokenization.to_hf_ids(self.inputs),
      'attention_mask': (self.inputs != 0).astype(np.int64),
      'decoder_input_ids': tokenization.to_hf_ids(start),
    }

  def for_peer(self, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Writes the model to a folder and returns it and the batch for a peer."""
    for framework, write, name in (
      ('torch', weights.write_safetensors, weights.SAFETENSORS),
      ('flax', weights.write_msgpack, weights.MSGPACK),
    ):
      write(folder / name, mapping.to_hf(self.params, self.config, framework))
    configs.write_json(folder / 'config.json', configs.to_hf(self.config, 'float32'))
    return {'folder': str(folder), **self.batch()}


def _case(seed: int = 0, run=None, **overrides) -> Case:
  """The model of a run, or a small one, and three rows of 11, 7 and 4 tokens."""
  fields = {
      'vocab_size': 61, 'emb_dim': 24, 'num_heads': 3, 'num_encoder_layers': 2,
      'num_decoder_layers': 3, 'mlp_dim': 40, 'max_positions': 20,
      'vocab_multiple_of': 16, **overrides,
  }  # fmt: skip
  config = network.BartConfig(**fields)
  rng = np.random.default_rng(seed)
  inputs = np.zeros((3, 11), np.int64)
  for row, length in enumerate((11, 7, 4)):
    inputs[row, :length] = [1, *rng.integers(4, 61, length - 2), 2]
  decoder_inputs = rng.integers(4, 61, (3, 9))
  decoder_inputs[:, 0], decoder_inputs[:, 1] = 0, 1
  if run:
    return Case(run.config, run.params, inputs, decoder_inputs)
  params = random_params(config, rng)
  return Case(config, params, inputs, decoder_inputs)


@pytest.fixture
def make_case() -> Callable[..., Case]:
  return _case
