"""Connectors: what inference engines call a storage backend, each a thin module over kvcache.

`sglang`, `lmcache` and `vllm` are loaded by their engines, by module path. Nothing is imported here: none of them needs another's packages."""
