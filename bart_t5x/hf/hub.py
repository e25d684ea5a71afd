"""Downloads models from the Hugging Face Hub and pushes them to it.

huggingface_hub finds the token (HF_TOKEN or `hf auth login`); messages never show it.
"""

import pathlib
from collections.abc import Iterator
from contextlib import contextmanager

import huggingface_hub
import huggingface_hub.utils

from bart_t5x.hf import tokenizers, weights

_LOGIN = 'Log in with `hf auth login`, or set HF_TOKEN to a token with write access.'


class HubError(ValueError):
  """The Hub refused a request, or could not be reached."""


class LoginError(HubError):
  """The token is missing or invalid: trying again does not help."""


@contextmanager
def _explained(action: str) -> Iterator[None]:
  """Converts any error to a HubError without the token in its message."""
  try:
    yield
  except HubError:
    raise
  except Exception as e:  # Error classes differ between versions.
    # An upload error only names the file; its cause has the Hub's response.
    error = e
    while getattr(error, 'response', None) is None and error.__cause__ is not None:
      error = error.__cause__
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    reason = ' '.join(str(error if status else e).split()) or type(e).__name__
    if token := huggingface_hub.get_token():
      reason = reason.replace(token, '***')
    if status in (401, 403):
      raise LoginError(f'{action} failed: {reason}. {_LOGIN}') from e
    raise HubError(f'{action} failed: {reason}.') from e


def check_login(repo_id: str) -> None:
  """Checks the name `org/name` and the token.

  Raises:
    LoginError: the name is invalid, or the token is missing or invalid.
    HubError: the Hub could not be reached.
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
  """Uploads a model folder as one commit and returns its URL.

  Args:
    folder: of the model.
    repo_id: `org/name`; created if missing.
    message: of the commit.
    private: create a private repository, and reject an existing public one.
    revision: branch, created if missing; by default main.
    logs: a run's folder, whose TensorBoard events are uploaded to `runs`.

  Raises:
    HubError: the push failed.
  """
  files = {p.relative_to(folder): p for p in folder.rglob('*') if p.is_file()}
  if logs is not None:
    # Read now: a running job appends to them during the upload.
    for path in logs.rglob('events.out.tfevents.*'):
      files['runs' / path.relative_to(logs)] = path.read_bytes()
  operations = [
    huggingface_hub.CommitOperationAdd(name.as_posix(), content)
    for name, content in sorted(files.items())
  ]
  api = huggingface_hub.HfApi(library_name='bart-t5x')
  with _explained(f'Pushing to {repo_id}'):
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    # create_repo does not change an existing repository's visibility.
    if private and not api.model_info(repo_id).private:
      raise HubError(
        f'{repo_id} is public, and --private was given. Make it private in its '
        'settings, or push to another name.'
      )
    if revision is not None:
      api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = api.create_commit(
      repo_id, operations, commit_message=message, revision=revision
    )
  return commit.commit_url


def download(repo_id: str, revision: str | None = None) -> pathlib.Path:
  """Downloads a model, with weights in one format, and returns its cache folder.

  Raises:
    HubError: the model does not exist, or the Hub could not be reached.
  """
  with _explained(f'{repo_id} is not a folder, and downloading it from the Hub'):
    info = huggingface_hub.HfApi().model_info(repo_id, revision=revision)
    names = {sibling.rfilename for sibling in info.siblings}
    kinds = [k for k in weights.KINDS if {k, f'{k}.index.json'} & names]
    patterns = ['config.json', 'generation_config.json', *tokenizers.FILES]
    if kinds:
      stem, _, suffix = kinds[0].partition('.')
      patterns += [kinds[0], f'{stem}-*.{suffix}', f'{kinds[0]}.index.json']
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        repo_id, revision=info.sha, allow_patterns=patterns
      )
    )
