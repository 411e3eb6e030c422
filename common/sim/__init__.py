"""Simulated versions of the four boundaries: deterministic by seed, with faults on demand."""
