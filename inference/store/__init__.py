"""Prefixes on kvfs."""
