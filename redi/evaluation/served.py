"""Completions from any server that speaks OpenAI's protocol (vLLM's, SGLang's...), many at a time.

Standard library only: one thread per request in flight. What may pass (time-outs, dropped
connections, answers that are not JSON, 408, 409, 425, 429, 5xx) is tried again after a growing
pause, or after the pause that Retry-After asks for. A refusal of one request (400, 413, 414, 422: a
problem too long for the server, say) concerns that request; any other ends the evaluation at once.
No redirect is followed: the key would go along, to whatever host it names.
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
REFUSING = {400, 413, 414, 422}  # this request, not all of them
# What servers say of an answer that max_tokens has cut off: OpenAI and most; Anthropic, Vertex;
# Mistral; llama.cpp's own. Everything else is an answer, to be judged as it stands.
CUT_OFF = {"length", "max_tokens", "model_length", "max_length", "max_new_tokens", "limit"}
# Of an answer that the model ended itself, in the words of the same servers and of TGI.
ENDED = {"stop", "eos", "eos_token", "stop_sequence", "end_turn", "stop_token"}
FAILED = {"error", "abort", "aborted", "cancelled"}  # no answer at all
Key = TypeVar("Key")


@dataclass(frozen=True)
class Completion:
    text: str
    finished: bool  # not cut off by max_new_tokens
    num_tokens: int | None  # None where the server does not count them
    odd_ending: str | None = None  # a reason to finish that is none of those we know


class Unanswered(Exception):
    """A request that failed at every try; says why the last one did."""


class Refused(Exception):
    """A request that the server understands and does not take; says why, in its words."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None  # urllib then raises the 30x as the error that it is to us


_open = urllib.request.build_opener(_NoRedirect).open


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

        An Unanswered or Refused concerns its request only; any other exception would meet them all.
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
        """One answer. Raises Unanswered when the retries are used up, Refused where the server
        does not take this request, RediError where it takes none."""
        for attempt in range(self.config.max_retries + 1):
            asked: float | None = None
            try:
                return self._read(self._post(body))
            except urllib.error.HTTPError as error:
                why = f"{error.code} {error.reason}: {_excerpt(error)}"
                if error.code in REFUSING:
                    raise Refused(f"{self.url}: {why}") from None
                if error.code not in PASSING and error.code < 500:
                    raise RediError(f"{self.url}: {why}{self._hint(error)}") from None
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
        with _open(request, timeout=self.config.request_timeout) as response:
            return json.loads(response.read())

    def _read(self, answer: Any) -> Completion:
        """Raises Refused or ValueError, with the server's words, for an error sent as a 200."""
        if not isinstance(answer, dict):
            raise TypeError(f"the answer is {type(answer).__name__}, not an object")
        if "choices" not in answer:
            self._raise_what_it_says(answer)
        choice = answer["choices"][0]
        if self.config.api == "completions":
            text = _text_of(choice["text"])
        else:
            message = choice["message"]
            text = _text_of(message.get("content"))
            # A server that parses the thinking sends it apart, or as parts of the content.
            apart = message.get("reasoning_content") or message.get("reasoning")
            thinking = _text_of(apart) or _text_of(message.get("content"), thoughts=True)
            if thinking:
                text = f"<think>{thinking}</think>{text}"
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair is no UTF-8
        reason = choice.get("finish_reason")
        said = str(reason).lower()
        if said in FAILED:
            raise ValueError(f"the server gave up on it: finish_reason {reason!r}")
        usage = answer.get("usage")
        count = usage.get("completion_tokens") if isinstance(usage, dict) else None
        return Completion(
            text,
            finished=said not in CUT_OFF,
            num_tokens=count if isinstance(count, int) else None,
            odd_ending=None if said in CUT_OFF | ENDED else repr(reason),
        )

    def _raise_what_it_says(self, answer: dict[str, Any]) -> None:
        error = answer.get("error", answer)
        words = error.get("message") if isinstance(error, dict) else error
        code = error.get("code", error.get("status")) if isinstance(error, dict) else None
        words = str(words or answer.get("detail") or answer)[:300]
        if str(code) in map(str, REFUSING):
            raise Refused(f"{self.url}: {code}: {words}")
        raise ValueError(f"the server says: {words}")

    def _hint(self, error: urllib.error.HTTPError) -> str:
        if error.code in (401, 403):
            return f"; the key is read from the environment variable {self.config.api_key_env}"
        if 300 <= error.code < 400:
            return (
                f"; it redirects to {error.headers.get('Location')}: if that is right, set base_url"
            )
        return (
            "; is base_url right, and does the server hold this model?" if error.code == 404 else ""
        )


def _text_of(content: Any, *, thoughts: bool = False) -> str:
    """The text of a message's content, which may come in parts; with `thoughts`, of the parts that
    hold thinking (Mistral's and Anthropic's)."""
    if content is None:
        return ""
    if isinstance(content, str):
        return "" if thoughts else content
    if not isinstance(content, list):
        raise TypeError(f"the completion is {type(content).__name__}, not text")
    pieces = []
    for part in content:
        if isinstance(part, str):
            pieces.append("" if thoughts else part)
        elif part.get("type") in ("thinking", "reasoning"):
            inside = part.get("thinking", part.get("reasoning", part.get("text")))
            pieces.append(_text_of(inside) if thoughts else "")
        elif not thoughts and isinstance(part.get("text"), str):
            pieces.append(part["text"])
    return "".join(pieces)


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
