"""seqio preprocessors: from documents or texts to model examples.

    documents   batches of tokens, sentence_starts, example_id, seed, epoch
      split_documents: cuts at sentence ends to pieces of the target length
    pieces      the same, and `piece`, the piece's number in its document
      denoise: adds the noise, `<s>` and `</s>`
    examples    inputs, targets, targets_noised

`tokenize_documents` makes documents from text, for `seqio_cache_tasks`.
`tokenize_for_bart` and `add_ends` are for text-to-text tasks.
"""

from collections.abc import Mapping

import numpy as np
import seqio
import tensorflow as tf

from bart_t5x import corpus_format, noise
from bart_t5x.data import EPOCH, SEED
from bart_t5x.tensors import do_not_convert, select

# Odd multipliers that combine numbers into one seed; products may overflow.
_MIX_SEED = -0x61C8864680B583EB
_MIX_EPOCH = 0x2545F4914F6CDD1D
_MIX_PIECE = 0x369DEA0F31A53F85


def tokenize_documents(
  dataset: tf.data.Dataset, output_features: Mapping[str, seqio.Feature]
) -> tf.data.Dataset:
  """Makes the same documents of texts as `bart_t5x.prepare`.

  Runs Python for each document, so that iterators cannot be saved: put it before a
  `seqio.CacheDatasetPlaceholder(required=True)`.

  Args:
    dataset: strings, or examples with a string `text`.
    output_features: `targets` has the vocabulary.

  Returns:
    `tokens` int32 [n], `sentence_starts` int32 [s] and `example_id` int64. Texts of
    white space are left out.
  """
  tokenizer = output_features['targets'].vocabulary.tokenizer

  def encode(text: bytes):
    content = text.decode('utf-8')
    ((ids, starts),) = corpus_format.encode(
      tokenizer, ['' if content.isspace() else content]
    )
    return ids, starts, np.int64(corpus_format.digest(text))

  @do_not_convert
  def tokenize(example):
    text = example['text'] if isinstance(example, dict) else example
    ids, starts, example_id = tf.numpy_function(
      encode, [text], [tf.int32, tf.int32, tf.int64], stateful=False
    )
    return {
      'tokens': tf.ensure_shape(ids, [None]),
      'sentence_starts': tf.ensure_shape(starts, [None]),
      'example_id': tf.ensure_shape(example_id, []),
    }

  dataset = dataset.map(tokenize, num_parallel_calls=tf.data.AUTOTUNE)
  return dataset.filter(
    do_not_convert(lambda document: tf.size(document['tokens']) > 0)
  )


def split_documents(
  dataset: tf.data.Dataset, sequence_length: Mapping[str, int]
) -> tf.data.Dataset:
  """Cuts documents into pieces that fit the target with `<s>` and `</s>`.

  A piece has as many whole sentences as fit. A sentence longer than a piece is cut
  where the piece is full.

  Args:
    dataset: batches of documents from `EpochTask`: `tokens` and `sentence_starts`,
      ragged int32 [b, (n)], and `example_id`, `seed`, `epoch`, int64 [b].
    sequence_length: the length of `targets` counts.

  Returns:
    Single pieces: `tokens` int32 [n], `sentence_starts` int32 [s], and int64 scalars
    `example_id`, `seed`, `epoch` and `piece`, from 0.
  """
  room = _lengths(sequence_length)[1] - 2

  @do_not_convert
  def split(batch):
    tokens = batch['tokens'].with_row_splits_dtype(tf.int32)
    bounds = tokens.row_splits
    starts = batch['sentence_starts']
    starts = starts.flat_values + tf.repeat(bounds[:-1], starts.row_lengths())
    cuts = cut_points(bounds, starts, room)
    document = tf.searchsorted(bounds, cuts[:-1], side='right') - 1
    first_piece = tf.searchsorted(cuts, tf.gather(bounds, document))
    piece = tf.range(tf.size(document)) - first_piece
    starts = _sorted_once(tf.concat([starts, cuts[:-1]], 0))
    splits = tf.searchsorted(starts, cuts)
    starts -= tf.repeat(cuts[:-1], splits[1:] - splits[:-1])
    return {
      'tokens': _rows(tokens.flat_values, cuts),
      'sentence_starts': _rows(starts, splits),
      'piece': tf.cast(piece, tf.int64),
      **{k: tf.gather(batch[k], document) for k in ('example_id', SEED, EPOCH)},
    }

  return dataset.map(split, num_parallel_calls=tf.data.AUTOTUNE).unbatch()


