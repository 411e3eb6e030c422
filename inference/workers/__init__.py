"""Worker processes and the router over them."""
