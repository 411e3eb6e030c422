"""`kvfs demo-inference` (`make demo-inference`): a model served from the KV cache on disk, from nothing, on one machine.

A small random DeepSeek-V3 checkpoint is made with transformers, and a tokenizer. A cluster and `kvfs serve` with one prefill and one decode worker
come up. Conversations over a common system prompt are held through the openai client: cold; again, when all prefixes are stored; and again after
everything that computes was stopped and started, its memory empty. Every answer must be, in all three, what transformers says. Everything lies
in one temporary directory, which is gone at the end, also after an interrupt.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import statistics
import textwrap
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from kvfs.cli import cluster_dir
from kvfs.cli.context import common_options, console, human_bytes, print_json, table
from kvfs.cli.engine_options import needs_inference
from kvfs.cli.measure import step_teller, steps_bar
from kvfs.cli.own_cluster import shut_down, work_directory
from kvfs.cli.own_server import OwnServer, own_server
from kvfs.cli.process import interruptible
from kvfs.cli.up import start_detached
from kvfs.common.errors import DataError, SetupError

STORAGE = 2
SHAPE = "latent576"
"""Cached rows as wide as DeepSeek-V3's, 4 layers."""
CONVERSATIONS = 3
TURNS = 3
ANSWER_TOKENS = 16
SYSTEM_CHARACTERS = 1500
TURN_CHARACTERS = 400
SERVE = ("--prefill", "1", "--decode", "1", "--cache-pages", "256", "--name", SHAPE)
RUNS = ("cold", "warm", "after a restart")

Message = dict[str, str]


