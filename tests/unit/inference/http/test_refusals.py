"""What the server refuses, and how it says so; what happens when clients leave, send too much, or stop reading."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from tests.unit.inference.http.conftest import VOCABULARY, Serve, Served, Step

from kvfs.common.errors import AddressInUse, InternalError, Overloaded, Unreachable
from kvfs.inference.http.backend import WorkerStatus
from kvfs.inference.http.config import HttpConfig
from kvfs.inference.http.server import listen
from kvfs.inference.request import Finish, Request, TokenEvent


@pytest.fixture
def served(serving: Serve) -> Served:
    return serving(lambda request: [9] * 2000)


def eventually(happened: Callable[[], bool], seconds: float = 5.0) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"n": 0}, "n"),
    ({"n": 1000}, "n"),
    ({"best_of": 3}, "best_of"),
    ({"seed": 1 << 70}, "seed"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 1e-45}, "repetition_penalty"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": 0}, "stop"),
    ({"stop_token_ids": {}}, "stop_token_ids"),
    ({"include_stop_str_in_output": True}, "include_stop_str_in_output"),
    ({"truncate_prompt_tokens": 1}, "truncate_prompt_tokens"),
    ({"regex": "a+"}, "regex"),
    ({"documents": [{"text": "a"}]}, "documents"),
    ({"stop_token_ids": [VOCABULARY]}, "stop_token_ids"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": []}, "stream_options"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"logprobs": 0}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"logit_bias": {"1": 5}}, "logit_bias"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"cache_salt": 7}, "cache_salt"),
]
BAD_PROMPTS: list[Any] = [None, 7, [], {}, [[]], [1.5], [True], ["a", 1], [VOCABULARY], [-1], [["a"]], [[1], [VOCABULARY]]]
BAD_MESSAGES: list[tuple[Any, str]] = [
    (None, "messages"),
    ([], "messages"),
    (["a"], "messages[0]"),
    ([{"role": "king", "content": "a"}], "messages[0]"),
    ([{"role": "user", "content": "a"}, {"role": "user"}], "messages[1].content"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content"),
]


def test_every_parameter_is_checked_and_named(served: Served) -> None:
    with httpx.Client(base_url=served.url) as http:

        def refused(path: str, values: dict[str, Any], param: str) -> None:
            answer = http.post(path, content=json.dumps({"model": "micro"} | values), headers={"content-type": "application/json"})
            assert answer.status_code == 400, (values, answer.text)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error"), (values, error)
            assert param in error["message"]

        for values, param in BAD:
            refused("/v1/completions", {"prompt": "a"} | values, param)
        for prompt in BAD_PROMPTS:
            refused("/v1/completions", {"prompt": prompt}, "prompt")
        for messages, param in BAD_MESSAGES:
            refused("/v1/chat/completions", {"messages": messages}, param)
        refused("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "echo": True}, "echo")
        refused("/v1/completions", {"prompt": ["a"] * 100, "n": 2}, "prompt")
        refused("/v1/completions", {"prompt": "", "add_special_tokens": False}, "prompt")
    assert served.backend.asked == []


def test_values_that_change_nothing_are_taken(served: Served) -> None:
    neutral = {
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logprobs": False,
        "logit_bias": {},
        "tools": [],
        "suffix": "",
        "n": 1.0,
    }
    for top_k in (0, 1 << 30):
        asked = {"prompt": "a", "max_tokens": 1, "tool_choice": "none", "top_k": top_k} | neutral
        answer = httpx.post(served.url + "/v1/completions", json=asked)
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"7", b'{"prompt": "\\ud800"}', b'{"prompt": "\xed\xa0\x80"}', b"[" * 100_000])
def test_a_body_that_is_no_request(served: Served, body: bytes) -> None:
    answer = httpx.post(served.url + "/v1/completions", content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


def test_no_such_route_method_or_model(served: Served) -> None:
    with httpx.Client(base_url=served.url) as http:
        for answer, status, code in (
            (http.get("/v2"), 404, "not_found"),
            (http.get("/v1/completions"), 405, "method_not_allowed"),
            (http.post("/v1/completions", json={"model": "gpt", "prompt": "a"}), 404, "model_not_found"),
            (http.post("/v1/chat/completions", json={"model": 7, "messages": []}), 404, "model_not_found"),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_what_is_longer_than_the_context(served: Served) -> None:
    api = openai.OpenAI(base_url=served.url + "/v1", api_key="x", max_retries=0)
    for prompt, max_tokens in (([5] * 1000, None), ([5] * 1200, 1), ([5] * 900, 101), ("a" * 20_000, 1)):
        with pytest.raises(openai.BadRequestError, match="maximum context length is 1000 tokens") as caught:
            api.completions.create(model="micro", prompt=prompt, max_tokens=max_tokens)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.BadRequestError) as caught:
        api.chat.completions.create(model="micro", messages=[{"role": "user", "content": "word " * 2000}])
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    assert api.completions.create(model="micro", prompt=[5] * 900, max_tokens=100).usage.completion_tokens == 100  # type: ignore[union-attr]
    assert api.completions.create(model="micro", prompt=[5] * 990).usage.completion_tokens == 10  # type: ignore[union-attr]


def test_keys(serving: Serve) -> None:
    served = serving(lambda request: [9], api_keys=("sesame", "second"))
    for key, works in (("sesame", True), ("second", True), ("sesam", False), ("", False), ("ßesam", False)):
        headers = {"authorization": f"Bearer  {key}".rstrip().encode("latin-1")}
        answer = httpx.post(served.url + "/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers=headers)
        assert answer.status_code == (200 if works else 401), key
    assert answer.json()["error"]["code"] == "invalid_api_key"
    for path in ("/v1/models", "/tokenize", "/server_info", "/flush_cache", "/version", "/nowhere"):
        assert httpx.get(served.url + path).status_code == 401
        assert httpx.get(served.url + path, headers={"authorization": "Basic sesame"}).status_code == 401
    assert [httpx.get(served.url + path).status_code for path in ("/health", "/ping", "/metrics")] == [200] * 3
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=served.url + "/v1", api_key="wrong").models.list()


def test_the_callers_request_id_comes_back(served: Served) -> None:
    with httpx.Client(base_url=served.url) as http:
        assert http.get("/version", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
        assert http.get("/nowhere", headers={"x-request-id": "abc-2"}).headers["x-request-id"] == "abc-2"
        ids = [http.get("/version", headers={"x-request-id": given}).headers["x-request-id"] for given in ("x" * 200, "a b", "")]
        assert all(len(made) == 32 for made in ids) and len(set(ids)) == 3
        made = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers={"x-request-id": "abc-3"})
        assert made.headers["x-request-id"] == "abc-3" and "abc-3" not in served.backend.asked[0].id


@pytest.mark.parametrize(
    ("step", "status", "said"),
    [
        (Overloaded("every worker is full"), 429, "every worker is full"),
        (Unreachable("no worker is there"), 503, "no worker is there"),
        (InternalError("secret"), 500, "its log has the details"),
        (RuntimeError("secret"), 500, "its log has the details"),
        (TokenEvent(request="", index=0, token=None, finish=Finish.CANCELLED), 503, "cancelled"),
        (TokenEvent(request="", index=0, token=None, finish=Finish.ERROR, message="the device is gone"), 500, "the device is gone"),
    ],
)
def test_trouble_of_the_backend(serving: Serve, step: Step, status: int, said: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    for before in ([], [9, 9]):
        served = serving(lambda request, before=before: [*before, step])  # type: ignore[misc]
        whole = httpx.post(served.url + "/v1/completions", json={"prompt": "a", "max_tokens": 9})
        assert whole.status_code == status and said in whole.json()["error"]["message"] and "secret" not in whole.text, whole.text
        assert (whole.headers.get("retry-after") == "1") == (status in (429, 503))
        streamed = httpx.post(served.url + "/v1/completions", json={"prompt": "a", "max_tokens": 9, "stream": True})
        if not before:
            assert streamed.status_code == status and said in streamed.json()["error"]["message"]
            continue
        events = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
        assert streamed.status_code == 200 and events[-1] == "[DONE]"
        assert said in json.loads(events[-2])["error"]["message"] and "secret" not in streamed.text


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_its_request(serving: Serve, stream: bool) -> None:
    def slow(request: Request) -> Iterator[Step]:
        while True:
            yield 9
            yield 0.01

    served = serving(slow)
    with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=0.3) as http:
        if stream:
            with http.stream("POST", served.url + "/v1/completions", json={"prompt": "a", "max_tokens": 900, "n": 2, "stream": True}) as response:
                next(response.iter_text())
                raise httpx.ReadTimeout("enough")
        http.post(served.url + "/v1/completions", json={"prompt": "a", "max_tokens": 900, "n": 2})
    eventually(lambda: len(served.backend.given_up) == 2)
    assert sorted(served.backend.given_up) == sorted(request.id for request in served.backend.asked)


def test_a_body_that_is_too_large(serving: Serve) -> None:
    served = serving(lambda request: [9], body_bytes_max=10_000, api_keys=("key",))
    for headers, status in (({"authorization": "Bearer key"}, 413), ({}, 401)):
        with httpx.Client(base_url=served.url, headers=headers) as http:
            answer = http.post("/v1/completions", json={"prompt": "a" * 20_000})
            assert (answer.status_code, answer.json()["error"]["type"]) in ((413, "invalid_request_error"), (401, "authentication_error"))
            assert answer.status_code == status
            assert http.get("/health").status_code == 200


def test_a_large_body_that_nobody_reads_holds_no_connection(serving: Serve) -> None:
    """The server's queue for a request has ten places: once they were full, connection and request stayed for ever."""
    served = serving(lambda request: [9])
    served.backend.flush_s = 0.3
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as sock:
        sock.settimeout(5)
        sock.sendall(b"POST /flush_cache HTTP/1.1\r\nhost: x\r\ncontent-length: 3000000\r\n\r\n" + b"x" * 2_900_000)
        assert b"200" in sock.recv(4096).split(b"\r\n")[0]
        while sock.recv(65536):
            pass


