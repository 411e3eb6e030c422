"""KV-cache spaces and blocks. Nothing is built here yet; ARCHITECTURE.md says what will be."""
