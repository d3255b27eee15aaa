"""The C library under AddressSanitizer: no call reads or writes beyond its tensors."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reformer_dist.ops.lsh.native import library


def sanitizer() -> str | None:
    """Path of libasan, if gcc has one."""
    if shutil.which("gcc") is None:
        return None
    command = ["gcc", "-print-file-name=libasan.so"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return path if Path(path).is_absolute() else None


def build(target: Path) -> None:
    flags = [*(flag for flag in library.FLAGS if flag != "-O3"), "-O1", "-g", "-fsanitize=address"]
    sources = [str(library.HERE / name) for name in library.SOURCES]
    subprocess.run(["gcc", *flags, *sources, "-o", str(target), "-lm"], check=True)


def run(path: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    found = sanitizer()
    assert found is not None
    options = "detect_leaks=0:allocator_may_return_null=1"  # Python leaks by design
    environment = {**os.environ, "LD_PRELOAD": found, "ASAN_OPTIONS": options, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, script, str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=900)


@pytest.mark.slow
@pytest.mark.skipif(sanitizer() is None, reason="needs gcc with libasan")
def test_no_access_beyond_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "sanitized.so"
    build(path)
    done = run(path, str(Path(__file__).with_name("sanitized_calls.py")))
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.fullmatch(r"360 calls, 12 refused\n", done.stdout)


OUT_OF_BOUNDS = """
import ctypes, sys, torch
library = ctypes.CDLL(sys.argv[1])
rows, out = torch.ones(8, 16), torch.zeros(8)
pointers = [ctypes.c_void_p(x.data_ptr()) for x in (rows, rows, out)]
library.reformer_row_dot(*pointers, ctypes.c_int64(4096), ctypes.c_int64(16), ctypes.c_int64(1))
"""


@pytest.mark.slow
@pytest.mark.skipif(sanitizer() is None, reason="needs gcc with libasan")
def test_the_sanitizer_sees_an_access_beyond_them(tmp_path: Path) -> None:
    path, script = tmp_path / "sanitized.so", tmp_path / "beyond.py"
    build(path)
    script.write_text(OUT_OF_BOUNDS)
    done = run(path, str(script))
    assert done.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in done.stderr
