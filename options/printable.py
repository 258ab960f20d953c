"""Text that others wrote, made fit for a terminal: a path, a class, a tensor's name, a message."""

from __future__ import annotations

import unicodedata

# Zl and Zp break lines, Cs is half of a character: bytes of a path that are not UTF-8. Of the
# formats, Cf, some reverse what follows or are not seen.
_ESCAPED = ("Cc", "Cs", "Cf", "Zl", "Zp")
# They join letters of Persian, Hindi and emoji.
_JOINERS = ("\u200c", "\u200d")


def printable(text: object) -> str:
    """Return `text` in one line that commands no terminal: controls as Python writes them."""
    return "".join(
        repr(char)[1:-1]
        if unicodedata.category(char) in _ESCAPED and char not in _JOINERS
        else char
        for char in str(text)
    )
