"""Remote data that does not respond: the run waits, then saves and stops with a status that asks for a restart."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from run_helpers import LOSS, losses, train, when_told
from support.events import scalars
from support.servers import Server, serve
from support.threads import on_ranks

from reformer_dist.data.format import storage
from reformer_dist.distributed.runtime import Preempted, Runtime, SharedError, Unavailable
from reformer_dist.errors import DataError, SourceUnavailable, UserError
from reformer_dist.training.preemption import StopSignal

pytest.importorskip("aiohttp")
pytestmark = pytest.mark.usefixtures("said")
LONG = ("trainer.max_steps=40", "trainer.save_every=0", "data.workers=0", "optim.schedule=constant")


@pytest.fixture
def server(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(storage, "RETRY_DELAYS", (0.01, 0.01))
    monkeypatch.setattr(storage, "LONG_DELAY", 0.05)
    with serve(tiny_data) as found:
        yield found


def address(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


def go_away(server: Server, times: int = 10**9) -> None:
    server.failures.update({path.name: times for path in server.root.iterdir()})


def test_what_comes_back_is_waited_for(
    server: Server, tiny_data: Path, tmp_path: Path, job: Runtime, said: pytest.LogCaptureFixture
) -> None:
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    with when_told(step__2=lambda: go_away(server, 6)):
        run = train(job, address(server), tmp_path / "run", *LONG, cache)  # type: ignore[arg-type]
    assert any("trying again" in line and "503" in line for line in said.messages)
    local = train(job, tiny_data, tmp_path / "local", *LONG)
    assert scalars(run, LOSS) == scalars(local, LOSS)


def test_what_stays_away_ends_the_run_after_saving(
    server: Server, tiny_data: Path, tmp_path: Path, job: Runtime
) -> None:
    changed = (*LONG, f"data.cache_dir={tmp_path / 'cache'}", "data.retry_seconds=0.2")
    run, where = tmp_path / "run", address(server)
    with (
        when_told(step__2=lambda: go_away(server)),
        pytest.raises(Preempted, match=r"train-.*503.*: saved step \d"),
    ):
        train(job, where, run, *changed)  # type: ignore[arg-type]
    assert list((run / "checkpoints").glob("step-*"))
    with pytest.raises(Preempted, match=r"dataset\.json.*the same command resumes"):  # requeued too early
        train(job, where, run, *changed)  # type: ignore[arg-type]
    with pytest.raises(SharedError, match=r"dataset\.json") as error:  # a new run may have a wrong address
        train(job, where, tmp_path / "other", *changed)  # type: ignore[arg-type]
    assert not isinstance(error.value, Preempted)
    server.failures.clear()
    train(job, where, run, *changed)  # type: ignore[arg-type]
    local = train(job, tiny_data, tmp_path / "local", *LONG)
    assert [row[LOSS] for row in losses(run).values()] == [row[LOSS] for row in losses(local).values()]


def test_held_out_rows_that_stay_away_end_the_run_after_saving(
    server: Server, tmp_path: Path, job: Runtime
) -> None:
    changed = ("trainer.eval_every=2", f"data.cache_dir={tmp_path / 'cache'}", "data.retry_seconds=0.2")
    with when_told(step_1=lambda: go_away(server)), pytest.raises(Preempted, match=r"heldout.*: saved step 2"):
        train(job, address(server), tmp_path / "run", *changed)  # type: ignore[arg-type]


def test_a_signal_ends_the_wait_for_held_out_rows(server: Server, tmp_path: Path, job: Runtime) -> None:
    class StopLater(StopSignal):
        @property
        def is_set(self) -> bool:
            return is_told.is_set()

    is_told = threading.Event()

    def leave() -> None:
        go_away(server)
        threading.Timer(1, is_told.set).start()

    changed = ("trainer.eval_every=2", f"data.cache_dir={tmp_path / 'cache'}", "data.retry_seconds=600")
    with when_told(step_1=leave), pytest.raises(Preempted, match=r"^stopped by a signal: saved step 2"):
        train(job, address(server), tmp_path / "run", *changed, stop=StopLater())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fail", "kind"),
    [
        (lambda rank: SourceUnavailable("away") if rank == 1 else None, Unavailable),
        (lambda rank: SourceUnavailable("away") if rank == 1 else DataError("damaged"), SharedError),
    ],
)
def test_ranks_agree_that_a_source_is_away(fail: Callable[[int], UserError | None], kind: type) -> None:
    errors = on_ranks(2, lambda runtime: runtime.raise_together(fail(runtime.rank)))
    assert [type(error) for error in errors] == [kind, kind]


def test_what_is_refused_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def _strip_protocol(self, path: str) -> str:
            return path

        def cat_file(self, path: str) -> bytes:
            raise PermissionError("no key")

    monkeypatch.setattr(storage, "RETRY_DELAYS", (0.01,))
    folder = storage.RemoteFolder("s3://bucket", Refusing(), None)  # type: ignore[arg-type]
    folder.patience = 1e9
    with pytest.raises(DataError, match=r"s3://bucket/dataset\.json: .*no key") as error:
        folder.read("dataset.json")
    assert not isinstance(error.value, SourceUnavailable)
