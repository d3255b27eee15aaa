"""Where a run stands in its data: what a checkpoint keeps, as JSON values, and what may go on from it.

Each data-parallel rank has a state of its own streams; `merge_states` joins those of all ranks into one, from
which any number of ranks can go on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reformer_dist.data.format.quarantine import SampleId
from reformer_dist.data.loading.packing import HASH_BYTES, TokenStream
from reformer_dist.data.loading.sampler import Order
from reformer_dist.errors import DataError

STATE_VERSION = 2


@dataclass(frozen=True)
class Start:
    """Where streams begin."""

    step: int = 0
    """Steps of the run that were read before."""
    origin: tuple[int, int] = (0, 0)
    """(step, pass) at which the order began: (0, 0), unless the data changed since."""
    streams: Mapping[int, tuple[list[int], bytes]] | None = None
    """(position in each lane, running hash) of each stream."""
    quarantine: frozenset[SampleId] = frozenset()

    def open_stream(self, order: Order, stream: int, passes: int | None) -> TokenStream:
        if self.streams is None:
            return TokenStream(order, stream, passes=passes)
        positions, digest = self.streams[stream]
        return TokenStream(order, stream, positions=positions, digest=digest, passes=passes)


def write_state(
    order: Order,
    step: int,
    origin: tuple[int, int],
    streams: Mapping[int, tuple[list[int], bytes]],
    quarantine: set[SampleId],
) -> dict[str, Any]:
    """The state behind a step."""
    return {
        "version": STATE_VERSION,
        "data": order.corpus.fingerprint,
        "settings": order.settings(),
        "lanes": [[lane.digest, lane.n_units] for lane in order.lanes],
        "step": step,
        "origin": list(origin),
        "quarantine": [list(sample) for sample in sorted(quarantine)],
        "streams": {str(stream): [*positions, digest.hex()] for stream, (positions, digest) in streams.items()},
    }


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state that holds the streams of all ranks' states of the same step.

    Raises DataError where there is none or they are not of one run.
    """
    if not states:
        raise DataError("data state: there is none; at least one rank's must be given")
    own = ("streams", "quarantine")
    shared = {key: value for key, value in states[0].items() if key not in own}
    streams: dict[str, Any] = {}
    quarantine: set[SampleId] = set()
    for state in states:
        if {key: value for key, value in state.items() if key not in own} != shared:
            right = "they must differ in their streams only"
            raise DataError(f"data state: the ranks' states are not of one run; {right}")
        streams.update(_mapping(state))
        quarantine |= _read_quarantine(state)
    ordered = {key: streams[key] for key in sorted(streams, key=int)}
    return {**shared, "quarantine": [list(sample) for sample in sorted(quarantine)], "streams": ordered}


def consumed_hash(state: Mapping[str, Any]) -> str:
    """One hash of the ids of all samples read so far in their order, whatever the world, from a merged state."""
    return join_digests([bytes.fromhex(state["streams"][key][-1]) for key in sorted(state["streams"], key=int)])


def join_digests(digests: Sequence[bytes]) -> str:
    """One hash of the running hashes of all streams, in their order."""
    return hashlib.blake2b(b"".join(digests), digest_size=HASH_BYTES).hexdigest()


def read_state(
    state: Mapping[str, Any], order: Order, *, changes: Sequence[str] = (), accept_changed: bool = False
) -> Start:
    """Where the streams of `order` begin.

    `changes`: what is known of the differences of the data, for the message. Raises DataError where the state
    is of other settings, or of other data and that is not accepted.
    """
    if state.get("version") != STATE_VERSION:
        found = state.get("version")
        raise DataError(f"data state: version {found!r} is not {STATE_VERSION}, which this version reads")
    _check_settings(state.get("settings"), order)
    if state.get("data") == order.corpus.fingerprint:
        return _same_data(state, order)
    if not accept_changed:
        what = "".join(f"\n  {line}" for line in changes)
        fix = "bring the old data back, or accept a new order with data.accept_changed=true"
        raise DataError(f"the data are not those that the run began with; {fix}{what}")
    return _changed_data(state, order)


