"""The chunk engine: the chunks of one target, on one disk, in one directory. `engine.ChunkEngine` is the face; `requests` has its arguments and answers."""
