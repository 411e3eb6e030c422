"""A small byte-level tokenizer with special tokens and a chat template, as a checkpoint has them; and real servers over a backend that is told what
to say.
"""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import pytest
import tokenizers
import trio
from starlette.types import ASGIApp
from tokenizers import decoders, models, pre_tokenizers, trainers

from kvfs.common.boundary.world import Boundaries
from kvfs.inference.http.answers import ServedModel
from kvfs.inference.http.app import make_app
from kvfs.inference.http.backend import WorkerStatus
from kvfs.inference.http.config import HttpConfig
from kvfs.inference.http.server import serve
from kvfs.inference.http.tokenizer import Tokenizer
from kvfs.inference.request import Finish, Request, TokenEvent

Step = int | float | Exception | TokenEvent

SPECIAL = ("<bos>", "<eos>", "<user>", "<assistant>")
VOCABULARY = 400
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}<user>{{ message.content }}"
    "{% elif message.role == 'assistant' %}<assistant>{% generation %}{{ message.content }}{% endgeneration %}<eos>"
    "{% elif message.role == 'system' %}{{ message.content }}{% else %}{{ raise_exception('no role ' + message.role) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    corpus = [Path(__file__).read_text(), Path(__file__).parents[4].joinpath("README.md").read_text(), "größer, naïve, 深度求索, 🦑🦑"]
    made.train_from_iterator(corpus, trainer)
    made.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": "<bos>"},
        "eos_token": "<eos>",
        "pad_token": None,
        "add_bos_token": True,
        "chat_template": TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> Tokenizer:
    return Tokenizer.load(checkpoint)


# --- a server ------------------------------------------------------------------------------------------------------------------------------


class Script:
    """A backend that says what it is told to: `answer(request)` gives tokens, errors to raise, seconds to wait, or events."""

    def __init__(self, answer: Callable[[Request], Iterable[Step]]) -> None:
        self.answer = answer
        self.asked: list[Request] = []
        self.given_up: list[str] = []
        self.workers: list[WorkerStatus] = [WorkerStatus(name="worker-0", role="both", serving=True)]
        self.flushed = 0
        self.flush_s = 0.0

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        self.asked.append(request)
        ended, index = False, 0
        try:
            for step in self.answer(request):
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, float):
                    await trio.sleep(step)
                    continue
                event = step
                if isinstance(step, int):
                    last = index + 1 == request.sampling.max_tokens
                    event = TokenEvent(request=request.id, index=index, token=step, finish=Finish.LENGTH if last else None)
                assert isinstance(event, TokenEvent)
                ended, index = event.finish is not None, index + 1
                yield event
                if ended:
                    return
        finally:
            if not ended:
                self.given_up.append(request.id)

    async def status(self) -> list[WorkerStatus]:
        return self.workers

    async def flush(self) -> None:
        await trio.sleep(self.flush_s)
        self.flushed += 1


class Served:
    """A real server on a free port, in a thread of its own."""

    def __init__(self, backend: Script, tokenizer: Tokenizer, config: HttpConfig, context_tokens: int) -> None:
        self.backend = backend
        self.url = ""
        self._stop: Callable[[], None] = lambda: None
        model = ServedModel(name="micro", tokenizer=tokenizer, context_tokens=context_tokens, vocabulary=VOCABULARY, created_s=1_700_000_000)
        app = make_app(model, backend, config, Boundaries())
        ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._run, app, config, ready))
        self._thread.start()
        assert ready.wait(10)

    async def _run(self, app: ASGIApp, config: HttpConfig, ready: threading.Event) -> None:
        token, stop = trio.lowlevel.current_trio_token(), trio.Event()
        self._stop = lambda: token.run_sync_soon(stop.set)
        async with trio.open_nursery() as nursery:
            self.url = await nursery.start(partial(serve, app, config, stop=stop))
            ready.set()

    def close(self) -> None:
        self._stop()
        self._thread.join(20)
        assert not self._thread.is_alive()


Serve = Callable[..., Served]


@pytest.fixture
def serving(tokenizer: Tokenizer) -> Iterator[Serve]:
    """(what it answers, **configuration) -> Served."""
    made: list[Served] = []

    def start(answer: Callable[[Request], Iterable[Step]], context_tokens: int = 1000, **settings: object) -> Served:
        served = Served(Script(answer), tokenizer, HttpConfig(port=0, shutdown_s=0.2, **settings), context_tokens)  # type: ignore[arg-type]
        made.append(served)
        return served

    yield start
    for served in made:
        served.close()
