"""Documents of files and folders."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from support.datasets import write_tar

from reformer_dist.data import SkippedFiles, read_documents
from reformer_dist.data.prepare.documents import MAX_SECTION_BYTES, MIN_SECTION_BYTES, TARGET_SECTIONS
from reformer_dist.errors import DataError


def test_folders_are_sorted_and_binary_files_skipped(tmp_path: Path) -> None:
    texts = {"b.py": b"b", "a.py": b"a", "sub/c.py": b"c", "notes.md": b"d", "sub/z.py.gz": gzip.compress(b"z")}
    skipped = ["x/__pycache__/m.py", ".git/config.py", ".hidden.py", "site-packages/p.py", "x/dist-packages/q.py"]
    for name, content in (texts | dict.fromkeys(skipped, b"no") | {"binary.py": b"a\0b"}).items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    found = list(read_documents([tmp_path / "root"], [".py"]))
    expected = [("a.py", b"a"), ("b.py", b"b"), ("sub/c.py", b"c"), ("sub/z.py.gz", b"z")]
    assert found == [(f"root/{name}", text) for name, text in expected]
    assert ("root/notes.md", b"d") in list(read_documents([tmp_path / "root"]))


@pytest.mark.parametrize("zipped", [False, True])
def test_jsonl(tmp_path: Path, zipped: bool) -> None:
    content = b"".join(json.dumps({"body": text}).encode() + b"\n\n" for text in ("one", "zwölf", ""))
    path = tmp_path / ("d.jsonl.gz" if zipped else "d.jsonl")
    path.write_bytes(gzip.compress(content) if zipped else content)
    found = list(read_documents([path], jsonl_field="body"))
    assert [text.decode() for _, text in found] == ["one", "zwölf", ""]
    assert found[1][0] == f"{path.name}:3"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"d\.jsonl:2: .*JSON"),
        ('{"other": "x", "n": 1}', "field 'text'.* other, n\\b.*--jsonl-field"),
        ('{"text": null}', "field 'text' is None"),
        ("{}", "field 'text'$"),
        ('{"text": 3}', "is 3"),
        ("[1]", "None"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        list(read_documents([path]))


@pytest.mark.parametrize("zipped", [False, True])
def test_webdataset_shards(tmp_path: Path, zipped: bool) -> None:
    """As webdataset itself writes them."""
    path = tmp_path / ("shard.tar.gz" if zipped else "shard.tar")
    with webdataset.TarWriter(str(path)) as shard:
        shard.write({"__key__": "a/one", "txt": "first"})
        shard.write({"__key__": "a/two", "json": {"text": "second"}, "cls": 3})
    found = list(read_documents([path]))
    assert found == [(f"{path.name}/a/one.txt", b"first"), (f"{path.name}/a/two.json", b"second")]
    in_folder = [(f"{tmp_path.name}/{name}", text) for name, text in found]
    assert list(read_documents([tmp_path])) == in_folder
    assert list(read_documents([tmp_path], [".tar"])) == in_folder
    if zipped:
        path = path.rename(tmp_path / "shard.tgz")
        assert [text for _, text in read_documents([path])] == [b"first", b"second"]
        for suffix in (".tgz", ".tar"):
            assert [text for _, text in read_documents([tmp_path], [suffix])] == [b"first", b"second"]


def test_skipped_files_are_counted(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (root / "a.txt").write_text("text")
    for name in ("b.txt", "sub/c.txt"):
        (root / name).write_bytes("wide".encode("utf-16"))
    write_tar(root / "d.tar", [("x.cls", b"1"), ("x.txt", b"member"), ("y.pkl", b"2"), ("z.pkl", b"3")])
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / ".hidden").symlink_to(tmp_path / "elsewhere")
    (root / "lost.txt").symlink_to(tmp_path / "nowhere")
    skipped = SkippedFiles()
    assert [text for _, text in read_documents([root], skipped=skipped)] == [b"text", b"member"]
    assert skipped == {
        "binary files, which contain NUL": (2, "root/b.txt"),
        "members of .tar files that are neither .txt nor .json": (3, "root/d.tar/x.cls"),
        "links to folders": (1, str(root / "linked")),
        "broken links or devices": (1, str(root / "lost.txt")),
    }
    skipped.clear()
    list(read_documents([root], [".zip", ".tar"], skipped=skipped))
    assert list(skipped) == ["links to folders", "members of .tar files that are neither .txt nor .json"]


def test_inputs_without_text_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "d.tar", [("x.pkl", b"x")])
    words = rf"^no text in {tmp_path}; .*\b1 members .*/d\.tar/x\.pkl$"
    with pytest.raises(DataError, match=words):
        list(read_documents([tmp_path]))
    with pytest.raises(DataError, match=rf"^no text: .*{tmp_path} .*\.zzz or \.py$"):
        list(read_documents([tmp_path], [".zzz", ".py"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=rf"^no text in {tmp_path}/empty$"):
        list(read_documents([tmp_path / "empty"]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("../x.txt", b"x", "named '../x.txt'"),
        ("/x.txt", b"x", "named '/x.txt'"),
        ("x.json", b"{", r"x\.json: .*JSON"),
        ("x.json", b"{}", r"x\.json: .*field 'text'$"),
        ("x.pkl", b"x", r"no text in .*d\.tar; .*\b1 members .*d\.tar/x\.pkl"),
    ],
)
def test_bad_members_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    write_tar(tmp_path / "d.tar", [(name, content)])
    with pytest.raises(DataError, match=message):
        list(read_documents([tmp_path / "d.tar"]))


def test_a_torn_tar_is_named(tmp_path: Path) -> None:
    path = tmp_path / "d.tar"
    write_tar(path, [("x.txt", b"x" * 5000)])
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"d\.tar: .*read"):
        list(read_documents([path]))


PARAGRAPHS = st.lists(
    st.tuples(
        st.sampled_from(["a", "é", "中", "🙂", "word "]),
        st.integers(1, 40_000),
        st.sampled_from(["", "\n", "\n\n", "\r\n\r\n"]),
    ),
    min_size=1,
    max_size=8,
)


@given(PARAGRAPHS)
def test_a_single_file_is_cut_without_loss(
    tmp_path_factory: pytest.TempPathFactory, paragraphs: list[tuple[str, int, str]]
) -> None:
    text = "".join(unit * count + end for unit, count, end in paragraphs).encode()
    path = tmp_path_factory.mktemp("lone") / "book.txt"
    path.write_bytes(text)
    pieces = [piece for _, piece in read_documents([path])]
    assert b"".join(pieces) == text
    for piece in pieces:
        piece.decode()  # no character is cut in two
        assert 0 < len(piece) <= 2 * MAX_SECTION_BYTES


def test_a_single_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"x" * 999 + b"\n" + b"\n".join([b"y" * 500 + b"\n"] * 600))
    pieces = [piece for _, piece in read_documents([path])]
    aim = path.stat().st_size // TARGET_SECTIONS
    assert MIN_SECTION_BYTES < aim < MAX_SECTION_BYTES
    assert TARGET_SECTIONS // 2 < len(pieces) <= TARGET_SECTIONS + 1
    assert all(piece.endswith(b"\n\n") and aim <= len(piece) < aim + 600 for piece in pieces[:-1])


@pytest.mark.parametrize(("size", "longest"), [(20_000, MIN_SECTION_BYTES), (9 << 20, MAX_SECTION_BYTES)])
def test_section_sizes_are_bounded(tmp_path: Path, size: int, longest: int) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"a line of text\n\n" * (size // 16))
    lengths = [len(piece) for _, piece in read_documents([path])]
    assert all(longest <= length <= longest + 16 for length in lengths[:-1])


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        list(read_documents([tmp_path / "nowhere"]))
    (tmp_path / "image.txt").write_bytes(b"a\0b")
    with pytest.raises(DataError, match=r"image\.txt: .*NUL"):
        list(read_documents([tmp_path / "image.txt"]))
    for broken in (b"not gzip", gzip.compress(b"x" * 5000)[:-12]):
        (tmp_path / "t.txt.gz").write_bytes(broken)
        with pytest.raises(DataError, match=r"t\.txt\.gz: .*read"):
            list(read_documents([tmp_path / "t.txt.gz"]))
