"""Completions from any server that speaks OpenAI's protocol (vLLM's, SGLang's...), many at a time.

Standard library only: one thread per request in flight. What may pass (time-outs, dropped
connections, answers that are not JSON, 408, 409, 425, 429, 5xx) is tried again after a growing
pause, or after the pause that Retry-After asks for; any other refusal ends the evaluation at once.
"""

import http.client
import json
import os
import queue
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from redi.config import EvalConfig
from redi.errors import RediError

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds; a pause is half to all of what its turn allows
PASSING = {408, 409, 425, 429}  # and 5xx
Key = TypeVar("Key")


@dataclass(frozen=True)
class Completion:
    text: str
    finished: bool  # by the model, not by max_new_tokens
    num_tokens: int


class Unanswered(Exception):
    """A request that failed at every try; says why the last one did."""


class Client:
    def __init__(self, config: EvalConfig) -> None:
        self.config = config
        path = "/chat/completions" if config.api == "chat" else "/completions"
        self.url = str(config.base_url).rstrip("/") + path
        self._headers = {"Content-Type": "application/json", **_authorization(config.api_key_env)}
        self._stop = threading.Event()

    def answers(
        self, requests: Sequence[tuple[Key, dict[str, Any]]]
    ) -> Iterator[list[tuple[Key, Completion | Exception]]]:
        """Sends all requests, `concurrency` at a time, and yields what has come back since.

        An Unanswered concerns its request only; any other exception would meet them all.
        """
        todo: queue.SimpleQueue = queue.SimpleQueue()
        done: queue.SimpleQueue = queue.SimpleQueue()
        for request in requests:
            todo.put(request)

        def work() -> None:
            while not self._stop.is_set():
                try:
                    key, body = todo.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((key, self.complete(body)))
                except Exception as error:  # told to the caller, who decides
                    done.put((key, error))

        for _ in range(min(self.config.concurrency, len(requests))):
            threading.Thread(target=work, daemon=True).start()  # Ctrl-C waits for none of them
        left = len(requests)
        try:
            while left:
                batch = [done.get()]
                while not done.empty():
                    batch.append(done.get())
                left -= len(batch)
                yield batch
        finally:
            self._stop.set()

    def complete(self, body: dict[str, Any]) -> Completion:
        """One answer. Raises Unanswered when the retries are used up, RediError for a refusal."""
        for attempt in range(self.config.max_retries + 1):
            asked: float | None = None
            try:
                return self._read(self._post(body))
            except urllib.error.HTTPError as error:
                why = f"{error.code} {error.reason}: {_excerpt(error)}"
                if error.code not in PASSING and error.code < 500:
                    raise RediError(f"{self.url}: {why}{self._hint(error.code)}") from None
                asked = _retry_after(error.headers.get("Retry-After"))
            except (
                OSError,
                http.client.HTTPException,
                ValueError,
                LookupError,
                TypeError,
            ) as error:
                why = f"{type(error).__name__}: {getattr(error, 'reason', error)}"
            pause = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE) * random.uniform(0.5, 1)
            if attempt == self.config.max_retries or self._stop.wait(
                pause if asked is None else min(asked, self.config.request_timeout)
            ):
                break
        raise Unanswered(f"{self.url}: {why}")

    def _post(self, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(self.url, json.dumps(body).encode(), self._headers)
        with urllib.request.urlopen(request, timeout=self.config.request_timeout) as response:
            return json.loads(response.read())

    def _read(self, answer: Any) -> Completion:
        choice = answer["choices"][0]
        num_tokens = int(answer["usage"]["completion_tokens"])
        if self.config.api == "completions":
            text = choice["text"]
        else:
            message = choice["message"]
            text = message["content"] or ""
            # A server that parses the thinking sends it apart.
            thinking = message.get("reasoning_content") or message.get("reasoning")
            if thinking:
                text = f"<think>{thinking}</think>{text}"
        if not isinstance(text, str):
            raise TypeError(f"the completion is {type(text).__name__}, not text")
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair is no UTF-8
        return Completion(text, choice["finish_reason"] == "stop", num_tokens)

    def _hint(self, status: int) -> str:
        if status in (401, 403):
            return f"; the key is read from the environment variable {self.config.api_key_env}"
        return "; is base_url right, and does the server hold this model?" if status == 404 else ""


def _authorization(variable: str) -> dict[str, str]:
    """The header with the key. Raises RediError for one that no header takes: http.client's words
    for it would show it."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise RediError(
            f"the key in the environment variable {variable} holds a line break or another "
            "character that no key has; set it again"
        )
    return {"Authorization": f"Bearer {key}"} if key else {}


def _excerpt(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(2000).decode("utf-8", "replace").strip()[:300]
    except (OSError, http.client.HTTPException):
        return ""


def _retry_after(value: str | None) -> float | None:
    """Seconds, or the date at which to come back; None if the server asks for nothing legible."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
