"""The wire: frames, handshakes, calls and servers, and the messages in *.proto."""
