"""3FS's Python package, over kvfs: see `hf3fs_fuse.io`."""
