"""Files that are read and written past the page cache, at the speed of the disk.

A checkpoint of many GB is used once. Through the page cache each byte is copied once more, what was
cached makes room first, and who writes more than a share of the memory (``vm.dirty_ratio``) waits
for one thread of the kernel. What is less than ``SMALL`` does go through the cache, which keeps it
for who reads it next. So does everything where a file system has no direct access.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from mmap import ACCESS_COPY, MADV_HUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE, mmap
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import torch

Path = str | os.PathLike[str]
CHUNK = 32 << 20
"""Bytes of a write: enough to keep a disk busy, and a multiple of every disk's block."""
SMALL = 1 << 30
"""Bytes of a model, or of a file to read, that the cache has room for."""


def read_numbers(path: Path, start: int, dtype: torch.dtype, count: int) -> torch.Tensor:
    """Reads numbers [count] that begin at a byte of a file, which does not change with them.

    Raises:
        EOFError: The file is shorter.
    """
    import torch

    if not count:
        return torch.empty(0, dtype=dtype)
    size = os.stat(path).st_size
    if size < start + count * dtype.itemsize:
        raise EOFError(f"{path} ends before byte {start + count * dtype.itemsize}")
    if size < SMALL:
        with open(path, "rb") as opened:
            mapped = mmap(opened.fileno(), 0, access=ACCESS_COPY)
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=start)
    skipped = start % PAGESIZE
    end = skipped + count * dtype.itemsize
    pages = _memory(end)
    file = _open(path, os.O_RDONLY)
    try:
        with memoryview(pages) as data:
            done = 0
            while done < end:
                read = _direct(os.preadv, file, [data[done:]], start - skipped + done)
                if not read:
                    raise EOFError(f"{path} was cut short while it was read")
                done += read
    finally:
        os.close(file)
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=skipped)


def new_file(path: Path, expected: int) -> DirectFile | BinaryIO:
    """Opens a file to write, a part of a model of so many bytes."""
    return open(path, "wb") if expected < SMALL else DirectFile(path)


class DirectFile:
    """A new file, written a chunk at a time by a thread while the next one is gathered."""

    def __init__(self, path: Path) -> None:
        self._file = _open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._gathering, self._spare = _memory(CHUNK), _memory(CHUNK)
        self._gathered = self._start = 0
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def fileno(self) -> int:
        """The number of the open file."""
        return self._file

    def tell(self) -> int:
        """Bytes so far."""
        return self._start + self._gathered

    def write(self, data: Any) -> int:
        """Takes all of a buffer.

        Raises:
            OSError: An earlier one could not be written.
        """
        with memoryview(data) as given, given.cast("B") as left:
            done = 0
            while done < len(left):
                part = left[done : done + CHUNK - self._gathered]
                self._gathering[self._gathered : self._gathered + len(part)] = part
                self._gathered += len(part)
                done += len(part)
                if self._gathered == CHUNK:
                    self._hand_on(CHUNK)
            return done

    def flush(self) -> None:
        """Nothing: what is gathered is written when it is a chunk, or at the end."""

    def close(self) -> None:
        """Waits until all of it is on the disk."""
        if self._file < 0:
            return
        try:
            size = self.tell()
            # Whole blocks only can be written; what is too much is cut off again.
            self._hand_on(_whole_pages(self._gathered))
            self._wait()
            os.ftruncate(self._file, size)
            os.fsync(self._file)
        finally:
            self._thread.shutdown()
            os.close(self._file)
            self._file = -1

    def _hand_on(self, size: int) -> None:
        self._wait()
        self._writing = self._thread.submit(_write, self._file, self._gathering, size, self._start)
        self._gathering, self._spare = self._spare, self._gathering
        self._start, self._gathered = self.tell(), 0

    def _wait(self) -> None:
        if self._writing:
            self._writing.result()


def _whole_pages(size: int) -> int:
    return -(-size // PAGESIZE) * PAGESIZE


def _memory(size: int) -> mmap:
    """Memory that begins at a page, as direct access asks for."""
    memory = mmap(-1, _whole_pages(size), MAP_PRIVATE | MAP_ANONYMOUS)
    memory.madvise(MADV_HUGEPAGE)
    return memory


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what a file system says that has none
            raise
    return os.open(path, flags, 0o666)


def _direct(transfer: Callable[[int, Any, int], int], file: int, data: Any, start: int) -> int:
    """Reads or writes; through the page cache from where on a file system refuses to do without."""
    try:
        return transfer(file, data, start)
    except OSError as error:
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
            raise
    fcntl.fcntl(file, fcntl.F_SETFL, flags & ~os.O_DIRECT)
    return transfer(file, data, start)


def _write(file: int, chunk: mmap, size: int, start: int) -> None:
    with memoryview(chunk) as data:
        done = 0
        while done < size:
            done += _direct(os.pwrite, file, data[done:size], start + done)
