"""Parameters of a space: limits, the namespace digest, and what differs between two."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from kvfs.common.errors import InvalidArgument, SpaceDiffers
from kvfs.kvcache.params import SpaceParams

BASE: dict[str, Any] = {"block_tokens": 64, "block_bytes": 4_497_408, "model": "deepseek-v3", "dtype": "bf16"}


@pytest.mark.parametrize(
    "fields",
    [
        {"block_bytes": 0},
        {"block_bytes": (64 << 20) + 1},
        {"block_tokens": 0},
        {"replication": 4},
        {"replication": -1},
        {"quota_bytes": 0},
        {"quota_bytes": -5},
        {"quota_bytes": 1 << 63},
        {"quota_bytes": 1e9},
        {"block_bytes": 4096.5},
        {"block_bytes": "4096"},
        {"block_tokens": 1 << 32},
        {"table": 1 << 16},
        {"table": -1},
        {"ttl_s": float("nan")},
        {"ttl_s": float("inf")},
        {"ttl_s": 1e300},
        {"model": "a\udcff"},
        {"model": b"m"},
        {"extra": {"a\udcff": "x"}},
        {"ttl_s": 0},
        {"extra": {"model": "x"}},
        {"extra": {"": "x"}},
        {"extra": {"tp": 3}},
    ],
)
def test_what_is_out_of_limits(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        SpaceParams(**{**BASE, **fields})


def test_a_quota_of_zero_says_what_to_do() -> None:
    with pytest.raises(InvalidArgument, match="None for no quota"):
        SpaceParams(**BASE, quota_bytes=0)


def test_the_namespace_digest_is_what_its_description_says() -> None:
    params = SpaceParams(**BASE, extra={"tp": "0/8"}, quota_bytes=5 << 30, ttl_s=3)
    text = '{"block_bytes":4497408,"block_tokens":64,"format":{"dtype":"bf16","model":"deepseek-v3","tp":"0/8"}}'
    assert params.digest == hashlib.blake2b(text.encode(), digest_size=16, person=b"kvfs-space").digest()
    assert SpaceParams(**BASE, extra={"tp": "0/8"}, replication=3).digest == params.digest  # retention and placement are no part of it
    assert SpaceParams(**BASE, extra={"tp": "1/8"}).digest != params.digest


def test_there_and_back() -> None:
    for params in (
        SpaceParams(**BASE),
        SpaceParams(**BASE, layout="l", rope="r", extra={"a": "b"}, replication=2, table=4, quota_bytes=7, ttl_s=0.5),
    ):
        assert SpaceParams.from_wire(params.to_wire()) == params


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"block_tokens": 32}, "block_tokens"),
        ({"block_bytes": 4096}, "block_bytes"),
        ({"dtype": "fp8"}, "dtype"),
        ({"dtype": ""}, "dtype"),
        ({"rope": "yarn"}, "rope"),
        ({"extra": {"tp": "0/8"}}, "tp"),
    ],
)
def test_a_difference_is_named_from_either_side(change: dict[str, Any], field: str) -> None:
    one, two = SpaceParams(**BASE), SpaceParams(**{**BASE, **change})
    for here, there in ((one, two), (two, one)):
        with pytest.raises(SpaceDiffers, match=f"space s has another format: {field} is "):
            here.check_same("s", there.to_wire())
    one.check_same("s", SpaceParams(**BASE, quota_bytes=1, ttl_s=9, replication=3).to_wire())
