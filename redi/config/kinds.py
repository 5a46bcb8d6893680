"""Kinds of values that fields of several sections have."""

import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field


def _has_slot(template: str) -> str:
    if "{problem}" not in template:
        raise ValueError("must contain {problem}")
    return template


def _is_a_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9](?:[\w.+ -]*[\w+-])?", name):
        raise ValueError(
            f"{name!r} cannot name a folder of the run: use letters, digits, space or one of -_+."
        )
    return name


def _is_a_url(text: str) -> str:
    parts = urlsplit(text)  # raises ValueError by itself for [ without ]
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"\s", text):
        raise ValueError(f"{text!r} is no address of a server, as http://localhost:8000/v1")
    return text


# Folders and files are called so.
FolderName = Annotated[str, AfterValidator(_is_a_name)]
PromptTemplate = Annotated[str, AfterValidator(_has_slot)]  # the user's turn
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every generator takes
Name = Annotated[str, Field(min_length=1)]  # of a path or a model: "" would be the current folder
Url = Annotated[str, AfterValidator(_is_a_url)]  # of a server
