"""The chunk engine: the chunks of one target, on one disk, in one directory. `engine.ChunkEngine` is its face, `requests` its arguments and answers."""
