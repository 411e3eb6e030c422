"""How the HTTP server is set up. Owns `HttpConfig`; units are in the names."""

from __future__ import annotations

from dataclasses import dataclass

from kvfs.common.errors import InvalidArgument


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpConfig:
    host: str = "127.0.0.1"
    port: int = 8000
    """0: a free one."""
    api_keys: tuple[str, ...] = ()
    """Any of them opens the API; none: it is open to everyone who reaches the port."""
    body_bytes_max: int = 16 << 20
    body_timeout_s: float = 60.0
    """For a request to arrive whole."""
    requests_max: int = 1024
    """Under way at once; more are refused (429)."""
    choices_max: int = 128
    """Answers that one request may ask for: prompts times n."""
    client_timeout_s: float = 60.0
    """A client that takes nothing for so long is gone."""
    shutdown_s: float = 10.0
    """For answers under way, once the server is told to stop."""

    def __post_init__(self) -> None:
        for name in ("body_bytes_max", "body_timeout_s", "requests_max", "choices_max", "client_timeout_s"):
            if getattr(self, name) <= 0:
                raise InvalidArgument(f"{name} is {getattr(self, name)}: above 0")
        if not 0 <= self.port < 1 << 16:
            raise InvalidArgument(f"port is {self.port}: 0 to 65535")
        if any(not key or not key.isascii() for key in self.api_keys):
            raise InvalidArgument("an API key is empty or has characters that a header cannot carry")
