"""Documents of files and folders."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from support.datasets import write_tar

from reformer_dist.data import (
    RECORD_SUFFIXES,
    ByteTokenizer,
    SkippedFiles,
    TextOptions,
    read_parallel,
    read_records,
    read_text,
    write_dataset,
)
from reformer_dist.data.prepare import formats, raw_files
from reformer_dist.errors import DataError

MEMBERS = f"members of .tar files that are neither .txt nor {', '.join(RECORD_SUFFIXES)}"


def documents(*paths: Path, skipped: SkippedFiles | None = None, **options: Any) -> list[tuple[str, bytes]]:
    return [(sample.name, sample.fields[0]) for sample in read_text(paths, TextOptions(**options), skipped)]


def test_folders_are_sorted_and_binary_files_skipped(tmp_path: Path) -> None:
    texts = {"b.py": b"b", "a.py": b"a", "sub/c.py": b"c", "notes.md": b"d", "sub/z.py.gz": gzip.compress(b"z")}
    skipped = ["x/__pycache__/m.py", ".git/config.py", ".hidden.py", "site-packages/p.py", "x/dist-packages/q.py"]
    for name, content in (texts | dict.fromkeys(skipped, b"no") | {"binary.py": b"a\0b"}).items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    found = documents(tmp_path / "root", suffixes=(".py",))
    expected = [("a.py", b"a"), ("b.py", b"b"), ("sub/c.py", b"c"), ("sub/z.py.gz", b"z")]
    assert found == [(f"root/{name}", text) for name, text in expected]
    assert ("root/notes.md", b"d") in documents(tmp_path / "root")


@pytest.mark.parametrize("zipped", [False, True])
def test_jsonl(tmp_path: Path, zipped: bool) -> None:
    content = b"".join(json.dumps({"body": text}).encode() + b"\n\n" for text in ("one", "zwölf", ""))
    path = tmp_path / ("d.jsonl.gz" if zipped else "d.jsonl")
    path.write_bytes(gzip.compress(content) if zipped else content)
    found = documents(path, text_field="body")
    assert [text.decode() for _, text in found] == ["one", "zwölf", ""]
    assert found[1][0] == f"{path.name}:3"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"d\.jsonl:2: .*JSON"),
        ('{"other": "x", "n": 1}', "field 'text'.* other, n\\b.*--text-field"),
        ('{"text": null}', "field 'text' is None"),
        ("{}", "field 'text'"),
        ('{"text": 3}', "is 3"),
        ("[1]", r"holds \[1\]"),
        ("[" * 100_000, r"d\.jsonl:2: .*JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        documents(path)


@pytest.mark.parametrize("zipped", [False, True])
def test_webdataset_shards(tmp_path: Path, zipped: bool) -> None:
    """As webdataset itself writes them."""
    path = tmp_path / ("shard.tar.gz" if zipped else "shard.tar")
    with webdataset.TarWriter(str(path)) as shard:
        shard.write({"__key__": "a/one", "txt": "first"})
        shard.write({"__key__": "a/two", "json": {"text": "second"}, "cls": 3})
    found = documents(path)
    assert found == [(f"{path.name}/a/one.txt", b"first"), (f"{path.name}/a/two.json:1", b"second")]
    in_folder = [(f"{tmp_path.name}/{name}", text) for name, text in found]
    assert documents(tmp_path) == in_folder
    assert documents(tmp_path, suffixes=(".tar",)) == in_folder
    if zipped:
        path = path.rename(tmp_path / "shard.tgz")
        assert [text for _, text in documents(path)] == [b"first", b"second"]
        for suffix in (".tgz", ".tar"):
            assert [text for _, text in documents(tmp_path, suffixes=(suffix,))] == [b"first", b"second"]


def test_skipped_files_are_counted(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (root / "a.txt").write_text("text")
    for name in ("b.txt", "sub/c.txt"):
        (root / name).write_bytes("wide".encode("utf-16-le"))
    write_tar(root / "d.tar", [("x.cls", b"1"), ("x.txt", b"member"), ("y.pkl", b"2"), ("z.pkl", b"3")])
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / ".hidden").symlink_to(tmp_path / "elsewhere")
    (root / "lost.txt").symlink_to(tmp_path / "nowhere")
    skipped = SkippedFiles()
    assert [text for _, text in documents(root, skipped=skipped)] == [b"text", b"member"]
    assert skipped == {
        "binary files, which contain NUL": (2, "root/b.txt"),
        MEMBERS: (3, "root/d.tar/x.cls"),
        "links to folders": (1, str(root / "linked")),
        "broken links or devices": (1, str(root / "lost.txt")),
    }
    skipped.clear()
    documents(root, suffixes=(".zip", ".tar"), skipped=skipped)
    assert list(skipped) == ["links to folders", MEMBERS]


def test_inputs_without_text_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "d.tar", [("x.pkl", b"x")])
    words = rf"^no text in {tmp_path}; .*\b1 members .*/d\.tar/x\.pkl$"
    with pytest.raises(DataError, match=words):
        documents(tmp_path)
    with pytest.raises(DataError, match=rf"^no text: .*{tmp_path} .*\.zzz or \.py$"):
        documents(tmp_path, suffixes=(".zzz", ".py"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=rf"^no text in {tmp_path}/empty$"):
        documents(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("../x.txt", b"x", "named '../x.txt'"),
        ("/x.txt", b"x", "named '/x.txt'"),
        ("x.json", b"{", r"x\.json: .*JSON"),
        ("x.json", b"{}", r"x\.json:1: .*field 'text'"),
        ("x.pkl", b"x", r"no text in .*d\.tar; .*\b1 members .*d\.tar/x\.pkl"),
    ],
)
def test_bad_members_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    write_tar(tmp_path / "d.tar", [(name, content)])
    with pytest.raises(DataError, match=message):
        documents(tmp_path / "d.tar")


def test_a_torn_tar_is_named(tmp_path: Path) -> None:
    path = tmp_path / "d.tar"
    write_tar(path, [("x.txt", b"x" * 5000)])
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"d\.tar: .*read"):
        documents(path)


TEXTS = ["one", 'zwölf, "in Worten"\nund Zahlen: 12', "", "[{,}]"]


def in_format(suffix: str, layout: str) -> str:
    records = [json.dumps({"n": number, "body": text}) for number, text in enumerate(TEXTS)]
    if suffix == ".json" and layout == "array":
        return json.dumps([json.loads(record) for record in records], indent=2)
    if suffix == ".json" and layout == "one after another":
        return "".join(json.dumps(json.loads(record), indent=1) for record in records)
    if suffix in (".csv", ".tsv"):
        with io.StringIO() as file:
            writer = csv.writer(file, delimiter="," if suffix == ".csv" else "\t")
            writer.writerows([("n", "body"), *enumerate(TEXTS)])
            return "\ufeff" + file.getvalue()
    return "\n".join(records) + "\n\n"


@pytest.mark.parametrize(
    ("suffix", "layout"),
    [
        *((suffix, "") for suffix in formats.TEXT_RECORD_SUFFIXES),
        (".JSON", ""),
        (".json", "array"),
        (".json", "one after another"),
    ],
)
def test_every_format_of_records(
    tmp_path: Path, suffix: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, in a folder and in a .tar, compressed or not, also if it is read in small pieces."""
    monkeypatch.setattr(formats, "JSON_CHUNK", 7)
    content = in_format(suffix.lower(), layout).encode()
    root = tmp_path / "root"
    root.mkdir()
    (root / f"a{suffix}").write_bytes(content)
    (root / f"b{suffix}.gz").write_bytes(gzip.compress(content))
    write_tar(root / "c.tar", [(f"x/d{suffix}", content)])
    found = documents(root, text_field="body")
    assert [text.decode() for _, text in found] == TEXTS * 3
    assert len({name for name, _ in found}) == len(found)
    for path in root.iterdir():
        assert [text.decode() for _, text in documents(path, text_field="body")] == TEXTS
    with pytest.raises(DataError, match=r"a\.\w+:\d+: .*'text', but n, body; --text-field .*--as-text \.\w+ "):
        documents(root)
    assert documents(root / f"a{suffix}", as_text=(suffix.lower(),)) == [(f"a{suffix}", content)]
    samples = list(read_records([root / f"a{suffix}"], ["body", "body"]))
    assert [sample.fields[1].decode() for sample in samples] == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.json", b'[{"text": "x"}', r"d\.json: .*ends without \] after 1 record"),
        ("d.json", b'[{"text": "x"}] {}', r"d\.json: .*{} follows"),
        ("d.json", b'{"text": "x"}\n{"te', r"d\.json: .*JSON after 1 record"),
        ("d.json", b"// a comment\n{}", r"d\.json: .*JSON from its first record"),
        ("d.json", b'["a"]', r"d\.json:1: holds 'a'"),
        ("d.json", '{"text": "é"}'.encode("latin-1"), r"d\.json: is not UTF-8"),
        ("d.json", b"[" * 100_000, r"d\.json: .*JSON"),
        ("d.csv", b"text,n\nx\n", r"d\.csv:2: .*columns: text, n"),
        ("d.csv", b"text,n\nx,1,2\n", r"d\.csv:2: .*columns: text, n"),
        ("d.csv", b"text;n\nx;1\n", r"d\.csv:2: has no field 'text', but text;n"),
        ("d.csv", b'text\n"x', r"d\.csv:\d: .*CSV"),
        ("d.csv", b"text\ncaf\xe9\n", r"d\.csv: is not UTF-8"),
    ],
)
def test_broken_records_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    for read in (lambda: documents(tmp_path), lambda: list(read_records([tmp_path / name], ["text"]))):
        with pytest.raises(DataError, match=message):
            read()


