"""Scrub: every stored byte of the targets read against its checksum at a bounded rate, and repaired from the chain."""
