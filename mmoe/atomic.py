"""Writes files whole or not at all: to a temporary name in the same folder, then renamed."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

from mmoe.errors import BadInput


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name when the block ends well, and is removed when it does not.

    Raises:
        BadInput: the folder cannot be written to, or the disk is full; an older file at `path` stays as it was.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with atomic_path(folder / "a.txt") as temporary:
        ...     _ = temporary.write_text("whole")
        >>> [file.name for file in folder.iterdir()]
        ['a.txt']
    """
    with atomic_paths(path) as (temporary,):
        yield temporary


@contextmanager
def atomic_paths(*paths: str | Path) -> Iterator[tuple[Path, ...]]:
    """As `atomic_path` for files that belong together: none takes its name before all are on the disk.

    They take their names in the given order.
    """
    files = [_target(Path(path)) for path in paths]
    temporaries = tuple(map(_temporary, files))
    try:
        modes = [_make(temporary, file) for temporary, file in zip(temporaries, files, strict=True)]
        yield temporaries
        for temporary, mode in zip(temporaries, modes, strict=True):
            temporary.chmod(mode)
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
        for temporary, file in zip(temporaries, files, strict=True):
            temporary.replace(file)
    except (OSError, SafetensorError) as error:
        raise _unwritable(files[0], error) from error
    finally:
        for temporary in temporaries:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Makes sure, before long work, that a file can be written.

    Raises:
        BadInput: it cannot.
    """
    file = _target(Path(path))
    probe = _temporary(file)
    try:
        _make(probe, file)
    except OSError as error:
        raise _unwritable(file, error) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _temporary(file: Path) -> Path:
    return file.parent / f".{file.name}.{os.getpid()}-{threading.get_ident()}.tmp{file.suffix}"


def _unwritable(file: Path, error: Exception) -> BadInput:
    reason = getattr(error, "strerror", None) or str(error)
    return BadInput(f"cannot write '{file}'", reason, "write to another folder or free space")


def _target(path: Path) -> Path:
    """The file that a path means: where a link leads to.

    Raises:
        BadInput: it is a folder, a pipe or a device.
    """
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if target.exists() and not target.is_file():
        wrong = "it is a folder" if target.is_dir() else "it is no regular file"
        raise BadInput(f"cannot write '{path}'", wrong, "the name of a new file")
    return target


def _make(temporary: Path, file: Path) -> int:
    """Makes an empty file; returns its mode in the end: that of the file it replaces, or what the umask gives.

    Safetensors makes files with another one.
    """
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.touch()
    return (file if file.exists() else temporary).stat().st_mode


@contextmanager
def open_atomic(path: str | Path) -> Iterator[BinaryIO]:
    """Like `atomic_path`, with the temporary file opened for binary writing."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        yield file


def torch_save(value: Any, path: str | Path) -> None:
    """`torch.save` to a file that is written whole or not at all.

    Raises:
        BadInput: it cannot be written.
    """
    import torch

    with open_atomic(path) as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # of torch's zip writer, in place of the file's own
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
