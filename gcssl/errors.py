"""The ways a run can end, and the exit code of each."""

import errno
import os


class UserError(Exception):
    """Bad usage, config or data.

    The text is one line: what was given, what is expected, what to do. Exit 2.
    """


class NotFinite(UserError):
    """A backbone's outputs are not numbers: in an evaluation bad usage, in the online probe a NumericStop."""


class Preempted(BaseException):  # like KeyboardInterrupt, so that no `except Exception` takes it for a fault of its own
    """Stopped by a signal or by train.max_hours, in the loop after a checkpoint: the same command goes on. Exit 75."""

    agreed = True  # all processes stop at this step


class NumericStop(Exception):
    """Stopped on a number that is not finite, or on a collapse. Exit 78."""


class Failure(Exception):
    """The machine failed, not the program or its user. Exit 1, in one line."""


class CannotWrite(Failure):
    """A disk takes no checkpoint."""


class LostProcess(Failure):
    """Another process of the run hung or died."""


FAULTS = (
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN,
    errno.EHOSTUNREACH, errno.ECONNRESET, errno.ECONNABORTED,
)  # fmt: skip


def check_machine(error: Exception, what: str) -> None:
    """Failure where reading `what` failed by the machine: no open files left, a file server that is away.

    A MemoryError is not among them: decoders raise it on damaged sizes.
    """
    if isinstance(error, OSError) and error.errno in FAULTS:
        told = f"{what} cannot be read: {error.strerror}; this says nothing of the file"
        raise Failure(f"{told}: look after the machine, and run the same command again") from error


def too_small(error: BaseException) -> str | None:
    """What to do where a disk or a GPU's memory is full: nothing in the program is wrong, so one line too, and 1."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "make room on that disk, and run the same command again"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
        return "a smaller train.batch_size, or batch_size of an evaluation, or model.grad_checkpointing=true needs less"
    return None


def outcome(error: BaseException | None) -> tuple[str, int, str]:
    """State, exit code and reason of the exception that ended a run, for status.json; None: it finished."""
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "finished", 0, ""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return "refused", 2, text
    if isinstance(error, Preempted):
        return "preempted", 75, text
    if isinstance(error, NumericStop):
        return "failed", 78, text
    if isinstance(error, KeyboardInterrupt):
        return "failed", 1, "interrupted from the keyboard"
    if isinstance(error, Failure):
        return "failed", 1, text
    if remedy := too_small(error):
        return "failed", 1, f"{text.partition('. GPU ')[0]}; {remedy}"
    return "failed", 1, f"{type(error).__name__}: {text}" if text else type(error).__name__


def first_of(names: list[str]) -> str:
    """The first three, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def one_line(error: BaseException) -> str:
    """Its type and the first 160 characters of what it says."""
    text = " ".join(str(error).split())[:160]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def is_main_process() -> bool:
    """True in the one process that prints and writes.

    Known from the launcher's environment, before any set-up.
    """
    return int(os.environ.get("RANK", "0")) == 0
