"""Inference workers for DeepSeek-V3-architecture models that keep their KV cache in kvfs.

  model    a checkpoint becomes a forward pass: MLA over a paged latent cache, gate, experts, rope, FP8 weights
  cache    pages: their format in bytes, the pool of them, who holds which page, prefixes found again in memory
  engine   one model, many requests: scheduling, sampling, the loop
  store    prefixes on kvfs: reading pages of a prompt ahead of computing it, writing new pages back
  workers  the process around an engine, what is said between it and the router, and the router
  http     OpenAI's interface over the router: text in, text out

Imports point down: http and workers over engine, engine over store and model, those over cache. `request.py` and `config.py` are everyone's.
torch is imported by model, cache and engine only, so that the router and the HTTP server need none.
"""