PACKED = [
    *(("d.bin", magic + b"rest of it") for magic in raw_files.PACKED_FORMATS if magic != b"BZh"),
    *((f"d{suffix}", b"anything") for suffix in raw_files.PACKED_SUFFIXES),
    ("d.jsonl", bz2.compress(b"text")),
    ("d.txt", lzma.compress(b"text")),
    ("d.TXT.gz", gzip.compress(gzip.compress(b"text"))),
    ("d.txt", "text".encode("utf-16")),
]


@pytest.mark.parametrize(("name", "content"), PACKED, ids=range(len(PACKED)))
def test_text_in_formats_that_are_not_read_is_never_left_out_in_silence(
    tmp_path: Path, name: str, content: bytes
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / name).write_bytes(content)
    (root / "other.txt").write_bytes(b"text")
    words = rf"{name}: is .*can't be read.*"
    for paths in ([root], [root / name]):
        with pytest.raises(DataError, match=f"{words} --skip-unreadable"):
            documents(*paths)
    for read in (lambda: read_parallel(root / name, root / name), lambda: read_records([root / name], ["text"])):
        with pytest.raises(DataError, match=words):
            list(read())
    skipped = SkippedFiles()
    assert documents(root, skip_packed=True, skipped=skipped) == [("root/other.txt", b"text")]
    assert skipped == {"files in formats that can't be read": (1, str(root / name))}

    write_tar(tmp_path / "d.tar", [(name, content), ("other.txt", b"text")])
    with pytest.raises(DataError, match=rf"d\.tar: {words} --skip-unreadable"):
        documents(tmp_path / "d.tar")
    assert documents(tmp_path / "d.tar", skip_packed=True) == [("d.tar/other.txt", b"text")]


