"""Saves, keeps and restores checkpoints with Orbax.

A checkpoint is `MODEL_DIR/checkpoint_<step>` with an item `state`, the train state
`{state: {param_states, step}, target: params}`, an item `dataset`, the state of the
training iterator, and digests of its files, which are compared before it is restored.
It is written in the background under a temporary name and renamed when complete; a
checkpoint to be deleted is renamed first. So a process killed at any time leaves only
complete checkpoints under their names. `Checkpointer` writes the layout that T5X wrote
before Orbax (`checkpoint_importer`); both are read.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import clu.data.dataset_iterator as clu_iterators
import gin
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers as policies

from t5x import checkpoint_importer, multihost, state_utils, whole_files
from t5x.checkpoint_importer import DamagedCheckpointError, LazyArray

PyTreeDef = jax.tree_util.PyTreeDef

_STATE = 'state'
_DATASET = 'dataset'
_TRAIN_DS = 'train_ds'  # Prefix of the files of dataset states.
_METRICS = 'metrics'
_TRASH = 'deleting'  # Folder in the model's folder, emptied after each save.
_UNFINISHED = '.unfinished'  # Suffix of a checkpoint that `Checkpointer` is writing.
_SAVE_TIMEOUT = 600  # Seconds that a host waits for the others to finish a save.
DIGESTS = 'SHA256SUMS'  # File in a checkpoint, written last.
_THREADS = 16
_SHOWN = 8  # Names listed in an error message.

_RESTART_DATA = (
  'To restart the data instead, set utils.SaveCheckpointConfig.save_dataset = False '
  '(and utils.RestoreCheckpointConfig.restore_dataset = False if it is True).'
)


class CheckpointSaveError(OSError):
  """A checkpoint could not be written. Earlier ones are intact."""


class DatasetStateError(ValueError):
  """A dataset state is missing, or belongs to another pipeline or other data."""


class SaveStateTransformationFn(Protocol):
  """Transforms a state dict and its `ParameterInfo`s before saving."""

  def __call__(self, state_dict: Any, parameter_infos: Any) -> tuple[Any, Any]: ...


class RestoreStateTransformationFn(Protocol):
  """Maps a saved state dict to the names of the current model."""

  def __call__(
    self, state_dict: Any, target_state_dict: Any, *, is_resuming: bool = False
  ) -> Any: ...


def get_local_data(x: Any) -> Any:
  """Returns this host's part of a global array, and any other value unchanged."""
  if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
    return x.addressable_data(0)
  return x


# -- Folders -------------------------------------------------------------------


def absolute(path: epath.PathLike) -> epath.Path:
  """Makes a path absolute, as Orbax requires."""
  text = os.fspath(path)
  return epath.Path(text if '://' in text else os.path.abspath(text))


def _checkpoint_folder(path: epath.PathLike) -> epath.Path:
  """The absolute folder of a checkpoint given by its folder or its index file."""
  folder = absolute(path)
  is_index = folder.name == checkpoint_importer.INDEX_FILE and folder.is_file()
  return folder.parent if is_index else folder


def get_checkpoint_dir(checkpoints_dir: epath.PathLike, step: int) -> str:
  """Returns `<checkpoints_dir>/checkpoint_<step>`."""
  return os.path.join(checkpoints_dir, f'checkpoint_{step}')


def step_in_name(path: epath.PathLike) -> int | None:
  """Returns the step in the path of a checkpoint, or None for any other path."""
  name = os.path.basename(os.fspath(path).rstrip('/'))
  match = re.fullmatch(r'checkpoint_(\d+)', name)
  return int(match[1]) if match else None


def all_steps(checkpoints_dir: epath.PathLike) -> list[int]:
  """Returns the steps of the complete checkpoints in a folder, ascending."""
  root = epath.Path(checkpoints_dir)
  if not root.is_dir():
    return []
  folders = [folder for folder in root.iterdir() if step_in_name(folder) is not None]
  if os.fspath(root).startswith('gs://'):
    # Folders cannot be renamed there; Orbax marks complete checkpoints with a file.
    marks = ('commit_success.txt', checkpoint_importer.INDEX_FILE)
    folders = [f for f in folders if any((f / mark).exists() for mark in marks)]
  return sorted(step_in_name(folder) for folder in folders)


def is_checkpoint(path: epath.PathLike) -> bool:
  """Returns whether a path is that of a complete checkpoint."""
  return step_in_name(path) in all_steps(absolute(path).parent)


def latest_step(checkpoints_dir: epath.PathLike) -> int | None:
  """Returns the step of the newest complete checkpoint, or None."""
  return max(all_steps(checkpoints_dir), default=None)


# -- Digests -------------------------------------------------------------------


def _each(function: Callable[..., Any], *iterables: Any) -> list[Any]:
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    return list(pool.map(function, *iterables))


def _digest(file: pathlib.Path) -> str:
  with file.open('rb') as opened:
    return hashlib.file_digest(opened, 'sha256').hexdigest()


