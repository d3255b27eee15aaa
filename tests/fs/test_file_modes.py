"""All files that a command writes have the mode of the umask, so that others can read a shared model."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from support.tiny import WORDS, tiny_config

import reformer_dist
from reformer_dist.checkpoint import CheckpointReader, resolve_checkpoint, write_export
from reformer_dist.convert import build_parser, run_conversion
from reformer_dist.data import BpeTokenizer, write_dataset
from reformer_dist.data.format.cache import FileCache, FileRef
from reformer_dist.distributed.runtime import Runtime
from reformer_dist.fs.atomic import file_sha256, write_synced
from reformer_dist.fs.tensors import save_file
from reformer_dist.ops.lsh.native.library import _store
from reformer_dist.run.build import build_trainer

# a model that transformers can express
EXPORTABLE = (
    *("model.neighbours=chunk", "model.activation=relu", "model.dropout=0", "model.compat.chunk_wrap=true"),
    *("model.compat.local_chunk_len=16", "model.compat.merge_streams=concat", "model.compat.bucket_factors=[4]"),
    *("model.chunk_len=16", "trainer.max_steps=1", "trainer.sample_every=0"),
)


@pytest.fixture(params=[0o022, 0o027], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    mask: int = request.param
    before = os.umask(mask)
    yield mask
    os.umask(before)


def modes(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_mode & 0o7777 for path in sorted(root.rglob("*"))}


def test_files_of_every_command(umask: int, tmp_path: Path, job: Runtime) -> None:
    data, run, export = tmp_path / "data", tmp_path / "run", tmp_path / "export"
    documents = [(f"{number}", " ".join(WORDS[number % 9 :] * 9).encode()) for number in range(40)]
    tokenizer = BpeTokenizer.train((text for _, text in documents), 280)
    write_dataset(documents, data, tokenizer, heldout_fraction=0.2)
    with ExitStack() as resources:
        build_trainer(tiny_config(data, run, *EXPORTABLE), job, resources).fit()
    for path in run.rglob("tokenizer.json"):
        path.chmod(0o400)  # a source's mode is not that of its copies
    write_export(CheckpointReader(resolve_checkpoint(run)), export, max_shard_bytes=10_000)
    for source, target in ((run, tmp_path / "theirs"), (tmp_path / "theirs", tmp_path / "back")):
        run_conversion(build_parser().parse_args([str(source), str(target)]))
    shard = next(data.glob("*.tar"))
    cached = FileRef("shard", shard.stat().st_size, file_sha256(shard))
    os.close(
        FileCache(tmp_path / "cache", 2**20).open(cached, "", lambda to: write_synced(to, shard.read_bytes()))
    )
    _store(shard, tmp_path / "cache" / "library.so")
    for path in run.rglob("tokenizer.json"):
        path.chmod(0o666 & ~umask)

    found = modes(tmp_path)
    for kind in ("safetensors", "json", "yaml", "jsonl", "tar", "copy", "so"):
        assert any(name.endswith(f".{kind}") for name in found), kind
    assert found == {name: (0o777 if (tmp_path / name).is_dir() else 0o666) & ~umask for name in found}


def test_a_directory_that_grants_more_is_respected(umask: int, tmp_path: Path) -> None:
    """The mode is that of a new file, not a constant: with an ACL on the directory, the umask does not count."""
    path = tmp_path / "weights.safetensors"
    path.touch(0o640)
    path.chmod(0o640)
    save_file({"weight": torch.ones(2)}, path)
    assert path.stat().st_mode & 0o7777 == 0o640


def test_only_one_module_knows_of_private_files() -> None:
    private = re.compile(r"NamedTemporaryFile|mkstemp|mkdtemp|shutil\.(copy2?|move)\(|safetensors\.torch import")
    package = Path(reformer_dist.__file__).parent
    users = {str(path.relative_to(package)) for path in package.rglob("*.py") if private.search(path.read_text())}
    assert users == {"fs/tensors.py"}
