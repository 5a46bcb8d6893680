"""Reads a page as a browser would, strictly: tags must close, nothing may be loaded or run."""

import base64
import hashlib
from html.parser import HTMLParser
from pathlib import Path

import redi.pages.html

VOID = {"meta", "br", "hr", "img", "input", "link"}
SCRIPT = (redi.pages.html.TEMPLATES / "tap.js").read_text(encoding="utf-8")
HOSTILE = (
    "<script>alert(1)</script>",
    "</textarea></title></style></script><h1 onclick=alert(1)>",
    "\"><img src=x onerror='alert(1)'>",
    "a\u202eb\u2066c\u200fd",  # would turn the text around
    "a\x00b\x1b[31mc\x85",
    "a\ud800b",  # half a surrogate pair: no UTF-8 for it
    "{{ 7 * 7 }}{% raw %}&lt;&#x41;",
    "https://example.com/x.js url(https://example.com)",
)


class Page(HTMLParser):
    """`tables`: rows of cells' text; `tokens`: (class, text, title) of each <i>; `paths`: of SVGs;
    `text`: all that is shown."""

    def __init__(self, file: Path):
        super().__init__(convert_charrefs=True)
        self.tables: list[list[list[str]]] = []
        self.tokens: list[tuple[str, str, str]] = []
        self.paths: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.source = file.read_bytes().decode("utf-8")  # strictly
        self.csp = ""
        self.feed(self.source)
        self.close()
        assert self.open == [], f"never closed: {self.open}"
        self.check()

    def check(self):
        assert len(self.source.encode()) < redi.pages.html.MAX_BYTES
        assert len(set(self.ids)) == len(self.ids)
        assert {link.removeprefix("#") for link in self.links} <= set(self.ids)
        assert all(link.startswith("#") for link in self.links)
        assert "default-src 'none'" in self.csp
        for script in self.scripts:
            assert script == SCRIPT
            digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in self.csp  # else the browser would not run it
        unseen = set("\x00\x1b\x85\u202a\u202b\u202d\u202e\u2066\u2067\u2068\u200e\u200f")
        assert not unseen & set(self.source)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} has a handler: {name}"
            assert name not in ("src", "action", "data", "srcdoc", "poster"), f"{tag} loads {value}"
            if name == "href":
                self.links.append(value)
            if name == "id":
                self.ids.append(value)
            if name == "style":
                assert "url" not in value
        attributes = dict(attrs)
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.csp = attributes["content"]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "i":
            self.tokens.append((attributes["class"], "", attributes.get("title", "")))
        if tag == "path":
            self.paths.append((attributes["class"], attributes["d"]))
        assert tag not in ("iframe", "object", "embed", "base", "form", "link", "img")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a beginning"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
            return
        if self.open and self.open[-1] == "style":
            assert "url(" not in data and "@import" not in data
            return
        self.text += data
        if any(tag in ("td", "th") for tag in self.open):
            self.tables[-1][-1][-1] += data
        if self.open and self.open[-1] == "i":
            kind, text, title = self.tokens[-1]
            self.tokens[-1] = kind, text + data, title

    def table(self, *header: str) -> list[dict[str, str]]:
        """The rows of the table that has these columns, by column."""
        (table,) = (t for t in self.tables if set(header) <= set(t[0]))
        return [dict(zip(table[0], row, strict=True)) for row in table[1:]]
