"""What the meta service does behind its answers: freeing chunks, carrying out truncations, clearing sessions, sweeping old records."""
