"""RunRecord: the description of a run in its checkpoints and exports."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from reformer_dist.config.renamed import translate_saved

EXPORTED_FIELDS = ("config", "tokenizer", "vocab_size", "labels", "fields", "shapes")


@dataclass(frozen=True)
class RunRecord:
    """Contents of a checkpoint's run.json, and, without the optional fields, of an export's config.json."""

    config: dict[str, Any]
    """Resolved configuration, enums by name. Keys that older versions named differently are translated."""
    tokenizer: dict[str, Any]
    """Specification of the tokenizer, as `load_tokenizer` takes it."""
    vocab_size: int
    """Of the tokenizer; a model may have additional rows for special tokens."""
    shapes: dict[str, list[int]]
    """Shape of each trained parameter by name."""
    labels: list[str] = field(default_factory=list)
    """Class names; empty unless the task classifies."""
    fields: list[str] = field(default_factory=list)
    """Names of the fields of a training sample; empty in records of older versions and of converted models."""
    data: dict[str, Any] | None = None
    """Shards and digests of the training data, from `Corpus.record`."""
    progress: dict[str, Any] | None = None
    """Fields of TrainState that are equal on all ranks."""
    loss_scaler: dict[str, float] | None = None
    """State of the fp16 loss scaler; empty in other precisions."""
    average: dict[str, Any] | None = None
    """Fields of the AverageRecord, if the run averages its weights."""

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> RunRecord:
        """Ignores unknown keys, and translates renamed keys of the configuration.

        Raises TypeError for missing keys, and for values that should be objects.
        """
        record = cls(**{each.name: document[each.name] for each in fields(cls) if each.name in document})
        for name in ("config", "tokenizer", "shapes"):
            if not isinstance(getattr(record, name), dict):
                raise TypeError(f"{name} must be an object, not {getattr(record, name)!r}")
        return replace(record, config=translate_saved(record.config))

    def to_json(self) -> dict[str, Any]:
        """JSON values by name, without those that are None."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def to_export_json(self) -> dict[str, Any]:
        """The fields that describe the model, without the state of training."""
        return {name: getattr(self, name) for name in EXPORTED_FIELDS}
