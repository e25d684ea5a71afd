"""Following a run: each newest checkpoint is pushed, failures end nothing."""

import os
import shutil
import subprocess
import sys

import pytest
from fake_hub import TOKEN

from bart_t5x.hf import follow_run

REPO = 'ola/norbart'


@pytest.fixture
def run(make_run, tmp_path):
  return make_run(tmp_path / 'trained')


def follower(run, **arguments):
  return follow_run.RunFollower(run.model_dir, REPO, corpus_dir=run.corpus, **arguments)


def pushed(server):
  return server.repos[REPO]['branches']['main']


def commits(server):
  return sum('/commit/' in path for _, path in server.requests)


def test_the_newest_checkpoint_counts_by_its_number(tmp_path):
  assert follow_run.newest_checkpoint(tmp_path) is None
  for name in ('checkpoint_900', 'checkpoint_1000', 'damaged_checkpoint_2000'):
    (tmp_path / name).mkdir()
  (tmp_path / 'checkpoint_3000.tmp').mkdir()
  assert follow_run.newest_checkpoint(tmp_path) == tmp_path / 'checkpoint_1000'


def test_a_checkpoint_is_pushed_once_and_the_next_one_too(server, run, capsys):
  events = run.model_dir / 'train/events.out.tfevents.1.v2'
  events.parent.mkdir()
  events.write_bytes(b'events')
  following = follower(run)
  following.step()
  following.step()
  assert commits(server) == 1 and not following.pending()
  assert pushed(server)['runs/train/events.out.tfevents.1.v2'] == b'events'
  assert b'for 0 steps' in pushed(server)['README.md']
  shutil.copytree(run.checkpoint, run.model_dir / 'checkpoint_12')
  following.step()
  assert commits(server) == 2
  assert b'for 12 steps' in pushed(server)['README.md']
  assert 'checkpoint_12 pushed to' in capsys.readouterr().out


def test_a_failure_is_tried_again_after_a_pause(server, run, capsys):
  server.fail['commit'] = 500
  following = follower(run, retry_seconds=3600)
  following.step()
  told = capsys.readouterr().out
  assert 'checkpoint_0 was not pushed' in told and 'Next try in 600 s' in told
  server.fail.clear()
  following.step()  # The pause is not over.
  assert following.pending() and pushed(server) == {}
  following.step(now=True)
  assert not following.pending() and 'model.safetensors' in pushed(server)


def test_it_gives_up_with_the_last_try_and_does_not_wait_once_more(
  tmp_path, capsys, monkeypatch
):
  (tmp_path / 'checkpoint_7/state').mkdir(parents=True)  # cannot be exported
  following = follow_run.RunFollower(tmp_path, REPO)
  slept = []
  monkeypatch.setattr(follow_run, '_wait', lambda seconds, watch_stdin: True)
  monkeypatch.setattr(follow_run.time, 'sleep', slept.append)
  assert follow_run.follow(following, 5.0, True, last_tries=3) == 1
  assert slept == [5.0, 10.0]
  told = capsys.readouterr().out
  assert told.count('was not pushed') == 3 and 'Next try' not in told
  assert 'Given up' in told.splitlines()[-1]


def test_the_card_has_the_command_with_all_that_was_asked_for(server, run):
  follower(run, private=True, revision='steg').step()
  card = server.repos[REPO]['branches']['steg']['README.md'].decode()
  assert (
    f'follow_run --model_dir={run.model_dir} --push_to_hub={REPO} --revision=steg '
    f'--corpus_dir={run.corpus} --private' in card
  )


def test_a_damaged_checkpoint_is_told_and_the_next_one_pushed(server, run, capsys):
  (run.model_dir / 'checkpoint_7/state').mkdir(parents=True)
  following = follower(run, retry_seconds=0)
  following.step()
  assert 'checkpoint_7 was not pushed' in capsys.readouterr().out
  shutil.copytree(run.checkpoint, run.model_dir / 'checkpoint_8')
  following.step()
  assert b'for 8 steps' in pushed(server)['README.md']


def test_without_a_login_it_ends_at_once(server, run, capsys, monkeypatch):
  monkeypatch.setenv('HF_TOKEN', 'hf_wrongwrongwrong')
  arguments = [f'--model_dir={run.model_dir}', f'--push_to_hub={REPO}']
  assert follow_run.main(arguments) == 1
  told = capsys.readouterr().err
  assert 'hf auth login' in told and 'wrongwrong' not in told


def program(run):
  """The program, which only the end of stdin makes push: it polls once an hour."""
  return subprocess.run(
    [
      sys.executable, '-m', 'bart_t5x.hf.follow_run', f'--model_dir={run.model_dir}',
      f'--push_to_hub={REPO}', f'--corpus_dir={run.corpus}', '--until_stdin_closes',
      '--poll_seconds=3600',
    ],
    input=b'', capture_output=True, timeout=120, env=os.environ,
  )  # fmt: skip


def test_the_program_pushes_the_last_checkpoint_when_stdin_closes(server, run):
  process = program(run)
  assert process.returncode == 0, process.stderr
  assert 'model.safetensors' in pushed(server)
  assert TOKEN.encode() not in process.stdout + process.stderr


def test_the_program_does_not_need_the_hub_when_it_starts(server, run):
  server.fail['whoami'] = 418  # A failure that is not asked for again.
  process = program(run)
  assert process.returncode == 0, process.stderr
  assert b'Pushes will be tried' in process.stdout
  assert 'model.safetensors' in pushed(server)
