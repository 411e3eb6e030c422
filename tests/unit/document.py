"""The worked bytes of docs/format.md, for the tests that hold them against what is written."""

from __future__ import annotations

import re
from pathlib import Path

FORMAT = Path(__file__).parents[2] / "docs" / "format.md"


def worked_bytes(name: str) -> bytes:
    """Of the example below `<!-- NAME example -->`: lines of an offset, bytes, and a comment. Each offset must be that of its bytes."""
    block = re.search(rf"<!-- {name} example -->\n```\n(.*?)```", FORMAT.read_text(), re.S)
    assert block is not None, f"docs/format.md has no example of that name: {name}"
    data = b""
    for line in block[1].splitlines():
        text = line.split("#")[0].strip()
        if text:
            offset, colon, rest = text.partition(":")
            assert colon and int(offset, 16) == len(data), f"{name}: {line!r} begins at {len(data):04x}"
            data += bytes.fromhex(rest)
    return data
