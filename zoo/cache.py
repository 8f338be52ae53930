"""The folder of what is kept on a machine: files of packages, and plain data that took time to work out.

No torch here, and nothing that is slow to import: the command line begins with it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from mmoe.errors import BadInput, MmoeError

T = TypeVar("T")


def home() -> Path:
    """The folder: $MMOE_HOME, or ~/.cache/mmoe.

    Raises:
        BadInput: there is neither that variable nor a home, as for a number without a name in a container.
    """
    named = os.environ.get("MMOE_HOME") or "~/.cache/mmoe"
    try:
        return Path(named).expanduser()
    except RuntimeError as error:
        fix = "MMOE_HOME=FOLDER in front of the command"
        raise BadInput(f"find the folder '{named}'", "there is no such user with a home", fix) from error


def kept(kind: str, source: bytes, make: Callable[[bytes], T]) -> T:
    """Plain data made from some bytes, from a file of an earlier time where there is a whole one.

    Data that JSON would change are made every time, and so are all where there is no folder that can be written to.

    Args:
        kind: what it is, a name for a folder; another one when `make` changes what it makes.
        source: that the data depends on alone.
        make: source -> data.
    """
    try:
        file = home() / "kept" / kind / f"{hashlib.sha256(source).hexdigest()}.kept"
    except BadInput:
        return make(source)
    with suppress(OSError, ValueError):
        checksum, text = file.read_bytes().split(b"\n", 1)
        if hashlib.sha256(text).hexdigest().encode() == checksum:
            found: T = json.loads(text)
            return found
    made = make(source)
    with suppress(OSError, TypeError, MmoeError):
        text = json.dumps(made).encode()
        if json.loads(text) == made:
            from mmoe.atomic import open_atomic

            with open_atomic(file) as written:
                written.write(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
    return made
