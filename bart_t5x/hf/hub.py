"""The Hugging Face Hub: models from it, models to it.

The token is that of HF_TOKEN or of `hf auth login`; huggingface_hub finds it. It
appears in no message.
"""

import pathlib
from collections.abc import Iterator
from contextlib import contextmanager

import huggingface_hub
import huggingface_hub.utils

from bart_t5x.hf import tokenizer_import, weights

_LOGIN = 'Log in with `hf auth login`, or set HF_TOKEN to a token that may write.'


class HubError(ValueError):
  """The Hub refused, or was not reached; the message says what to do."""


class LoginError(HubError):
  """No token, or none that the Hub accepts: trying again would not help."""


@contextmanager
def _explained(what: str) -> Iterator[None]:
  """Turns whatever goes wrong at the Hub into one message without the token."""
  try:
    yield
  except HubError:
    raise
  except Exception as e:  # the HTTP client and its errors change between versions
    # An upload's own error says no more than which file it was about.
    causes = [e]
    while causes[-1].__cause__ is not None:
      causes.append(causes[-1].__cause__)
    told = next((c for c in causes if getattr(c, 'response', None) is not None), e)
    status = getattr(getattr(told, 'response', None), 'status_code', None)
    reason = ' '.join(str(told).split()) or type(told).__name__
    if token := huggingface_hub.get_token():
      reason = reason.replace(token, '***')
    if status in (401, 403):
      raise LoginError(f'{what} failed: {reason}. {_LOGIN}') from e
    raise HubError(f'{what} failed: {reason}.') from e


def check_login(repo_id: str) -> None:
  """Makes sure, before any work, that a push can begin.

  Args:
    repo_id: `org/name`.

  Raises:
    LoginError: the name is none, there is no token, or the Hub refuses it.
    HubError: the Hub was not reached.
  """
  try:
    huggingface_hub.utils.validate_repo_id(repo_id)
  except ValueError as e:
    raise LoginError(f'Pushing to {repo_id} failed: {e}') from e
  if huggingface_hub.get_token() is None:
    raise LoginError(f'Pushing to {repo_id} needs a token. {_LOGIN}')
  with _explained('Logging in to the Hub'):
    huggingface_hub.HfApi().whoami()


def push(
  folder: pathlib.Path,
  repo_id: str,
  message: str,
  private: bool = False,
  revision: str | None = None,
  logs: pathlib.Path | None = None,
) -> str:
  """Uploads a model folder as one commit: all of it is seen, or none.

  Args:
    folder: with the model.
    repo_id: `org/name`; made if there is no such repository.
    message: of the commit.
    private: whether the repository must be private.
    revision: branch, made if there is none; by default main.
    logs: a run's folder, whose TensorBoard events go along, under `runs`.

  Returns:
    The commit's address.

  Raises:
    HubError: the Hub refuses or fails; or the repository exists and is public,
      and private was asked for. Nothing of the model is to be seen there then.
  """
  files = {p.relative_to(folder): p for p in folder.rglob('*') if p.is_file()}
  if logs is not None:
    # Read now, as a run that goes on makes them longer during the upload.
    for path in logs.rglob('events.out.tfevents.*'):
      files['runs' / path.relative_to(logs)] = path.read_bytes()
  operations = [
    huggingface_hub.CommitOperationAdd(name.as_posix(), content)
    for name, content in sorted(files.items())
  ]
  api = huggingface_hub.HfApi(library_name='bart-t5x')
  with _explained(f'Pushing to {repo_id}'):
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    # A repository that was there keeps its visibility, whatever is asked for.
    if private and not api.model_info(repo_id).private:
      raise HubError(
        f'{repo_id} is public, and --private was given: nothing was pushed. Make '
        'it private on its settings page, or push to another name.'
      )
    if revision is not None:
      api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = api.create_commit(
      repo_id, operations, commit_message=message, revision=revision
    )
  return commit.commit_url


def download(repo_id: str, revision: str | None = None) -> pathlib.Path:
  """Fetches a model into the Hub's cache: weights in one format, and the rest.

  Args:
    repo_id: `org/name`, or a name of the Hub's own.
    revision: branch, tag or commit; by default main.

  Returns:
    The folder in the cache.

  Raises:
    HubError: there is no such model or folder, or the Hub was not reached.
  """
  what = f'There is no folder {repo_id}, and fetching it from the Hub'
  with _explained(what):
    info = huggingface_hub.HfApi().model_info(repo_id, revision=revision)
    names = {sibling.rfilename for sibling in info.siblings}
    kinds = [k for k in weights.KINDS if {k, f'{k}.index.json'} & names]
    stem, _, suffix = kinds[0].partition('.') if kinds else ('', '', '')
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        repo_id,
        revision=info.sha,
        allow_patterns=[
          'config.json',
          'generation_config.json',
          *tokenizer_import.FILES,
          f'{stem}.{suffix}',
          f'{stem}-*.{suffix}',
          f'{stem}.{suffix}.index.json',
        ],
      )  # fmt: skip
    )
