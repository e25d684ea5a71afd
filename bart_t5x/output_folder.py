"""A folder that is either complete or not there: built aside, moved at the end."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from bart_t5x import shards, tokenization

CORPUS_FILE = 'corpus.json'
FORMAT_VERSION = 1
_WORKING = '.prepare-unfinished'


class Occupied(Exception):
  """The output folder holds something else."""


def parse(text: str, path: str) -> dict[str, Any]:
  """The content of corpus.json.

  Args:
    text: of the file.
    path: for the message.

  Raises:
    ValueError: the file is damaged.
  """
  try:
    return json.loads(text)
  except ValueError as e:
    raise ValueError(
      f'{path!r} is damaged ({e}). Copy it again, or prepare the corpus again with '
      '--overwrite.'
    ) from e


def read(folder: str) -> dict[str, Any] | None:
  """The content of corpus.json; None where there is none that can be read."""
  path = os.path.join(folder, CORPUS_FILE)
  try:
    with open(path, encoding='utf-8') as f:
      return parse(f.read(), path)
  except (OSError, ValueError):
    return None


def is_complete(
  folder: str, settings: Mapping[str, Any], files: Iterable[str] = ()
) -> bool:
  """Whether a folder holds the corpus that these settings make.

  The sizes of the source's files must be the same too, as far as they are still there.

  Args:
    folder: of the corpus.
    settings: it is to be made with.
    files: of the source, as found now; one that the corpus was not made of is missing.
  """
  corpus = read(folder)
  if corpus is None or corpus.get('format_version') != FORMAT_VERSION:
    return False
  if corpus.get('settings') != json.loads(json.dumps(dict(settings))):
    return False
  names = set(os.listdir(folder))
  for split, counts in corpus['splits'].items():
    if not names.issuperset(shards.shard_names(split, counts['shards'])):
      return False
  if not names & {tokenization.BYTE_LEVEL_FILE, tokenization.SENTENCEPIECE_FILE}:
    return False
  if not set(files) <= set(corpus['source_files']):
    return False
  return all(
    not os.path.exists(path) or os.path.getsize(path) == size
    for path, size in corpus['source_files'].items()
  )


@contextlib.contextmanager
def building(
  folder: str, overwrite: bool, settings: Mapping[str, Any] = MappingProxyType({})
) -> Iterator[str]:
  """A working folder, whose files move into `folder` if all goes well.

  Args:
    folder: to be made or filled; left as it was if the body raises.
    overwrite: whether files in it may go, once the new ones are complete.
    settings: what the corpus is made with, for the message of a folder that holds one.

  Yields:
    Path of the working folder, on the same file system.

  Raises:
    Occupied: `folder` is not empty, or another process is filling it.
    OSError: it cannot be made or written.
  """
  _check_free(folder, overwrite, settings)
  created = not os.path.isdir(folder)
  working = os.path.join(folder, _WORKING)
  try:
    os.makedirs(working, exist_ok=True)
  except OSError as e:
    raise OSError(f'Cannot write to --output_dir={folder!r}: {e.strerror or e}.') from e
  with _lock(working, folder):
    try:
      _empty(working)  # what a run that was killed left
      yield working
      _move(working, folder)
    except BaseException as e:
      shutil.rmtree(working, ignore_errors=True)
      if created:
        with contextlib.suppress(OSError):
          os.rmdir(folder)
      if isinstance(e, OSError) and e.filename is None and e.strerror:
        raise OSError(f'Cannot write to {folder!r}: {e.strerror}.') from e
      raise
    shutil.rmtree(working)


def _differences(folder: str, settings: Mapping[str, Any]) -> str:
  """What sets the corpus that is there apart from the one asked for, in words."""
  there = (read(folder) or {}).get('settings', {})
  wanted = json.loads(json.dumps(dict(settings)))
  names = [n for n in {**there, **wanted} if there.get(n) != wanted.get(n)]
  if not names:
    return (
      'of which files are missing, or whose source has files that are new or have '
      'changed since'
    )
  arguments = ', '.join(
    # Of a tokenizer the settings hold a hash.
    f'--{n}'
    if n == 'tokenizer_file'
    else f'--{n}: {there.get(n)!r}, now {wanted.get(n)!r}'
    for n in names
  )
  return f'made with other arguments ({arguments})'


def _check_free(folder: str, overwrite: bool, settings: Mapping[str, Any]) -> None:
  if os.path.exists(folder) and not os.path.isdir(folder):
    raise Occupied(f'--output_dir={folder!r} is a file. Name a folder.')
  names = set(os.listdir(folder)) if os.path.isdir(folder) else set()
  names.discard(_WORKING)
  if not names or overwrite:
    return
  if CORPUS_FILE in names:
    raise Occupied(
      f'{folder!r} holds a corpus {_differences(folder, settings)}. '
      'Name another --output_dir, or replace it with --overwrite.'
    )
  raise Occupied(
    f'{folder!r} is not empty ({sorted(names)[0]!r}, …) and holds no complete corpus. '
    'Name another --output_dir, or replace what is there with --overwrite.'
  )


@contextlib.contextmanager
def _lock(working: str, folder: str) -> Iterator[None]:
  # On the folder itself: nothing is left behind, and the system lets go of it when the
  # process ends, however it ends.
  handle = os.open(working, os.O_RDONLY)
  try:
    try:
      fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      raise Occupied(f'Another process is preparing {folder!r} just now.') from e
    yield
  finally:
    os.close(handle)


def _empty(folder: str) -> None:
  for entry in os.scandir(folder):
    if entry.is_dir(follow_symlinks=False):
      shutil.rmtree(entry.path)
    else:
      os.remove(entry.path)


def _move(working: str, folder: str) -> None:
  """Old files out, corpus.json first; new files in, corpus.json last."""
  old = [name for name in os.listdir(folder) if name != _WORKING]
  for name in sorted(old, key=lambda n: n != CORPUS_FILE):
    if _is_ours(name):
      os.remove(os.path.join(folder, name))
  for name in sorted(os.listdir(working), key=lambda n: n == CORPUS_FILE):
    os.replace(os.path.join(working, name), os.path.join(folder, name))


def _is_ours(name: str) -> bool:
  """Whether `prepare` writes files of this name: others are never removed."""
  return name.endswith('.tfrecord') or name in (
    CORPUS_FILE,
    tokenization.BYTE_LEVEL_FILE,
    tokenization.SENTENCEPIECE_FILE,
  )
