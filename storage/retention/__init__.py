"""Which KV-cache blocks a target holds, in the order in which they were last touched, and which of them have to go."""
