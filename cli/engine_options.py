"""Options of commands that run a model: how the engine is set up, as `kvfs worker` takes them and `kvfs serve` passes them on.

Owns `engine_options` and their way back onto a command line. This module must never import torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kvfs.cli.arguments import Size
from kvfs.common.errors import InvalidArgument, NotFound, SetupError
from kvfs.inference.config import CACHE_DTYPES, DTYPES

if TYPE_CHECKING:
    from kvfs.inference.model.config import ModelConfig

F = TypeVar("F", bound=Callable[..., Any])

_NEEDED = ("torch", "safetensors", "tokenizers", "jinja2", "starlette", "hypercorn", "prometheus_client")

_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("--device", {"default": "cpu", "show_default": True, "help": "As torch names it: cpu, cuda, cuda:1."}),
    ("--dtype", {"type": click.Choice(DTYPES), "default": "fp32", "show_default": True, "help": "Of weights and activations."}),
    (
        "--cache-dtype",
        {"type": click.Choice(CACHE_DTYPES), "default": "fp32", "show_default": True, "help": "Of cached latents."},
    ),
    ("--cache-pages", {"type": click.IntRange(1), "default": 512, "show_default": True, "help": "Pages of 64 tokens in a worker's memory."}),
    ("--step-tokens", {"type": click.IntRange(1), "default": 512, "show_default": True, "help": "Computed in one step at most."}),
    ("--running-requests", {"type": click.IntRange(1), "default": 64, "show_default": True, "help": "Decoded at once by a worker."}),
    ("--waiting-requests", {"type": click.IntRange(1), "default": 256, "show_default": True, "help": "More are refused: HTTP 429."}),
    ("--threads", {"type": click.IntRange(1), "default": 1, "show_default": True, "help": "Of torch, on the CPU."}),
    ("--space", {"default": "", "help": "KV-cache space. Default: one of the model's own."}),
    ("--space-quota-bytes", {"type": Size(), "default": 0, "help": "Of the space, when it is made: beyond it the least recently used pages go."}),
    (
        "--space-ttl-s",
        {"type": click.FloatRange(0), "default": 0.0, "help": "Of the space, when it is made: a page not used for so long goes."},
    ),
]


def engine_options(command: F) -> F:
    for name, settings in reversed(_OPTIONS):
        command = click.option(name, **settings)(command)
    return command


def as_arguments(values: Mapping[str, Any]) -> list[str]:
    """The same options for another command line."""
    found: list[str] = []
    for name, _ in _OPTIONS:
        value = values[name.removeprefix("--").replace("-", "_")]
        if value != "":
            found += [name, str(value)]
    return found


def model_config(directory: Path) -> ModelConfig:
    """Of a checkpoint. SetupError for one that cannot be served: said before anything is started for it."""
    from kvfs.inference.model.config import ModelConfig

    try:
        return ModelConfig.load(directory)
    except (NotFound, InvalidArgument) as error:
        raise SetupError(error.message) from None


def needs_inference() -> None:
    """SetupError that says what to install."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SetupError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: pip install torch==2.13.0 'kvfs[inference]'")
