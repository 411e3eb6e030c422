"""The chain protocol (CRAQ) of one target, without I/O: state and event in, effects out. `replica.Replica` is the face; the service drives it."""
