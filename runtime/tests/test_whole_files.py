import inspect
import os
import subprocess
import sys

import pytest

from t5x import whole_files


@pytest.mark.parametrize('mode, text', [('w', 'år'), ('wb', b'\xc3\xa5')])
def test_file_appears_at_the_end(tmp_path, mode, text):
  path = tmp_path / 'a.txt'
  path.write_text('before')
  with whole_files.whole_file(path, mode) as file:
    file.write(text)
    assert path.read_text() == 'before'
  assert path.read_bytes() == (text if mode == 'wb' else text.encode())
  assert list(tmp_path.iterdir()) == [path]


def test_failed_write_leaves_the_old_file(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('before')
  with pytest.raises(OSError, match='full'), whole_files.whole_file(path) as file:
    file.write('half')
    raise OSError('full')
  assert path.read_text() == 'before'
  assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file(tmp_path):
  path = tmp_path / 'a.txt'
  with whole_files.whole_file(path) as one, whole_files.whole_file(path) as other:
    one.write('one')
    other.write('other')
  assert path.read_text() == 'one'


def test_writable_folder_is_created(tmp_path):
  for _ in range(2):
    whole_files.open_folder('model_dir', str(tmp_path / 'a/b'))
  assert list((tmp_path / 'a/b').iterdir()) == []


def test_unwritable_folder_is_reported_with_the_reason(tmp_path):
  file = tmp_path / 'notes.txt'
  file.write_text('mine')
  with pytest.raises(OSError, match='model_dir .*notes.txt .* a file'):
    whole_files.open_folder('model_dir', str(file))
  with pytest.raises(OSError, match='notes.txt/run .*: Not a directory$'):
    whole_files.open_folder('model_dir', str(file / 'run'))
  assert file.read_text() == 'mine'


@whole_files.only_writer('model_dir')
def write(*, model_dir, body=lambda: None):
  body()


def test_one_writer_at_a_time(tmp_path):
  folder = str(tmp_path / 'run')

  def write_again():
    with pytest.raises(BlockingIOError, match=f'model_dir .* {os.getpid()} on '):
      write(model_dir=folder)
    write(model_dir=str(tmp_path / 'other'))
    raise KeyError

  for _ in range(2):  # An error releases the lock.
    with pytest.raises(KeyError):
      write(model_dir=folder, body=write_again)
  assert list(inspect.signature(write).parameters) == ['model_dir', 'body']


def test_killed_process_holds_no_lock(tmp_path):
  code = 'import fcntl, sys; f = open(sys.argv[1], "a"); fcntl.flock(f, fcntl.LOCK_EX)'
  code += '; print("locked", flush=True); input()'
  process = subprocess.Popen(
    [sys.executable, '-c', code, tmp_path / '.lock'],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  )
  process.stdout.readline()
  with pytest.raises(BlockingIOError, match='another run'):
    write(model_dir=str(tmp_path))
  process.kill()
  process.wait()
  write(model_dir=str(tmp_path))
