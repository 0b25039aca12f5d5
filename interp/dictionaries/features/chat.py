"""Chat models that explain latents: an endpoint that speaks OpenAI's protocol, or a model on this machine.

A chat is any callable from messages (`[{"role": "user", "content": text}, ...]`, with the roles `system`, `user` and
`assistant`) to the text of the answer; these two are only the most usual.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from interp.errors import FileError, InputError, SettingsError, UnsupportedError
from interp.inputs import tokenizer_of
from interp.lens import Lens
from interp.wrapping import load

Message = dict[str, str]
Chat = Callable[[Sequence[Message]], str]
_AGAIN = (408, 409, 429, 500, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class OpenAIChat:
    """A chat model behind an endpoint that speaks OpenAI's chat protocol (`POST {base_url}/chat/completions`).

    Attributes:
        base_url: such as `http://localhost:8000/v1`.
        model: the name that the endpoint knows it by.
        api_key: sent as a bearer token; None for none. It is not shown.
        temperature: of sampling; 0 for the most likely answer.
        max_tokens: the longest answer.
        timeout: seconds to wait for an answer.
        retries: how often a busy or failing endpoint is asked again, after 1, 2, 4, ... seconds.

    Raises:
        SettingsError: the address is not of http or https, or a number is out of range.
    """

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    temperature: float = 0.0
    max_tokens: int = 400
    timeout: float = 120.0
    retries: int = 3

    def __post_init__(self) -> None:
        """Check every field."""
        if not self.base_url.startswith(("http://", "https://")):
            raise SettingsError(f"base_url begins with http:// or https://, found {self.base_url!r}.")
        if self.max_tokens < 1 or self.timeout <= 0 or self.retries < 0 or self.temperature < 0:
            raise SettingsError("max_tokens is at least 1, timeout above 0, retries and temperature at least 0.")

    def __call__(self, messages: Sequence[Message]) -> str:
        """The answer to some messages.

        Raises:
            FileError: the endpoint cannot be reached or refuses; the message holds what it said.
            InputError: what it answered is no chat completion.
        """
        wanted: dict[str, Any] = {"model": self.model, "messages": list(messages)}
        wanted |= {"temperature": self.temperature, "max_tokens": self.max_tokens}
        address = self.base_url.rstrip("/") + "/chat/completions"
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        body = self._post(urllib.request.Request(address, json.dumps(wanted).encode(), headers, method="POST"))
        try:
            content = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise InputError(f"{address} answered something that is no chat completion: {_short(body)}") from error
        if not isinstance(content, str):
            raise InputError(f"{address} answered without a text: {_short(body)}")
        return content

    def _post(self, request: urllib.request.Request) -> bytes:
        for attempt in range(self.retries + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return answer.read()
            except urllib.error.HTTPError as error:
                with error:
                    said = _short(error.read())
                if error.code not in _AGAIN or attempt == self.retries:
                    raise FileError(f"{request.full_url} refused with status {error.code}: {said}") from error
            except (urllib.error.URLError, TimeoutError, OSError) as error:
                if attempt == self.retries:
                    reason = getattr(error, "reason", error)
                    raise FileError(f"{request.full_url} cannot be reached: {reason}.") from error
            time.sleep(2.0**attempt)
        raise AssertionError  # the last attempt returned or raised


def _short(body: bytes) -> str:
    text = body.decode("utf-8", "replace").strip()
    return text if len(text) <= 300 else text[:297] + "..."


class LocalChat:
    """A model on this machine as a chat model, always its most likely answer.

    Args:
        model: a lens, or the name of a model (packaged, a folder, a hub id). Without a chat template the messages are
            written one below the other; models that were not trained to follow instructions answer accordingly.
        max_new_tokens: the longest answer.

    Raises:
        UnsupportedError: the model has no tokenizer.
    """

    def __init__(self, model: Lens | str, *, max_new_tokens: int = 200) -> None:
        if max_new_tokens < 1:
            raise SettingsError(f"max_new_tokens is at least 1, found {max_new_tokens}.")
        self.lens = load(model) if isinstance(model, str) else model
        self.max_new_tokens = max_new_tokens
        if tokenizer_of(self.lens.processor) is None:
            raise UnsupportedError(f"{self.lens.name} has no tokenizer, so it cannot chat.")

    def __call__(self, messages: Sequence[Message]) -> str:
        """The answer to some messages.

        Raises:
            InputError: they are longer than the model takes.
            UnsupportedError: the model does not generate.
        """
        tokenizer: Any = tokenizer_of(self.lens.processor)
        if getattr(tokenizer, "chat_template", None):
            text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        else:
            turns = [f"{m['role'].capitalize()}: {m['content']}" for m in messages]
            text = "\n\n".join([*turns, "Assistant:"])
        special = not getattr(tokenizer, "chat_template", None)
        batch = self.lens.prepare([text], padding_side="left", add_special_tokens=special)
        found = self.lens.generate(batch, max_new_tokens=self.max_new_tokens)
        assert found.texts is not None
        return found.texts[0].strip()
