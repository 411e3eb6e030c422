"""What the abstract connector knows of a full chunk."""

from __future__ import annotations

import math
from typing import Any

from lmcache.v1 import protocol


class RemoteConnector:
    def __init__(self, config: Any, metadata: Any) -> None:
        assert metadata is not None
        self.save_chunk_meta = config.extra_config is None or config.extra_config.get("save_chunk_meta", True)
        self.meta_shapes = metadata.get_shapes()
        self.meta_dtypes = metadata.get_dtypes()
        self.meta_fmt = protocol.MemoryFormat.KV_MLA_FMT
        self.full_chunk_size_bytes = sum(2 * math.prod(shape) for shape in self.meta_shapes)
        self.single_token_size = self.full_chunk_size_bytes // metadata.chunk_size
        self.remote_metadata_bytes = 4 * (2 + 5 * len(self.meta_shapes))

    def reshape_partial_chunk(self, memory_obj: Any, bytes_read: int) -> Any:
        if bytes_read == 0 or bytes_read % self.single_token_size or bytes_read > self.full_chunk_size_bytes:
            raise ValueError(f"bytes_read: {bytes_read} is illegal")
        memory_obj.byte_array = memory_obj.byte_array[:bytes_read]
        return memory_obj
