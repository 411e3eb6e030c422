"""kvfs: a distributed file system for AI clusters.

The packages below this one are relative symbolic links to the top-level folders of the repository; ARCHITECTURE.md is the map.
"""

__version__ = "0.1.0"
