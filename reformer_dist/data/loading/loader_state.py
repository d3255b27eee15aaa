"""The loader's state, as checkpoints store it in JSON values, and the checks before a run resumes from one.

Each data-parallel rank saves the state of its streams. `merge_states` merges those of all ranks into one, from
which any number of ranks can resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from reformer_dist.data.format.quarantine import SampleId
from reformer_dist.data.loading.cut import Cut, StreamPart, recut
from reformer_dist.data.loading.packing import HASH_BYTES, TokenStream
from reformer_dist.data.loading.sampler import Sampler
from reformer_dist.errors import DataError

STATE_VERSION = 4
# in version 2, no shards were interleaved; up to version 3, the rows of a run could not change
READ_VERSIONS = (2, 3, 4)
KEYS = {"seed": "trainer.seed", "shuffle": "data.shuffle"}
"""Keys of the configuration that can't change, by names of Sampler.settings."""
ROW_KEYS = ("seq_len", "by_sample")  # only one of which is set
RECUT_KEYS = ("batch_size", "seq_len", "packed_len")  # whose change divides what is left of the data anew


@dataclass(frozen=True)
class LoaderState:
    """Positions of the streams."""

    step: int = 0
    """Steps read so far."""
    origin: tuple[int, int] = (0, 0)
    """(step, pass) at which the order began: (0, 0), unless the data or the rows changed since."""
    streams: Mapping[int, tuple[list[int], bytes]] | None = None
    """(position in each pool, running hash) of each stream; None before the first step."""
    quarantine: frozenset[SampleId] = frozenset()
    cuts: Sequence[Cut] | None = None
    """Division of each pool among the streams; None if it is that of the beginning of the run."""

    def open_stream(self, sampler: Sampler, stream: int, passes: int | None) -> TokenStream:
        if self.streams is None:
            return TokenStream(sampler, stream, passes=passes)
        positions, digest = self.streams[stream]
        return TokenStream(sampler, stream, positions=positions, digest=digest, passes=passes, cuts=self.cuts)

    def recut(self, sampler: Sampler) -> LoaderState:
        """The state of a run that continues with the rows of `sampler`, over the same pools.

        Depends on the state of all streams together, so it is the same on every rank.
        """
        assert self.streams is not None
        saved = [self.streams[stream] for stream in range(len(self.streams))]
        cuts = [
            recut(cut, [positions[pool.number] for positions, _ in saved], pool.n_units)
            for cut, pool in zip(self.cuts or [Cut()] * len(sampler.pools), sampler.pools, strict=True)
        ]
        positions, digest = [cut.position for cut in cuts], join_digests([digest for _, digest in saved])
        streams = {stream: (positions, _first_digest(digest, stream)) for stream in range(sampler.n_streams)}
        return LoaderState(self.step, (self.step, cuts[0].first_pass), streams, self.quarantine, cuts)

    def to_json(self, sampler: Sampler) -> dict[str, Any]:
        streams = self.streams or {}
        return {
            "version": STATE_VERSION,
            "data": sampler.corpus.fingerprint,
            "settings": sampler.settings(),
            "lanes": [[pool.digest, pool.n_units] for pool in sampler.pools],
            "cuts": [astuple(cut) for cut in self.cuts or [Cut()] * len(sampler.pools)],
            "step": self.step,
            "origin": list(self.origin),
            "quarantine": [list(sample) for sample in sorted(self.quarantine)],
            "streams": {
                str(stream): [*positions, digest.hex()] for stream, (positions, digest) in streams.items()
            },
        }


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Merges the states of all ranks after the same step into one.

    Raises DataError if there is none or if they are not of one run.
    """
    if not states:
        raise DataError("data state: no rank's state was given; at least one is required")
    per_rank = ("streams", "quarantine")
    shared = {key: value for key, value in states[0].items() if key not in per_rank}
    streams: dict[str, Any] = {}
    quarantine: set[SampleId] = set()
    for state in states:
        if {key: value for key, value in state.items() if key not in per_rank} != shared:
            raise DataError("data state: the ranks' states are not of one run; only their streams may differ")
        streams.update(_read_streams(state))
        quarantine |= _read_quarantine(state)
    ordered = {key: streams[key] for key in sorted(streams, key=int)}
    return {**shared, "quarantine": [list(sample) for sample in sorted(quarantine)], "streams": ordered}


def consumed_hash(state: Mapping[str, Any]) -> str:
    """Hash of the ids of all samples read so far, from a merged state. The same for any number of ranks."""
    return join_digests([bytes.fromhex(state["streams"][key][-1]) for key in sorted(state["streams"], key=int)])


def join_digests(digests: Sequence[bytes]) -> str:
    """Hash of the running hashes of all streams, in stream order."""
    return hashlib.blake2b(b"".join(digests), digest_size=HASH_BYTES).hexdigest()


def saved_interleaving(state: Mapping[str, Any]) -> int:
    """The number of interleaved shards in a run's order, which it keeps. Raises DataError if it is invalid."""
    n_shards = _read_settings(state).get("interleaved_shards")
    if type(n_shards) is not int or n_shards < 1:
        raise DataError(f"data state: interleaved_shards is {n_shards!r}; it must be a positive integer")
    return n_shards


