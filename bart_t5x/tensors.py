"""Small TensorFlow functions on vectors, for use inside `tf.data`.

They take fewer operations, or copy less, than their public counterparts: an example's
noise takes some hundred microseconds, most of it the fixed cost of operations.
"""

from collections.abc import Callable

import tensorflow as tf

# Without it, AutoGraph searches a function and all its callees for `if` and `for` over
# tensors. There are none, and the search took most of a run's first ten seconds.
do_not_convert = tf.autograph.experimental.do_not_convert


def joined_ranges(begins: tf.Tensor, ends: tf.Tensor) -> tf.Tensor:
  """Concatenates the ranges [begins, ends), int32 [k] each."""
  return tf.raw_ops.RaggedRange(
    starts=begins, limits=ends, deltas=1, Tsplits=tf.int32
  ).rt_dense_values


def select(values: tf.Tensor, chosen: tf.Tensor) -> tf.Tensor:
  """The values for which `chosen` is true (`tf.boolean_mask`)."""
  return tf.gather(values, places(chosen))


def places(chosen: tf.Tensor) -> tf.Tensor:
  """Indices at which `chosen` [n] is true, int64 [k]."""
  # A reshape copies nothing, a slice does.
  return tf.reshape(tf.where(chosen), [-1])


def sums_at(places: tf.Tensor, values: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
  """Zeros [size] with values added at places; negative places are ignored."""
  return tf.math.unsorted_segment_sum(values, places, size)


def replace_if(
  condition: tf.Tensor,
  values: tf.Tensor,
  function: Callable[..., tf.Tensor],
  arguments: tuple[tf.Tensor, ...],
) -> tf.Tensor:
  """`function(*arguments)` if the condition is true, else `values`, int32 [n].

  Cheap where the condition is rarely true. `tf.cond` would be inlined, and each of its
  operations then takes part in the control flow, run or not: a seventh of the noise's
  time. The raw op calls a function, or does not.
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