def test_a_text_that_begins_like_bzip2_is_read(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_bytes(b"BZhou")
    assert documents(tmp_path / "d.txt") == [("d.txt", b"BZhou")]


def test_datasets_and_the_output_are_not_read(tmp_path: Path) -> None:
    """Neither the output nor earlier datasets, which are below an input."""
    root = tmp_path / "root"
    texts = [(f"root/{number}.txt", b"text %d" % number) for number in range(15)]
    root.mkdir()
    for name, text in texts:
        (tmp_path / name).write_bytes(text)
    expected = sorted(texts)
    output = root / "data/set"
    for _ in range(2):  # the second time, it is there
        found = documents(root, output=output)
        assert sorted(found) == expected
        write_dataset(found, output, ByteTokenizer(), heldout_fraction=0.2, overwrite=True)
    write_dataset(found, root / "sub/other", ByteTokenizer(), heldout_fraction=0.2)
    skipped = SkippedFiles()
    assert sorted(documents(root, output=root / "new", skipped=skipped)) == expected
    assert skipped == {"datasets, which are not read again": (2, str(output))}
    (tmp_path / "link").symlink_to(root)
    with pytest.raises(DataError, match=r"--output .*link: is also an input"):
        documents(root, output=tmp_path / "link")
    with pytest.raises(DataError, match=rf"{output}: holds a dataset"):
        documents(output)
    assert len(documents(*output.glob("*.tar"))) == 15  # said explicitly


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
    for section in (2048, 65536):
        pieces = [piece for _, piece in documents(path, section_bytes=section)]
        assert b"".join(pieces) == text
        for piece in pieces:
            piece.decode()  # no character is cut in two
            assert 0 < len(piece) <= 4 * section


def test_a_single_file_keeps_its_long_range(tmp_path: Path) -> None:
    """A book is one document, and a larger file has sections of equal size; each is cut at a blank line."""
    path = tmp_path / "book.txt"
    path.write_bytes(b"a line of text\n\n" * 65536)
    assert documents(path) == [("book.txt", path.read_bytes())]
    pieces = [text for _, text in documents(path, section_bytes=300_000)]
    assert b"".join(pieces) == path.read_bytes()
    sizes = list(map(len, pieces))
    assert len(sizes) == 3 and max(sizes) - min(sizes) <= 64 and all(text.endswith(b"\n\n") for text in pieces)


@pytest.mark.parametrize("size", [20_000, 300_000, 9 << 20])
def test_section_sizes_are_bounded(tmp_path: Path, size: int) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"a line of text\n\n" * (size // 16))
    for section in (2048, 65536, 4 << 20):
        lengths = [len(text) for _, text in documents(path, section_bytes=section)]
        assert all(section <= length < 2 * section + 16 for length in lengths[:-1])
        assert lengths[-1] < 2 * section + 16


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        documents(tmp_path / "nowhere")
    (tmp_path / "image.txt").write_bytes(b"a\0b")
    with pytest.raises(DataError, match=r"image\.txt: .*NUL"):
        documents(tmp_path / "image.txt")
    for broken in (b"not gzip", gzip.compress(b"x" * 5000)[:-12]):
        (tmp_path / "t.txt.gz").write_bytes(broken)
        with pytest.raises(DataError, match=r"t\.txt\.gz: .*read"):
            documents(tmp_path / "t.txt.gz")
