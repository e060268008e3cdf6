"""Prompts of the command line as records."""

import json
from collections.abc import Iterator, Sequence

from meshway.framework.inference.bulk.line_formats import INPUTS
from meshway.framework.inference.bulk.record import Record


class PromptSource:
    """Texts, each a record of the field `field`; a `Source`."""

    def __init__(self, prompts: Sequence[str], field: str = INPUTS) -> None:
        self._prompts, self._field = list(prompts), field
        self.description = f"{len(self._prompts)} given prompts"

    @property
    def total(self) -> int:
        """How many records there are."""
        return len(self._prompts)

    def records(self, start: int = 0) -> Iterator[Record]:
        """Yields the records from place `start` on."""
        for index, text in enumerate(self._prompts[start:], start):
            yield Record(index, {self._field: text}, f"prompt {index + 1}", json.dumps(text).encode())
