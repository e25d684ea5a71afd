"""Small TensorFlow functions on vectors, for use inside `tf.data`.

They need fewer operations, or copy less, than their public counterparts: most of the
noise's time is the fixed cost of operations.
"""

from collections.abc import Callable

import tensorflow as tf

# Spares AutoGraph's search for `if` and `for` over tensors, which we don't use: it took
# most of the first ten seconds of a run.
do_not_convert = tf.autograph.experimental.do_not_convert


def joined_ranges(begins: tf.Tensor, ends: tf.Tensor) -> tf.Tensor:
  """Concatenates the ranges [begins, ends), int32 [k] each."""
  return tf.raw_ops.RaggedRange(
    starts=begins, limits=ends, deltas=1, Tsplits=tf.int32
  ).rt_dense_values


def select(values: tf.Tensor, chosen: tf.Tensor) -> tf.Tensor:
  """Returns the values for which `chosen` is true, like `tf.boolean_mask`."""
  return tf.gather(values, places(chosen))


def places(chosen: tf.Tensor) -> tf.Tensor:
  """Returns the indices at which `chosen` is true, int64 [k]."""
  # A reshape copies nothing; a slice would.
  return tf.reshape(tf.where(chosen), [-1])


def sums_at(places: tf.Tensor, values: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
  """Adds values to zeros [size] at places; negative places are ignored."""
  return tf.math.unsorted_segment_sum(values, places, size)


def replace_if(
  condition: tf.Tensor,
  values: tf.Tensor,
  function: Callable[..., tf.Tensor],
  arguments: tuple[tf.Tensor, ...],
) -> tf.Tensor:
  """Returns `function(*arguments)` if the condition is true, else `values`, int32 [n].

  For conditions that are rarely true: `tf.cond` would be inlined, so that even
  operations that don't run cost time.
  """
  if tf.executing_eagerly():
    return tf.cond(condition, lambda: function(*arguments), lambda: values)
  inputs = [values, *arguments]
  signature = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in inputs]

  def branch(python_function):
    traced = tf.function(python_function, autograph=False)
    return traced.get_concrete_function(*signature)

  (result,) = tf.raw_ops.StatelessIf(
    cond=condition,
    input=inputs,
    Tout=[values.dtype],
    then_branch=branch(lambda kept, *others: [function(*others)]),
    else_branch=branch(lambda kept, *others: [kept]),
    output_shapes=[[None]],
  )
  return result
