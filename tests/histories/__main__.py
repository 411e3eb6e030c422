"""`python -m tests.histories FILE`: the explanation of a dumped history, made again."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.histories.checker import check
from tests.histories.explain import explain
from tests.histories.history import load
from tests.histories.models import CreateOnce, FileLength, Model, Register


def model_of(key: str) -> Model:
    """By what the key's name says it is. Misses are free, since a dump does not say when trouble ended."""
    if key.startswith("block"):
        return CreateOnce(stale_s=1.5, free_misses_until_s=float("inf"))
    return FileLength() if key.startswith("length") else Register()


def main() -> int:
    bad = check(load(Path(sys.argv[1])), model_of)
    print("\n\n".join(explain(each) for each in bad) or "an order explains every operation")
    return bool(bad)


if __name__ == "__main__":
    raise SystemExit(main())
