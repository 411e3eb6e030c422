"""One thread of torch: with more, on a busy machine, a step of these small models takes ten times as long."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
