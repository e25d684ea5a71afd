"""The Hugging Face Hub: downloads and pushes of models.

huggingface_hub finds the token, in HF_TOKEN or from `hf auth login`. No message shows
it.
"""

import pathlib
from collections.abc import Iterator
from contextlib import contextmanager

import huggingface_hub
import huggingface_hub.utils

from bart_t5x.hf import tokenizers, weights

_LOGIN = 'Log in with `hf auth login`, or set HF_TOKEN to a token that may write.'


class HubError(ValueError):
  """The Hub refused, or was not reached."""


class LoginError(HubError):
  """There is no token, or the Hub refuses it: trying again would not help."""


@contextmanager
def _explained(action: str) -> Iterator[None]:
  """Turns whatever goes wrong at the Hub into a HubError without the token in it."""
  try:
    yield
  except HubError:
    raise
  except Exception as e:  # The HTTP client and its errors change between versions.
    # The error of an upload only names the file; its cause has the Hub's answer.
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
  """Checks, before any work, that a push to `org/name` can begin.

  Raises:
    LoginError: the name is not valid, there is no token, or the Hub refuses it.
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
  """Uploads a model folder as one commit: all of it appears, or nothing.

  Args:
    folder: of the model.
    repo_id: `org/name`; created if there is no such repository.
    message: of the commit.
    private: whether the repository must be private.
    revision: branch, created if missing; by default main.
    logs: a run's folder, whose TensorBoard events are uploaded to `runs`.

  Returns:
    The commit's URL.

  Raises:
    HubError: the Hub refuses or is not reached, or `private` was asked for and the
      repository exists and is public.
  """
  files = {p.relative_to(folder): p for p in folder.rglob('*') if p.is_file()}
  if logs is not None:
    # Read now: a run that continues appends to them during the upload.
    for path in logs.rglob('events.out.tfevents.*'):
      files['runs' / path.relative_to(logs)] = path.read_bytes()
  operations = [
    huggingface_hub.CommitOperationAdd(name.as_posix(), content)
    for name, content in sorted(files.items())
  ]
  api = huggingface_hub.HfApi(library_name='bart-t5x')
  with _explained(f'Pushing to {repo_id}'):
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    # An existing repository keeps its visibility, whatever create_repo asks for.
    if private and not api.model_info(repo_id).private:
      raise HubError(
        f'{repo_id} is public, and --private was given: nothing was pushed. Make it '
        'private on its settings page, or push to another name.'
      )
    if revision is not None:
      api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = api.create_commit(
      repo_id, operations, commit_message=message, revision=revision
    )
  return commit.commit_url


def download(repo_id: str, revision: str | None = None) -> pathlib.Path:
  """Downloads a model, with weights in one format, into the Hub's cache.

  Args:
    repo_id: such as `org/name`.
    revision: branch, tag or commit; by default main.

  Returns:
    The folder in the cache.

  Raises:
    HubError: there is no such model, or the Hub was not reached.
  """
  with _explained(f'There is no folder {repo_id}, and downloading it from the Hub'):
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
