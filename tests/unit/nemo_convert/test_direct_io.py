"""Files read and written past the page cache hold what they should, wherever they are."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_convert import direct_io
from nemo_convert.direct_io import DirectFile, new_file, read_numbers

PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(params=["none", "open", "use", "small"])
def file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A path where direct access is not refused, is when a file is opened or used, or not asked."""
    monkeypatch.setattr(direct_io, "SMALL", {"small": 1 << 30}.get(request.param, 0))
    refused = OSError(errno.EINVAL, "Invalid argument")
    opened = os.open

    def open_cached(path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            raise refused
        return opened(path, flags, *mode)

    def used(transfer: Callable[..., int]) -> Callable[..., int]:
        def use_cached(file: int, *args: Any) -> int:
            if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
                raise refused
            return transfer(file, *args)

        return use_cached

    if request.param == "open":
        monkeypatch.setattr(os, "open", open_cached)
    if request.param == "use":
        monkeypatch.setattr(os, "preadv", used(os.preadv))
        monkeypatch.setattr(os, "pwrite", used(os.pwrite))
    return tmp_path / "numbers"


@pytest.mark.parametrize("sizes", [[], [0], [1], [PAGE], [PAGE + 1, 3 * PAGE], [5, 7, 9 * PAGE]])
def test_what_is_written_is_there(
    file: Path, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_io, "CHUNK", 2 * PAGE)
    parts = [os.urandom(size) for size in sizes]
    with new_file(file, sum(sizes)) as written:
        for part in parts:
            assert written.write(part) == len(part)
        assert written.tell() == sum(sizes)
    assert file.read_bytes() == b"".join(parts)


@pytest.mark.parametrize("start", [0, 2, PAGE - 2, PAGE, 3 * PAGE + 6])
@pytest.mark.parametrize("count", [0, 1, PAGE, 3 * PAGE])
def test_numbers_are_read_from_anywhere(file: Path, start: int, count: int) -> None:
    every = torch.arange(8 * PAGE, dtype=torch.int16)
    file.write_bytes(every.numpy().tobytes())
    first = start // 2
    assert torch.equal(read_numbers(file, start, torch.int16, count), every[first : first + count])


def test_a_file_that_is_too_short_is_refused(file: Path) -> None:
    file.write_bytes(bytes(100))
    with pytest.raises(EOFError, match="ends before byte 104"):
        read_numbers(file, 4, torch.float32, 25)


@pytest.mark.parametrize("when", ["while it is written", "at the end"])
def test_a_full_disk_is_raised_and_the_file_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct_io, "CHUNK", PAGE)
    written = DirectFile(tmp_path / "numbers")
    opened = written.fileno()
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"), written:
        written.write(bytes(4 * PAGE if when == "while it is written" else 1))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened)


def test_what_is_refused_through_the_page_cache_too_is_raised(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(OSError, match="Invalid argument"), DirectFile(file) as written:
        written.write(b"1")


def test_what_else_a_file_system_says_is_raised(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_numbers(tmp_path / "none", 0, torch.float32, 1)
    with pytest.raises(FileNotFoundError):
        DirectFile(tmp_path / "no folder" / "numbers")


@pytest.mark.parametrize(("size", "direct"), [(PAGE, False), (3 * PAGE, True)])
def test_what_is_small_stays_in_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, direct: bool
) -> None:
    monkeypatch.setattr(direct_io, "SMALL", 2 * PAGE)
    path, opened = tmp_path / "numbers", os.open
    flags: list[int] = []

    def seen(path: Any, flag: int, *mode: int) -> int:
        flags.append(flag)
        return opened(path, flag, *mode)

    monkeypatch.setattr(os, "open", seen)
    with new_file(path, size) as written:
        written.write(bytes(size))
    found = read_numbers(path, 8, torch.uint8, size - 8)
    assert any(flag & os.O_DIRECT for flag in flags) is direct
    found.fill_(7)
    assert path.read_bytes() == bytes(size)
