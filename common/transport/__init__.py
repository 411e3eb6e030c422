"""Memory that moves between processes without going through messages: regions, spans, pools, and the transports that use them."""
