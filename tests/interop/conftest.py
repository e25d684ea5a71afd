"""Fixtures of the tests against Hugging Face.

A peer is another Python environment with its own transformers. Its scripts read an npz
file and write one.
"""

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
from bart_t5x.hf import mapping

_PEERS = pathlib.Path(__file__).parent / 'peers'


FRAMEWORKS = [
  pytest.param('flax', marks=pytest.mark.flax_peer),
  pytest.param('torch', marks=pytest.mark.torch_peer),
]


@pytest.fixture(params=FRAMEWORKS)
def framework(request) -> mapping.Framework:
  return request.param


@pytest.fixture
def run_peer(tmp_path) -> Callable:
  """Runs a script of `peers` with a framework's Python: arrays in, arrays out."""

  def run(framework: str, script: str, arrays: dict) -> dict[str, np.ndarray]:
    variable = f'{framework.upper()}_PEER_PYTHON'
    python = os.environ.get(variable)
    if not python:
      pytest.skip(f'{variable} names no Python')
    given, answer = tmp_path / 'given.npz', tmp_path / 'answer.npz'
    np.savez(given, **arrays)
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'CUDA_VISIBLE_DEVICES': ''}
    environment.pop('PYTHONPATH', None)
    done = subprocess.run(
        [python, str(_PEERS / script), str(given), str(answer)],
        env=environment, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(np.load(answer))

  return run


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
    logits = jax.jit(self.module.apply, static_argnames='enable_dropout')(
        {'params': self.params}, self.inputs, self.decoder_inputs,
        self.decoder_inputs, enable_dropout=False,
    )  # fmt: skip
    return np.asarray(logits)[..., : self.config.vocab_size]

  def packed_logits(self) -> np.ndarray:
    """Logits of the rows packed into one, as [batch, target length, vocabulary]."""
    lengths = (self.inputs != 0).sum(axis=1)
    batch, target_length = self.decoder_inputs.shape
    decoder_inputs = self.decoder_inputs.reshape(1, -1)
    logits = jax.jit(self.module.apply, static_argnames='enable_dropout')(
        {'params': self.params}, self.inputs[self.inputs != 0][None], decoder_inputs,
        decoder_inputs,
        encoder_segment_ids=np.repeat(np.arange(batch) + 1, lengths)[None],
        decoder_segment_ids=np.repeat(np.arange(batch) + 1, target_length)[None],
        encoder_positions=np.concatenate([np.arange(n) for n in lengths])[None],
        decoder_positions=np.tile(np.arange(target_length), batch)[None],
        enable_dropout=False,
    )  # fmt: skip
    rows = np.asarray(logits)[..., : self.config.vocab_size]
    return rows.reshape(batch, target_length, -1)

  def hf_columns(self, logits: np.ndarray) -> np.ndarray:
    """Reorders columns to Hugging Face's ids."""
    return logits[..., tokenization.to_hf_ids(np.arange(logits.shape[-1]))]

  def for_peer(self, framework: mapping.Framework) -> dict[str, np.ndarray]:
    """Returns weights and batch for a peer's script."""
    config = self.config
    hf_config = {
        'vocab_size': config.vocab_size, 'd_model': config.emb_dim,
        'encoder_layers': config.num_encoder_layers,
        'decoder_layers': config.num_decoder_layers,
        'encoder_attention_heads': config.num_heads,
        'decoder_attention_heads': config.num_heads,
        'encoder_ffn_dim': config.mlp_dim, 'decoder_ffn_dim': config.mlp_dim,
        'max_position_embeddings': config.max_positions,
        'pad_token_id': 1, 'bos_token_id': 0, 'eos_token_id': 2,
        'forced_eos_token_id': None,
    }  # fmt: skip
    tensors = mapping.to_hf(self.params, config, framework)
    # T5X starts with id 0, BART with </s>.
    start = np.where(self.decoder_inputs == 0, 2, self.decoder_inputs)
    return {
      'config': np.array(json.dumps(hf_config)),
      **{f'param:{name}': tensor for name, tensor in tensors.items()},
      'input_ids': tokenization.to_hf_ids(self.inputs),
      'attention_mask': (self.inputs != 0).astype(np.int64),
      'decoder_input_ids': tokenization.to_hf_ids(start),
    }


def _case(seed: int = 0, **overrides) -> Case:
  """A small model and three rows of 11, 7 and 4 tokens."""
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
  params = random_params(config, rng)
  return Case(config, params, inputs, decoder_inputs)


@pytest.fixture
def make_case() -> Callable[..., Case]:
  return _case
