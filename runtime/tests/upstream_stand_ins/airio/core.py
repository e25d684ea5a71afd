"""Classes of which nothing is an instance, so that T5X takes every task for seqio's."""


class DatasetProviderBase:
  """Not a base of seqio's."""


class Task(DatasetProviderBase):
  """Not seqio's."""


class Mixture(DatasetProviderBase):
  """Not seqio's."""


class AirIODatasetIterator:
  """Not an iterator over a tf.data.Dataset."""
