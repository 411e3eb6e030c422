"""Tensors of a checkpoint by their names: one safetensors file or many, mapped into memory, FP8 made whole.

Owns `Checkpoint`. Invariants: a tensor is read when it is asked for, never all at once; its shape is the one asked for, or an error names the tensor
and the file; a block-quantised weight comes out as weight * weight_scale_inv of its block (DeepSeek-V3, README_WEIGHTS.md). Files are only read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kvfs.common.errors import InvalidArgument, NotFound

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Checkpoint:
    def __init__(self, directory: str | Path, fp8_block: tuple[int, int] | None = None) -> None:
        self._directory = Path(directory)
        self._fp8_block = fp8_block
        self._files: dict[str, Any] = {}
        self.places = self._index()
        """Tensor -> file name."""

    def _index(self) -> dict[str, str]:
        index = self._directory / INDEX
        if index.exists():
            try:
                places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidArgument(f"{index} is no index of tensors: {error!r}") from None
            for name in sorted(set(places.values())):
                if "/" in name or not (self._directory / name).is_file():
                    raise NotFound(f"{index} names {name}, which is not there: the download is not complete")
            return places
        if not (self._directory / SINGLE).is_file():
            raise NotFound(f"{self._directory} has neither {SINGLE} nor {INDEX}: it holds no weights in safetensors")
        return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)

    def _open(self, name: str) -> Any:
        if name not in self._files:
            try:
                self._files[name] = safe_open(str(self._directory / name), framework="pt")
            except (SafetensorError, OSError) as error:
                raise InvalidArgument(f"{self._directory / name} is damaged, or no safetensors file: {error}") from None
        return self._files[name]

    def raw(self, name: str) -> torch.Tensor:
        """As it is stored."""
        place = self.places.get(name)
        if place is None:
            raise InvalidArgument(f"{self._directory} lacks the tensor {name}")
        try:
            tensor: torch.Tensor = self._open(place).get_tensor(name)
        except SafetensorError as error:
            raise InvalidArgument(f"{self._directory / place} lacks the tensor {name}: {error}") from None
        return tensor

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """As a tensor of that type; block-quantised ones multiplied out."""
        tensor = self.raw(name)
        if tuple(tensor.shape) != shape:
            raise InvalidArgument(f"{name} in {self._directory / self.places[name]} has the shape {tuple(tensor.shape)}, and the model needs {shape}")
        if tensor.dtype == torch.float8_e4m3fn:
            return self._whole(name, tensor).to(dtype)
        return tensor.to(dtype)

    def _whole(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if self._fp8_block is None:
            raise InvalidArgument(f"{name} is stored as FP8, and config.json has no quantization_config to read it by")
        rows, columns = self._fp8_block
        scale = self.raw(f"{name}_scale_inv").float()
        blocks = (-(-tensor.shape[0] // rows), -(-tensor.shape[1] // columns))
        if tuple(scale.shape) != blocks:
            raise InvalidArgument(f"{name}_scale_inv has the shape {tuple(scale.shape)}, and blocks of {rows} x {columns} make it {blocks}")
        spread = scale.repeat_interleave(rows, 0)[: tensor.shape[0]].repeat_interleave(columns, 1)[:, : tensor.shape[1]]
        return tensor.float() * spread
