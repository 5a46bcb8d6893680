"""Files that are whole or not there, also after a kill or a power cut."""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from redi.errors import RediError


def write_text(file: Path, text: str) -> None:
    """Writes aside, then renames: readers see the old text or the new one. Raises OSError."""
    aside = file.with_name(f".{file.name}-{os.getpid()}.tmp")  # no other process's, nor a user's
    try:
        aside.write_text(text, encoding="utf-8")
        publish(aside.parent, {aside.name: file})
    finally:
        aside.unlink(missing_ok=True)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file that this program has written; {} where there is no file. Raises
    RediError for anything else, as a copy that broke off leaves it."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise RediError(f"{file}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise RediError(f"{file}: holds no JSON object; redi has not written it")
    return content


def publish(aside: Path, targets: dict[str, Path]) -> None:
    """Moves finished files out of the folder `aside`, on the same disk, in the order given.

    `targets` maps a name in `aside` to its place. All reach the disk before any of them moves. The
    last one marks the others as complete: an old one goes before anything else changes.
    """
    for name in targets:
        fsync(aside / name)
    *_, last = targets.values()
    if len(targets) > 1:
        last.unlink(missing_ok=True)
    for name, target in targets.items():
        os.replace(aside / name, target)
    for folder in {target.parent for target in targets.values()}:
        fsync(folder)


@contextmanager
def claim(folder: Path, who: str) -> Iterator[None]:
    """`folder`, made if it is not there, is this process's alone until it ends in whatever way.

    Raises RediError where another process has claimed it, OSError where it cannot be written. (On a
    file system without locks nobody is kept out.)
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"no permission to write into {folder}")
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RediError(f"{folder}: another {who} is at work in it") from None
        except OSError:
            pass
        yield
    finally:
        os.close(handle)
        if is_new:
            with suppress(OSError):  # not empty: something was done
                folder.rmdir()


def digest_file(file: Path) -> str:
    """sha256 of the content, in hex."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def usual_mode(file: Path) -> None:
    """safetensors writes files that only their owner may read; this makes one as readable as any
    other that this process writes. (The umask itself cannot be asked for without changing it.)"""
    other = file.with_name(f"{file.name}.mode")
    other.touch()
    file.chmod(other.stat().st_mode)
    other.unlink()


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