def test_a_body_that_does_not_come(serving: Serve) -> None:
    served = serving(lambda request: [9], body_timeout_s=0.1)
    with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 30\r\n\r\n{")
        sock.settimeout(5)
        assert b"408" in sock.recv(4096)


def test_more_requests_than_are_taken_at_once(serving: Serve) -> None:
    served = serving(lambda request: [9, 60.0], requests_max=1)
    with httpx.stream("POST", served.url + "/v1/completions", json={"prompt": "a", "max_tokens": 9, "stream": True}):
        answer = httpx.get(served.url + "/v1/models")
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        assert httpx.get(served.url + "/health").status_code == 200
    eventually(lambda: httpx.get(served.url + "/v1/models").status_code == 200)


def test_a_client_that_stops_reading_is_dropped(serving: Serve) -> None:
    def endless(request: Request) -> Iterator[Step]:
        while True:
            yield from [9] * 100
            yield 0.0001

    served = serving(endless, client_timeout_s=0.5, context_tokens=10_000_000)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", int(served.url.rpartition(":")[2])))
        body = b'{"prompt": "a", "max_tokens": 9000000, "stream": true}'
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        eventually(lambda: len(served.backend.given_up) == 1, 20)


def test_health_follows_the_workers(served: Served) -> None:
    assert httpx.get(served.url + "/health").content == b""
    served.backend.workers = [WorkerStatus(name="worker-0", role="both", serving=False)]
    answer = httpx.get(served.url + "/health")
    assert (answer.status_code, answer.json()["error"]["message"]) == (503, "no worker takes requests")


def test_a_port_that_is_taken_is_said_so() -> None:
    taken = listen(HttpConfig(port=0))
    with taken, pytest.raises(AddressInUse, match=f"cannot listen on 127.0.0.1:{taken.getsockname()[1]}"):
        listen(HttpConfig(port=taken.getsockname()[1]))