@dataclass(slots=True)
class Run:
    """One round of all conversations."""

    name: str
    prompts: list[list[Message]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    hit_tokens: int = 0
    generated: int = 0
    bytes_read: float = 0.0
    seconds: float = 0.0

    def describe(self) -> dict[str, Any]:
        return {
            "run": self.name,
            "requests": len(self.answers),
            "tokens_per_s": self.generated / self.seconds,
            "prompt_tokens_per_s": self.prompt_tokens / self.seconds,
            "first_token_ms": 1000 * statistics.median(self.first_token_s),
            "prompt_tokens": self.prompt_tokens,
            "cache_hit_tokens": self.hit_tokens,
            "bytes_read": self.bytes_read,
        }


def texts() -> list[str]:
    """Prose and code that every Python has."""
    return [inspect.getsource(module) for module in (inspect, re, statistics, textwrap)]


def passages() -> tuple[str, list[str]]:
    """A system prompt, and what is said in each turn of each conversation: different texts."""
    words = re.sub(r"\s+", " ", "".join(texts()))
    turns = range(SYSTEM_CHARACTERS, SYSTEM_CHARACTERS + CONVERSATIONS * TURNS * TURN_CHARACTERS, TURN_CHARACTERS)
    return words[:SYSTEM_CHARACTERS], [words[start : start + TURN_CHARACTERS] for start in turns]


class InferenceDemo:
    """The steps, in order; `say` prints what happens."""

    def __init__(self, base: Path, quiet: bool) -> None:
        self.say, self.quiet = step_teller(quiet=quiet), quiet
        self.base = base
        self.model = base / SHAPE
        self.cluster = cluster_dir.create(
            base / "cluster", storage=STORAGE, replicas=1, mount=None, chunk_size_bytes=1 << 20, lease_ms=2000, base_port=None
        )

    def run(self) -> list[Run]:
        self.make_model()
        start_detached(self.cluster, restart=False)
        self.say(f"a cluster of {STORAGE} storage services is up")
        runs = []
        arguments = (*SERVE, "--cluster", str(self.cluster.path))
        with own_server(self.model, arguments, self.base / "serve-1") as server:
            self.say("one prefill and one decode worker serve it over HTTP")
            for name in RUNS[:2]:
                runs.append(self.converse(server, name))
        with own_server(self.model, arguments, self.base / "serve-2") as server:
            self.say("all workers were stopped and started again")
            runs.append(self.converse(server, RUNS[2]))
        self.compare(runs)
        return runs

    def make_model(self) -> None:
        from kvfs.inference.model import sample

        sample.make(SHAPE, self.model)
        sample.make_tokenizer(self.model, texts(), sample.SHAPES[SHAPE]["vocab_size"])
        size = sum(file.stat().st_size for file in self.model.iterdir())
        self.say(f"a random DeepSeek-V3 checkpoint of {human_bytes(size)}: latent rows of 512 + 64 values, 4 layers, 16 experts")

    def converse(self, server: OwnServer, name: str) -> Run:
        import openai

        run = Run(name)
        system, turns = passages()
        conversations: list[list[Message]] = [[{"role": "system", "content": system}] for _ in range(CONVERSATIONS)]
        before, began_s = self._bytes_read(server), time.perf_counter()
        with (
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120, max_retries=0) as client,
            steps_bar(CONVERSATIONS * TURNS, name, quiet=self.quiet) as advance,
        ):
            for turn in range(TURNS):
                for number, messages in enumerate(conversations):
                    messages.append({"role": "user", "content": turns[turn * CONVERSATIONS + number]})
                    run.prompts.append(list(messages))
                    messages.append({"role": "assistant", "content": self._ask(client, messages, run)})
                    advance(1, "")
        run.seconds = time.perf_counter() - began_s
        run.bytes_read = self._bytes_read(server) - before
        self.say(f"{name}: {len(run.answers)} requests, {run.hit_tokens:,} of {run.prompt_tokens:,} prompt tokens came from the cache")
        return run

    def _ask(self, client: Any, messages: Sequence[Message], run: Run) -> str:
        text: list[str] = []
        began_s, usage = time.perf_counter(), None
        chunks = client.chat.completions.create(
            model=SHAPE,
            messages=messages,
            max_tokens=ANSWER_TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        for chunk in chunks:
            usage = chunk.usage or usage
            if chunk.choices and chunk.choices[0].delta.content:
                if not text:
                    run.first_token_s.append(time.perf_counter() - began_s)
                text.append(chunk.choices[0].delta.content)
        if usage is None:
            raise DataError("an answer ended without the usage that was asked for")
        run.prompt_tokens += usage.prompt_tokens
        run.hit_tokens += usage.prompt_tokens_details.cached_tokens
        run.generated += usage.completion_tokens
        run.answers.append("".join(text))
        return run.answers[-1]

    @staticmethod
    def _bytes_read(server: OwnServer) -> float:
        import httpx

        text = httpx.get(f"{server.url}/metrics").text
        return sum(float(value) for value in re.findall(r"^kvfs:kv_bytes_read_total\{.*\} (\S+)$", text, re.MULTILINE))

    def compare(self, runs: Sequence[Run]) -> None:
        """DataError unless all of them say what transformers says, with its own tokenizer and template: only the checkpoint is shared."""
        import torch
        from transformers import AutoTokenizer, DeepseekV3ForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()

        tokenizer = AutoTokenizer.from_pretrained(self.model)
        oracle = DeepseekV3ForCausalLM.from_pretrained(self.model, dtype=torch.float32, experts_implementation="eager").eval()
        for other in runs[1:]:
            for number, (one, two) in enumerate(zip(runs[0].answers, other.answers, strict=True)):
                if one != two:
                    raise DataError(f"request {number} was answered with {one!r} in the run {runs[0].name!r} and with {two!r} in {other.name!r}")
        with steps_bar(len(runs[0].answers), "asking transformers", quiet=self.quiet) as advance:
            for messages, answer in zip(runs[0].prompts, runs[0].answers, strict=True):
                said = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
                prompt = tokenizer(said, add_special_tokens=False)["input_ids"]
                with torch.no_grad():
                    found = oracle.generate(
                        torch.tensor([prompt]),
                        attention_mask=torch.ones(1, len(prompt)),
                        max_new_tokens=ANSWER_TOKENS,
                        do_sample=False,
                        pad_token_id=0,
                        eos_token_id=-1,
                    )
                expected = tokenizer.decode(found[0, len(prompt) :], skip_special_tokens=True)
                if expected != answer:
                    raise DataError(f"a prompt of {len(prompt)} tokens was answered with {answer!r}; transformers says {expected!r}")
                advance(1, "")
        self.say(f"all {sum(len(run.answers) for run in runs)} answers are what transformers says")


def show(runs: Sequence[Run]) -> None:
    headings = ("run", "tokens/s", "first token, median", "prompt tokens", "from the cache", "read from kvfs", "same text as transformers")
    made = table(*headings, right=headings[1:6])
    for run in runs:
        made.add_row(
            run.name,
            f"{run.generated / run.seconds:,.1f}",
            f"{1000 * statistics.median(run.first_token_s):,.0f} ms",
            f"{run.prompt_tokens:,}",
            f"{run.hit_tokens:,} ({100 * run.hit_tokens / run.prompt_tokens:.0f} %)",
            human_bytes(run.bytes_read),
            "yes",
        )
    console.print(made)


@click.command("demo-inference")
@click.option("--keep", is_flag=True, help="Leave the temporary directory (everything is stopped all the same).")
@click.option(
    "--directory", type=click.Path(file_okay=False, exists=True, path_type=Path), default=None, help="Where to make the temporary directory."
)
@common_options
def demo_inference(options: Any, keep: bool, directory: Path | None) -> None:
    """Make a small model, serve it with its KV cache on kvfs, restart the workers, compare every answer with transformers, clean up."""
    needs_inference()
    missing = [name for name in ("transformers", "openai") if importlib.util.find_spec(name) is None]
    if missing:
        raise SetupError(f"{' and '.join(missing)} not installed: pip install torch==2.13.0 'kvfs[inference,oracle]'")
    with interruptible(), work_directory("kvfs-demo-inference-", directory, keep=keep) as base, ExitStack() as stack:
        made = InferenceDemo(base, options.as_json)
        stack.callback(shut_down, made.cluster)
        runs = made.run()
    if options.as_json:
        print_json({"model": SHAPE, "runs": [run.describe() for run in runs], "same_text_as_transformers": True})
    else:
        console.print(f"\n{CONVERSATIONS} conversations of {TURNS} turns, {ANSWER_TOKENS} tokens an answer, greedy, fp32 on the CPU")
        show(runs)
