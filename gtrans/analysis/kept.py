"""The folder in which gtrans keeps what it found out about graphs and machines.

$GTRANS_CACHE          by default ~/.cache/gtrans; "off" keeps nothing
"""

import json
import os
from pathlib import Path
from typing import Any


def folder() -> Path | None:
    """Where it is; None if nothing is to be kept."""
    chosen = os.environ.get("GTRANS_CACHE", "")
    if chosen.lower() == "off":
        return None
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gtrans"


def load(kind: str, key: str) -> Any:
    """What was kept under a key; None if that is nothing, or nothing that can be read."""
    path = _path(kind, key)
    try:
        return json.loads(path.read_text()) if path is not None and path.exists() else None
    except (OSError, ValueError):
        return None  # half written, or by something else


def save(kind: str, key: str, value: Any) -> None:
    """Keeps a value that JSON can express. A folder that cannot be written is no error."""
    path = _path(kind, key)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(value))
        draft.replace(path)
    except OSError:
        return


def _path(kind: str, key: str) -> Path | None:
    where = folder()
    return None if where is None else where / kind / f"{key}.json"
