"""What the tests against Hugging Face share: peers, weights, inputs.

A peer is another Python with its own transformers; it reads an npz file and
writes one.
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


def _run_peer(variable: str, script: str, folder: pathlib.Path) -> Callable:
  """A function that runs a peer's script: arrays in, arrays out."""
  python = os.environ.get(variable)
  if not python:
    pytest.skip(f'{variable} names no Python')

  def run(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    given, answer = folder / 'given.npz', folder / 'answer.npz'
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


@pytest.fixture
def flax_peer(tmp_path):
  return _run_peer('FLAX_PEER_PYTHON', 'flax_peer.py', tmp_path)


@pytest.fixture
def torch_peer(tmp_path):
  return _run_peer('TORCH_PEER_PYTHON', 'torch_peer.py', tmp_path)


@pytest.fixture
def torch_files_peer(tmp_path):
  return _run_peer('TORCH_PEER_PYTHON', 'torch_files_peer.py', tmp_path)


@pytest.fixture
def flax_folder_peer(tmp_path):
  return _run_peer('FLAX_PEER_PYTHON', 'hf_folder_peer.py', tmp_path)


@pytest.fixture
def torch_folder_peer(tmp_path):
  return _run_peer('TORCH_PEER_PYTHON', 'hf_folder_peer.py', tmp_path)


@pytest.fixture
def flax_tokenizer_class_peer(tmp_path):
  return _run_peer('FLAX_PEER_PYTHON', 'tokenizer_class_peer.py', tmp_path)


@pytest.fixture
def torch_tokenizer_class_peer(tmp_path):
  return _run_peer('TORCH_PEER_PYTHON', 'tokenizer_class_peer.py', tmp_path)


@pytest.fixture
def flax_tokenizer_peer(tmp_path):
  return _run_peer('FLAX_PEER_PYTHON', 'tokenizer_peer.py', tmp_path)


@pytest.fixture
def torch_tokenizer_peer(tmp_path):
  return _run_peer('TORCH_PEER_PYTHON', 'tokenizer_peer.py', tmp_path)


@dataclasses.dataclass
class Case:
  """A model with random weights, and a batch with padding, in inside ids."""

  config: network.BartConfig
  params: dict
  inputs: np.ndarray  # [batch, length]
  decoder_inputs: np.ndarray  # [batch, target length]

  @property
  def module(self) -> network.Transformer:
    return network.Transformer(self.config)

  def logits(self) -> np.ndarray:
    """The full forward pass, padded columns cut off."""
    logits = jax.jit(self.module.apply, static_argnames='enable_dropout')(
        {'params': self.params}, self.inputs, self.decoder_inputs,
        self.decoder_inputs, enable_dropout=False,
    )  # fmt: skip
    return np.asarray(logits)[..., : self.config.vocab_size]

  def packed_logits(self) -> np.ndarray:
    """The same rows in one row, each a segment: [batch, target length, vocabulary]."""
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
    """Columns in Hugging Face's order of ids."""
    return logits[..., tokenization.to_hf_ids(np.arange(logits.shape[-1]))]

  def for_peer(self, framework: mapping.Framework) -> dict[str, np.ndarray]:
    """Weights and batch as the peers' scripts read them."""
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
    # T5X's start, id 0, is BART's </s>; nothing else in these inputs is 0.
    start = np.where(self.decoder_inputs == 0, 2, self.decoder_inputs)
    return {
      'config': np.array(json.dumps(hf_config)),
      **{f'param:{name}': tensor for name, tensor in tensors.items()},
      'input_ids': tokenization.to_hf_ids(self.inputs),
      'attention_mask': (self.inputs != 0).astype(np.int64),
      'decoder_input_ids': tokenization.to_hf_ids(start),
    }


# Beside the usual one: one head and layer, many layers in a narrow model, and a wide
# feed-forward with long position tables; vocabularies that no power of 2 divides.
SHAPES = (
  {'num_heads': 1, 'num_encoder_layers': 1, 'num_decoder_layers': 1, 'vocab_size': 67},
  {'emb_dim': 8, 'num_heads': 4, 'num_encoder_layers': 12, 'num_decoder_layers': 2},
  {'emb_dim': 80, 'num_heads': 5, 'mlp_dim': 333, 'max_positions': 1024,
   'vocab_size': 1009, 'scan_layers': True},
)  # fmt: skip


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


@pytest.fixture(params=SHAPES, ids=('small', 'deep', 'wide'))
def shape(request) -> dict:
  return request.param


@pytest.fixture
def make_case() -> Callable[..., Case]:
  return _case
