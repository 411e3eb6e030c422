"""What a mount can be told: one frozen dataclass, loaded by common/config.py (section `mount`, environment KVFS_MOUNT__...).

Invariant: every field has a default that is right for one machine; units are in the names.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvfs.common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class MountConfig:
    mount_point: str = ""
    cluster: str = ""
    """A directory made by `kvfs up`, or manager addresses "host:port,host:port"."""
    allow_other: bool = True
    """Other users may use the mount. Needs root, or user_allow_other in /etc/fuse.conf."""
    read_only: bool = False
    attr_cache: bool = True
    """False: the kernel asks for attributes every time, whatever lease the metadata service grants."""
    data_cache: bool = True
    """False: nothing stays in the page cache from one open to the next."""
    read_ahead_kb: int = 4096
    """How far the kernel reads ahead (set through /sys/class/bdi, root only); 0: leave it at the kernel's 128."""
    max_background: int = 64
    """Read-ahead and write-back requests under way at once; the kernel may allow fewer to who is not root."""
    max_tasks: int = 256
    """Requests served at once; more wait in the kernel."""
    operation_deadline_s: float = 40.0
    """Last resort above the client's own deadline: an operation that has not ended by then answers ETIMEDOUT."""
    unmount_grace_s: float = 5.0
    """How long an unmount waits for files in use before it detaches the mount and closes them."""

    def __post_init__(self) -> None:
        if self.read_ahead_kb < 0 or self.read_ahead_kb > 1 << 20:
            raise ConfigError(f"mount.read_ahead_kb is {self.read_ahead_kb}: it must be from 0 to 1048576")
        if not 1 <= self.max_tasks <= 4096:
            raise ConfigError(f"mount.max_tasks is {self.max_tasks}: it must be from 1 to 4096")
        if not 1 <= self.max_background <= 4096:
            raise ConfigError(f"mount.max_background is {self.max_background}: it must be from 1 to 4096")
        if self.operation_deadline_s <= 0 or self.unmount_grace_s < 0:
            raise ConfigError("mount.operation_deadline_s must be above 0 and mount.unmount_grace_s not below 0")