def _write_digests(folder: epath.Path):
  """Writes the digests of a checkpoint's files in the format of `sha256sum`."""
  if '://' in os.fspath(folder):
    return  # Buckets have their own.
  files = sorted(file for file in pathlib.Path(folder).rglob('*') if file.is_file())
  lines = [
    f'{digest}  {file.relative_to(folder)}\n'
    for digest, file in zip(_each(_digest, files), files, strict=True)
  ]
  with whole_files.whole_file(folder / DIGESTS) as file:
    file.write(''.join(lines))


def _verify(folder: epath.Path):
  """Compares files with their digests, each process its share.

  Raises:
    DamagedCheckpointError: a file differs. Missing files are left to the readers.
  """
  if '://' in os.fspath(folder) or not (note := folder / DIGESTS).exists():
    return
  text = note.read_bytes().decode('utf-8', 'replace')
  saved = {n: digest for digest, n in re.findall(r'(?m)^(\w{64})  (.+)$', text)}
  names = sorted(saved)[jax.process_index() :: jax.process_count()]
  names = [name for name in names if (folder / name).is_file()]

  def digest(name):
    try:
      return _digest(pathlib.Path(folder) / name)
    except PermissionError:
      raise
    except OSError as error:  # The disk is damaged.
      return error

  found = _each(digest, names)
  damaged = [n for n, digest in zip(names, found, strict=True) if digest != saved[n]]
  if not multihost.everywhere(not damaged):
    raise DamagedCheckpointError(
      f"'{folder}' has files that do not match {DIGESTS}: "
      f'{_listed(damaged) or "see another process"}.'
    )


# -- Restoring arrays ----------------------------------------------------------


def _cast(name: str, dtype: Any, wanted: Any) -> np.dtype:
  """The dtype to save or restore an array in. Only floating parameters are cast."""
  is_parameter = name.startswith('target/') and jnp.issubdtype(dtype, jnp.floating)
  return np.dtype(wanted if wanted and is_parameter else dtype)


def _map_named(
  function: Callable[[str, Any], Any], tree: Any, name: tuple[str, ...] = ()
) -> Any:
  """Maps function('/'-joined name, leaf) over nested dicts. None stays None."""
  if isinstance(tree, Mapping):
    return {k: _map_named(function, v, (*name, k)) for k, v in tree.items()}
  return None if tree is None else function('/'.join(name), tree)


