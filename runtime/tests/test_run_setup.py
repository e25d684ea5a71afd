"""Keys, folders and the last step of a run."""

from concurrent import futures

import jax
import numpy as np
import pytest

from t5x import run_setup


@pytest.fixture(autouse=True)
def same_generator_afterwards():
  before = jax.config.jax_default_prng_impl
  yield
  jax.config.update('jax_default_prng_impl', before)


def keys(seed, hardware=False):
  return [np.asarray(key) for key in run_setup.random_keys(seed, hardware)]


def test_keys_follow_from_the_seed():
  init, dropout = keys(3)
  np.testing.assert_array_equal(keys(3), [init, dropout])
  assert not np.array_equal(init, dropout)
  assert not np.array_equal(init, keys(4)[0])
  # As T5X splits them: runs from one seed start from the same parameters.
  np.testing.assert_array_equal(
    [init, dropout], jax.random.split(jax.random.PRNGKey(3))
  )


def test_hardware_numbers_are_used_on_request():
  software = jax.random.normal(run_setup.random_keys(3, False)[0], (4,))
  assert jax.config.jax_default_prng_impl == 'threefry2x32'
  hardware = jax.random.normal(run_setup.random_keys(3, True)[0], (4,))
  assert jax.config.jax_default_prng_impl == 'unsafe_rbg'
  assert not np.array_equal(software, hardware)


def test_the_last_step(tmp_path):
  folder = str(tmp_path)
  assert run_setup.last_step(folder, 5, 12, None) == 12
  assert run_setup.last_step(folder, 5, 12, 3) == 8
  # Started again at step 7, it still ends where it was to end.
  assert run_setup.last_step(folder, 7, 12, 3) == 8
  # Gin files write 1e5; steps are counted in whole numbers all the same.
  assert type(run_setup.last_step(folder, 5, 1e2, None)) is int
  with pytest.raises(ValueError, match='total_steps must be a whole number.*12.5'):
    run_setup.last_step(folder, 5, 12.5, None)
  with pytest.raises(ValueError, match='total_steps must be a whole number.*None'):
    run_setup.last_step(folder, 5, None, None)
  with pytest.raises(ValueError, match='end at step 12, but its checkpoint is at'):
    run_setup.last_step(folder, 13, 12, None)


def test_a_folder_that_cannot_be_is_named_with_the_reason(tmp_path):
  file = tmp_path / 'notes.txt'
  file.write_text('mine')
  with pytest.raises(
    OSError, match='model_dir .*notes.txt cannot be .* is a file, and'
  ):
    run_setup.open_folder('model_dir', str(file))
  with pytest.raises(OSError, match='notes.txt/run cannot be .*: Not a directory$'):
    run_setup.open_folder('model_dir', str(file / 'run'))
  assert file.read_text() == 'mine'


def test_programs_that_open_one_folder_do_not_meet(tmp_path):
  def open_folder(_):
    run_setup.open_folder('output_dir', str(tmp_path / 'shared'))

  with futures.ThreadPoolExecutor(8) as threads:
    list(threads.map(open_folder, range(200)))
  assert list((tmp_path / 'shared').iterdir()) == []
