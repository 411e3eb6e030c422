"""A DeepSeek-V3 checkpoint as a forward pass."""
