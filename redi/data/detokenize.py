"""Token ids back to text, token by token: what each of them adds to what stands before it."""

from collections.abc import Sequence
from typing import Any

_PATIENCE = 8  # tokens that one character may be spread over


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token; joined, they are the decoded text.

    A token alone may be no text (a byte of a character) or another one (SentencePiece drops a
    leading space), so each is decoded behind the tokens before it. A character that is spread over
    tokens stands at the last of them, after empty texts.
    """

    def decode(start: int, end: int) -> str:
        return tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)

    texts: list[str] = []
    start = done = 0  # ids[start:done] are shown already; they are the context
    for end in range(1, len(ids) + 1):
        before, now = decode(start, done), decode(start, end)
        is_whole = not now.endswith("�") or end - done == _PATIENCE or end == len(ids)
        texts.append(now[len(before) :] if is_whole else "")
        if is_whole:
            start, done = done, end
    return texts