def _rows(values: tf.Tensor, splits: tf.Tensor) -> tf.RaggedTensor:
  return tf.RaggedTensor.from_row_splits(values, splits, validate=False)


def _sorted_once(values: tf.Tensor) -> tf.Tensor:
  """Returns the distinct values, sorted."""
  values = tf.sort(values)
  is_first = tf.ones_like(values[:1], tf.bool)
  is_new = tf.concat([is_first, values[1:] > values[:-1]], 0)
  return select(values, is_new)


def cut_points(bounds: tf.Tensor, sentence_starts: tf.Tensor, room: int) -> tf.Tensor:
  """Returns the bounds of the pieces of concatenated documents.

  Args:
    bounds: of the documents, int32 [documents + 1], from 0.
    sentence_starts: in the concatenation, int32 [s].
    room: maximal length of a piece.

  Returns:
    int32 [pieces + 1], strictly increasing; contains all `bounds`.
  """
  ends = tf.sort(tf.concat([bounds, sentence_starts], 0))

  def following(i, cuts, cut):
    # Cuts one more piece from each document that is not finished.
    limit = tf.minimum(cut + room, bounds[1:])
    fitting = tf.gather(ends, tf.searchsorted(ends, limit, side='right') - 1)
    cut = tf.where(fitting > cut, fitting, limit)
    return i + 1, cuts.write(i, cut), cut

  begins = bounds[:-1]
  cuts = tf.TensorArray(tf.int32, 1, dynamic_size=True).write(0, begins)
  _, cuts, _ = tf.while_loop(
    lambda i, cuts, cut: tf.reduce_any(cut < bounds[1:]), following, [1, cuts, begins]
  )
  return _sorted_once(tf.concat([bounds, tf.reshape(cuts.stack(), [-1])], 0))


def denoise(
  dataset: tf.data.Dataset,
  sequence_length: Mapping[str, int],
  output_features: Mapping[str, seqio.Feature],
  recipe: noise.Recipe | None = None,
  trace: bool = False,
) -> tf.data.Dataset:
  """Makes a denoising example of each piece.

  The noise depends only on the piece's `seed`, `epoch`, `example_id` and `piece`.

  Args:
    dataset: pieces, see `split_documents`.
    sequence_length: of `inputs` and `targets`.
    output_features: `targets` has the vocabulary.
    recipe: None for `noise.Recipe()` as gin binds it when the dataset is built.
    trace: whether to add `references`, `permuted`, `in_tokens` (see `noise`) and
      `sentence_starts`, for `bart_t5x.inspect`.

  Returns:
    `inputs` int32 [m], `targets` and `targets_noised` int32 [n + 2], `dropped` int32
    (source tokens cut off), and the piece's `example_id`, `piece` and `epoch`.

  Raises:
    ValueError: the encoder is too short for the noise.
  """
  recipe = noise.Recipe() if recipe is None else recipe
  encoder_length, decoder_length = _lengths(sequence_length)
  _check_room(recipe, encoder_length, decoder_length)
  ids = noise.Ids.of(output_features['targets'].vocabulary)

  @do_not_convert
  def corrupt(piece):
    tokens, starts, seed = piece['tokens'], piece['sentence_starts'], piece_seed(piece)
    noised = noise.corrupt(tokens, starts, seed, recipe, ids, encoder_length)
    example = {
      'inputs': noised.source,
      'targets': noised.target,
      'targets_noised': noised.codes,
      'dropped': noised.dropped,
      **{k: piece[k] for k in ('example_id', 'piece', EPOCH)},
    }
    if trace:
      example |= {
        'references': noised.references,
        'in_tokens': noised.in_tokens,
        'permuted': noise.permuted(tf.size(tokens), starts, seed, recipe),
        'sentence_starts': starts,
      }
    return example

  return dataset.map(corrupt, num_parallel_calls=tf.data.AUTOTUNE)


def _check_room(recipe: noise.Recipe, encoder_length: int, decoder_length: int) -> None:
  longest = noise.longest_source(recipe, decoder_length)
  if longest > encoder_length:
    raise ValueError(
      f'The noise makes sources of up to {longest} tokens from targets of '
      f'{decoder_length}, but the encoder takes {encoder_length}. Set '
      f"TASK_FEATURE_LENGTHS['inputs'] to {longest} or more, or use less noise: "
      f'{recipe}'
    )


