"""The text of samples in tar files of other programs, such as WebDataset shards, which are read in place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reformer_dist.errors import DataError


@dataclass(frozen=True)
class TextMember:
    """The member of each sample that holds its text."""

    suffix: str
    """Of its name from the first dot on, without that dot, as WebDataset's names of fields."""
    field: str | None = None
    """Of the JSON object in it; None if the member is the text itself."""

    @classmethod
    def of(cls, suffix: str, field: str) -> TextMember:
        """field: used if the members are JSON."""
        suffix = suffix.removeprefix(".").lower()
        return cls(suffix, field if suffix.rpartition(".")[2] == "json" else None)

    @classmethod
    def from_record(cls, record: object, where: str) -> TextMember | None:
        """From the value of `to_json` in dataset.json. Raises DataError if it is another value."""
        if record is None:
            return None
        values = record if isinstance(record, Mapping) else {}
        suffix, field = values.get("suffix"), values.get("field")
        if not isinstance(suffix, str) or not isinstance(field, str | None):
            raise DataError(f"{where}: text_member is {record!r}; it must hold a suffix and a field")
        return cls(suffix, field)

    def to_json(self) -> dict[str, Any]:
        return {"suffix": self.suffix, "field": self.field}

    def text(self, content: bytes, where: str) -> bytes:
        """The text in the content of a member. Raises DataError if it is not JSON or lacks the field."""
        if self.field is None:
            return content
        try:
            record = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: is not valid JSON ({error})") from error
        text = record.get(self.field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            found = ", ".join(map(str, record)) if isinstance(record, dict) else f"{record!r:.40}"
            raise DataError(f"{where}: has no text in field {self.field!r}; it holds {found}: give --text-field")
        return text.encode("utf-8", errors="replace")


def sample_key(name: str) -> tuple[str, str]:
    """(key, suffix) of a member, as WebDataset groups members: the base name is cut at its first dot."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()
