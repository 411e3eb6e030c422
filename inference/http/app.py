"""The routes: OpenAI's, and those that clients of vLLM and SGLang expect beside them.

Owns `make_app`. What is checked before a route is guard.py's; how an answer goes out is completions.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from kvfs import __version__
from kvfs.common.boundary.clock import Clock
from kvfs.common.boundary.random import Random
from kvfs.common.boundary.world import Boundaries
from kvfs.common.errors import KvfsError
from kvfs.inference.http.answers import Answers, ServedModel, answer_tokens, encode, engine_requests
from kvfs.inference.http.backend import Backend, Drainable, Flushable
from kvfs.inference.http.calls import Call, is_token, read_messages, read_prompts
from kvfs.inference.http.completions import ChatShape, Completion, Head, Shape, TextShape
from kvfs.inference.http.config import HttpConfig
from kvfs.inference.http.fields import Fields
from kvfs.inference.http.guard import INCOMING, Guard
from kvfs.inference.http.incoming import Incoming
from kvfs.inference.http.metrics import CONTENT_TYPE, Metrics
from kvfs.inference.http.refusals import Refusal, bad_parameter, refusal_of
from kvfs.inference.request import Request

COMPLETION_TOKENS = 16
"""Of /v1/completions without max_tokens: OpenAI's."""
ID_BYTES = 16


def make_app(model: ServedModel, backend: Backend, config: HttpConfig, world: Boundaries) -> ASGIApp:
    """The ASGI application that answers for one model."""
    metrics = Metrics(model.name)
    api = Api(model, backend, config, metrics, world.clock, world.random)
    return Guard(
        Starlette(routes=api.routes(), exception_handlers=dict.fromkeys((HTTPException, KvfsError, Exception), _refused)),
        config,
        world.random,
        metrics,
    )


async def _refused(request: HttpRequest, error: Exception) -> Response:
    return refusal_of(error).response()


