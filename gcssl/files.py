"""Writing files so that a reader finds the old content or the new, never half of it."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path


def fsync_folder(path: Path) -> None:
    """Make a rename or a new entry in this folder survive a power cut, where its file system can (CIFS cannot)."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def umask_mode() -> int:
    """The mode that a plain open() would give.

    os.umask can only be read by setting it; a file tells it without a race.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("Umask:"):
                return 0o666 & ~int(line.split()[1], 8)
    mask = os.umask(0o022)
    os.umask(mask)
    return 0o666 & ~mask


def aside(path: Path) -> Path:
    """A name beside `path` that no other process takes."""
    return path.with_name(f".{path.name}.{os.getpid()}.{socket.gethostname()}.tmp")  # containers share ids


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which it replaces at the end; on an error it is removed."""
    temporary = aside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write(path: Path | str, content: bytes | str) -> None:
    """Write next to `path`, fsync, rename over it, fsync the folder."""
    path = Path(path)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    fsync_folder(path.parent)
