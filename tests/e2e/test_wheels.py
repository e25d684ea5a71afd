"""The installed wheels prepare a corpus and train, without any file of the checkout."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_wheels_train_from_an_empty_folder(tmp_path, helpers):
  source, site, work = (tmp_path / name for name in ('source', 'site', 'work'))
  for folder in ('bart_t5x', 'tasks', 'gin', 'runtime'):
    shutil.copytree(ROOT / folder, source / folder)
  for file in ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / file, source)
  pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', 'install', '-q']
  pip += ['--no-index', '--no-deps', '--no-build-isolation', f'--target={site}']
  subprocess.run([*pip, source, source / 'runtime'], check=True)
  work.mkdir()
  lines = helpers.made_up_norwegian(documents=200)
  (work / 'texts.txt').write_text('\n'.join(lines), encoding='utf-8')
  path = os.pathsep.join([str(site), sysconfig.get_path('purelib')])

  def run(*args):
    done = subprocess.run(
      # -S: without site-packages' .pth files, which point to the checkout.
      [sys.executable, '-S', *args],
      cwd=work,
      env={**os.environ, 'PYTHONPATH': path, 'XLA_FLAGS': ''},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      timeout=600,
      check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout

  corpus = ('--output_dir=data/mini', '--vocab_size=512')
  command = site / 'bin' / 'bart-t5x'
  run(command, 'prepare', '--source=text', '--input=texts.txt', *corpus,
      '--min_validation_documents=20')  # fmt: skip
  out = run(
    '-m',
    't5x.train',
    '--gin_file=bart_t5x/gin/bart_mini_no.gin',
    '--gin_file=bart_t5x/gin/models/tiny.gin',
    *('--gin.TRAIN_STEPS=4', '--gin.WARMUP_STEPS=1', '--gin.BATCH_SIZE=8'),
    *('--gin.train.eval_steps=1', '--gin.train.run_eval_before_training=False'),
  )
  assert f't5x.train from {site}' in out
  assert (work / 'runs' / 'bart_mini_no' / 'checkpoint_4').exists()
