"""The error tree as the operating system's exceptions: what the synchronous face raises.

Owns the mapping: an error of common/errors.py becomes the OSError subclass that Python gives its errno (FileNotFoundError, PermissionError,
...), so that code
written for files works unchanged; the original is its cause. What no file operation could answer (no cluster there, bad configuration)
stays as it is.
"""

from __future__ import annotations

from kvfs.common.errors import KvfsError, SetupError


def to_os_error(error: KvfsError, path: str | None = None) -> BaseException:
    """The exception to raise instead. OSError picks the subclass by errno."""
    if isinstance(error, SetupError):
        return error
    # Many messages start with the path, for those who see nothing else; OSError prints its own.
    result = OSError(error.errno, error.message) if path is None else OSError(error.errno, error.message.removeprefix(f"{path}: "), path)
    result.__cause__ = error
    return result
