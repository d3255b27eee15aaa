"""The C library matches the reference: outputs and all gradients, for all options, widths, vectors and threads."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_helpers import Case, assert_fast_is_oracle, cases, needs_compiler, window_rules

from reformer_dist.ops.lsh import AttentionOptions, WindowRule, attend_locally, backends, bucket_attention
from reformer_dist.ops.lsh.attention import LocalExchange
from reformer_dist.ops.lsh.native import attention, calls, library

CPU = torch.device("cpu")

pytestmark = needs_compiler


def by_native(case: Case, head_dim: int) -> Case:
    return replace(case, head_dim=head_dim, options=replace(case.options, backend="native"))


# a window of 1 leaves one key, with a true dq of 0: only the rounding of sums over head_dim remains
TOLERANCE = 5e-5


@settings(max_examples=120, deadline=None)
@given(cases(window_rules()), st.sampled_from([16, 32, 48, 64, 112, 128, 256]))
def test_every_option_and_width(case: Case, head_dim: int) -> None:
    assert_fast_is_oracle(by_native(case, head_dim), tolerance=TOLERANCE)


@settings(max_examples=30, deadline=None)
@given(cases(window_rules(), longest=700, n_hashes=2), st.sampled_from([1, 300]))
def test_long_buckets_and_many_groups(case: Case, group_tokens: int) -> None:
    """Windows larger than a block of keys, buckets of several spans, calls of several groups."""
    rule = replace(case.options.rule, window=1 + case.seed % 400)
    case = replace(case, options=replace(case.options, rule=rule, n_buckets=1 + case.seed % 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "GROUP_TOKENS", group_tokens)
        patch.setattr(calls, "SPAN_LEN", 16)
        assert_fast_is_oracle(by_native(case, 16), tolerance=TOLERANCE)


@settings(max_examples=30, deadline=None)
@given(cases(window_rules()), st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_precision(case: Case, dtype: torch.dtype) -> None:
    assert_fast_is_oracle(by_native(case, 32), dtype, tolerance=0.2)


@pytest.fixture
def fresh_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiles the library again, into a separate cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.library.cache_clear()
    library.unavailable_reason.cache_clear()
    yield
    monkeypatch.undo()
    library.library.cache_clear()
    library.unavailable_reason.cache_clear()


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_every_vector_length(lanes: int, fresh_build: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers split vectors that are longer than the machine's."""
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, f"-DLANES={lanes}"))
    for seq_len, head_dim in ((1, 16), (77, 48), (301, 64)):
        options = AttentionOptions(
            WindowRule(70, True), 2, 0.5, count_pairs_once=True, dropout=0.2, backend="native"
        )
        assert_fast_is_oracle(Case(1, 2, 2, seq_len, head_dim, options, "some", seed=seq_len), tolerance=TOLERANCE)


