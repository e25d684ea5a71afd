"""Reads files of `torch.save` without executing code in them."""

import pathlib
from typing import Any


def read(path: pathlib.Path, allowed_classes: tuple[type, ...] = ()) -> Any:
  """Reads a `.bin` or `.pt` file, tensors as NumPy arrays (bfloat16 as float32).

  `allowed_classes` may occur in it besides tensors and plain Python data.

  Raises:
    ValueError: PyTorch is not installed, or the file is damaged or has other classes.
  """
  try:
    import torch  # Optional: only these files need it.
  except ImportError as e:
    raise ValueError(
      f'{path} needs PyTorch: `pip install torch`, or use a model.safetensors.'
    ) from e

  def to_numpy(tree):
    if isinstance(tree, torch.Tensor):
      tensor = tree.detach()
      return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    if isinstance(tree, dict):
      return {key: to_numpy(value) for key, value in tree.items()}
    return tree

  try:
    with torch.serialization.safe_globals(list(allowed_classes)):
      return to_numpy(torch.load(path, map_location='cpu', weights_only=True))
  except OSError:
    raise
  except Exception as e:  # PyTorch's errors share no base class.
    raise ValueError(
      f'{path} is damaged or has more than weights and settings: {e}\nDownload it '
      'again, or save the weights as model.safetensors.'
    ) from e
