"""Standard output and error that cannot end a run."""

import contextlib
import errno
import os
import sys
from typing import Any, TextIO


class _Lasting:
    """A stream that drops what cannot be written: its reader is gone, its disk full, its terminal closed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Any, *args: str) -> None:
        try:
            call(*args)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # for good: else Python tries again at its end, and complains
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def keep_talking() -> None:
    """Make both streams of this process such ones; None, where they were closed, is nobody who listens."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115 - as long as the process
        if isinstance(stream, _Lasting):
            continue
        if name == "stdout" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a file name may be no UTF-8
        setattr(sys, name, _Lasting(stream))
