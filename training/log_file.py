"""log.jsonl: one JSON object a line, whatever ended the run before, and whatever has its name."""

from __future__ import annotations

import os
import stat
from pathlib import Path


class LogFile:
    """Appends lines to a regular file; a line that could be written in part only is ended first."""

    def __init__(self, path: Path) -> None:
        """Open or create `path`.

        Raises:
            OSError: It is not a regular file. A link is not followed: its target is not ours.
        """
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            self._descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            raise OSError(f"file {path}: cannot be opened: {error.strerror}") from error
        facts = os.fstat(self._descriptor)
        if not stat.S_ISREG(facts.st_mode):
            self.close()
            raise OSError(f"file {path}: not a regular file")
        end = os.pread(self._descriptor, 1, facts.st_size - 1) if facts.st_size else b"\n"
        self._is_torn = end != b"\n"

    def append(self, line: str) -> None:
        """Add `line` and a line break.

        Raises:
            OSError: It cannot be written whole.
        """
        rest = (b"\n" if self._is_torn else b"") + line.encode() + b"\n"
        while rest:
            num_bytes = os.write(self._descriptor, rest)
            self._is_torn = num_bytes < len(rest)
            rest = rest[num_bytes:]

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
