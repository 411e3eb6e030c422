"""The API as the `openai` client sees it, over a real server whose backend is told what to say."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest
from tests.unit.inference.http.conftest import Serve, Served, Step

from kvfs.inference.http.tokenizer import Tokenizer
from kvfs.inference.request import Finish, Request, TokenEvent

ANSWER = "Grüße: ein 🦑 schwimmt."


def client(served: Served, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=served.url + "/v1", api_key=key, max_retries=0)


@pytest.fixture
def answering(serving: Serve, tokenizer: Tokenizer) -> Served:
    """Says ANSWER and then <eos>; of the prompt, the first 64 tokens were cached, 10 of them on disk."""

    def answer(request: Request) -> Iterator[Step]:
        cached = min(64, len(request.prompt) - 1)
        for index, token in enumerate(tokenizer.encode(ANSWER, add_special_tokens=False)):
            last = index + 1 == request.sampling.max_tokens
            finish = Finish.LENGTH if last else None
            yield TokenEvent(request=request.id, index=index, token=token, finish=finish, cached_tokens=cached, disk_tokens=min(10, cached))
        yield TokenEvent(request=request.id, index=99, token=tokenizer.token_id("<eos>"), finish=Finish.STOP)

    return serving(answer)


def test_models(answering: Served) -> None:
    listed = client(answering).models.list().data
    assert [(model.id, model.owned_by, model.max_model_len) for model in listed] == [("micro", "kvfs", 1000)]  # type: ignore[attr-defined]
    assert client(answering).models.retrieve("micro") == listed[0]
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client(answering).models.retrieve("other/model")


def test_a_completion_and_its_usage(answering: Served, tokenizer: Tokenizer) -> None:
    made = client(answering).completions.create(model="micro", prompt="word " * 80, max_tokens=100)
    tokens = tokenizer.encode("word " * 80)
    assert [(choice.text, choice.finish_reason) for choice in made.choices] == [(ANSWER, "stop")]
    assert made.usage is not None and made.usage.prompt_tokens_details is not None
    answered = len(tokenizer.encode(ANSWER, add_special_tokens=False)) + 1
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (len(tokens), answered)
    assert made.usage.prompt_tokens_details.cached_tokens == 64
    assert made.usage.prompt_cache_hit_tokens == 64  # type: ignore[attr-defined]
    assert made.usage.prompt_cache_miss_tokens == len(tokens) - 64  # type: ignore[attr-defined]
    [asked] = answering.backend.asked
    assert list(asked.prompt) == tokens and asked.sampling.max_tokens == 100 and asked.sampling.temperature == 1.0


def test_without_max_tokens_a_completion_has_16_tokens_and_a_chat_what_fits(answering: Served) -> None:
    assert client(answering).completions.create(model="micro", prompt="a").choices[0].finish_reason == "length"
    client(answering).chat.completions.create(model="micro", messages=[{"role": "user", "content": "a"}])
    short, chat = (request.sampling.max_tokens for request in answering.backend.asked)
    assert short == 16 and chat == 1000 - len(answering.backend.asked[1].prompt)


def test_prompts_of_every_form(answering: Served, tokenizer: Tokenizer) -> None:
    api = client(answering)
    one, two = tokenizer.encode("one"), tokenizer.encode("two")
    for prompt, expected in (("one", [one]), (["one", "two"], [one, two]), (one, [one]), ([one, two], [one, two])):
        answering.backend.asked.clear()
        made = api.completions.create(model="micro", prompt=prompt, max_tokens=100)
        assert sorted(list(request.prompt) for request in answering.backend.asked) == sorted(expected)
        assert [choice.index for choice in made.choices] == list(range(len(expected)))
        assert made.usage is not None and made.usage.prompt_tokens == sum(map(len, expected))


def test_n_answers_and_an_echo(answering: Served, tokenizer: Tokenizer) -> None:
    made = client(answering).completions.create(model="micro", prompt=["one ", "two "], n=2, echo=True, max_tokens=100, seed=7)
    assert [choice.text for choice in made.choices] == [f"one {ANSWER}"] * 2 + [f"two {ANSWER}"] * 2
    assert sorted((request.prompt, request.sampling.seed) for request in answering.backend.asked) == [
        (tuple(tokenizer.encode(word)), seed) for word in ("two ", "one ") for seed in (7, 8)
    ]
    assert len({request.id for request in answering.backend.asked}) == 4
    assert made.usage is not None and made.usage.prompt_tokens == len(tokenizer.encode("one ")) + len(tokenizer.encode("two "))
    answering.backend.asked.clear()
    client(answering).completions.create(model="micro", prompt="a", n=2, max_tokens=1)
    seeds = {request.sampling.seed for request in answering.backend.asked}
    assert len(seeds) == 2 and not seeds & {0, 1}, "without a seed it is drawn"


@pytest.mark.parametrize("include_usage", [True, False])
def test_a_stream_of_text(answering: Served, include_usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    chunks = list(client(answering).completions.create(model="micro", prompt="a", max_tokens=100, stream=True, **options))  # type: ignore[call-overload]
    if include_usage:
        usage = chunks.pop()
        assert usage.choices == [] and usage.usage.completion_tokens > 3
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in chunks), "SGLang's client looks at choices[0] of every chunk"
    texts = [chunk.choices[0].text for chunk in chunks]
    assert "".join(texts) == ANSWER and len(texts) > 5 and "\ufffd" not in "".join(texts)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("include_usage", [True, False])
def test_a_chat_and_its_stream(answering: Served, tokenizer: Tokenizer, include_usage: bool) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Who "}, {"type": "text", "text": "swims?"}]},
    ]
    api = client(answering)
    made = api.chat.completions.create(model="micro", messages=messages)  # type: ignore[arg-type]
    assert (made.choices[0].message.role, made.choices[0].message.content, made.choices[0].finish_reason) == ("assistant", ANSWER, "stop")
    sent = tokenizer.decode(answering.backend.asked[0].prompt, skip_special_tokens=False)
    assert sent == "<bos>Be brief.<user>Who swims?<assistant>"
    options = {"stream_options": {"include_usage": include_usage}}
    chunks = list(api.chat.completions.create(model="micro", messages=messages, stream=True, n=2, **options))  # type: ignore[call-overload]
    if include_usage:
        assert chunks.pop().usage.prompt_tokens == len(answering.backend.asked[0].prompt)
    for choice in (0, 1):
        deltas = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice]
        assert (deltas[0].delta.role, deltas[0].delta.content) == ("assistant", "")
        assert "".join(each.delta.content or "" for each in deltas) == ANSWER
        assert [each.finish_reason for each in deltas] == [None] * (len(deltas) - 1) + ["stop"]


def test_the_events_of_a_stream_byte_by_byte(answering: Served) -> None:
    with httpx.stream("POST", answering.url + "/v1/completions", json={"prompt": "a", "max_tokens": 1, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = response.read().decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: {") for line in lines[:-2])


def test_stop_strings_end_an_answer_and_cancel_the_rest(serving: Serve, tokenizer: Tokenizer) -> None:
    def endless(request: Request) -> Iterator[Step]:
        while True:
            yield from tokenizer.encode("all the squids of the sea ", add_special_tokens=False)
            yield 0.001

    served = serving(endless)
    for stop in ("uids of", ["the sea", "uids of"]):
        made = client(served).completions.create(model="micro", prompt="a", max_tokens=900, stop=stop)
        assert (made.choices[0].text, made.choices[0].finish_reason) == ("all the sq", "stop")
        assert served.backend.given_up == [served.backend.asked[-1].id]
        chunks = list(client(served).completions.create(model="micro", prompt="a", max_tokens=900, stop=stop, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == "all the sq"
        served.backend.given_up.clear()


def test_special_tokens_are_shown_when_asked_for(serving: Serve, tokenizer: Tokenizer) -> None:
    served = serving(lambda request: [tokenizer.token_id("<user>") or 0, *tokenizer.encode("x", add_special_tokens=False)])
    ask = client(served).completions.create
    assert ask(model="micro", prompt="a", max_tokens=2).choices[0].text == "x"
    assert ask(model="micro", prompt="a", max_tokens=2, extra_body={"skip_special_tokens": False}).choices[0].text == "<user>x"


def test_sampling_parameters_reach_the_engine(answering: Served) -> None:
    extra = {
        "top_k": 7,
        "repetition_penalty": 1.25,
        "ignore_eos": True,
        "stop_token_ids": [5, 6],
        "cache_salt": "tenant",
        "user": "x",
        "unheard_of": 1,
    }
    client(answering).completions.create(
        model="micro", prompt="a", temperature=0.5, top_p=0.9, seed=-3, max_tokens=3, logprobs=None, extra_body=extra
    )
    [asked] = answering.backend.asked
    sampling = asked.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.repetition_penalty) == (0.5, 0.9, 7, 1.25)
    assert (sampling.ignore_eos, sampling.stop_tokens, sampling.max_tokens, asked.salt) == (True, (5, 6), 3, b"tenant")
    assert sampling.seed == (1 << 63) - 3
    chat = client(answering).chat.completions.create
    chat(model="micro", messages=[{"role": "user", "content": "a"}], max_completion_tokens=4, max_tokens=9, extra_body={"top_k": -1})
    assert answering.backend.asked[1].sampling.max_tokens == 4 and answering.backend.asked[1].sampling.top_k == 0


def test_tokenize_and_detokenize(answering: Served, tokenizer: Tokenizer) -> None:
    post = httpx.Client(base_url=answering.url).post
    tokens = tokenizer.encode("Grüße")
    assert post("/tokenize", json={"model": "micro", "prompt": "Grüße"}).json() == {"tokens": tokens, "count": len(tokens), "max_model_len": 1000}
    assert post("/tokenize", json={"prompt": "Grüße", "add_special_tokens": False}).json()["tokens"] == tokens[1:]
    assert post("/tokenize", json={"messages": [{"role": "user", "content": "a"}]}).json()["count"] == 4
    assert post("/detokenize", json={"tokens": tokens}).json() == {"prompt": "<bos>Grüße"}
    assert post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}
    assert post("/detokenize", json={"tokens": [1, 4000]}).json()["error"]["param"] == "tokens"
    assert post("/tokenize", json={}).json()["error"]["param"] == "prompt"
