"""The benchmarks at small sizes: printed rows, and checks that can fail."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from reformer_dist.ops.kv_cache import BucketCache
from reformer_dist.ops.lsh import WindowRule
from reformer_dist.ops.lsh.reference import visible_pairs

TOOLS = Path(__file__).parents[2] / "tools"


def run_tool(name: str, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and the printed rows."""
    command = [sys.executable, str(TOOLS / name), "--json", "--threads", "1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_attention_rows() -> None:
    sizes = ("--seq-len", "512", "--n-hashes", "2", "--heads", "2", "--head-dim", "16", "--repeat", "1")
    status, rows = run_tool("bench_attention.py", *sizes, "--impl", "ours", "sdpa")
    assert status == 0 and [row["impl"] for row in rows] == ["ours", "sdpa"]
    for row in rows:
        assert row["correct"] is True and row["peak_mib"] >= 0
        assert row["seconds"] == pytest.approx(row["forward"] + row["backward"], abs=1e-4) and row["seconds"] > 0
    ours, sdpa = rows
    assert ours["hash"] > 0 and ours["sort"] > 0 and sdpa["hash"] is None and sdpa["sort"] is None
    assert 16 < ours["keys"] < 63 and sdpa["keys"] is None  # with a mean bucket size of 64


def test_a_row_that_could_not_run_is_not_incorrect() -> None:
    # an odd number of buckets is refused
    status, rows = run_tool("bench_attention.py", "--seq-len", "128", "--n-buckets", "3", "--impl", "ours")
    assert status == 2
    assert (rows[0]["correct"], rows[0]["seconds"], rows[0]["peak_mib"]) == (None, None, None)
    assert rows[0]["error"].startswith("ValueError: n_buckets=3")


def test_an_incorrect_row_shows_no_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = imported("bench_attention")
    monkeypatch.setattr(bench, "check", lambda row: False)
    bench.run_row(attention_row())
    row = json.loads(capsys.readouterr().out)
    assert (row["correct"], row["seconds"], row["peak_mib"]) == (False, None, None) and "error" not in row
    assert [bench.exit_status([{"correct": x} for x in found]) for found in ([True], [True, None])] == [0, 2]
    assert bench.exit_status([{"correct": None}, {"correct": False}]) == 1


class SilentError(Exception):
    """An error without a message, like some of Triton's."""


def test_rows_after_one_that_could_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = imported("bench_attention")
    checked = mock.Mock(side_effect=[SilentError(), MemoryError("too much\nby far"), True])
    monkeypatch.setattr(bench, "check", checked)
    monkeypatch.setattr(bench, "measure", lambda row: {"seconds": 1.0})
    lengths = (2048, 1024, 4096, 8192)
    bench.run_rows([attention_row(seq_len=seq_len) for seq_len in lengths])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["seq_len"] for row in rows] == list(lengths)
    assert [row["correct"] for row in rows] == [None, None, True, True]
    assert [row.get("error") for row in rows] == ["SilentError", "MemoryError: too much", None, None]
    assert checked.call_count == 3  # the last two are equal once shortened


