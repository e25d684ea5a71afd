"""Small TensorFlow functions on vectors, for what runs inside `tf.data`.

They take fewer operations than their public likes, or fewer that copy: at some hundred
microseconds an example, those are what is paid for.
"""

from collections.abc import Callable

import tensorflow as tf

# Keeps a function from AutoGraph, which looks through all that it calls for `if` and
# `for` over tensors. There are none here, and looking took most of a run's first ten
# seconds.
do_not_convert = tf.autograph.experimental.do_not_convert


def joined_ranges(begins: tf.Tensor, ends: tf.Tensor) -> tf.Tensor:
  """The numbers of the ranges [begins, ends) after each other, int32 [k] each."""
  return tf.raw_ops.RaggedRange(
    starts=begins, limits=ends, deltas=1, Tsplits=tf.int32
  ).rt_dense_values


def select(values: tf.Tensor, chosen: tf.Tensor) -> tf.Tensor:
  """The values for which `chosen` holds: `tf.boolean_mask` in fewer operations."""
  return tf.gather(values, places(chosen))


def places(chosen: tf.Tensor) -> tf.Tensor:
  """Where `chosen` [n] holds, int64 [k]. (A reshape copies nothing, a slice does.)"""
  return tf.reshape(tf.where(chosen), [-1])


def sums_at(places: tf.Tensor, values: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
  """A vector of `size` zeros with values added at places; negative places are none."""
  return tf.math.unsorted_segment_sum(values, places, size)


def replace_if(
  condition: tf.Tensor,
  values: tf.Tensor,
  function: Callable[..., tf.Tensor],
  arguments: tuple[tf.Tensor, ...],
) -> tf.Tensor:
  """`function(*arguments)` where the condition holds, else the values, int32 [n].

  For what is rare: `tf.cond` would be dissolved in the graph around it, and then each
  operation there, run or not, has its part in the control flow (a seventh of the
  noise's time). The raw op calls a function, or does not.
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
