"""Reading or computing: what the measurements so far say."""

from __future__ import annotations

import pytest

from kvfs.common.checksum import CHECKSUM_UNIT_BYTES
from kvfs.inference.cache.format import PAGE_TOKENS, PageFormat
from kvfs.inference.store.cost import TRY_EVERY, Cost
from kvfs.inference.store.groups import GROUPS_MAX, groups

MIB = 1 << 20


def test_pages_are_read_as_long_as_nothing_is_known() -> None:
    cost = Cost(MIB)
    assert cost.worth(10) == 10
    cost.computed(1000, 0.001)
    assert cost.worth(10) == 10, "a reading was never measured"
    assert cost.worth(0) == 0


def test_a_fixed_latency_makes_few_pages_dear_and_many_cheap() -> None:
    cost = Cost(MIB)
    for pages in (1, 2, 50, 100, 3, 70):
        cost.read(pages, 0.1 + pages * 0.001)
    cost.computed(PAGE_TOKENS * 10, 0.1)  # 10 ms a page
    assert cost.read_seconds(20) == pytest.approx(0.12)
    assert cost.worth(5) == 0
    assert cost.worth(12) == 12


def test_newer_measurements_win() -> None:
    cost = Cost(MIB)
    cost.computed(PAGE_TOKENS, 0.01)
    for _ in range(20):
        cost.read(10, 1.0)
    assert cost.worth(10) == 0
    for _ in range(200):
        cost.read(10, 0.001)
    assert cost.worth(10) == 10


def test_what_is_declined_is_still_tried_now_and_then() -> None:
    cost = Cost(MIB)
    cost.computed(PAGE_TOKENS, 0.01)
    cost.read(10, 5.0)
    found = [cost.worth(10) for _ in range(3 * TRY_EVERY)]
    assert found.count(10) == 3 and found.count(0) == 3 * TRY_EVERY - 3


def test_steps_that_decode_tell_nothing_of_prompts() -> None:
    cost = Cost(MIB)
    cost.computed(1, 10.0)
    assert cost.compute_seconds(1) == 0.0


def test_a_try_that_goes_well_is_believed() -> None:
    cost = Cost(MIB)
    cost.computed(PAGE_TOKENS, 0.01)
    for _ in range(30):
        cost.read(10, 5.0)
    while not cost.worth(10):
        pass
    cost.read(10, 4.0)
    assert cost.worth(10) == 0, "a try that goes as before changes nothing"
    while not cost.worth(10):
        pass
    cost.read(10, 0.002)
    assert [cost.worth(10) for _ in range(5)] == [10] * 5


@pytest.mark.parametrize("page_seconds", [0.0, 1e-6, 0.001, 10.0])
@pytest.mark.parametrize(
    "format", [PageFormat("bf16", 61, 512, 64), PageFormat("fp8", 61, 512, 64), PageFormat("fp32", 3, 32, 16), PageFormat("fp32", 4, 512, 64)]
)
def test_groups_cover_all_layers_in_order_in_whole_units(format: PageFormat, page_seconds: float) -> None:
    made = groups(format, page_seconds)
    assert 1 <= len(made) <= GROUPS_MAX
    at = 0
    for number, group in enumerate(made):
        assert group.offset == at and group.offset % CHECKSUM_UNIT_BYTES == 0 and group.length
        at += group.length
        behind = made[number + 1].first_layer if number + 1 < len(made) else format.layers
        assert at >= behind * format.layer_bytes, "its last layer is not whole"
    assert at == format.page_bytes


def test_slower_pages_come_in_more_steps_and_small_ones_whole() -> None:
    large, small = PageFormat("bf16", 61, 512, 64), PageFormat("fp32", 3, 32, 16)
    assert len(groups(small)) == 1
    assert 1 < len(groups(large)) < len(groups(large, 0.005)) == GROUPS_MAX