def test_a_lost_device_ends_the_process_of_its_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = imported("bench_attention")
    monkeypatch.setattr(
        bench, "check", mock.Mock(side_effect=RuntimeError("CUDA error: an illegal memory access"))
    )
    monkeypatch.setattr(bench, "is_usable", lambda device: False)
    assert bench.run_rows([attention_row(), attention_row()]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def attention_row(impl: str = "ours", seq_len: int = 65536, **changes: Any) -> Any:
    """A row of bench_attention.py on a CPU."""
    sizes = {"n_hashes": 4, "heads": 2, "head_dim": 16, "window": 64, "n_buckets": None, "dtype": "float32"}
    given = {"impl": impl, "seq_len": seq_len, **sizes, "device": "cpu", "repeat": 1, "threads": 1, **changes}
    return imported("attention_cases").BenchCase(**given)


def test_inputs_are_drawn_on_the_device_in_their_own_type(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = mock.Mock(wraps=torch.randn)
    monkeypatch.setattr(torch, "randn", drawn)
    attention_row(seq_len=64, dtype="bfloat16").inputs()
    assert drawn.call_count == 3
    for call in drawn.call_args_list:
        assert call.kwargs["dtype"] == torch.bfloat16 and call.kwargs["device"] == "cpu"
        assert call.kwargs["generator"].device == torch.device("cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checked_cases_resemble_timed_ones(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = imported("attention_cases")
    row = attention_row(dtype=dtype).shortened()
    assert row.seq_len // row.buckets == 64
    assert attention_row(n_buckets=4096).shortened().buckets == 32  # of 16 tokens both
    assert rows.check(row)
    for window in (32, 60):
        wrong = replace(rows.our_options(row), rule=WindowRule(window, causal=True))
        with monkeypatch.context() as patched:
            patched.setattr(rows, "our_options", lambda row, wrong=wrong: wrong)
            assert not rows.check(row)


@pytest.mark.parametrize("window", [16, 64])
def test_visible_keys_are_counted(window: int) -> None:
    rows = imported("attention_cases")
    row = attention_row(seq_len=512, window=window, n_buckets=16)
    ids = rows.hash_buckets(row, row.inputs()[0])
    met = visible_pairs(ids, WindowRule(window, causal=True)).sum() / ids.numel()
    assert rows.mean_visible_keys(row, ids) == pytest.approx(float(met)) and 0 < met < window - 1


def test_flex_attention_has_as_many_keys_as_ours() -> None:
    rows = imported("attention_cases")
    row = attention_row("flex", seq_len=512, window=64)
    q, v, _ = (x.detach() for x in row.inputs())
    n_keys = 4 * rows.mean_visible_keys(row, rows.hash_buckets(replace(row, impl="ours"), q))
    assert 64 < n_keys < 2 * 64 + 8 and rows.flex_reach(row) == round(n_keys)
    seen = rows.attend_dense(row, torch.zeros_like(q), v)[0, 0, -1]  # uniform scores: a mean
    assert torch.allclose(seen, v[0, 0, -round(n_keys) :].mean(0), atol=1e-5)


def test_a_wrong_hash_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = imported("attention_cases")
    row, right = attention_row().shortened(), rows.hash_vectors

    def hashed(*given: Any, backend: str) -> torch.Tensor:
        ids = right(*given, backend=backend)
        return ids if backend == "torch" else ids.flip(-1)

    monkeypatch.setattr(rows, "hash_vectors", hashed)
    assert not rows.check(row)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="live memory on a CPU is read under Linux only")
def test_memory_held_by_reversible_layers_does_not_grow() -> None:
    status, rows = run_tool("bench_memory.py", "--seq-len", "2048", "--dim", "128", "--batch", "1")
    held = {(row["recompute"], row["n_layers"]): row["held_mib"] for row in rows}
    assert status == 0 and len(rows) == 6
    assert held["reversible", 16] < 1.1 * held["reversible", 4]
    assert held["checkpoint", 16] > 2 * held["checkpoint", 4]
    assert held["none", 16] > 3 * held["none", 4] > 6 * held["reversible", 4]


SMALL_STEP = ("model.dim=32", "model.n_heads=2", "model.n_layers=1", "data.seq_len=512", "model.n_buckets=8")


def test_a_step_and_its_parts() -> None:
    status, (row,) = run_tool("bench_step.py", *SMALL_STEP, "model.axial_shape=[32,16]", "--repeat", "1")
    assert status == 0 and row["correct"] is True
    assert row["seconds"] > 0 and row["tokens_per_s"] == pytest.approx(512 / row["seconds"], rel=1e-2)
    assert {"hash", "sort", "attend", "projections", "feed-forward", "loss", "optimizer", "rest"} == set(
        row["split"]
    )
    assert 0 < row["mfu"] < 2 and row["mfu_of"] == "a measured product"


def imported(name: str) -> Any:
    """A tool as a module."""
    sys.path.insert(0, str(TOOLS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(TOOLS))


def test_a_step_that_could_not_run_is_not_incorrect() -> None:
    status, (row,) = run_tool("bench_step.py", *SMALL_STEP, "model.axial_shape=[2,2]")
    assert status == 2 and row["correct"] is None and "must be at most 4" in row["error"]


def test_peak_rates_are_found_by_name() -> None:
    bench_step = imported("bench_step")
    assert bench_step.card_peak("NVIDIA H100 80GB HBM3", "bf16") == pytest.approx(989.4e12)
    assert bench_step.card_peak("NVIDIA H100 PCIe", "bf16") == pytest.approx(756e12)
    assert bench_step.card_peak("NVIDIA H200", "fp32") == pytest.approx(66.9e12)
    assert bench_step.card_peak("Tesla V100-SXM2-16GB", "bf16") is None
    assert bench_step.card_peak("Some other card", "bf16") is None


SMALL_DECODING = ("--context", "64", "200", "--dim", "16", "--layers", "2", "--heads", "2", "--window", "8")


def test_decoding_rows() -> None:
    status, rows = run_tool("bench_decode.py", *SMALL_DECODING, "--tokens", "3", "--impl", "ours")
    assert status == 0 and [row["context"] for row in rows] == [64, 200]
    for row in rows:
        assert row["correct"] is True and row["difference"] < 1e-4
        assert min(row["seconds"], row["prefill"], row["forward"], row["cache_mib"]) > 0


def test_decoding_that_differs_from_forward_shows_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = imported("bench_decode")
    work = bench.DecodingCase("ours", [64, 100], 2, 16, 2, 2, 2, 8, 4, 20, 1)
    assert all(row["seconds"] > 0 for row in bench.ours(work))
    attend = BucketCache.attend
    monkeypatch.setattr(BucketCache, "attend", lambda self, *given, **ids: 1.01 * attend(self, *given, **ids))
    assert bench.ours(work) == [None, None]
