"""Prompt files: text with one prompt per line."""

from collections.abc import Sequence
from pathlib import Path


def read_prompts(sources: Sequence[str]) -> list[str]:
    """Return the prompts of text files; raise ValueError if there are none."""
    prompts: list[str] = []
    for source in sources:
        try:
            lines = Path(source).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as e:
            raise ValueError(f"{source!r} is not UTF-8 at byte {e.start}; save the file as UTF-8") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{list(sources)} hold no prompt; write one prompt per line")
    return prompts
