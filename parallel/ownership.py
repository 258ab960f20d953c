"""Whose work a file is: only this user's and root's own is read without a second look."""

from __future__ import annotations

import os
import stat

_ROOT_UID = 0


def foreign_reason(facts: os.stat_result, *, any_mode: bool = False) -> str | None:
    """Return why a file or folder may be somebody else's work, None if it is this user's or root's.

    `any_mode`: the file system has no modes of its own (every file is 0777), so they say nothing.
    """
    if facts.st_uid not in (os.geteuid(), _ROOT_UID):
        return f"belongs to user {facts.st_uid}, not to {os.geteuid()} or root"
    if facts.st_mode & stat.S_IWOTH and not any_mode:
        return f"can be written by every user (mode {stat.S_IMODE(facts.st_mode):04o})"
    return None