def _check_settings(saved: Any, order: Order) -> None:
    saved = saved if isinstance(saved, dict) else {}
    for key, right in order.settings().items():
        if saved.get(key) != right:
            fix = "go on with the settings that the run began with, or begin a new run"
            raise DataError(f"data state: {key} was {saved.get(key)!r} and is {right!r} now; {fix}")


def _same_data(state: Mapping[str, Any], order: Order) -> Start:
    streams = {stream: _stream(state, stream, len(order.lanes)) for stream in range(order.n_streams)}
    return Start(_step(state), _origin(state), streams, frozenset(_read_quarantine(state)))


def _changed_data(state: Mapping[str, Any], order: Order) -> Start:
    """Lanes that are as they were go on; in the others, the pass that was begun starts anew."""
    lanes = state.get("lanes")
    if not isinstance(lanes, list) or not all(isinstance(lane, list) and len(lane) == 2 for lane in lanes):
        raise DataError(f"data state: lanes is {lanes!r}; it must hold the digest and the tokens of each lane")
    saved = [_stream(state, stream, len(lanes)) for stream in range(order.n_streams)]
    positions: list[list[int]] = [[] for _ in saved]
    origin = _origin(state)
    for number, lane in enumerate(order.lanes):
        if number < len(lanes) and lanes[number] == [lane.digest, lane.n_units]:
            now = [places[number] for places, _ in saved]
        else:
            old = int(lanes[number][1]) if number < len(lanes) else 0
            passes = _passes_begun([places[number] for places, _ in saved], old) if old else 0
            now = [passes * lane.share(stream)[1] for stream in range(order.n_streams)]
            origin = (_step(state), passes)
        for places, place in zip(positions, now, strict=True):
            places.append(place)
    streams = {stream: (places, saved[stream][1]) for stream, places in enumerate(positions)}
    # keys of other shards would name other samples
    return Start(_step(state), origin, streams)


def _passes_begun(places: list[int], n_tokens: int) -> int:
    """Passes that every stream had finished, of a lane that had so many tokens."""
    V = len(places)
    shares = [n_tokens * (stream + 1) // V - n_tokens * stream // V for stream in range(V)]
    return min(place // share for place, share in zip(places, shares, strict=True))


def _mapping(state: Mapping[str, Any]) -> Mapping[str, Any]:
    streams = state.get("streams")
    if not isinstance(streams, dict):
        raise DataError(f"data state: streams is {streams!r}; it must hold the position of each stream")
    return streams


def _stream(state: Mapping[str, Any], stream: int, n_lanes: int) -> tuple[list[int], bytes]:
    found = _mapping(state).get(str(stream))
    try:
        *positions, digest = found  # type: ignore[misc]
        content = bytes.fromhex(digest)
    except (TypeError, ValueError):
        positions, content = [], b""
    counts = all(type(number) is int and number >= 0 for number in positions)
    if len(positions) != n_lanes or not counts or len(content) != HASH_BYTES:
        right = f"{n_lanes} non-negative integers and a hash of {HASH_BYTES} bytes"
        raise DataError(f"data state: stream {stream} is {found!r}; it must be {right}")
    return positions, content


def _step(state: Mapping[str, Any]) -> int:
    step = state.get("step")
    if type(step) is not int or step < 0:
        raise DataError(f"data state: step is {step!r}; it must be a non-negative integer")
    return step


def _origin(state: Mapping[str, Any]) -> tuple[int, int]:
    origin = state.get("origin")
    if not isinstance(origin, list) or len(origin) != 2 or not all(type(part) is int for part in origin):
        raise DataError(f"data state: origin is {origin!r}; it must be two integers")
    return origin[0], origin[1]


def _read_quarantine(state: Mapping[str, Any]) -> set[SampleId]:
    listed = state.get("quarantine")
    try:
        return {(int(number), str(shard), str(key)) for number, shard, key in listed}  # type: ignore[union-attr]
    except (TypeError, ValueError) as error:
        right = "it must list a number, a shard and a key of each sample"
        raise DataError(f"data state: quarantine is {listed!r}; {right}") from error