def _leaves(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Flattens to '/'-joined names and drops leaves that are None."""
  flat = state_utils.flatten_state_dict(tree)
  return {name: leaf for name, leaf in flat.items() if leaf is not None}


@dataclasses.dataclass(frozen=True)
class Destination:
  """The arrays to restore and where to put them."""

  state_dict: Mapping[str, Any]  # Nested, with arrays or their shapes.
  axes: Mapping[str, Any]  # Nested, with PartitionSpecs or None (replicated).
  mesh: jax.sharding.Mesh
  dtype: Any = None  # Parameters are cast to it; None keeps their dtype on disk.

  def sharding(self, name: str) -> NamedSharding:
    spec: Any = self.axes
    for key in name.split('/'):
      spec = spec.get(key) if isinstance(spec, Mapping) else None
    return NamedSharding(self.mesh, PartitionSpec() if spec is None else spec)

  def cast(self, name: str, dtype: Any) -> np.dtype:
    return _cast(name, dtype, self.dtype)

  def place(self, name: str, value: Any) -> jax.Array:
    """Puts a value on the mesh, cast."""
    sharding = self.sharding(name)
    if isinstance(value, jax.Array) and len(value.sharding.device_set) > 1:
      value = value.astype(self.cast(name, value.dtype))
      return jax.device_put(value, sharding)
    value = np.asarray(value)
    value = value.astype(self.cast(name, value.dtype))
    return jax.make_array_from_callback(value.shape, sharding, lambda i: value[i])


_AS_NUMPY = ocp.RestoreArgs(restore_type=np.ndarray)


class _OrbaxArray(LazyArray):
  """An array of an Orbax checkpoint, not yet read."""

  def __init__(self, folder: epath.Path, name: str, leaf: Any):
    super().__init__(getattr(leaf, 'shape', ()) or (), leaf.dtype, self._read)
    self._folder = folder
    self.path = tuple(name.split('/'))

  def _read(self) -> np.ndarray:
    return _restore_orbax(self._folder, {self.path: _AS_NUMPY})[self.path]


def _restore_orbax(folder: epath.Path, restore_args: Mapping[Any, Any]) -> Any:
  """Reads the arrays with these paths; returns {path: array}."""
  try:
    tree = ocp.PyTreeCheckpointHandler(use_ocdbt=True).restore(
      folder,
      args=ocp.args.PyTreeRestore(
        item=traverse_util.unflatten_dict(dict.fromkeys(restore_args, 0)),
        restore_args=traverse_util.unflatten_dict(restore_args),
        partial_restore=True,
      ),
    )
  except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
    raise
  except Exception as error:
    raise DamagedCheckpointError(f"'{folder}' is unreadable: {error}") from error
  return traverse_util.flatten_dict(tree)


def _saved_tree(folder: epath.Path) -> dict[str, Any]:
  """Reads the names, shapes and dtypes of a checkpoint in either layout."""
  if (folder / checkpoint_importer.INDEX_FILE).exists():
    return checkpoint_importer.saved_tree(folder)
  if not (folder / _STATE).is_dir():
    if steps := all_steps(folder):
      raise ValueError(
        f"'{folder}' is a folder of checkpoints with steps {steps}. Give the path of "
        f'one, for instance {get_checkpoint_dir(folder, steps[-1])}.'
      )
    raise DamagedCheckpointError(f"'{folder}' is not a T5X checkpoint, or damaged.")
  folder = folder / _STATE
  try:
    tree = ocp.PyTreeCheckpointHandler(use_ocdbt=True).metadata(folder).tree
  except Exception as error:
    raise DamagedCheckpointError(f"'{folder}' is unreadable: {error}") from error
  return _map_named(lambda name, leaf: _OrbaxArray(folder, name, leaf), tree)


def _read_orbax(
  folder: epath.Path, sources: Mapping[str, _OrbaxArray], destination: Destination
) -> dict[str, jax.Array]:
  """Reads arrays by name. Several names may share a source."""
  restore_args: dict[tuple[str, ...], Any] = {}
  for name, source in sources.items():
    dtype = destination.cast(name, source.dtype)
    if source.path in restore_args:
      dtype = source.dtype  # Cast for each name after reading.
    restore_args[source.path] = ocp.ArrayRestoreArgs(
      sharding=destination.sharding(name), dtype=dtype
    )
  read = _restore_orbax(folder, restore_args)
  return {
    name: destination.place(name, read[source.path]) for name, source in sources.items()
  }


def _listed(texts: Sequence[str], separator: str = ', ') -> str:
  more = f' and {len(texts) - _SHOWN} more' if len(texts) > _SHOWN else ''
  return separator.join(sorted(texts)[:_SHOWN]) + more


def _choose(
  where: epath.Path,
  available: Mapping[str, Any],
  wanted: Mapping[str, Any],
  fallback: Mapping[str, Any],
) -> dict[str, Any]:
  """Takes each wanted array from the checkpoint or else from the fallback."""
  wrong = [
    f'{name} is {tuple(np.shape(available[name]))}, the model has {tuple(leaf.shape)}'
    for name, leaf in wanted.items()
    if name in available and tuple(np.shape(available[name])) != tuple(leaf.shape)
  ]
  if wrong:
    raise ValueError(
      f"Checkpoint '{where}' is of another model: {_listed(wrong, '; ')}. Configure "
      'the model as it was trained, or drop these arrays with '
      'RestoreCheckpointConfig.assignment_map and fallback_to_scratch.'
    )
  missing = [n for n in wanted if n not in available and n not in fallback]
  if missing:
    unused = _listed([name for name in available if name not in wanted])
    raise ValueError(
      f"Checkpoint '{where}' lacks {len(missing)} of {len(wanted)} arrays: "
      f'{_listed(missing)}. Its unused entries: {unused or "none"}. Map the names with '
      'RestoreCheckpointConfig.assignment_map, or initialise the missing arrays with '
      'fallback_to_scratch.'
    )
  return {name: available.get(name, fallback.get(name)) for name in wanted}


def read_state(
  folder: epath.Path,
  destination: Destination,
  transformations: Sequence[RestoreStateTransformationFn] = (),
  fallback_state: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Reads the train state of a checkpoint in either layout onto the mesh.

  Args:
    folder: `checkpoint_<step>`.
    destination: the arrays to read and where to put them.
    transformations: applied in order to the saved state dict before arrays are read.
    fallback_state: state dict with the arrays that the checkpoint lacks.

  Raises:
    ValueError: the checkpoint is of another model.
    DamagedCheckpointError: the checkpoint cannot be read.
  """
  tree = _saved_tree(folder)
  for transform in transformations:
    tree = transform(tree, destination.state_dict)
  wanted = _leaves(destination.state_dict)
  fallback = state_utils.flatten_state_dict(fallback_state or {})
  chosen = _choose(folder, _leaves(tree), wanted, fallback)
  in_orbax = {n: leaf for n, leaf in chosen.items() if isinstance(leaf, _OrbaxArray)}
  values = _read_orbax(folder / _STATE, in_orbax, destination) if in_orbax else {}
  others = checkpoint_importer.read_all(
    {name: leaf for name, leaf in chosen.items() if name not in in_orbax},
    lambda name, leaf: leaf.read(
      destination.sharding(name), destination.cast(name, leaf.dtype)
    ),
  )
  for name, value in others.items():
    is_read = isinstance(chosen[name], checkpoint_importer.StoredArray)
    values[name] = value if is_read else destination.place(name, value)
  return _map_named(lambda name, _: values[name], destination.state_dict)


def load_t5x_checkpoint(
  path: str,
  step: int | None = None,
  state_transformation_fns: Sequence[RestoreStateTransformationFn] = (),
  remap: bool = True,
  restore_dtype: Any = None,
  lazy_parameters: bool = False,
) -> dict[str, Any]:
  """Reads a checkpoint of any model, in either layout.

  Args:
    path: a folder of checkpoints, a checkpoint, or its file `checkpoint`.
    step: selects from a folder of checkpoints; None for the newest.
    state_transformation_fns: called in order with (saved state dict, {}) before arrays
      are read.
    remap: whether to call them.
    restore_dtype: parameters are cast to it; None keeps their dtype on disk.
    lazy_parameters: whether to return `LazyArray`s instead of NumPy arrays.

  Raises:
    ValueError: the checkpoint does not exist.
    DamagedCheckpointError: the checkpoint cannot be read.
  """
  folder = _checkpoint_folder(path)
  if step is not None or all_steps(folder):
    step = latest_step(folder) if step is None else step
    folder = epath.Path(get_checkpoint_dir(folder, step))
  if not folder.is_dir():
    raise ValueError(f"Checkpoint '{folder}' does not exist.")
  tree = _saved_tree(folder)
  for transform in state_transformation_fns if remap else ():
    tree = transform(tree, {})

  def lazy(name, leaf):
    read = leaf.get if isinstance(leaf, LazyArray) else lambda: leaf
    return LazyArray(leaf.shape, _cast(name, leaf.dtype, restore_dtype), read)

  flat = state_utils.flatten_state_dict(tree, keep_empty_nodes=True)
  if not lazy_parameters:
    flat = checkpoint_importer.read_all(flat, lambda _, leaf: leaf.get())
    orbax = {name: leaf for name, leaf in flat.items() if isinstance(leaf, _OrbaxArray)}
    args = {leaf.path: _AS_NUMPY for leaf in orbax.values()}
    read = _restore_orbax(folder / _STATE, args) if orbax else {}
    flat |= {name: read[leaf.path] for name, leaf in orbax.items()}
  for name, leaf in flat.items():
    if hasattr(leaf, 'shape'):
      flat[name] = lazy(name, leaf) if lazy_parameters else lazy(name, leaf).get()
  return traverse_util.unflatten_dict(flat, sep='/')


# -- Dataset state -------------------------------------------------------------


@dataclasses.dataclass
class _TfIterator:
  """Gives a plain `tf.data.Iterator` the two methods of clu's iterators."""

  iterator: Any

  def save(self, filename: str):
    import tensorflow as tf

    tf.train.Checkpoint(ds=self.iterator).write(filename)

  def restore(self, filename: str):
    import tensorflow as tf

    tf.train.Checkpoint(ds=self.iterator).read(filename).assert_consumed()


def _with_save(iterator: Any) -> Any:
  is_clu = isinstance(iterator, clu_iterators.DatasetIterator)
  return iterator if is_clu else _TfIterator(iterator)


def _check_readable(stem: epath.Path):
  """Reads a whole TensorFlow checkpoint, to find damage before anything uses it."""
  import tensorflow as tf

  try:
    dtypes = tf.train.load_checkpoint(os.fspath(stem)).get_variable_to_dtype_map()
    tf.raw_ops.RestoreV2(
      prefix=os.fspath(stem),
      tensor_names=list(dtypes),
      shape_and_slices=[''] * len(dtypes),
      dtypes=list(dtypes.values()),
    )
  except Exception as error:
    raise DamagedCheckpointError(f"'{stem}' is unreadable: {error}") from error


def _check_source(note: epath.Path, source: Mapping[str, str]):
  saved = json.loads(note.read_text())
  differing = [
    f"{field} was '{saved.get(field)}', now '{source[field]}'"
    for field in source
    if saved.get(field) != source[field]
  ]
  if differing:
    raise DatasetStateError(
      f"Dataset state '{note.parent}' was saved for different data: "
      f'{", ".join(differing)} (files: a digest of their names and sizes). Resume with '
      f'the original data or use a new MODEL_DIR. {_RESTART_DATA}'
    )


class DatasetCheckpointHandler(ocp.CheckpointHandler):
  """Saves and restores the state of this host's training iterator.

  The files are those of `tf.train.Checkpoint`, named as in upstream T5X:
  `dataset/train_ds-<shard>-of-<shards>.*` or, with several processes,
  `dataset/process_<i>-of-<n>/train_ds-…`. If the iterator has an attribute `source`, a
  dict that describes its data, that is written to `train_ds-….source.json` and compared
  on restore; upstream does neither.
  """

  def __init__(self, checkpoint_filename: str, should_write_dataset_ckpt: bool):
    # One of several hosts that read the same shard writes its state.
    self._filename = checkpoint_filename
    self._writes = should_write_dataset_ckpt

  def save(self, directory: epath.Path, args: 'DatasetArgs'):
    if self._writes and jax.process_count() > 1:
      directory = directory / f'process_{jax.process_index()}-of-{jax.process_count()}'
      directory.mkdir()
    self.write(directory, args.item)

  def write(self, directory: epath.Path, iterator: Any):
    """Writes this host's files, if any, directly to a folder."""
    if not self._writes:
      return
    _with_save(iterator).save(os.fspath(directory / self._filename))
    if source := getattr(iterator, 'source', None):
      (directory / f'{self._filename}.source.json').write_text(json.dumps(source))

  def _find(self, folder: epath.Path) -> epath.Path:
    """Finds the stem of this shard's files, whichever process wrote them."""
    places = (folder, *sorted(folder.glob('process_*')))
    for place in places:
      if any(place.glob(self._filename + '*')):
        return place / self._filename
    prefix = self._filename.split('-')[0]
    others = {f.name.split('.')[0] for p in places for f in p.glob(prefix + '-*')}
    if others:
      raise DatasetStateError(
        f"'{folder}' has dataset states {', '.join(sorted(others))}, but not "
        f'{self._filename}: the number of data shards has changed. Resume with the '
        f'original number of hosts. {_RESTART_DATA}'
      )
    raise DatasetStateError(
      f"'{folder}' has no dataset state; the checkpoint was saved without "
      f'save_dataset. {_RESTART_DATA}'
    )

  def restore(self, directory: epath.Path, args: 'DatasetArgs') -> Any:
    """Restores the iterator in place and returns it.

    Raises:
      DatasetStateError: this shard has no state, or that of another pipeline or of
        other data.
      DamagedCheckpointError: the files are incomplete or damaged.
    """
    stem = self._find(epath.Path(directory))
    note = stem.parent / f'{stem.name}.source.json'
    source = getattr(args.item, 'source', None)
    if source and note.exists():
      _check_source(note, source)
    if not stem.exists():  # A single file is not TensorFlow's.
      _check_readable(stem)
    try:
      _with_save(args.item).restore(os.fspath(stem))
    except Exception as error:
      raise DatasetStateError(
        f"Dataset state '{stem}' does not fit the data pipeline: {error}. Use the "
        'task, batch size, lengths, packing and preprocessors it was saved with. '
        f'{_RESTART_DATA}'
      ) from error
    return args.item


@ocp.args.register_with_handler(
  DatasetCheckpointHandler, for_save=True, for_restore=True
)
@dataclasses.dataclass
class DatasetArgs(ocp.args.CheckpointArgs):
  """The iterator to save or to restore."""

  item: Any = None


# -- The manager ---------------------------------------------------------------


@dataclasses.dataclass
class ParameterInfo:
  """Describes an array to a `SaveStateTransformationFn`."""

  name: str  # '/'-joined name in the train state.
  mesh_axes: PartitionSpec


_ParameterInfo = ParameterInfo  # T5X's name.


def _savable(leaf: Any) -> Any:
  """Converts a leaf to what Orbax saves: read, and not local to one of many hosts."""
  if isinstance(leaf, LazyArray):
    return leaf.get()
  if jax.process_count() > 1 and isinstance(leaf, jax.Array):
    return np.asarray(leaf) if leaf.is_fully_addressable else leaf
  return leaf


def _free_bytes(directory: epath.Path) -> float:
  """Free bytes on the disk, infinite for remote file systems."""
  path = os.fspath(directory)
  return math.inf if '://' in path else shutil.disk_usage(path).free


@gin.configurable(module='t5x.checkpoints')
class OrbaxCheckpointManagerInterface:
  """Manages the checkpoints of one model folder.

  Args:
    directory: the model's folder.
    train_state: state of arrays or their shapes, for names and axes.
    partitioner: has `mesh`, `get_mesh_axes`, `get_data_layout`.
    dataset_iterator: training iterator whose state is saved and restored.
    save_dtype: parameters are cast to it on disk; None keeps their dtype.
    restore_dtype: restored parameters are cast to it; None keeps their dtype.
    keep: how many of the newest to keep, or of the best with
      `metric_name_to_monitor`; None keeps all.
    period: steps between saves. The training loop decides when to save; with neither
      a period nor checkpoint_steps, the folder is not touched before the first save.
    checkpoint_steps: further steps to save at; see `period`.
    keep_dataset_checkpoints: how many of the newest keep the dataset state; None: all.
    force_keep_period: checkpoints at its multiples are never removed.
    metric_name_to_monitor: the metric by which to keep the `keep` best of all
      checkpoints, the newest included, and always the newest: `keep` checkpoints, or
      one more if the newest is not among the best.
    metric_mode: whether 'max' or 'min' is best.
    keep_checkpoints_without_metrics: whether checkpoints saved without the metric are
      kept as well.

  Raises:
    ValueError: an argument is out of range.
    CheckpointSaveError: checkpoints are to be saved and the folder is not writable.
  """

  def __init__(
    self,
    directory: str,
    train_state: Any,
    partitioner: Any,
    dataset_iterator: Any = None,
    save_dtype: Any = None,
    restore_dtype: Any = None,
    keep: int | None = None,
    period: int | None = 1,
    checkpoint_steps: Sequence[int] | None = None,
    keep_dataset_checkpoints: int | None = None,
    force_keep_period: int | None = None,
    metric_name_to_monitor: str | None = None,
    metric_mode: str = 'max',
    keep_checkpoints_without_metrics: bool = True,
  ):
    for name, value in (
      ('keep', keep),
      ('keep_dataset_checkpoints', keep_dataset_checkpoints),
      ('force_keep_period', force_keep_period),
    ):
      if value is not None and value < 1:
        raise ValueError(f'{name} must be at least 1, or None. Got: {value}.')
    if metric_mode not in ('max', 'min'):
      raise ValueError(f"metric_mode must be 'max' or 'min'. Got: '{metric_mode}'.")
    self.directory = absolute(directory)
    self._train_state = train_state
    self._partitioner = partitioner
    self._dataset_iterator = dataset_iterator
    self._save_dtype = np.dtype(save_dtype) if save_dtype else None
    self._restore_dtype = np.dtype(restore_dtype) if restore_dtype else None
    self._keep_dataset = keep_dataset_checkpoints
    self.metric_name_to_monitor = metric_name_to_monitor
    self._metric_mode = metric_mode
    if metric_name_to_monitor is None:
      kept = [policies.LatestN(keep)]
    else:
      best = policies.BestN(
        get_metric_fn=self._rank,
        reverse=metric_mode == 'min',
        n=keep,
        keep_checkpoints_without_metrics=keep_checkpoints_without_metrics,
      )
      kept = [policies.LatestN(1), best]
    if force_keep_period:
      kept.append(policies.EveryNSteps(force_keep_period))
    self._preservation = policies.AnyPreservationPolicy(kept)
    layout = partitioner.get_data_layout()
    self._dataset_handler = DatasetCheckpointHandler(
      f'{_TRAIN_DS}-{layout.shard_id:03}-of-{layout.num_shards:03}',
      layout.is_first_host_in_replica_set,
    )
    self._manager: ocp.CheckpointManager | None = None
    self._finisher: concurrent.futures.ThreadPoolExecutor | None = None
    self._finishing: concurrent.futures.Future | None = None
    if period or checkpoint_steps:
      self._open()

  def _rank(self, metrics: Mapping[str, float]) -> float:
    value = metrics[self.metric_name_to_monitor]
    worst = -math.inf if self._metric_mode == 'max' else math.inf
    return worst if math.isnan(value) else value

  def _folder(self, step: int) -> epath.Path:
    return epath.Path(get_checkpoint_dir(self.directory, step))

  def all_steps(self) -> Sequence[int]:
    """Returns the steps of complete checkpoints and of the one being written."""
    if self._manager is None:
      return all_steps(self.directory)
    return sorted(self._manager.all_steps())

  def latest_step(self) -> int | None:
    """Returns the newest step, or None."""
    return max(self.all_steps(), default=None)

  # -- Saving ------------------------------------------------------------------

  def _open(self):
    """Opens the folder for saving and removes what a killed run left behind."""
    try:
      if multihost.is_host_0():
        for pattern in (f'{_TRASH}*', f'checkpoint_*{_UNFINISHED}'):
          for leftover in self.directory.glob(pattern):
            leftover.rmtree()
      self._manager = self._make_manager()
    except OSError as error:
      raise CheckpointSaveError(
        f"Checkpoints cannot be written to '{self.directory}': {error}. Make the "
        'folder writable, or choose another MODEL_DIR.'
      ) from error
    self._finisher = concurrent.futures.ThreadPoolExecutor(1, 't5x_checkpoint')

  def _make_manager(self) -> Any:
    return ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        step_prefix='checkpoint',
        cleanup_tmp_directories=True,
        todelete_subdir=_TRASH,
        preservation_policy=self._preservation,
        best_fn=self._rank if self.metric_name_to_monitor else None,
        best_mode=self._metric_mode,
        async_options=ocp.AsyncOptions(timeout_secs=_SAVE_TIMEOUT),
      ),
      item_handlers={
        _STATE: ocp.PyTreeCheckpointHandler(use_ocdbt=True),
        _DATASET: self._dataset_handler,
      },
    )

  def save(
    self,
    train_state: Any,
    state_transformation_fns: Sequence[SaveStateTransformationFn] = (),
    metrics: Mapping[str, float] | None = None,
  ) -> bool:
    """Starts writing a checkpoint and leaves the rest to the background.

    The state may be changed or donated as soon as this returns. Call it on all hosts.

    Args:
      train_state: the state to save.
      state_transformation_fns: applied to its state dict in order.
      metrics: metrics of this state. If process 0's contain `metric_name_to_monitor`,
        that one is stored.

    Returns:
      False if this step already has a checkpoint, which stays unchanged.

    Raises:
      CheckpointSaveError: this save or the previous one failed.
    """
    self.wait_until_finished()
    if self._manager is None:
      self._open()
    step = int(get_local_data(train_state.step))
    if step in self.all_steps():
      logging.info('%s exists and is not written again.', self._folder(step))
      return False
    state_dict = _map_named(lambda _, x: _savable(x), train_state.state_dict())
    axes = self._destination()
    infos = _map_named(
      lambda name, _: ParameterInfo(name, axes.sharding(name).spec), state_dict
    )
    for transform in state_transformation_fns:
      state_dict, infos = transform(state_dict, infos)

    def save_arg(name, x):
      dtype = x.dtype if hasattr(x, 'dtype') else np.result_type(x)
      return ocp.SaveArgs(dtype=_cast(name, dtype, self._save_dtype))

    save_args = _map_named(save_arg, state_dict)
    self._check_space(state_dict, save_args)
    try:
      self._write(step, state_dict, save_args, self._monitored(metrics))
    except Exception as error:
      raise self._failure(step, error) from error
    self._finishing = self._finisher.submit(self._finish, step)
    return True

  def _write(self, step: int, state_dict: Any, save_args: Any, metrics: Any):
    items = {_STATE: ocp.args.PyTreeSave(state_dict, save_args=save_args)}
    if self._dataset_iterator is not None:
      items[_DATASET] = DatasetArgs(self._dataset_iterator)
    self._manager.save(
      step, args=ocp.args.Composite(**items), metrics=metrics, force=True
    )

  def _monitored(self, metrics: Mapping[str, float] | None) -> dict[str, float] | None:
    """The monitored metric of process 0, or None if it has none."""
    if self.metric_name_to_monitor is None:
      return None
    has_metric = self.metric_name_to_monitor in (metrics or {})
    value = float(metrics[self.metric_name_to_monitor]) if has_metric else 0.0
    if jax.process_count() > 1:
      has_metric, value = multihost.broadcast((np.int32(has_metric), np.float32(value)))
    return {self.metric_name_to_monitor: float(value)} if has_metric else None

  def _check_space(self, state_dict: Any, save_args: Any):
    needed = sum(
      np.size(x) * args.dtype.itemsize
      for x, args in zip(jax.tree.leaves(state_dict), jax.tree.leaves(save_args))
    )
    free = _free_bytes(self.directory) if multihost.is_host_0() else math.inf
    is_full = free < needed
    if jax.process_count() > 1:
      is_full = bool(multihost.broadcast(np.int32(is_full)))
    if is_full:
      raise CheckpointSaveError(
        f"A checkpoint in '{self.directory}' needs {needed / 1e9:.3g} GB; "
        f'{free / 1e9:.3g} GB are free. Free some space, or lower '
        'SaveCheckpointConfig.keep.'
      )

  def _failure(self, step: int, error: Exception) -> CheckpointSaveError:
    self._manager = None  # The next save opens the folder again.
    return CheckpointSaveError(
      f"Checkpoint '{self._folder(step)}' could not be written: {error}. The disk has "
      f'{_free_bytes(self.directory) / 1e9:.3g} GB free; earlier checkpoints are '
      'intact.'
    )

  def _finish(self, step: int):
    """Waits for the files, then removes old ones. Runs in the background."""
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._failure(step, error) from error
    if not multihost.is_host_0():
      return
    try:
      if self._keep_dataset:
        folders = [self._folder(s) for s in all_steps(self.directory)]
        states = [[*f.glob(_DATASET), *f.glob(f'{_TRAIN_DS}*')] for f in folders]
        states = [state for state in states if state]
        for state in states[: -self._keep_dataset]:
          self._discard(*state)
      if (trash := self.directory / _TRASH).exists():
        trash.rmtree()
    except OSError as error:
      # The new checkpoint is complete, and the next save will try again.
      logging.warning('Cleaning up after a save failed: %s', error)
    try:
      _write_digests(self._folder(step))
    except OSError as error:
      logging.warning('Checkpoint %d has no digests: %s', step, error)

  def _discard(self, *paths: epath.Path):
    trash = self.directory / _TRASH
    trash.mkdir(exist_ok=True)
    for path in paths:
      path.rename(trash / f'{path.parent.name}_{path.name}')

  def wait_until_finished(self):
    """Waits for the checkpoint being written.

    Raises:
      CheckpointSaveError: the save failed.
    """
    if self._finishing is not None:
      finishing, self._finishing = self._finishing, None
      finishing.result()

  def close(self):
    """Waits for the checkpoint being written and stops the background thread.

    Raises:
      CheckpointSaveError: the save failed.
    """
    try:
      self.wait_until_finished()
    finally:
      if self._manager is not None:
        self._manager.close()
        self._manager = None
      if self._finisher is not None:
        self._finisher.shutdown()

  # -- Restoring ---------------------------------------------------------------

  def set_aside(self, step: int):
    """Renames a damaged checkpoint so that its step can be saved again."""
    folder = self._folder(step)
    target = folder.parent / f'damaged_{folder.name}'
    if multihost.is_host_0():
      if target.exists():
        target.rmtree()
      folder.rename(target)
    multihost.sync(f't5x_set_aside_{step}')
    logging.error('Renamed the damaged checkpoint to %s.', target)

  def _destination(self) -> Destination:
    return Destination(
      self._train_state.state_dict(),
      self._partitioner.get_mesh_axes(self._train_state).state_dict(),
      self._partitioner.mesh,
      self._restore_dtype,
    )

  def restore(
    self,
    step: int | None = None,
    path: str | None = None,
    fallback_state: Mapping[str, Any] | None = None,
    state_transformation_fns: Sequence[RestoreStateTransformationFn] = (),
    lazy_parameters: bool = False,
  ) -> Any:
    """Restores a train state onto the mesh, and the state of the iterator if any.

    Args:
      step: a checkpoint of this folder; the newest if neither is given.
      path: a checkpoint in any folder.
      fallback_state: state dict with the arrays that the checkpoint lacks.
      state_transformation_fns: applied in order to the saved state dict.
      lazy_parameters: ignored (T5X compatibility); arrays are always read.

    Raises:
      FileNotFoundError: the checkpoint does not exist.
      ValueError: it is of another model, or its dataset state of another pipeline.
      DamagedCheckpointError: the checkpoint cannot be read.
    """
    del lazy_parameters
    if path is not None:
      folder = _checkpoint_folder(path)
    else:
      step = latest_step(self.directory) if step is None else step
      folder = self.directory if step is None else self._folder(step)
    if path is None and step is None or not folder.exists():
      parent = self.directory if path is None else folder.parent
      found = f'It has steps {steps}' if (steps := all_steps(parent)) else 'It has none'
      raise FileNotFoundError(
        f"Checkpoint '{folder.name}' was not found in '{parent}'. {found}."
      )
    _verify(folder)
    state_dict = read_state(
      folder, self._destination(), state_transformation_fns, fallback_state
    )
    if self._dataset_iterator is not None:
      is_orbax = (folder / _STATE).is_dir()
      self._dataset_handler.restore(
        folder / _DATASET if is_orbax else folder, DatasetArgs(self._dataset_iterator)
      )
    return self._train_state.restore_state(state_dict)


