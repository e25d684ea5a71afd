"""What of a save goes on in the background, and what is told of a failed one."""

import asyncio
import concurrent.futures
import time
import types

import pytest

from t5x.checkpointing import writing


def test_background_writes_are_waited_for_however_they_end():
  ended = []

  def fail():
    raise OSError('No space left on device')

  def write():
    time.sleep(0.2)
    ended.append(True)

  with concurrent.futures.ThreadPoolExecutor(2) as pool:

    async def async_save(tree, args):
      assert (tree, args) == ('tree', 'args')
      return [pool.submit(fail), pool.submit(write)]

    handler = types.SimpleNamespace(async_save=async_save)
    writes = writing.BackgroundWrites(handler)
    writes.wait()
    first, second = asyncio.run(handler.async_save('tree', args='args'))
    writes.wait()
    assert ended and second.done()
    assert isinstance(first.exception(), OSError)


@pytest.mark.parametrize(
  'error, advice',
  [
    (OSError(28, 'No space left on device'), 'Free some space'),
    (OSError(27, 'File too large'), 'Free some space'),
    (OSError(13, 'Permission denied'), 'Make the folder writable'),
    (ValueError('other'), 'Mend the cause'),
  ],
)
def test_advice_for_a_failed_write(error, advice):
  assert advice in writing.mend(error)
