"""Images in a file that need not fit in memory."""

import contextlib
import mmap
from typing import Any

import numpy as np

TOUCHED = 512  # images read before their pages are let go; to touch one maps some 64 kB around it


class Mapped:
    """Images in a memory-mapped file, or some of them in any order, to be read only.

    An index reads what it asks for, as an ndarray; ``numpy.asarray`` reads all. What was read leaves this process's
    memory again (the system's cache may keep it). A file must not be cut short meanwhile: the system ends the process.
    """

    def __init__(self, array: np.memmap, rows: np.ndarray | None = None):
        """``rows``: the numbers of the images; ``None``: all."""
        self._array, self._rows = array, rows
        self.dtype, self.ndim = array.dtype, array.ndim
        self.shape = (len(array if rows is None else rows), *array.shape[1:])

    def __len__(self) -> int:
        return int(self.shape[0])

    @property
    def size(self) -> int:
        """Numbers of all images."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Of all images."""
        return self.size * self.dtype.itemsize

    def only(self, rows: np.ndarray) -> "Mapped":
        """Some of them; nothing is read."""
        return Mapped(self._array, rows if self._rows is None else self._rows[rows])

    def __getitem__(self, index: Any) -> np.ndarray:
        if self._rows is not None:
            index = self._rows[index]
        if isinstance(index, np.ndarray) and index.ndim == 1 and index.dtype != bool:
            return self._gather(index)
        found = np.array(self._array[index])
        self._let_go()
        return found

    def _gather(self, numbers: np.ndarray) -> np.ndarray:
        found = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        order = np.argsort(numbers, kind="stable")  # as they lie in the file
        for start in range(0, len(order), TOUCHED):
            some = order[start : start + TOUCHED]
            found[some] = self._array[numbers[some]]
            self._let_go()
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    def _let_go(self) -> None:
        with contextlib.suppress(AttributeError, OSError):  # where the system has no such advice, it does as it likes
            self._array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
