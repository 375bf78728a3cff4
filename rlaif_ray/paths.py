"""Paths as people write them."""

from __future__ import annotations

import os
import re
from pathlib import Path

_HOME = re.compile(r"\$(?:HOME|\{HOME\})(?=/|$)")


def expand_home(path: str | Path) -> Path:
    """The path with the user's home folder for a `~`, `~name`, `$HOME` or `${HOME}` that it begins with.

    A `~name` that nobody here has stays as it is. No other variable is replaced: they may hold secrets, and a config is
    to mean the same wherever it is read.
    """
    return Path(os.path.expanduser(_HOME.sub("~", str(path), count=1) if _HOME.match(str(path)) else str(path)))
