"""Real engines. torchvision, which SGLang imports, has no build for a torch without CUDA: the two operators it misses are declared for it."""

from __future__ import annotations

import contextlib
import importlib.util

with contextlib.suppress(ImportError):
    import torch

    if importlib.util.find_spec("torchvision") is not None:
        LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
        for _name in ("nms", "qnms"):
            with contextlib.suppress(RuntimeError):  # a torchvision that has them
                LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from tests.connectors.conftest import cluster, settings

__all__ = ["cluster", "settings"]
