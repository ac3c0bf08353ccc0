"""Whose a file is: code from the cache runs only if nobody else can have put it there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from smollm2.errors import LoadError


def check_owners(path: Path, root: Path) -> None:
    """Raises LoadError unless `path`, the folder `root` above it and all between belong to people whose code
    runs here anyway (this user, root, the owner of this installation), and nobody else may write to them.

    Symbolic links are asked whose they are, and so is what they lead to. A folder like /tmp, in which
    everybody writes but removes only what is theirs (the sticky bit), is sound if what lies in it is. Systems
    without user ids (Windows) are not checked.
    """
    if not hasattr(os, "getuid"):
        return
    trusted = _trusted()
    between = [parent for parent in path.parents if parent.is_relative_to(root)]
    for place in [*reversed(between), path]:
        found = place.stat()
        for owner in {place.lstat().st_uid, found.st_uid} - trusted:
            hint = "code in it is not run: remove it, or let SMOLLM2_CACHE name a folder of your own"
            raise LoadError(f"{place}: belongs to another user (uid {owner}); {hint}")
        is_sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not is_sticky:
            hint = f"code in it is not run: chmod go-w {place}, if you know what is in it"
            raise LoadError(f"{place}: others may write to it; {hint}")


def _trusted() -> set[int]:
    """The user ids of those whose code runs here anyway."""
    return {os.getuid(), 0, os.stat(__file__).st_uid}
