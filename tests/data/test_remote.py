"""Datasets at http: and s3: addresses, read by real clients from a local server through the cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.datasets import damage_sample, folder_of, read_world
from support.servers import Server, serve

from reformer_dist.data import BpeTokenizer, Corpus, Dataset
from reformer_dist.data.format import storage as storage_module
from reformer_dist.data.format.cache import FileCache, FileRef
from reformer_dist.errors import DataError

pytest.importorskip("aiohttp")
pytest.importorskip("s3fs")


@pytest.fixture(scope="module")
def packed(make_dataset: Callable[..., Dataset]) -> Dataset:
    """A dataset with a tokenizer file, which has to be downloaded too."""
    return make_dataset(tokenizer=BpeTokenizer.train([b"0:1 2:3 4:5 6:7 8:9"] * 9, 280))


@pytest.fixture
def server(packed: Dataset, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(storage_module, "RETRY_DELAYS", (0.01, 0.01, 0.01))
    with serve(folder_of(packed).parent) as found:
        yield found


def address(server: Server, packed: Dataset) -> str:
    return f"http://127.0.0.1:{server.port}/{folder_of(packed).name}"


def open_remote(where: str, cache: Path, **changed: Any) -> Corpus:
    return Corpus.open([where], cache_folder=cache, **changed)


def test_http_reads_the_rows_of_the_folder(packed: Dataset, server: Server, tmp_path: Path) -> None:
    expected, state = read_world(packed, 40)
    rows, remote_state = read_world(open_remote(address(server, packed), tmp_path), 40, workers=3)
    assert torch.equal(rows, expected)
    assert remote_state == state  # the address is not part of the state
    counted = dict(server.requests)
    assert counted["tokenizer.json"] == 1
    assert all(counted[shard.name] == counted[shard.index_name] == 1 for shard in packed.shards("train"))
    again, _ = read_world(open_remote(address(server, packed), tmp_path), 40, dp_size=2)
    assert torch.equal(again, expected)
    assert {name: n for name, n in server.requests.items() if counted[name] != n}.keys() <= {
        "dataset.json",
        "tokenizer.json",
    }


def test_s3_reads_the_rows_of_the_folder(
    packed: Dataset, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "us-east-1")
    where = f"s3://{folder_of(packed).name}"
    rows, _ = read_world(open_remote(where, tmp_path), 10)
    assert torch.equal(rows, read_world(packed, 10)[0])
    (folder_of(packed).parent / "empty").mkdir(exist_ok=True)
    with pytest.raises(DataError, match=r"s3://empty/dataset\.json: .*missing"):
        open_remote("s3://empty", tmp_path)


def test_transient_failures_are_retried(packed: Dataset, server: Server, tmp_path: Path) -> None:
    server.failures.update({"dataset.json": 2, packed.shards("train")[0].name: 3})
    rows, _ = read_world(open_remote(address(server, packed), tmp_path), 40)
    assert torch.equal(rows, read_world(packed, 40)[0])
    server.failures["dataset.json"] = 100
    with pytest.raises(DataError, match=r"dataset\.json: .*503"):
        open_remote(address(server, packed), tmp_path)


def test_missing_files_are_named(packed: Dataset, server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"http://.*/nothing/dataset\.json: .*missing"):
        open_remote(f"http://127.0.0.1:{server.port}/nothing", tmp_path)
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9/x/dataset\.json: .*read"):
        open_remote("http://127.0.0.1:9/x", tmp_path)


def test_a_truncated_copy_is_downloaded_again(packed: Dataset, server: Server, tmp_path: Path) -> None:
    name = packed.shards("train")[1].name
    server.spoil = lambda file, number, content: content[:700] if file == name and number == 1 else content
    rows, state = read_world(open_remote(address(server, packed), tmp_path), 40)
    assert torch.equal(rows, read_world(packed, 40)[0])
    assert server.requests[name] == 2 and state["quarantine"] == []


def test_damage_at_the_source_is_treated_like_local_damage(
    make_dataset: Callable[..., Dataset], tmp_path: Path
) -> None:
    dataset = make_dataset()
    damage_sample(dataset, 3)
    expected, state = read_world(dataset, 40)
    with serve(folder_of(dataset)) as server:
        corpus = open_remote(f"http://127.0.0.1:{server.port}", tmp_path)
        rows, remote_state = read_world(corpus, 40)
    assert torch.equal(rows, expected)
    assert remote_state == state and len(state["quarantine"]) == 1


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda file, number, content: content + bytes(99), r".*more than .*\d bytes"),
        (lambda file, number, content: b"%d" % number * 100, ".*3 downloads"),
    ],
)
def test_sources_that_change_or_grow_are_refused(
    packed: Dataset, server: Server, tmp_path: Path, spoil: Callable[..., bytes], words: str
) -> None:
    server.spoil = lambda file, number, content: spoil(file, number, content) if file[-4:] == ".tar" else content
    with pytest.raises(DataError, match=rf"train-\d+\.tar: {words}"):
        read_world(open_remote(address(server, packed), tmp_path), 1)
    assert not list(tmp_path.glob("*.partial"))


def test_the_cache_keeps_to_its_size(packed: Dataset, server: Server, tmp_path: Path) -> None:
    largest = max(shard.size for shard in packed.shards("train"))
    corpus = open_remote(address(server, packed), tmp_path, cache_gb=2.2 * largest / 2**30)
    rows, _ = read_world(corpus, 100, workers=3)
    assert torch.equal(rows, read_world(packed, 100)[0])
    assert sum(path.stat().st_size for path in tmp_path.glob("*.copy")) <= 2.2 * largest
    with pytest.raises(DataError, match=r"data\.cache_gb"):
        read_world(open_remote(address(server, packed), tmp_path / "tiny", cache_gb=100 / 2**30), 1)


def write_copy(content: bytes, log: list[str], name: str) -> Callable[[Path], None]:
    def download(path: Path) -> None:
        log.append(name)
        path.write_bytes(content)

    return download


def read_copy(cache: FileCache, content: bytes, log: list[str]) -> bytes:
    wanted = FileRef(f"file {content[:1]!r}", len(content), hashlib.sha256(content).hexdigest())
    descriptor = cache.open(wanted, wanted.name, write_copy(content, log, wanted.name))
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def test_the_least_recently_used_copy_is_removed(tmp_path: Path) -> None:
    cache, log = FileCache(tmp_path, 250), []
    one, two, three = (bytes([65 + number]) * 100 for number in range(3))
    for content in (one, two, one, three, one, two):
        assert read_copy(cache, content, log) == content
    assert log == ["file b'A'", "file b'B'", "file b'C'", "file b'B'"]


def test_the_next_process_downloads_a_damaged_file_again(tmp_path: Path) -> None:
    """Two equal downloads are the content of the source, but the source may be repaired."""
    right, log = b"right" * 20, []
    wanted = FileRef("file", len(right), hashlib.sha256(right).hexdigest())

    def read(cache: FileCache, content: bytes) -> bytes:
        with os.fdopen(cache.open(wanted, wanted.name, write_copy(content, log, "download")), "rb") as file:
            return file.read()

    before = FileCache(tmp_path, 1000)
    assert [read(before, b"wrong" * 20) for _ in range(3)] == [b"wrong" * 20] * 3
    assert len(log) == 2
    assert read(FileCache(tmp_path, 1000), right) == right
    assert len(log) == 3


def test_threads_download_once(tmp_path: Path) -> None:
    cache, log = FileCache(tmp_path, 1000), []
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: read_copy(cache, b"x" * 100, log), range(16)))
    assert found == [b"x" * 100] * 16
    assert len(log) == 1


def test_an_unusable_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"file: .*data\.cache_dir"):
        read_copy(FileCache(tmp_path / "file", 1000), b"x", [])


def test_a_missing_package_is_named() -> None:
    program = """
import sys
sys.modules["s3fs"] = sys.modules["aiohttp"] = None
from reformer_dist.data import Dataset
for address in ("s3://bucket/x", "https://host/x"):
    try:
        Dataset.open(address)
    except Exception as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert "s3: needs the package s3fs: pip install 'reformer_dist[remote]'" in first
    assert "https: needs the package aiohttp: pip install 'reformer_dist[remote]'" in second
