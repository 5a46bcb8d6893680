"""Tables between a page's markers: `<!-- name -->` and `<!-- end of name -->`."""

from pathlib import Path


def replace_between(file: Path, name: str, text: str) -> None:
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, rest = file.read_text().split(begin)
    file.write_text(f"{before}{begin}\n{text.strip()}\n{end}{rest.split(end)[1]}")
