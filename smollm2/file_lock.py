"""A lock on a file. The system releases it when the process ends, however that happens."""

from __future__ import annotations


def lock(descriptor: int) -> bool:
    """Locks an open file against other processes until it is closed; False where the system cannot do that.

    Raises BlockingIOError when another process has locked it. The file must be open for writing: network file
    systems ask for that.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a network file system without locks
        return False
    return True
