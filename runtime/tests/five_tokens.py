"""A transformer of five tokens in T5X's contract, and all it could decode."""

import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from t5x import models

EOS = 2
VOCABULARY = 5
LENGTH = 4
HEADS, WIDTH = 2, 8


class Attention(nn.Module):
  """Multi-head attention; its cache is laid out [batch, heads, dim, length]."""

  @nn.compact
  def __call__(self, x, source, mask, decode=False, prefill_lengths=None):
    def project(name, inputs):
      return nn.DenseGeneral((HEADS, WIDTH // HEADS), name=name)(inputs)

    query, key, value = (
      project('query', x),
      project('key', source),
      project('value', source),
    )
    if decode or prefill_lengths is not None:
      key, value, mask = self.cached(key, value, mask, prefill_lengths)
    scores = jnp.einsum('bqhd,bkhd->bhqk', query, key)
    weights = nn.softmax(jnp.where(mask, scores, -1e9))
    self.sow('intermediates', 'weights', weights)
    mixed = jnp.einsum('bhqk,bkhd->bqhd', weights, value)
    return nn.DenseGeneral(WIDTH, axis=(-2, -1), name='out')(mixed)

  def cached(self, key, value, mask, prefill_lengths):
    exists = self.has_variable('cache', 'cached_key')
    turned = tuple(key.shape[i] for i in (0, 2, 3, 1))
    keys = self.variable('cache', 'cached_key', jnp.zeros, turned)
    values = self.variable('cache', 'cached_value', jnp.zeros, turned)
    index = self.variable('cache', 'cache_index', jnp.zeros, (), jnp.int32)
    if not exists:
      return key, value, mask
    length = keys.value.shape[-1]
    if prefill_lengths is not None:
      keys.value, values.value = (jnp.moveaxis(x, 1, -1) for x in (key, value))
      index.value = prefill_lengths
      return key, value, mask
    at = jnp.broadcast_to(index.value, key.shape[:1])[:, None, None, None]
    here = jnp.arange(length) == at
    keys.value = jnp.where(here, jnp.moveaxis(key, 1, -1), keys.value)
    values.value = jnp.where(here, jnp.moveaxis(value, 1, -1), values.value)
    index.value = index.value + 1
    key, value = (jnp.moveaxis(x.value, -1, 1) for x in (keys, values))
    return key, value, jnp.arange(length) <= at


class Positions(nn.Module):
  @nn.compact
  def __call__(self, x, decode):
    table = self.param('table', nn.initializers.normal(1.0), (16, WIDTH))
    position = jnp.arange(x.shape[1])[None]
    if decode:
      stepping = self.has_variable('cache', 'position_embedder_index')
      index = self.variable(
        'cache', 'position_embedder_index', jnp.zeros, (), jnp.int32
      )
      if stepping:
        position = jnp.broadcast_to(index.value, x.shape[:1])[:, None]
        index.value = index.value + 1
    return x + table[position]


class Decoder(nn.Module):
  @nn.compact
  def __call__(self, y, encoded, masks, decode, prefill_lengths, dropout):
    y = Positions(name='position_embedder')(y, decode)
    y = y + Attention(name='self')(y, y, masks[0], decode, prefill_lengths)
    y = nn.Dropout(0.3)(y, deterministic=not dropout)
    y = y + Attention(name='cross')(y, encoded, masks[1])
    return nn.Dense(VOCABULARY, name='logits')(nn.tanh(y))


class Transformer(nn.Module):
  """T5X's contract, without prefilling."""

  def setup(self):
    self.embed = nn.Embed(VOCABULARY, WIDTH, embedding_init=nn.initializers.normal(1.0))
    self.mix = Attention()
    self.decoder = Decoder()

  def encode(self, encoder_input_tokens, encoder_segment_ids=None, enable_dropout=True):
    x = self.embed(encoder_input_tokens.astype(jnp.int32))
    return x + self.mix(x, x, (encoder_input_tokens > 0)[:, None, None, :])

  def decode(
    self,
    encoded,
    encoder_input_tokens,
    decoder_input_tokens,
    decoder_target_tokens,
    enable_dropout=True,
    decode=False,
    max_decode_length=None,
  ):
    return self._decode(
      encoded, encoder_input_tokens, decoder_input_tokens, enable_dropout, decode
    )

  def _decode(
    self, encoded, encoder_tokens, tokens, dropout, decode, prefill_lengths=None
  ):
    length = tokens.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
    masks = causal, (encoder_tokens > 0)[:, None, None, :]
    y = self.embed(tokens.astype(jnp.int32))
    return self.decoder(y, encoded, masks, decode, prefill_lengths, dropout)

  def __call__(
    self,
    encoder_input_tokens,
    decoder_input_tokens,
    decoder_target_tokens,
    encoder_segment_ids=None,
    decoder_segment_ids=None,
    encoder_positions=None,
    decoder_positions=None,
    *,
    enable_dropout=True,
    decode=False,
  ):
    encoded = self.encode(encoder_input_tokens)
    return self.decode(
      encoded,
      encoder_input_tokens,
      decoder_input_tokens,
      decoder_target_tokens,
      enable_dropout=enable_dropout,
      decode=decode,
    )


class PrefillTransformer(Transformer):
  """T5X's contract, with prefilling."""

  def decode(
    self,
    encoded,
    encoder_input_tokens,
    decoder_input_tokens,
    decoder_target_tokens,
    enable_dropout=True,
    decode=False,
    max_decode_length=None,
    prefill=False,
    prefill_lengths=None,
  ):
    return self._decode(
      encoded,
      encoder_input_tokens,
      decoder_input_tokens,
      enable_dropout,
      decode,
      prefill_lengths if prefill else None,
    )


def make_model(module=None, cls=models.EncoderDecoderModel, **options):
  vocabulary = mock.Mock(eos_id=EOS)
  return cls(
    module=module or Transformer(),
    input_vocabulary=mock.Mock(eos_id=EOS),
    output_vocabulary=vocabulary,
    optimizer_def=mock.Mock(),
    **options,
  )


def make_batch(seed=0, rows=3):
  rng = np.random.default_rng(seed)
  inputs = rng.integers(1, VOCABULARY, (rows, 5)).astype(np.int32)
  inputs[0, 3:] = 0
  targets = rng.integers(3, VOCABULARY, (rows, LENGTH)).astype(np.int32)
  targets[1, 2:] = [EOS, 0]
  shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
  return {
    'encoder_input_tokens': inputs,
    'decoder_input_tokens': shifted,
    'decoder_target_tokens': targets,
    'decoder_loss_weights': (targets != 0).astype(np.float32),
  }


def log_probs_of(params, batch):
  logits = Transformer().apply(
    {'params': params},
    batch['encoder_input_tokens'],
    batch['decoder_input_tokens'],
    batch['decoder_target_tokens'],
    enable_dropout=False,
  )
  return np.asarray(jax.nn.log_softmax(logits.astype(jnp.float32)))


def all_sequences(params, encoder_row, prompt=(), length=LENGTH):
  """Every closed sequence after a prompt with its log probability, best first."""
  sequences = []
  for size in range(length - len(prompt)):
    for middle in itertools.product((3, 4), repeat=size):
      sequence = (*prompt, *middle, EOS)
      sequences.append(sequence + (0,) * (length - len(sequence)))
  targets = np.array(sequences, np.int32)
  batch = {
    'encoder_input_tokens': np.tile(encoder_row, (len(targets), 1)),
    'decoder_input_tokens': np.pad(targets[:, :-1], ((0, 0), (1, 0))),
    'decoder_target_tokens': targets,
  }
  token = np.take_along_axis(log_probs_of(params, batch), targets[:, :, None], axis=2)[
    :, :, 0
  ]
  counted = (targets != 0) & (np.arange(length) >= len(prompt))
  log_prob = np.sum(token * counted, axis=1)
  order = np.argsort(-log_prob)
  return targets[order], log_prob[order]
