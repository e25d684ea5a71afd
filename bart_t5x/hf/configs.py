"""Converts configurations: `config.json`, a run's `config.gin` and BartConfig."""

import dataclasses
import json
import pathlib
import tokenize
from typing import Any, NamedTuple

import numpy as np
from gin import config_parser

from bart_t5x.network import BartConfig

# ---- config.json and generation_config.json ----------------------------------

# The ids of every Hugging Face BART.
BOS_ID, PAD_ID, EOS_ID = 0, 1, 2
_SPECIAL_IDS = {
  'bos_token_id': BOS_ID,
  'pad_token_id': PAD_ID,
  'eos_token_id': EOS_ID,
  'decoder_start_token_id': EOS_ID,
}

# network.py computes only these variants. Exports state them all: some readers, such as
# CTranslate2's, take no defaults.
_VARIANT = {
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
  """Returns the content of `config.json`.

  Args:
    config: of the network.
    dtype: of the stored weights.
    forced_bos_id: Hugging Face's id of a first token that generation forces.
  """
  sides = {
    f'{side}_{key}': value
    for side, layers in (
      ('encoder', config.num_encoder_layers),
      ('decoder', config.num_decoder_layers),
    )
    for key, value in (
      ('layers', layers),
      ('attention_heads', config.num_heads),
      ('ffn_dim', config.mlp_dim),
      ('layerdrop', 0.0),
    )
  }
  return {
    'architectures': ['BartForConditionalGeneration'],
    'model_type': 'bart',
    'vocab_size': config.vocab_size,
    'd_model': config.emb_dim,
    'num_hidden_layers': config.num_encoder_layers,
    'max_position_embeddings': config.max_positions,
    'dropout': config.dropout_rate,
    'attention_dropout': config.attention_dropout_rate,
    'activation_dropout': config.activation_dropout_rate,
    'classifier_dropout': 0.0,
    'init_std': config.init_std,
    'is_encoder_decoder': True,
    'use_cache': True,
    'torch_dtype': dtype,
    'forced_eos_token_id': EOS_ID,
    **_VARIANT,
    **_forced(forced_bos_id),
    **sides,
  }


class BeamSearch(NamedTuple):
  """Settings of a run's beam search."""

  beams: int
  alpha: float  # the exponent of `decoding.brevity_penalty`
  longest: int  # targets, in tokens

  @property
  def length_penalty(self) -> float:
    """The exponent of Hugging Face's penalty that comes closest to T5X's.

    Scores are divided by `length ** length_penalty` there and by
    `((5 + length) / 6) ** alpha` here. Only ratios of penalties matter, so this is the
    slope of one logarithm over the other.
    """
    lengths = np.arange(1, max(self.longest, 2) + 1)
    slope, _ = np.polyfit(np.log(lengths), self.alpha * np.log((5 + lengths) / 6), 1)
    return round(float(slope), 3)


def generation_to_hf(
  config: BartConfig,
  forced_bos_id: int | None = None,
  search: BeamSearch | None = None,
) -> dict[str, Any]:
  """Returns the content of `generation_config.json`; without `search`, for greedy."""
  longest = config.max_positions - 1
  content = {
    **_SPECIAL_IDS,
    **_forced(forced_bos_id),
    'forced_eos_token_id': EOS_ID,
    # Not max_length, which transformers 5 warns of if a call has max_new_tokens.
    'max_new_tokens': min(search.longest, longest) if search else longest,
  }
  if search:
    content |= {
      'num_beams': search.beams,
      'length_penalty': search.length_penalty,
      'early_stopping': 'never',  # as in T5X: no beam can beat the worst finished one
    }
  return content


def _forced(bos_id):
  return {} if bos_id is None else {'forced_bos_token_id': bos_id}


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
  """Returns the BartConfig fields that a `config.json` determines.

  Raises:
    ValueError: not a BART, or a variant that network.py does not compute.
  """
  if hf.get('model_type') != 'bart':
    raise ValueError(
      f'config.json has model_type {hf.get("model_type")!r}. Only "bart" can be '
      'imported; mBART (also BARTpho and BARThez) is another architecture.'
    )
  try:
    sides = {f'decoder_{k}': hf[f'encoder_{k}'] for k in ('attention_heads', 'ffn_dim')}
    for key, value in {**_VARIANT, **sides}.items():
      if hf.get(key, value) != value:
        raise ValueError(
          f'config.json has {key} = {hf[key]!r}. This network supports only {value!r}.'
        )
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
    raise ValueError(f'config.json has no {e.args[0]!r}') from e


def forced_bos(hf: dict[str, Any], generation: dict[str, Any] | None) -> int | None:
  """Returns the id of a forced first token, if any, with transformers' precedence.

  Args:
    hf: config.json.
    generation: generation_config.json; if it exists, config.json is ignored.
  """
  return (hf if generation is None else generation).get('forced_bos_token_id')


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
  """Writes indented JSON, non-ASCII characters unescaped."""
  text = json.dumps(content, ensure_ascii=False, indent=2) + '\n'
  path.write_text(text, encoding='utf-8')


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object; raises ValueError with the path if the file has no such."""
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as e:
    raise ValueError(f'{path} is damaged: {e}. Download it again.') from e
  if not isinstance(content, dict):
    raise ValueError(f'{path} has no JSON object, but a {type(content).__name__}.')
  return content


# ---- config.gin --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Macro:
  name: str


class _Unresolved(config_parser.ParserDelegate):
  def configurable_reference(self, scoped_configurable_name, evaluate):
    return f'@{scoped_configurable_name}' + '()' * evaluate

  def macro(self, macro_name):
    return _Macro(macro_name)


class RunConfig:
  """A run's config.gin as data: macros resolved, references as strings.

  Gin itself cannot evaluate the file here: it refers to the script that ran
  (`__main__.train`).
  """

  def __init__(self, text: str):
    self._bindings: dict[tuple[str, str], Any] = {}
    for statement in config_parser.ConfigParser(text, _Unresolved()):
      if isinstance(statement, config_parser.BindingStatement):
        selector = '/'.join(filter(None, (statement.scope, statement.selector)))
        self._bindings[selector, statement.arg_name or ''] = statement.value

  def bindings_of(self, selector: str) -> dict[str, Any]:
    """Returns all values bound to a configurable, by parameter.

    'BartConfig' also finds 'bart_t5x.network.BartConfig'; a scope must match
    ('train/DatasetConfig').
    """
    *scope, name = selector.split('/')
    found = {}
    for (bound, parameter), value in self._bindings.items():
      *bound_scope, bound_name = bound.split('/')
      same_name = f'.{bound_name}'.endswith(f'.{name}')
      if parameter and same_name and bound_scope == scope:
        found[parameter] = self._resolved(value)
    return found

  def macro(self, name: str) -> Any:
    """Returns a macro's value, or None."""
    return self._resolved(self._bindings.get((name, '')))

  def bart_config(self) -> BartConfig:
    """Returns the network's configuration; ValueError for runs of other models."""
    bound = self.bindings_of('BartConfig')
    if 'vocab_size' not in bound:
      raise ValueError(
        'config.gin binds no network.BartConfig.vocab_size: the run did not train a '
        'model of bart_t5x.network'
      )
    try:
      return BartConfig(**bound)
    except TypeError as e:
      raise ValueError(f'config.gin does not fit this version of bart-t5x: {e}') from e

  def beam_search(self) -> BeamSearch | None:
    """Returns how the run evaluated generated text, or None if by greedy search."""
    beams = self.bindings_of('predict_batch_with_aux').get('num_decodes', 1)
    decode_fn = self.bindings_of('BartModel').get('decode_fn', '@beam_search')
    if beams == 1 or not decode_fn.endswith('beam_search'):
      return None
    alpha = self.bindings_of('beam_search').get('alpha', 0.6)
    lengths = self.macro('TASK_FEATURE_LENGTHS') or {}
    return BeamSearch(beams, alpha, lengths.get('targets', 128))

  def _resolved(self, value: Any) -> Any:
    if isinstance(value, _Macro):
      return self.macro(value.name)
    if isinstance(value, dict):
      return {key: self._resolved(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
      return type(value)(self._resolved(item) for item in value)
    return value


def read_gin(path: pathlib.Path) -> RunConfig:
  """Reads a run's config.gin.

  Raises:
    FileNotFoundError: the file is missing.
    ValueError: it is not valid Gin.
  """
  try:
    return RunConfig(path.read_text(encoding='utf-8'))
  except FileNotFoundError as e:
    raise FileNotFoundError(
      f'{path} not found. It describes the model; name it with --config=FILE.'
    ) from e
  except (SyntaxError, tokenize.TokenError, UnicodeDecodeError) as e:
    raise ValueError(f'{path} is not a valid Gin file: {e}') from e
