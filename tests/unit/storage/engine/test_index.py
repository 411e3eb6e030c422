"""The layered index against a dict: every read, forward and back, at every stage of a checkpoint, also one that failed."""

from __future__ import annotations

from engine_world import LogDisk
from hypothesis import given
from hypothesis import strategies as st

from kvfs.storage.engine.index import Index

KEYS = st.integers(0, 12).map(lambda number: b"k%02d" % number)
STEPS = st.lists(
    st.one_of(
        st.dictionaries(KEYS, st.none() | st.binary(min_size=1, max_size=3), max_size=6),
        st.sampled_from(["freeze", "write", "drop"]),
    ),
    max_size=20,
)


@given(STEPS, KEYS, KEYS)
def test_layers(steps: list[object], begin: bytes, end: bytes) -> None:
    index = Index(LogDisk().open_map("index", size_bytes=1))
    model: dict[bytes, bytes] = {}
    stage = ""
    floor = 1
    for step in steps:
        if isinstance(step, dict):
            index.put(step)
            model.update(step)
            model = {key: value for key, value in model.items() if value is not None}
        elif step == "freeze" and stage in ("", "freeze"):  # once more: the first checkpoint failed
            index.freeze()
            stage = "freeze"
        elif step == "write" and stage == "freeze":
            floor += 1
            index.write_frozen(floor)
            stage = "write"
        elif step == "drop" and stage == "write":
            index.drop_frozen()
            stage = ""
        rows = [(key, model[key]) for key in sorted(model) if begin <= key < end]
        assert list(index.scan(begin, end)) == rows
        assert list(index.scan(begin, end, reverse=True)) == rows[::-1]
        for wanted in (1, 3):  # a small first page of the map, and more than that taken
            assert list(index.scan(begin, end, wanted=wanted)) == rows
            assert list(index.scan(begin, end, wanted=wanted, reverse=True)) == rows[::-1]
        for number in range(13):
            assert index.get(b"k%02d" % number) == model.get(b"k%02d" % number)
