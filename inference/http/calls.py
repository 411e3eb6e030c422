"""What a caller asks for: OpenAI's parameters, and those of vLLM and SGLang that benchmark clients send, checked.

Owns `Call` and how prompts and messages are read. Invariants: a parameter that would change the answer and is not offered is refused by name unless
it has the value that changes nothing; a field that nobody knows is ignored, as OpenAI-compatible servers do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvfs.inference.http.fields import Fields
from kvfs.inference.http.refusals import Refusal, bad_parameter
from kvfs.inference.request import PENALTY_MAX, PENALTY_MIN, SEED_MAX, Sampling

STOPS_MAX = 16
STOP_CHARACTERS_MAX = 256
STOP_TOKENS_MAX = 64
SALT_CHARACTERS_MAX = 256
TOP_K_MAX = (1 << 31) - 1
"""SGLang's clients write 1 << 30 for all tokens."""
ROLES = ("system", "developer", "user", "assistant", "tool")

NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "ebnf": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "json_schema": (),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logits_processors": ([],),
    "logprobs": (False,),
    "min_p": (0,),
    "min_new_tokens": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "no_stop_trim": (False,),
    "presence_penalty": (0,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "regex": (),
    "response_format": ({"type": "text"},),
    "stop_regex": ([],),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
"""Field: values that change nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """All of a request but its prompt."""

    n: int
    stream: bool
    include_usage: bool
    """In a stream: a last chunk with the usage."""
    max_tokens: int | None
    """None: the endpoint's own."""
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    repetition_penalty: float
    ignore_eos: bool
    stops: tuple[str, ...]
    stop_tokens: tuple[int, ...]
    skip_special_tokens: bool
    salt: bytes

    @classmethod
    def read(cls, fields: Fields, *, choices_max: int, vocabulary: int) -> Call:
        for name, neutral in NOT_OFFERED.items():
            value = fields.get(name)
            if value is not None and not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral):
                raise Refusal(400, f"{name} is not offered by this server", param=name, code="unsupported_parameter")
        n = fields.integer("n", 1, 1, choices_max)
        if fields.integer("best_of", n, 1, choices_max) != n:
            raise Refusal(400, "best_of is not offered by this server beyond n", param="best_of", code="unsupported_parameter")
        seed = fields.integer("seed", -1, -(1 << 63), (1 << 64) - 1)
        return cls(
            n=n,
            stream=fields.flag("stream"),
            include_usage=fields.inside("stream_options").flag("include_usage"),
            max_tokens=_max_tokens(fields),
            temperature=fields.number("temperature", 1.0, 0.0, 2.0),
            top_p=fields.number("top_p", 1.0, 0.0, 1.0, above_low=True),
            top_k=min(max(0, fields.integer("top_k", 0, -1, TOP_K_MAX)), vocabulary),
            seed=None if fields.get("seed") is None else seed & SEED_MAX,
            repetition_penalty=fields.number("repetition_penalty", 1.0, PENALTY_MIN, PENALTY_MAX),
            ignore_eos=fields.flag("ignore_eos"),
            stops=_stops(fields),
            stop_tokens=_stop_tokens(fields, vocabulary),
            skip_special_tokens=fields.flag("skip_special_tokens", True),
            salt=(fields.text("cache_salt", SALT_CHARACTERS_MAX) or "").encode(errors="surrogatepass"),
        )

    def sampling(self, max_tokens: int, seed: int) -> Sampling:
        return Sampling(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=seed,
            repetition_penalty=self.repetition_penalty,
            ignore_eos=self.ignore_eos,
            stop_tokens=self.stop_tokens,
        )


def _max_tokens(fields: Fields) -> int | None:
    """The newer name goes before the older one."""
    for name in ("max_completion_tokens", "max_tokens"):
        if fields.get(name) is not None:
            return fields.integer(name, 1, 1, 1 << 31)
    return None


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.get("stop")
    stops = [value] if isinstance(value, str) else [] if value is None else value
    good = isinstance(stops, list) and len(stops) <= STOPS_MAX
    if not good or not all(isinstance(stop, str) and 0 < len(stop) <= STOP_CHARACTERS_MAX for stop in stops):
        raise fields.refuse("stop", f"a string or a list of up to {STOPS_MAX}, of 1 to {STOP_CHARACTERS_MAX} characters")
    return tuple(stops)


def _stop_tokens(fields: Fields, vocabulary: int) -> tuple[int, ...]:
    value = fields.get("stop_token_ids")
    if value is None:
        return ()
    if not (isinstance(value, list) and len(value) <= STOP_TOKENS_MAX and all(is_token(each, vocabulary) for each in value)):
        raise fields.refuse("stop_token_ids", f"a list of up to {STOP_TOKENS_MAX} token ids below {vocabulary}")
    return tuple(value)


def is_token(value: object, vocabulary: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocabulary


def read_prompts(fields: Fields, vocabulary: int) -> list[str | list[int]]:
    """`prompt`: a string, several, a list of token ids, or several."""
    value = fields.get("prompt")
    if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(each, int) for each in value)):
        value = [value]
    if not isinstance(value, list) or not value:
        raise fields.refuse("prompt", "a string, a list of strings, a list of token ids, or a list of those")
    for place, prompt in enumerate(value):
        if not isinstance(prompt, str) and not isinstance(prompt, list):
            raise bad_parameter("prompt", f"prompt {place} is neither a string nor a list of token ids")
        if isinstance(prompt, list) and not all(is_token(token, vocabulary) for token in prompt):
            raise bad_parameter("prompt", f"prompt {place} is no list of token ids, which are whole numbers below {vocabulary}")
    return value


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """`messages`, their content as one string each."""
    value = fields.get("messages")
    if not isinstance(value, list) or not value:
        raise fields.refuse("messages", "a list of at least one message")
    return [_message(place, message) for place, message in enumerate(value)]


def _message(place: int, message: object) -> dict[str, Any]:
    name = f"messages[{place}]"
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise bad_parameter(name, f"{name} is no object with a role of {', '.join(ROLES)}")
    role = "system" if message["role"] == "developer" else message["role"]  # OpenAI's newer word for it, which templates do not know
    return {**message, "role": role, "content": _content(f"{name}.content", message)}


def _content(name: str, message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None and message["role"] == "assistant":
        return ""
    if not isinstance(content, list):
        raise bad_parameter(name, f"{name} is neither a string nor a list of parts")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise bad_parameter(name, f"{name} has a part that is no text: this model takes text only")
    return "".join(part["text"] for part in content)