def read_state(
    state: Mapping[str, Any], sampler: Sampler, *, changes: Sequence[str] = (), accept_changed: bool = False
) -> LoaderState:
    """The state that a checkpoint stores, for the streams of `sampler`.

    If its rows were others, what is left of the data is divided among those of `sampler`. changes: known
    differences of the data, for the error message. Raises DataError if the state has other settings, or is of
    other data without `accept_changed`.
    """
    settings, now = _read_settings(state), sampler.settings()
    for key, value in now.items():
        saved = settings.get(key)
        is_count = (type(saved) is int and saved > 0) or (key == "packed_len" and saved is None)
        if saved != value and key != "weights" and not (key in RECUT_KEYS and is_count):
            raise DataError(_explain_setting(key, saved, value))
    version, n_streams, corpus = state["version"], settings["batch_size"], sampler.corpus
    if state.get("data") == (corpus.fingerprint if version > 3 else corpus.fingerprint_with_weights):
        cuts = _read_cuts(state, [pool.n_units for pool in sampler.pools])
        streams = {stream: _read_stream(state, stream, cuts) for stream in range(n_streams)}
        quarantine = frozenset(_read_quarantine(state))
        loaded = LoaderState(_read_step(state), _read_origin(state), streams, quarantine, cuts)
    elif accept_changed:
        loaded = _read_state_of_changed_data(state, sampler, n_streams)
    else:
        lines = "".join(f"\n  {line}" for line in changes)
        hint = "restore the old data, or accept a new order with data.accept_changed=true"
        raise DataError(f"the data differ from those that the run began with; {hint}{lines}")
    has_other_rows = any(settings.get(key) != now[key] for key in RECUT_KEYS if key in now)
    return loaded.recut(sampler) if has_other_rows else loaded


def _explain_setting(key: str, before: Any, now: Any) -> str:
    """Why a state with another setting of the sampler can't be resumed from."""
    if before is None and key in ROW_KEYS:
        return "task.kind: the run began with rows of another kind; begin a new run in another output_dir"
    if before is None:
        return f"data state: settings has no {key}"
    if key not in KEYS:
        return f"data state: {key} was {before!r} and is {now!r}; begin a new run in another output_dir"
    old, new = (str(value).lower() if isinstance(value, bool) else value for value in (before, now))
    hint = f"resume with {KEYS[key]}={old}, or begin a new run in another output_dir"
    return f"{KEYS[key]}={new}: the run began with {old}, on which its position in the data depends; {hint}"


def _read_state_of_changed_data(state: Mapping[str, Any], sampler: Sampler, n_streams: int) -> LoaderState:
    """Unchanged pools keep their positions; the others restart the current pass."""
    old_pools = state.get("lanes")
    if not isinstance(old_pools, list) or not all(isinstance(pool, list) and len(pool) == 2 for pool in old_pools):
        raise DataError(f"data state: lanes is {old_pools!r}; it must hold the digest and the tokens of each pool")
    old_cuts = _read_cuts(state, [int(n_units) for _, n_units in old_pools])
    saved = [_read_stream(state, stream, old_cuts) for stream in range(n_streams)]
    columns: list[list[int]] = []  # positions of all streams, per pool
    cuts, origin = [], _read_origin(state)
    for n, pool in enumerate(sampler.pools):
        old = [positions[n] for positions, _ in saved] if n < len(old_pools) else []
        if old and old_pools[n] == [pool.digest, pool.n_units]:
            columns.append(old)
            cuts.append(old_cuts[n])
        else:
            passes = _finished_passes(old, old_cuts[n], int(old_pools[n][1])) if old else 0
            parts = [StreamPart(Cut(), pool.n_units, stream, n_streams) for stream in range(n_streams)]
            columns.append([part.position_after(passes) for part in parts])
            cuts.append(Cut())
            origin = (_read_step(state), passes)
    positions_by_stream = zip(*columns, strict=True)
    streams = {stream: (list(row), saved[stream][1]) for stream, row in enumerate(positions_by_stream)}
    # the quarantine is dropped: its keys would identify other samples
    return LoaderState(_read_step(state), origin, streams, cuts=cuts)