def shared_query_key(n_threads: int, window: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, v, d_out = (torch.randn(1, 2, 5000, 32, generator=generator) for _ in range(3))
    ids = torch.randint(0, 3, (1, 2, 3, 5000), generator=generator)
    options = AttentionOptions(WindowRule(window, causal=True), 3, scale=1.0, backend="native")
    leaves = [x.requires_grad_() for x in (q, v)]
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        out = bucket_attention(q, None, v, ids, options)
        return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("window", [100, 400])
def test_threads_change_no_bit(window: int) -> None:
    """Concurrent additions to the same key would."""
    alone = shared_query_key(1, window)
    for n_threads in (2, 3, 2):
        assert all(torch.equal(a, b) for a, b in zip(alone, shared_query_key(n_threads, window), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_keys_are_those_of_torch(dtype: torch.dtype) -> None:
    """Shared query-key: the gradient of q includes that of its normalized key, which is undefined for q = 0."""
    generator = torch.Generator().manual_seed(3)
    q, v, d_out = (torch.randn(2, 2, 200, 32, generator=generator).to(dtype) for _ in range(3))
    q *= torch.rand(200, 1, generator=generator).to(dtype) * 3
    q[:, :, 5] = 0
    ids = torch.randint(0, 4, (2, 2, 3, 200), generator=generator)
    found = []
    for name in ("native", "torch"):
        leaves = [x.clone().requires_grad_() for x in (q, v)]
        options = AttentionOptions(WindowRule(30, causal=False), 4, scale=1.0, backend=name)
        out = bucket_attention(leaves[0], None, leaves[1], ids, options)
        found.append([out, *torch.autograd.grad(out, leaves, d_out)])
    rows = torch.arange(200) != 5  # the gradient of a normalized zero vector is undefined
    for one, other in zip(*found, strict=True):
        assert one.isfinite().all() and one.dtype == dtype
        error = (one - other)[:, :, rows].abs().max() / other[:, :, rows].abs().max()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def test_a_window_beyond_the_sequence() -> None:
    options = AttentionOptions(
        WindowRule(2**28 // 3, causal=True), 3, 1.0, count_pairs_once=True, backend="native"
    )
    assert_fast_is_oracle(Case(1, 1, 3, 100, 16, options, "none", seed=0), tolerance=TOLERANCE)


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("window", [1, 5, 70, 300])
def test_causal_to_the_last_bit(window: int, once: bool) -> None:
    generator = torch.Generator().manual_seed(window)
    q, v = (torch.randn(1, 2, 700, 16, generator=generator) for _ in range(2))
    ids = torch.randint(0, 3, (1, 2, 3, 700), generator=generator)
    options = AttentionOptions(
        WindowRule(window, True), 3, 1.0, count_pairs_once=once, dropout=0.1, backend="native"
    )
    before = bucket_attention(q, None, v, ids, options)
    for t in (1, 15, 16, 333, 699):
        other_q, other_v, other_ids = q.clone(), v.clone(), ids.clone()
        other_q[:, :, t:] *= -3
        other_v[:, :, t:] += 100
        other_ids[..., t:] = 1
        after = bucket_attention(other_q, None, other_v, other_ids, options)
        assert torch.equal(after[:, :, :t], before[:, :, :t]) and not torch.equal(after, before)


def test_nan_propagates() -> None:
    q, v = (torch.randn(1, 1, 40, 16) for _ in range(2))
    ids = torch.zeros(1, 1, 1, 40, dtype=torch.uint8)
    options = AttentionOptions(WindowRule(40, causal=True), 1, scale=1.0, backend="native")
    q[0, 0, 7] = torch.nan
    out = bucket_attention(q, q, v, ids, options)
    assert out[0, 0, :7].isfinite().all() and out[0, 0, 7:].isnan().all()


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_large_scores(scale: float) -> None:
    q, k, v = (torch.randn(1, 1, 300, 16, requires_grad=True) for _ in range(3))
    ids = torch.zeros(1, 1, 2, 300, dtype=torch.uint8)
    found = []
    for name in ("native", "torch"):
        options = AttentionOptions(WindowRule(50, causal=True), 1, scale, backend=name)
        out = bucket_attention(q, k, v, ids, options)
        found.append([out, *torch.autograd.grad(out.sum(), (q, k, v))])
        assert all(x.isfinite().all() for x in found[-1])
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-3 * scale**0.5, rtol=1e-3)


@pytest.mark.parametrize("wrong", [-1, 9, 2**31 - 1])
def test_ids_out_of_range_are_refused(wrong: int) -> None:
    """In C they would write out of bounds."""
    v = torch.randn(1, 2, 50, 16)
    ids = torch.zeros(1, 2, 2, 50, dtype=torch.int32)
    ids[0, 1, 1, 7] = wrong
    options = AttentionOptions(WindowRule(5, causal=True), 8, scale=1.0, backend="native")
    with pytest.raises(ValueError, match=rf"bucket_ids={wrong}: .*\b0 to 7\b"):
        bucket_attention(v, None, v, ids, options)
    with pytest.raises(ValueError, match=rf"bucket_ids={wrong}: .*\b0 to 7\b"):  # as layers call it
        attend_locally(v, None, v, LocalExchange(ids, options, None))


def test_unsupported_inputs_are_refused_and_auto_falls_back_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    why = backends.unsupported_reason
    assert why("native", CPU, 64) is None and backends.choose("auto", CPU, 64, torch.float32) == "native"
    assert "window rule" in why("native", CPU, 64, chunks=True)
    assert "multiple of 16" in why("native", CPU, 24) and "multiple of 16" in why("native", CPU, 272)
    assert "float64" in why("native", CPU, 64, torch.float64)
    assert "not on meta" in why("native", torch.device("meta"), 64)
    assert backends.choose("auto", CPU, 64, torch.float32, chunks=True) == "torch"
    assert backends.choose("auto", CPU, 24, torch.float32) == "torch"
    with pytest.raises(ValueError, match=r"\bnative: .*head_dim"):
        backends.choose("native", CPU, 24, torch.float32)


def test_auto_falls_back_to_torch_without_a_compiler(fresh_build: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert backends.choose("auto", CPU, 64, torch.float32) == "torch"
    with pytest.raises(ValueError, match=r"native: .*C compiler"):
        backends.choose("native", CPU, 64, torch.float32)


def test_a_compiler_error_is_reported(fresh_build: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-DGROUP=nothing", "-Dvec=?"))
    reason = library.unavailable_reason()
    assert reason is not None and "could not compile it" in reason and "error" in reason


def test_the_library_is_cached_and_a_truncated_file_replaced(fresh_build: None) -> None:
    library.library()
    (cached,) = library.cache_directory().iterdir()
    whole = cached.read_bytes()
    cached.unlink()
    cached.write_bytes(whole[:1000])
    library.library.cache_clear()
    library.library()
    assert cached.stat().st_size == len(whole)


def test_a_full_disk_leaves_no_partial_file(fresh_build: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", fill)
    assert library.unavailable_reason() is None
    assert not list(library.cache_directory().iterdir())


def test_a_cache_that_can_not_be_written_to(fresh_build: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert library.unavailable_reason() is None
