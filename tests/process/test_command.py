"""A command that ends with an error of the operating system: one message with the path and the reason."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from reformer_dist.process.command import run_command
from reformer_dist.process.exit_status import FAILED


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("name", ["n" * 300, "loop", "plain/below"])
def test_a_path_that_can_not_be_opened_is_one_message(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "plain").touch()
    with pytest.raises(SystemExit) as end:
        run_command(lambda: print((tmp_path / name).read_text()))
    said = capsys.readouterr().err
    assert end.value.code == FAILED
    assert said.startswith(f"error: {tmp_path / name}: ") and len(said.splitlines()) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_disk_that_can_not_be_written_is_one_message(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run_command(lambda: fail(OSError(number, os.strerror(number))))
    assert end.value.code == FAILED
    assert capsys.readouterr().err == f"error: {os.strerror(number)}\n"


@pytest.mark.parametrize("error", [OSError("of a library"), ConnectionResetError(104, "reset"), KeyError("a")])
def test_other_errors_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_command(lambda: fail(error))
