"""A lock on a file. The system releases it when the process ends, however that happens."""

from __future__ import annotations


def lock(descriptor: int, wait: bool = False) -> bool:
    """Locks an open file or folder against other processes until it is closed; False if there are no locks.

    Raises BlockingIOError when another process has locked it, unless it is to wait. A file must be open for
    writing: network file systems ask for that.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:  # a network file system without locks
        return False
    return True
