"""The look that all pages share: one HTML file that needs nothing else, from redi/pages/templates.

Every text that a template shows is escaped, and characters that would hide or turn around what
stands beside them are shown by their number: pages show what strangers' files hold.
"""

import base64
import hashlib
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from redi.errors import RediError
from redi.files import write_text

TEMPLATES = Path(__file__).parent / "templates"
MAX_BYTES = 5_000_000  # of a page; whoever fills one leaves things out, and says so
# Control characters, marks that reorder text, halves of surrogate pairs, what is no character.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
    "\ufff9-\ufffc\ufffe\uffff\ud800-\udfff]"
)


def visible(text: str) -> str:
    """The text with unseen characters written as ⟨U+202E⟩; it can be encoded as UTF-8."""
    return _UNSEEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


def clip(text: str, limit: int = 4000) -> str:
    """At most about `limit` characters: the beginning and the end, and how many are left out."""
    if len(text) <= limit:
        return text
    head, tail = text[: limit * 3 // 4], text[-(limit // 4) :]
    return f"{head}\n[… {len(text) - len(head) - len(tail):,} characters left out …]\n{tail}"


def prompt_text(prompt: Any) -> str:
    """A prompt, text or messages, as text; the role is named where there are several messages."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def token_spans(tokens: Iterable[tuple[str, str, str]]) -> Markup:
    """(text, class, title) of tokens as one run of text; a line break shows as ↵ too."""
    parts = []
    for text, kind, title in tokens:
        shown = escape(visible(text).replace("\n", "↵\n"))
        note = f' title="{escape(visible(title))}"' if title else ""
        parts.append(f"<i class={kind}{note}>{shown}</i>")
    return Markup("".join(parts))


def write_page(file: Path, template: str, **content: Any) -> Path:
    """Renders templates/`template` into `file`. Raises RediError if it cannot be written."""
    text = render(template, **content)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
    except OSError as error:
        raise RediError(f"{file}: cannot be written: {error}") from error
    return file


def render(template: str, **content: Any) -> str:
    script = (TEMPLATES / "tap.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = _environment().get_template(template)
    return page.render(script=Markup(script), script_hash=digest, **content)


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda x: x if isinstance(x, Markup) else visible(str(x)),
    )
    environment.filters |= {"clip": clip, "prompt": prompt_text}
    return environment