def _finished_passes(positions: list[int], cut: Cut, n_units: int) -> int:
    """Passes over a pool of `n_units` that every stream has finished."""
    if n_units < len(positions):
        return 0
    parts = (StreamPart(cut, n_units, stream, len(positions)) for stream in range(len(positions)))
    return min(part.locate(position)[0] for part, position in zip(parts, positions, strict=True))


def _first_digest(digest: str, stream: int) -> bytes:
    """Running hash of a stream after a recut: a hash of all streams before it."""
    return hashlib.blake2b(f"{digest}/{stream}".encode(), digest_size=HASH_BYTES).digest()


def _read_settings(state: Mapping[str, Any]) -> dict[str, Any]:
    if (version := state.get("version")) not in READ_VERSIONS:
        known = " and ".join(map(str, READ_VERSIONS))
        raise DataError(f"data state: version {version!r} is unknown; this version of reformer_dist reads {known}")
    settings = state.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    return {"interleaved_shards": 1, **settings} if version == 2 else settings


def _read_streams(state: Mapping[str, Any]) -> Mapping[str, Any]:
    streams = state.get("streams")
    if not isinstance(streams, dict):
        raise DataError(f"data state: streams is {streams!r}; it must hold the position of each stream")
    return streams


def _read_stream(state: Mapping[str, Any], stream: int, cuts: Sequence[Cut]) -> tuple[list[int], bytes]:
    value = _read_streams(state).get(str(stream))
    try:
        *positions, digest = value  # type: ignore[misc]
        content = bytes.fromhex(digest)
    except (TypeError, ValueError):
        positions, content = [], b""
    are_counts = len(positions) == len(cuts) and all(
        type(number) is int and number >= cut.position for number, cut in zip(positions, cuts, strict=True)
    )
    if not are_counts or len(content) != HASH_BYTES:
        expected = f"{len(cuts)} integers, not below the positions in cuts, and a hash of {HASH_BYTES} bytes"
        raise DataError(f"data state: stream {stream} is {value!r}; it must be {expected}")
    return positions, content


def _read_cuts(state: Mapping[str, Any], n_units: Sequence[int]) -> list[Cut]:
    """The cut of each pool, given the units of a pass over it."""
    saved = state.get("cuts", [[0, 0, []]] * len(n_units))
    try:
        cuts = [
            Cut(position, first, tuple(tuple((start, end) for start, end in intervals) for intervals in rest))
            for position, first, rest in saved
        ]
        are_counts = all(
            type(count) is int and count >= 0 for cut in cuts for count in (cut.position, cut.first_pass)
        )
        are_inside = all(
            type(first) is int and type(end) is int and 0 <= first < end <= n
            for cut, n in zip(cuts, n_units, strict=True)
            for intervals in cut.rest
            for first, end in intervals
        )
    except (TypeError, ValueError):
        are_counts = are_inside = False
    if not (are_counts and are_inside):
        expected = "it must hold a position, a pass and intervals of units for each pool"
        raise DataError(f"data state: cuts is {str(saved)[:200]}; {expected}")
    return cuts


def _read_step(state: Mapping[str, Any]) -> int:
    step = state.get("step")
    if type(step) is not int or step < 0:
        raise DataError(f"data state: step is {step!r}; it must be a non-negative integer")
    return step


def _read_origin(state: Mapping[str, Any]) -> tuple[int, int]:
    origin = state.get("origin")
    if not isinstance(origin, list) or len(origin) != 2 or not all(type(part) is int for part in origin):
        raise DataError(f"data state: origin is {origin!r}; it must be two integers")
    return origin[0], origin[1]


def _read_quarantine(state: Mapping[str, Any]) -> set[SampleId]:
    samples = state.get("quarantine")
    try:
        return {(int(number), str(shard), str(key)) for number, shard, key in samples}  # type: ignore[union-attr]
    except (TypeError, ValueError) as error:
        expected = "it must list the dataset number, shard and key of each sample"
        raise DataError(f"data state: quarantine is {samples!r}; {expected}") from error
