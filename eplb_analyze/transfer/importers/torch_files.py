"""Read .pt files with torch without running code from them. Only this module imports torch."""

from __future__ import annotations

import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

from eplb_analyze.errors import DumpError
from eplb_analyze.transfer.importers.files import Array, regular, zip_names


def load(path: Path) -> Any:
    """The content of a file from ``torch.save``, with ``weights_only``; tensors stay mapped from it.

    :class:`Arrays` checks a tensor and makes an array of it. Raises DumpError if torch is missing, or if the
    file holds more than tensors and plain values.
    """
    try:
        import torch
    except ImportError:
        raise DumpError(
            f"{path}: reading .pt files needs torch: pip install 'eplb-dump[analyze,torch]'"
        ) from None
    regular(path)
    names = zip_names(path)
    if not any(name.endswith("data.pkl") for name in names):
        raise DumpError(f"{path}: it is not a file that torch.save wrote")
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise DumpError(f"{path}: it is compressed, which torch.save never does")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise DumpError(
            f"{path}: it contains objects other than tensors and plain values; they are not opened, "
            f"because they could run code"
        ) from None
    except Exception as error:  # torch raises many types for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DumpError(f"{path}: it cannot be read ({reason})") from None


class Arrays:
    """Turns the tensors of one file into arrays, which together must not be larger than the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._left = regular(path)

    def of(self, tensor: Any, dimensions: tuple[int, ...], name: str) -> Array:
        """An integer or float tensor as a read-only array. Raises DumpError."""
        import torch

        where = f"{self._path}: {name}"
        if type(tensor) is not torch.Tensor or tensor.layout != torch.strided or tensor.is_quantized:
            raise DumpError(f"{where}: it is not a plain tensor")
        if tensor.ndim not in dimensions or not tensor.numel():
            wanted = " or ".join(map(str, dimensions))
            raise DumpError(f"{where}: it has the shape {list(tensor.shape)}, not {wanted} dimensions")
        if tensor.dtype == torch.bfloat16 or tensor.is_complex():
            raise DumpError(f"{where}: token counts of type {str(tensor.dtype).removeprefix('torch.')}")
        # A view can have any shape over a few bytes (stride 0), and many views can share bytes.
        self._left -= tensor.numel() * tensor.element_size()
        if self._left < 0 or tensor.device.type != "cpu":
            raise DumpError(f"{where}: its tensors claim more than the file holds")
        array: Array = tensor.detach().numpy()
        return array


def is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # without it there are no tensors
    return torch is not None and isinstance(value, torch.Tensor)