class Checkpointer(OrbaxCheckpointManagerInterface):
  """Writes the layout before Orbax to one folder and waits for each write.

  `retention` takes `keep`, `keep_dataset_checkpoints` and the like of
  `OrbaxCheckpointManagerInterface`. Nothing is written before the first save.
  """

  def __init__(
    self,
    train_state: Any,
    partitioner: Any,
    checkpoints_dir: str,
    dataset_iterator: Any = None,
    *,
    save_dtype: Any = np.float32,
    restore_dtype: Any = None,
    **retention: Any,
  ):
    super().__init__(
      checkpoints_dir,
      train_state,
      partitioner,
      dataset_iterator,
      save_dtype,
      restore_dtype,
      period=None,
      **retention,
    )
    self.retention = {k: v for k, v in retention.items() if v is not None}

  def save(
    self,
    train_state: Any,
    state_transformation_fns: Sequence[SaveStateTransformationFn] = (),
    metrics: Mapping[str, float] | None = None,
    *,
    concurrent_gb: int = 128,
  ) -> bool:
    """Saves a checkpoint and waits for it; `concurrent_gb` is ignored."""
    del concurrent_gb
    saved = super().save(train_state, state_transformation_fns, metrics)
    self.wait_until_finished()
    return saved

  def _make_manager(self) -> Any:
    # Stands in for Orbax's, which cannot write this layout.
    self.directory.mkdir(parents=True, exist_ok=True)
    return types.SimpleNamespace(
      all_steps=lambda: all_steps(self.directory),
      wait_until_finished=lambda: None,
      close=lambda: None,
    )

  def _write(self, step: int, state_dict: Any, save_args: Any, metrics: Any):
    folder = unfinished = self._folder(step)
    if not os.fspath(folder).startswith('gs://'):  # There, the index marks the end.
      unfinished = folder.parent / f'{folder.name}{_UNFINISHED}'
    first = multihost.is_host_0()
    if first:
      if unfinished.exists():  # Of a killed run, on gs://.
        unfinished.rmtree()
      unfinished.mkdir(parents=True)
    multihost.sync(f't5x_created_{step}')
    dtypes = {name: args.dtype for name, args in _leaves(save_args).items()}
    tree = checkpoint_importer.write_arrays(unfinished, state_dict, dtypes)
    if self._dataset_iterator is not None:
      self._dataset_handler.write(unfinished, self._dataset_iterator)
    multihost.sync(f't5x_written_{step}')
    if first:
      if metrics:  # Where Orbax has them.
        (unfinished / _METRICS).mkdir()
        (unfinished / _METRICS / _METRICS).write_text(json.dumps(metrics))
      checkpoint_importer.write_index(unfinished, tree)
      if unfinished != folder:
        unfinished.rename(folder)
      self._remove_old()
    multihost.sync(f't5x_saved_{step}')

  def _remove_old(self):
    saved = []
    for step in all_steps(self.directory):
      file = self._folder(step) / _METRICS / _METRICS
      metrics = json.loads(file.read_text()) if file.exists() else None
      saved.append(types.SimpleNamespace(step=step, metrics=metrics))
    kept = self._preservation.should_preserve(
      saved, context=policies.PreservationContext()
    )
    for checkpoint, keep in zip(saved, kept, strict=True):
      if not keep:
        self._discard(self._folder(checkpoint.step))


@gin.configurable(module='t5x.checkpoints')
class SaveBestCheckpointer(Checkpointer):
  """Keeps the `keep` best checkpoints by a metric, the newest included, and the newest.

  Bind it to `SaveCheckpointConfig.checkpointer_cls`.
  """

  def __init__(
    self,
    *args: Any,
    metric_name_to_monitor: str = 'train/accuracy',
    **retention: Any,
  ):
    super().__init__(*args, metric_name_to_monitor=metric_name_to_monitor, **retention)
