"""Configuration files: what they hold reaches the dataclass, and every mistake is named with its line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from kvfs.common.config import dump, load, loads, setting
from kvfs.common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Engine:
    size_bytes: int = 4096
    sync: bool = True


@dataclass(frozen=True, slots=True)
class Config:
    data: str
    listen: tuple[str, ...] = ("tcp://127.0.0.1:0",)
    lease_ms: int = setting(2000, minimum=100, maximum=60000)
    ratio: float = 0.5
    mode: Literal["fast", "safe"] = "safe"
    path: Path | None = None
    engine: Engine = field(default_factory=Engine)

    def __post_init__(self) -> None:
        if self.data == "/":
            raise ConfigError("data: the root directory is no data directory")


def made(text: str, **environ: str) -> Config:
    return loads(Config, text, environ, "storage", name="file.toml")


def test_fills_fields_from_top_level_section_and_environment() -> None:
    assert made('data = "/d"') == Config("/d")
    assert made('[storage]\ndata = "/d"\nratio = 2\n[storage.engine]\nsync = false').engine == Engine(sync=False)
    config = made(
        'data = "/d"', KVFS_STORAGE__LEASE_MS="300", KVFS_STORAGE__LISTEN="a, b", KVFS_STORAGE__ENGINE__SYNC="no", KVFS_META__X="1", HOME="/"
    )
    assert (config.lease_ms, config.listen, config.engine.sync) == (300, ("a", "b"), False)
    assert made('[meta]\nanything = 1\n[storage]\ndata = "/d"') == Config("/d")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('data = "/d"\n\nleas_ms = 5', "file.toml:3: unknown key 'leas_ms' (did you mean 'lease_ms'?)"),
        ('[storage]\ndata = "/d"\n# c\nlease_ms = "5"', "file.toml:4: 'lease_ms' must be a whole number, not '5'"),
        ('data = "/d"\nlease_ms = true', "file.toml:2: 'lease_ms' must be a whole number, not True"),
        ('data = "/d"\nlease_ms = 5', "file.toml:2: 'lease_ms' must be at least 100 and at most 60000, not 5"),
        ('data = "/d"\nlisten = "x"', "file.toml:2: 'listen' must be a list of a text in quotes, not 'x'"),
        ('data = "/d"\nmode = "slow"', "file.toml:2: 'mode' must be one of 'fast', 'safe', not 'slow'"),
        ('data = "/d"\n[engine]\nsize_bytes = 1\nsink = 2', "file.toml:4: unknown key 'sink'"),
        ('data = "/d"\n[storage.engine]\nsyn = true', "file.toml:3: unknown key 'syn' (did you mean 'sync'?)"),
        ('ratio = 1.0\ndata = "/"', "file.toml:2: data: the root directory is no data directory"),
        ("ratio = 0.5", "'data' must be set"),
        ('data = "/d"\nratio = nan', "file.toml:2: 'ratio' must be a number"),
        ('data = "/d"\nratio = = 1', "file.toml:2: "),
        ('data = "/d"\n[storage]\ndata = "/e"', "is set"),
        ('data = "/d"\n[stroage]\nx = 1', "file.toml:2: unknown key 'stroage'"),
    ],
)
def test_mistakes_name_their_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(text)
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("KVFS_STORAGE__LEAS_MS", "5", "environment variable KVFS_STORAGE__LEAS_MS: unknown key 'leas_ms' (did you mean 'lease_ms'?)"),
        ("KVFS_STORAGE__LEASE_MS", "soon", "environment variable KVFS_STORAGE__LEASE_MS: 'lease_ms' must be a whole number, not 'soon'"),
        ("KVFS_STORAGE__LEASE_MS", "1", "must be at least 100"),
        ("KVFS_STORAGE__ENGINE__SYNC", "maybe", "'sync' must be true or false, not 'maybe'"),
        ("KVFS_STORAGE__ENGINE", "x", "is a table"),
        ("KVFS_STORAGE__DATA__X", "x", "unknown key 'data.x'"),
    ],
)
def test_mistakes_in_the_environment_name_the_variable(name: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made('data = "/d"', **{name: value})
    assert message in caught.value.message


def test_dump_reads_back_equal(tmp_path: Path) -> None:
    config = Config('/a "quoted"\\\n\x01ü', ("x", "y"), 100, 1e-9, "fast", Path("/p"), Engine(1, False))
    assert made(dump(config)) == config
    assert made(dump(config, "storage")) == config
    assert made(dump(config, changed=True)) == config
    (tmp_path / "c.toml").write_text(dump(config))
    assert load(Config, tmp_path / "c.toml", {}, "storage") == config


def test_dump_of_what_was_changed_leaves_the_defaults_out() -> None:
    config = made('data = "/d"')
    assert dump(config, "storage", changed=True).startswith('[storage]\ndata = "/d"\n') and made(dump(config, changed=True)) == config
    assert len(dump(config, changed=True)) < len(dump(config))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read configuration .*none.toml"):
        load(Config, tmp_path / "none.toml", {}, "storage")
