"""Prompt files: text with one prompt per line."""

import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path


def read_prompts(sources: Sequence[str]) -> list[str]:
    """Return the prompts of text files; raise ValueError if there are none, or for what is no text."""
    prompts = [prompt for source in sources for prompt in prompts_of(source)]
    if not prompts:
        raise ValueError(f"{list(sources)} hold no prompt; write one prompt per line")
    return prompts


def prompts_of(source: str) -> Iterator[str]:
    r"""Yield the prompts of one file: its lines end with \n or \r\n, and with nothing else."""
    try:
        text = Path(source).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{source!r} is not UTF-8 at byte {e.start}; save the file as UTF-8") from None
    for number, line in enumerate(text.split("\n"), 1):
        prompt = line.removesuffix("\r")
        for character in prompt:
            if unicodedata.category(character) == "Cc" and character != "\t":
                raise ValueError(
                    f"{source!r}, line {number}: control character {character!r}; remove it, or end lines "
                    "with a line feed"
                )
        if prompt.strip():
            yield prompt.strip()
