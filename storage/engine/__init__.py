"""The chunk engine: the chunks of one target, on one disk, in one directory. Its face is `engine.ChunkEngine`."""
