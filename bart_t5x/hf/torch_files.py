"""Reads files of `torch.save`; nothing that is in them is run."""

import pathlib
from typing import Any


def read(path: pathlib.Path, allowed_classes: tuple[type, ...] = ()) -> Any:
  """Reads a `.bin` or `.pt` file, tensors as NumPy arrays (bfloat16 as float32).

  Args:
    path: the file.
    allowed_classes: may be in it, beside tensors and plain Python data.

  Raises:
    ValueError: PyTorch is not installed, or the file is damaged or holds other classes.
  """
  try:
    import torch  # Optional: only these files need it.
  except ImportError as e:
    raise ValueError(
      f'{path} needs PyTorch: `pip install torch`, or take the model as '
      'model.safetensors.'
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
  except Exception as e:  # PyTorch has no common class for what damage leads to.
    raise ValueError(
      f'{path} cannot be read as a PyTorch file: {e}\nIt is damaged, or has more in it '
      'than weights and settings. Download it again, or save the weights as '
      'model.safetensors.'
    ) from e