def piece_seed(piece: Mapping[str, tf.Tensor]) -> tf.Tensor:
  """Combines seed, epoch, example id and piece into a seed, int64 [2]."""
  mixed = (
    piece[SEED] * _MIX_SEED + piece[EPOCH] * _MIX_EPOCH + piece['piece'] * _MIX_PIECE
  )
  return tf.stack([piece['example_id'], mixed])


def tokenize_for_bart(
  dataset: tf.data.Dataset,
  output_features: Mapping[str, seqio.Feature],
  sequence_length: Mapping[str, int] | None = None,
) -> tf.data.Dataset:
  """Tokenizes text as in pre-training: `<s>` … `</s>`.

  seqio's `tokenize` and `append_eos` leave out the `<s>`.

  Args:
    dataset: examples in which output features are scalar strings; other features pass
      through.
    output_features: each text's has a `BartVocabulary`.
    sequence_length: see `add_ends`.

  Returns:
    As `add_ends`.
  """
  spec = dataset.element_spec
  texts = {
    name: feature
    for name, feature in output_features.items()
    if name in spec and spec[name].dtype == tf.string
  }
  for name, feature in texts.items():
    if not isinstance(getattr(feature.vocabulary, 'bos_id', None), int):
      raise ValueError(
        f'tokenize_for_bart needs a vocabulary with <s> for feature {name!r}, such as '
        f'bart_t5x.vocabularies.load_vocabulary(…). Got: {feature.vocabulary}'
      )

  @do_not_convert
  def tokenize(example):
    ids = {k: f.vocabulary.encode_tf(example[k]) for k, f in texts.items()}
    plain = {f'{k}_pretokenized': example[k] for k in texts}
    return {**example, **ids, **plain}

  dataset = dataset.map(tokenize, num_parallel_calls=tf.data.AUTOTUNE)
  return add_ends(dataset, texts, sequence_length)


def add_ends(
  dataset: tf.data.Dataset,
  output_features: Mapping[str, seqio.Feature],
  sequence_length: Mapping[str, int] | None = None,
) -> tf.data.Dataset:
  """Adds `<s>` and `</s>` to ids, after cutting them to what leaves room for both.

  Args:
    dataset: examples with int32 [n] and the text `<feature>_pretokenized` for each
      output feature.
    output_features: each has a `BartVocabulary`.
    sequence_length: of the features, at least 2; None for no limit, of one or of all.

  Returns:
    The same with int32 [m], and the number of ids cut off as `<feature>_truncated`.
  """
  lengths = sequence_length or {}
  for name in output_features:
    limit = lengths.get(name)
    if limit is not None and limit < 2:
      raise ValueError(
        f'TASK_FEATURE_LENGTHS[{name!r}] must be at least 2, for <s> and </s>. Got: '
        f'{limit}'
      )

  @do_not_convert
  def add(example):
    out = dict(example)
    for name, feature in output_features.items():
      vocabulary, limit = feature.vocabulary, lengths.get(name)
      kept = example[name] if limit is None else example[name][: limit - 2]
      out[name] = tf.concat([[vocabulary.bos_id], kept, [vocabulary.eos_id]], 0)
      # Removed and added again, to follow the ids in files of predictions.
      out[f'{name}_pretokenized'] = out.pop(f'{name}_pretokenized')
      out[f'{name}_truncated'] = tf.size(example[name]) - tf.size(kept)
    return out

  return dataset.map(add, num_parallel_calls=tf.data.AUTOTUNE)


def _lengths(sequence_length: Mapping[str, int] | None) -> tuple[int, int]:
  lengths = sequence_length or {}
  if not {'inputs', 'targets'} <= set(lengths):
    raise ValueError(
      'A denoising task needs the lengths of inputs and targets, with <s> and </s>: '
      f"TASK_FEATURE_LENGTHS = {{'inputs': 1024, 'targets': 1024}}. Got: {lengths}"
    )
  if lengths['targets'] < 3:
    raise ValueError(
      "TASK_FEATURE_LENGTHS['targets'] must be at least 3, for <s>, a token and </s>. "
      f'Got: {lengths["targets"]}'
    )
  return lengths['inputs'], lengths['targets']
