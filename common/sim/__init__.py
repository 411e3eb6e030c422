"""Simulated versions of the four boundaries: deterministic by seed, with faults on demand. They pass the conformance suites of the real ones."""