@dataclass(frozen=True, slots=True)
class Api:
    model: ServedModel
    backend: Backend
    config: HttpConfig
    metrics: Metrics
    clock: Clock
    random: Random

    def routes(self) -> list[Route]:
        def route(method: str, path: str, endpoint: Callable[[HttpRequest], Coroutine[Any, Any, Response]]) -> Route:
            return Route(path, endpoint, methods=[method])

        return [
            route("GET", "/v1/models", self.models),
            route("GET", "/v1/models/{name:path}", self.one_model),
            route("POST", "/v1/completions", self.completions),
            route("POST", "/v1/chat/completions", self.chat),
            route("POST", "/tokenize", self.tokenize),
            route("POST", "/detokenize", self.detokenize),
            route("GET", "/health", self.health),
            route("GET", "/ping", self.health),
            route("POST", "/ping", self.health),
            route("GET", "/metrics", self.expose),
            route("GET", "/version", self.version),
            route("GET", "/server_info", self.server_info),
            route("GET", "/flush_cache", self.flush),
            route("POST", "/flush_cache", self.flush),
            route("POST", "/reset_prefix_cache", self.flush),
            route("POST", "/workers/{name}/drain", self.drain),
            route("DELETE", "/workers/{name}/drain", self.drain),
        ]

    # --- completions ---------------------------------------------------------------------------------------------------------------------

    async def completions(self, request: HttpRequest) -> Response:
        fields = await self._fields(request)
        call = self._call(fields)
        prompts = read_prompts(fields, self.model.vocabulary)
        if len(prompts) * call.n > self.config.choices_max:
            message = f"{len(prompts)} prompts with {call.n} answers each: up to {self.config.choices_max} answers are given at once"
            raise bad_parameter("prompt", message)
        special = fields.flag("add_special_tokens", True)
        echo = fields.flag("echo")
        identity = self._identity("cmpl")
        requests: list[Request] = []
        texts: list[str] = []
        for place, prompt in enumerate(prompts):
            tokens = await encode(self.model, prompt, add_special_tokens=special) if isinstance(prompt, str) else prompt
            if echo:
                texts += [prompt if isinstance(prompt, str) else self.model.tokenizer.decode(prompt)] * call.n
            requests += self._requests(tokens, call, COMPLETION_TOKENS, f"{identity}-{place}", "prompt")
        return self._completion(request, requests, call, TextShape(echo=texts), identity)

    async def chat(self, request: HttpRequest) -> Response:
        fields = await self._fields(request)
        call = self._call(fields)
        if fields.flag("echo"):
            raise Refusal(400, "echo is offered by /v1/completions only", param="echo", code="unsupported_parameter")
        tokens = await self._chat_tokens(fields)
        identity = self._identity("chatcmpl")
        return self._completion(request, self._requests(tokens, call, None, identity, "messages"), call, ChatShape(), identity)

    async def _chat_tokens(self, fields: Fields) -> list[int]:
        template = self.model.tokenizer.chat_template
        if template is None:
            raise Refusal(400, "the model has no chat template: use /v1/completions", param="messages", code="unsupported_parameter")
        variables = fields.get("chat_template_kwargs")
        if variables is not None and not isinstance(variables, dict):
            raise fields.refuse("chat_template_kwargs", "an object")
        prompt = fields.flag("add_generation_prompt", True)
        text = template.render(read_messages(fields), add_generation_prompt=prompt, variables=variables)
        return await encode(self.model, text, add_special_tokens=fields.flag("add_special_tokens"))

    def _requests(self, tokens: Sequence[int], call: Call, default: int | None, identity: str, param: str) -> list[Request]:
        if not tokens:
            raise bad_parameter(param, f"the {param} has no tokens: at least one is needed")
        max_tokens = answer_tokens(self.model, len(tokens), call, default, param)
        return engine_requests(tokens, call, max_tokens, identity, self.random)

    def _completion(self, request: HttpRequest, requests: list[Request], call: Call, shape: Shape, identity: str) -> Response:
        answers = Answers(self.model, self.backend, self.metrics, self.clock)
        head = Head(identity, self.model.name, self.clock.wall_ns() // 1_000_000_000)
        return Completion(answers, requests, call, shape, head, _incoming(request))

    def _identity(self, kind: str) -> str:
        return f"{kind}-{self.random.bytes(ID_BYTES).hex()}"

    async def _fields(self, request: HttpRequest) -> Fields:
        fields = Fields.parse(await _incoming(request).body())
        name = fields.get("model")
        if name is not None and name != self.model.name:
            raise Refusal(404, f"The model `{name}` does not exist: this server has {self.model.name}.", param="model", code="model_not_found")
        return fields

    def _call(self, fields: Fields) -> Call:
        return Call.read(fields, choices_max=self.config.choices_max, vocabulary=self.model.vocabulary)

    # --- tokens --------------------------------------------------------------------------------------------------------------------------

    async def tokenize(self, request: HttpRequest) -> Response:
        """Of a prompt, or of messages as a chat would send them to the model."""
        fields = await self._fields(request)
        prompt = fields.text("prompt", self.config.body_bytes_max)
        if prompt is not None:
            tokens = await encode(self.model, prompt, add_special_tokens=fields.flag("add_special_tokens", True))
        elif fields.get("messages") is not None:
            tokens = await self._chat_tokens(fields)
        else:
            raise fields.refuse("prompt", "a string, or else give messages")
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": self.model.context_tokens})

    async def detokenize(self, request: HttpRequest) -> Response:
        fields = await self._fields(request)
        tokens = fields.get("tokens")
        if not isinstance(tokens, list) or not all(is_token(token, self.model.vocabulary) for token in tokens):
            raise fields.refuse("tokens", f"a list of token ids, which are whole numbers below {self.model.vocabulary}")
        return JSONResponse({"prompt": self.model.tokenizer.decode(tokens, skip_special_tokens=False)})

    # --- the server ----------------------------------------------------------------------------------------------------------------------

    async def models(self, request: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def one_model(self, request: HttpRequest) -> Response:
        if request.path_params["name"] != self.model.name:
            raise Refusal(404, f"The model `{request.path_params['name']}` does not exist.", param="model", code="model_not_found")
        return JSONResponse(self._described())

    def _described(self) -> dict[str, Any]:
        model = self.model
        return {
            "id": model.name,
            "object": "model",
            "created": model.created_s,
            "owned_by": "kvfs",
            "root": model.name,
            "parent": None,
            "max_model_len": model.context_tokens,
        }

    async def health(self, request: HttpRequest) -> Response:
        """200 while at least one worker takes requests."""
        if not any(worker.serving for worker in await self.backend.status()):
            raise Refusal(503, "no worker takes requests")
        return Response()

    async def expose(self, request: HttpRequest) -> Response:
        return Response(self.metrics.expose(await self.backend.status()), media_type=CONTENT_TYPE)

    async def version(self, request: HttpRequest) -> Response:
        return JSONResponse({"version": __version__})

    async def server_info(self, request: HttpRequest) -> Response:
        workers = [
            {
                "name": worker.name,
                "role": worker.role,
                "serving": worker.serving,
                "requests_running": worker.running,
                "requests_waiting": worker.waiting,
                "tokens_waiting": worker.waiting_tokens,
                "pages": worker.pages,
                "pages_used": worker.pages_used,
            }
            for worker in await self.backend.status()
        ]
        return JSONResponse({"version": __version__, "model": self._described(), "vocabulary": self.model.vocabulary, "workers": workers})

    async def flush(self, request: HttpRequest) -> Response:
        """Prefixes in memory are forgotten; what is on disk stays."""
        if not isinstance(self.backend, Flushable):
            raise Refusal(501, "this server's workers cannot forget their caches")
        await self.backend.flush()
        return JSONResponse({"success": True})

    async def drain(self, request: HttpRequest) -> Response:
        """POST: a worker ends what it has and takes nothing new, until DELETE. `/server_info` tells when it has no request any more."""
        if not isinstance(self.backend, Drainable):
            raise Refusal(501, "this server's workers cannot be drained")
        name, drain = request.path_params["name"], request.method == "POST"
        if name not in {worker.name for worker in await self.backend.status()}:
            raise Refusal(404, f"there is no worker {name}: GET /server_info names them")
        await self.backend.drain(name, drain)
        return JSONResponse({"worker": name, "draining": drain})


def _incoming(request: HttpRequest) -> Incoming:
    incoming: Incoming = request.scope[INCOMING]
    return incoming
