"""Inference workers that keep their KV cache in kvfs. Nothing is built here yet; ARCHITECTURE.md says what will be."""
