"""Numpy arrays as Arrow columns and back, without a Python object for each value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa


def large_list(arrays: Sequence[Any], dtype: Any) -> pa.Array:
    """large_list of one numpy array [n] a row; None is null."""
    parts = [np.asarray(a, dtype) for a in arrays if a is not None]
    flat = np.concatenate(parts) if parts else np.empty(0, dtype)
    # Not pa.array, which loads numpy.ma to see that the values are not masked.
    values = pa.Array.from_buffers(
        pa.from_numpy_dtype(flat.dtype), len(flat), [None, pa.py_buffer(flat)]
    )
    offsets = _offsets([0 if a is None else len(a) for a in arrays])
    return pa.Array.from_buffers(
        pa.large_list(values.type), len(arrays), [_validity(arrays), offsets], children=[values]
    )


def large_binary(arrays: Sequence[np.ndarray | None]) -> pa.Array:
    """large_binary of the bytes of one array a row (C order); None is null."""
    parts = [np.ascontiguousarray(a).reshape(-1).view(np.uint8) for a in arrays if a is not None]
    data = np.concatenate(parts) if parts else np.empty(0, np.uint8)
    offsets = _offsets([0 if a is None else a.nbytes for a in arrays])
    return pa.Array.from_buffers(
        pa.large_binary(), len(arrays), [_validity(arrays), offsets, pa.py_buffer(data)]
    )


def fixed_view(array: pa.Array, dtype: Any) -> np.ndarray:
    """The values [rows] of a column of numbers; those of nulls mean nothing."""
    return _fixed(array.buffers()[1], array.offset, len(array), dtype)


def _fixed(buffer: pa.Buffer | None, offset: int, count: int, dtype: Any) -> np.ndarray:
    if not count or buffer is None:
        return np.empty(0, dtype)
    return np.frombuffer(buffer, dtype, offset + count)[offset:]


def list_view(array: pa.Array, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """The values of a large_list column, and the offsets [rows + 1] of its rows in them."""
    _, offsets, _, values = array.buffers()
    at = _fixed(offsets, array.offset, len(array) + 1, np.int64)
    return _fixed(values, 0, int(at[-1]) if len(at) else 0, dtype), at


def binary_view(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of a large_binary column (uint8), and the offsets [rows + 1] of its rows."""
    _, offsets, data = array.buffers()
    at = _fixed(offsets, array.offset, len(array) + 1, np.int64)
    return np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8), at


def _offsets(lengths: list[int]) -> pa.Buffer:
    return pa.py_buffer(np.cumsum([0, *lengths], dtype=np.int64))


def _validity(rows: Sequence[Any]) -> pa.Buffer | None:
    present = np.array([row is not None for row in rows], bool)
    if present.all():
        return None
    return pa.py_buffer(np.packbits(present, bitorder="little").tobytes())
