"""`config.json` and `generation_config.json` of a BART, from and to BartConfig."""

from typing import Any

from bart_t5x.network import BartConfig

# The ids outside: those of every Hugging Face BART.
BOS_ID, PAD_ID, EOS_ID = 0, 1, 2

_SPECIAL_IDS = {
  'bos_token_id': BOS_ID,
  'pad_token_id': PAD_ID,
  'eos_token_id': EOS_ID,
  'decoder_start_token_id': EOS_ID,
}

# What would make a model with config.json's model_type "bart" another network than
# the one in network.py. Value: what it must be, or be absent.
_REQUIRED = {
  'scale_embedding': False,
  'normalize_before': False,
  'add_final_layer_norm': False,
  'normalize_embedding': True,
  'add_bias_logits': False,
  'static_position_embeddings': False,
  'extra_pos_embeddings': 2,
  'tie_word_embeddings': True,
  'activation_function': 'gelu',
  **_SPECIAL_IDS,
}


def to_hf(
  config: BartConfig, dtype: str, forced_bos_id: int | None = None
) -> dict[str, Any]:
  """`config.json` for a model of this shape.

  Args:
    config: the network's configuration.
    dtype: of the stored weights, 'float32' or 'bfloat16'.
    forced_bos_id: the id outside that its texts begin with; None for none.

  Returns:
    The JSON object.
  """
  both = {
    'layers': (config.num_encoder_layers, config.num_decoder_layers),
    'attention_heads': (config.num_heads, config.num_heads),
    'ffn_dim': (config.mlp_dim, config.mlp_dim),
    'layerdrop': (0.0, 0.0),
  }
  sides = {
    f'{side}_{key}': values[i]
    for i, side in enumerate(('encoder', 'decoder'))
    for key, values in both.items()
  }
  return {
    'architectures': ['BartForConditionalGeneration'],
    'model_type': 'bart',
    'vocab_size': config.vocab_size,
    'd_model': config.emb_dim,
    'num_hidden_layers': config.num_encoder_layers,
    'max_position_embeddings': config.max_positions,
    'activation_function': 'gelu',
    'dropout': config.dropout_rate,
    'attention_dropout': config.attention_dropout_rate,
    'activation_dropout': config.activation_dropout_rate,
    'classifier_dropout': 0.0,
    'init_std': config.init_std,
    'scale_embedding': False,
    'tie_word_embeddings': True,
    'is_encoder_decoder': True,
    'use_cache': True,
    'torch_dtype': dtype,
    'forced_eos_token_id': EOS_ID,
    **_SPECIAL_IDS,
    **_forced(forced_bos_id),
    **sides,
  }


def _forced(bos_id: int | None) -> dict[str, int]:
  return {} if bos_id is None else {'forced_bos_token_id': bos_id}


def generation_to_hf(
  config: BartConfig, forced_bos_id: int | None = None
) -> dict[str, Any]:
  """`generation_config.json`: greedy search up to the longest sequence."""
  return {
    **_SPECIAL_IDS,
    **_forced(forced_bos_id),
    'forced_eos_token_id': EOS_ID,
    'max_length': config.max_positions,
  }


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
  """The values of BartConfig that a `config.json` determines.

  Args:
    hf: the JSON object.

  Returns:
    Field name to value; fields that a checkpoint does not fix (dtype, remat,
    layout) are left out.

  Raises:
    ValueError: it is no BART, or a variant that network.py does not compute.
  """
  if not isinstance(hf, dict):
    raise ValueError(f'config.json holds no JSON object but {type(hf).__name__}')
  if hf.get('model_type') != 'bart':
    raise ValueError(
      f'config.json has model_type {hf.get("model_type")!r}. Only "bart" can be '
      'imported: mBART, for one (and with it BARTpho and BARThez, which are mBARTs '
      'to Hugging Face), is pre-norm with a final norm.'
    )
  for key, value in _REQUIRED.items():
    if hf.get(key, value) != value:
      raise ValueError(
        f'config.json has {key} = {hf[key]!r}, BART has {value!r}: a variant that '
        'this network does not compute'
      )
  try:
    _check_sides(hf)
    return {
      'vocab_size': hf['vocab_size'],
      'emb_dim': hf['d_model'],
      'num_heads': hf['encoder_attention_heads'],
      'num_encoder_layers': hf['encoder_layers'],
      'num_decoder_layers': hf['decoder_layers'],
      'mlp_dim': hf['encoder_ffn_dim'],
      'max_positions': hf['max_position_embeddings'],
      'dropout_rate': hf.get('dropout', 0.1),
      'attention_dropout_rate': hf.get('attention_dropout', 0.0),
      'activation_dropout_rate': hf.get('activation_dropout', 0.0),
    }
  except KeyError as e:
    raise ValueError(f'config.json has no {e.args[0]!r}: it is no whole config') from e


def forced_bos(hf: dict[str, Any], generation: dict[str, Any] | None) -> int | None:
  """The id outside that every generated text begins with, None for none.

  Args:
    hf: config.json.
    generation: generation_config.json, which alone counts where there is one.

  Raises:
    ValueError: it is no id of the model.
  """
  forced = (hf if generation is None else generation).get('forced_bos_token_id')
  # What the setting was before it had an id.
  if generation is None and hf.get('force_bos_token_to_be_generated'):
    forced = BOS_ID if forced is None else forced
  # The inside id 0 is padding, with which no text begins.
  if forced is not None and (
    not isinstance(forced, int)
    or forced == PAD_ID
    or not 0 <= forced < hf['vocab_size']
  ):
    raise ValueError(
      f'forced_bos_token_id = {forced!r} is no id that a text could begin with'
    )
  return forced


def _check_sides(hf: dict[str, Any]) -> None:
  """Raises unless encoder and decoder have layers of one shape."""
  for key in ('attention_heads', 'ffn_dim'):
    if hf[f'encoder_{key}'] != hf[f'decoder_{key}']:
      raise ValueError(
        f'config.json has encoder_{key} = {hf[f"encoder_{key}"]} and decoder_{key} '
        f'= {hf[f"decoder_{key}"]}: encoder and decoder must agree here'
      )
