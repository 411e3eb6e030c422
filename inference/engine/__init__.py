"""One model, many requests."""
