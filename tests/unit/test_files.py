"""Writing and reading files: complete or not at all, and nothing believed."""

import errno
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tl_codebook import files
from tl_codebook.errors import CheckpointError, CheckpointExistsError

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}
SHAPES = {"a": (2, 3), "b": (4,)}


def listing(folder):
    """Every file with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rewritten(folder, entry, content):
    """The entry of a file with this content, size and hash as they are: what someone would write who wants to be read."""
    path = folder / entry["file"]
    path.write_bytes(content)
    return entry | {"bytes": len(content), "sha256": files._hash(path)}


def header(fields, data=b""):
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + data


# --- tensors ---


def test_what_is_written_is_read(tmp_path):
    entry = files.write_tensors(tmp_path, "codes", TENSORS)
    assert list(listing(tmp_path)) == [entry["file"]]
    assert entry["file"] == f"codes.{entry['sha256'][:12]}.safetensors"
    assert entry["bytes"] == (tmp_path / entry["file"]).stat().st_size
    for expected in (None, SHAPES):
        read = files.read_tensors(tmp_path, entry, expected)
        assert read.keys() == TENSORS.keys()
        assert all(torch.equal(read[name], value) for name, value in TENSORS.items())


def test_views_shared_storage_and_graphs_are_written_as_values(tmp_path):
    base = torch.arange(12.0).reshape(3, 4).requires_grad_()
    tensors = {"whole": base, "view": base[:, 1], "transposed": base.T, "again": base}
    read = files.read_tensors(tmp_path, files.write_tensors(tmp_path, "x", tensors))
    assert all(torch.equal(read[name], value.detach()) for name, value in tensors.items())


def test_the_same_content_has_the_same_name(tmp_path):
    assert files.write_tensors(tmp_path, "x", TENSORS) == files.write_tensors(tmp_path, "x", TENSORS)
    assert len(listing(tmp_path)) == 1
    files.write_tensors(tmp_path, "x", TENSORS | {"b": torch.zeros(4)})
    assert len(listing(tmp_path)) == 2


@pytest.mark.parametrize("kept", [0, 1, 7, 40, -1])
def test_a_truncated_file(tmp_path, kept):
    entry = files.write_tensors(tmp_path, "codes", TENSORS)
    path = tmp_path / entry["file"]
    kept = kept if kept >= 0 else entry["bytes"] - 1
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=rf"{entry['file']} is incomplete: it has {kept} bytes, the manifest says {entry['bytes']}"):
        files.read_tensors(tmp_path, entry)


def test_a_changed_byte(tmp_path):
    entry = files.write_tensors(tmp_path, "codes", TENSORS)
    path = tmp_path / entry["file"]
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match="sha256 differs"):
        files.read_tensors(tmp_path, entry)


LIES = {
    "a huge shape": header({"a": {"dtype": "F32", "shape": [2**40, 2**10], "data_offsets": [0, 24]}}, bytes(24)),
    "a shape that overflows": header({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 24]}}, bytes(24)),
    "overlapping offsets": header(
        {"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}, "b": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}},
        bytes(24),
    ),
    "offsets past the end": header({"a": {"dtype": "F32", "shape": [6], "data_offsets": [0, 2**50]}}, bytes(24)),
    "a header of 100 MB that is not there": struct.pack("<Q", 100 * 2**20) + b"{}",
    "a header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "no JSON": struct.pack("<Q", 8) + b"\xff" * 8,
    "an empty file": b"",
    "an unknown dtype": header({"a": {"dtype": "PICKLE", "shape": [6], "data_offsets": [0, 24]}}, bytes(24)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(tmp_path, lie):
    entry = rewritten(tmp_path, files.write_tensors(tmp_path, "codes", TENSORS), LIES[lie])
    with pytest.raises(CheckpointError, match=r"codes\..*\.safetensors is damaged"):
        files.read_tensors(tmp_path, entry)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": TENSORS["a"]}, r"missing tensors \['b'\], unexpected tensors \[\]"),
        (TENSORS | {"c": torch.ones(1)}, r"missing tensors \[\], unexpected tensors \['c'\]"),
        ({"a": TENSORS["a"], "c": torch.ones(1)}, r"missing tensors \['b'\], unexpected tensors \['c'\]"),
        (TENSORS | {"a": torch.ones(3, 2)}, r"'a' has shape \(3, 2\), the manifest says \(2, 3\)"),
    ],
    ids=["missing", "extra", "both", "shape"],
)
def test_other_tensors_than_expected(tmp_path, tensors, message):
    entry = files.write_tensors(tmp_path, "codes", tensors)
    with pytest.raises(CheckpointError, match=message):
        files.read_tensors(tmp_path, entry, SHAPES)


@pytest.mark.parametrize("entry", [None, [], "codes.safetensors", {}, {"file": "x"}, {"file": "x", "sha256": "", "bytes": 1, "code": "os"}])
def test_an_entry_that_is_none(tmp_path, entry):
    with pytest.raises(CheckpointError, match=r"has a file entry .*It needs file, sha256 and bytes"):
        files.read_tensors(tmp_path, entry)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pkl", ".npy", ".json"])
def test_nothing_but_safetensors_is_read(tmp_path, suffix):
    entry = files.write_tensors(tmp_path, "codes", TENSORS)
    (tmp_path / entry["file"]).rename(tmp_path / f"codes{suffix}")
    with pytest.raises(CheckpointError, match="not a safetensors file, and nothing else is read"):
        files.read_tensors(tmp_path, entry | {"file": f"codes{suffix}"})


# --- names ---

BAD_NAMES = ["../x", "/abs", "a/b", "..", ".", "", ".hidden", "a\0b", "a\nb", "-rf", "x" * 300, "ä", "a b", "\\x", "C:x", None, 3, ["x"]]


@pytest.mark.parametrize("name", BAD_NAMES, ids=repr)
def test_names_that_lead_elsewhere(tmp_path, name):
    (tmp_path / "x").write_text("outside")
    folder = tmp_path / "inside"
    folder.mkdir()
    with pytest.raises(CheckpointError, match=r"its manifest names .* do not use it"):
        files.resolve(folder, name)


def test_a_link_that_leads_outside(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "inside"
    outside.mkdir(), folder.mkdir()
    entry = files.write_tensors(outside, "codes", TENSORS)
    (folder / entry["file"]).symlink_to(outside / entry["file"])
    with pytest.raises(CheckpointError, match=r"is a link to .* outside the checkpoint"):
        files.read_tensors(folder, entry)
    (folder / "tokenizer.0").symlink_to(outside, target_is_directory=True)
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        files.resolve(folder, "tokenizer.0")


def test_a_link_inside_is_followed(tmp_path):
    entry = files.write_tensors(tmp_path, "codes", TENSORS)
    (tmp_path / "other.safetensors").symlink_to(entry["file"])
    assert files.read_tensors(tmp_path, entry | {"file": "other.safetensors"}).keys() == TENSORS.keys()


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match="x is missing, though the manifest names it"):
        files.resolve(tmp_path, "x")


# --- JSON ---


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands there twice"),
        ('{"a": NaN}', "NaN is no JSON value"),
        ('{"a": -Infinity}', "-Infinity is no JSON value"),
        ("[1, 2]", "holds a list, not an object"),
        ('"x"', "holds a str, not an object"),
        ('{"a": 1', "cannot be read as JSON .* incomplete or damaged"),
        ("", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
    ],
    ids=["twice", "nan", "infinity", "list", "string", "cut off", "empty", "deep", "no text"],
)
def test_json_that_is_not_taken(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=message) as raised:
        files.read_json(path)
    assert "x.json" in str(raised.value)


def test_no_json_at_all(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no x\.json\. Give a folder written by tl_codebook\.save"):
        files.read_json(tmp_path / "x.json")


def test_json_is_replaced_in_one_step(tmp_path):
    path = tmp_path / "x.json"
    files.replace_json(path, {"a": "ä"})
    assert files.read_json(path) == {"a": "ä"}
    files.replace_json(path, {"b": 2})
    assert files.read_json(path) == {"b": 2}
    with pytest.raises(ValueError, match="Out of range float"):
        files.replace_json(path, {"a": float("nan")})
    assert list(listing(tmp_path)) == ["x.json"]
    assert files.read_json(path) == {"b": 2}


# --- folders and faults of the disk ---


def test_a_folder_to_write_to(tmp_path):
    folder = files.check_writable(tmp_path / "a/b", overwrite=False)
    assert folder.is_dir()
    assert list(folder.iterdir()) == []
    files.check_writable(folder, overwrite=False)  # empty: fine
    (folder / "x").write_text("mine")
    with pytest.raises(CheckpointExistsError, match=r"exists and is not empty.*overwrite=True"):
        files.check_writable(folder, overwrite=False)
    with pytest.raises(FileExistsError):
        files.check_writable(folder, overwrite=False)
    files.check_writable(folder, overwrite=True)
    assert listing(folder) == {"x": b"mine"}


def test_a_folder_is_tried_without_creating_it(tmp_path, monkeypatch):
    assert files.check_writable(tmp_path / "a/b", overwrite=False, create=False) == tmp_path / "a/b"
    monkeypatch.chdir(tmp_path)
    files.check_writable("a/b", overwrite=False, create=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("mine")
    with pytest.raises(CheckpointExistsError, match="not empty"):
        files.check_writable(tmp_path / "x", overwrite=False, create=False)


@pytest.mark.parametrize("create", [True, False])
@pytest.mark.parametrize("below", [".", "deeper/still"])
def test_a_file_where_the_folder_should_be(tmp_path, below, create):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(CheckpointError, match=r"cannot be written to .*nothing was written"):
        files.check_writable(tmp_path / "x" / below, overwrite=True, create=create)
    assert listing(tmp_path) == {"x": b"mine"}


@pytest.mark.parametrize("create", [True, False])
@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "\ud800"])
def test_a_name_that_no_folder_can_have(tmp_path, monkeypatch, name, create):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot be written to .*Choose another"):
        files.check_writable(name, overwrite=True, create=create)
    assert list(tmp_path.iterdir()) == []


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.as_path("~/a") == tmp_path / "a"
    assert files.as_path(tmp_path / "~/a") == tmp_path / "~/a"
    for name in ("a\0b", "\ud800", "~nobody-of-this-name/x"):
        with pytest.raises(CheckpointError, match=r"is no name of a file or folder .*Choose another"):
            files.as_path(name)


def test_folders_made_for_what_fails_are_removed(tmp_path):
    (tmp_path / "a").mkdir()

    def fail(content):
        with files.made(tmp_path / "a/b/c"):
            for name in content:
                (tmp_path / "a/b" / name).write_text("of someone else")
            raise KeyboardInterrupt

    for content in ([], ["x"]):
        with pytest.raises(KeyboardInterrupt):
            fail(content)
        assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["a", *(["a/b", "a/b/x"] if content else [])]
    with files.made(tmp_path / "new/er"):
        pass
    assert (tmp_path / "new/er").is_dir()


def test_a_folder_that_cannot_be_written_to_is_not_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "touch", full_disk)
    with pytest.raises(CheckpointError, match="nothing was written"):
        files.check_writable(tmp_path / "a/b", overwrite=True)
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_file_system(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be written to \(Read-only file system\)"):
        files.check_writable(tmp_path, overwrite=True)


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["save_file", "os.fsync", "os.replace"])
def test_a_full_disk_while_tensors_are_written(tmp_path, monkeypatch, where):
    files.write_tensors(tmp_path, "codes", TENSORS)
    before = listing(tmp_path)

    def half(tensors, path, **kwargs):
        Path(path).write_bytes(bytes(100))
        full_disk()

    monkeypatch.setattr(f"tl_codebook.files.{where}", half if where == "save_file" else full_disk)
    with pytest.raises(CheckpointError, match=r"could not be written \(No space left on device\).*untouched"):
        files.write_tensors(tmp_path, "codes", {"a": torch.zeros(9)})
    assert listing(tmp_path) == before


def test_a_full_disk_as_safetensors_tells_it(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def fail(tensors, path, **kwargs):
        Path(path).write_bytes(bytes(100))
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("tl_codebook.files.save_file", fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        files.write_tensors(tmp_path, "codes", TENSORS)
    assert listing(tmp_path) == {}


def test_a_full_disk_while_a_folder_is_written(tmp_path):
    def half(path):
        (path / "one").write_text("x")
        full_disk()

    with pytest.raises(CheckpointError, match="No space left on device"):
        files.write_folder(tmp_path, "tokenizer", half)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_while_json_is_written(tmp_path, monkeypatch):
    files.replace_json(tmp_path / "x.json", {"a": 1})
    monkeypatch.setattr("tl_codebook.files.os.fsync", full_disk)
    with pytest.raises(CheckpointError, match="No space left on device"):
        files.replace_json(tmp_path / "x.json", {"a": 2})
    assert listing(tmp_path) == {"x.json": b'{\n  "a": 1\n}\n'}


def test_an_interrupt_leaves_no_temporary_files(tmp_path, monkeypatch):
    def interrupt(tensors, path, **kwargs):
        Path(path).write_bytes(bytes(100))
        raise KeyboardInterrupt

    monkeypatch.setattr("tl_codebook.files.save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_tensors(tmp_path, "codes", TENSORS)
    assert list(tmp_path.iterdir()) == []


def test_folders_are_named_after_their_content(tmp_path):
    def write(path):
        (path / "a").write_text("1")

    entry = files.write_folder(tmp_path, "tokenizer", write)
    assert entry == files.write_folder(tmp_path, "tokenizer", write)
    assert list(listing(tmp_path)) == [f"{entry['folder']}/a"]


def test_stale_files_are_removed_and_those_of_others_are_not(tmp_path):
    old, new = files.write_tensors(tmp_path, "codes", {"a": torch.zeros(2)}), files.write_tensors(tmp_path, "codes", TENSORS)
    folder = files.write_folder(tmp_path, "tokenizer", lambda path: (path / "a").write_text("1"))
    (tmp_path / "mine.txt").write_text("mine")
    outside = tmp_path.parent / "outside.txt"
    outside.write_text("keep")
    before = {"codes": old, "tokenizer": folder, "other": {"file": "../outside.txt"}, "sites": {"x": [1]}}
    files.remove_stale(tmp_path, before, {"codes": new})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([new["file"], "mine.txt"])
    assert outside.read_text() == "keep"


def test_a_mapped_file_is_safe_from_being_written_again(tmp_path):
    from safetensors import safe_open

    entry = files.write_tensors(tmp_path, "codes", TENSORS)
    with safe_open(tmp_path / entry["file"], framework="pt") as mapped:
        view = mapped.get_tensor("a")
        files.write_tensors(tmp_path, "codes", TENSORS)
        files.remove_stale(tmp_path, {"codes": entry}, {})
        assert torch.equal(view, TENSORS["a"])
        assert torch.equal(mapped.get_tensor("b"), TENSORS["b"])


def test_a_safetensors_file_of_someone_else_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    entry = {
        "file": "x.safetensors",
        "sha256": files._hash(tmp_path / "x.safetensors"),
        "bytes": (tmp_path / "x.safetensors").stat().st_size,
    }
    assert files.read_tensors(tmp_path, entry, SHAPES).keys() == TENSORS.keys()


def test_one_writer_at_a_time(tmp_path):
    import threading

    order, inside = [], threading.Event()

    def second():
        inside.wait()
        with files.one_writer(tmp_path):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with files.one_writer(tmp_path):
        inside.set()
        thread.join(timeout=0.3)
        assert thread.is_alive()
        order.append("first")
    thread.join(timeout=30)
    assert order == ["first", "second"]


# --- files that somebody names ---


def test_a_file_that_may_be_written(tmp_path):
    assert files.target_file(tmp_path / "a.csv", overwrite=False) == tmp_path / "a.csv"
    assert files.target_file(str(tmp_path / "new" / "a.csv"), overwrite=False).parent.is_dir()
    assert listing(tmp_path) == {}
    (tmp_path / "old.csv").write_text("old")
    assert files.target_file(tmp_path / "old.csv", overwrite=True) == tmp_path / "old.csv"
    assert listing(tmp_path) == {"old.csv": b"old"}


def test_files_that_may_not_be_written(tmp_path):
    (tmp_path / "old.csv").write_text("old")
    (tmp_path / "dangling.csv").symlink_to(tmp_path / "nowhere.csv")
    (tmp_path / "loop.csv").symlink_to(tmp_path / "loop.csv")
    for name in ("old.csv", "dangling.csv", "loop.csv"):
        with pytest.raises(CheckpointExistsError, match=rf"{name} exists\. Choose another name, or say overwrite=True"):
            files.target_file(tmp_path / name, overwrite=False)
        assert files.target_file(tmp_path / name, overwrite=True).name == name
    for path, message in [
        (tmp_path, "is a folder. Give the name of a file"),
        (tmp_path / ("x" * 300), "is no name of a file"),
        (tmp_path / "a\0b", "is no name of a file"),
        (tmp_path / "old.csv" / "a.csv", "cannot be written to"),
        ("~nobody-of-this-name/a.csv", "is no name of a file"),
    ]:
        for overwrite in (False, True):
            with pytest.raises(CheckpointError, match=message):
                files.target_file(path, overwrite)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling.csv", "loop.csv", "old.csv"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_file_in_a_folder_that_may_not_be_written(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="cannot be written to"):
        files.target_file(tmp_path / "closed" / "a.csv", overwrite=False)


def test_the_longest_name_can_be_written(tmp_path):
    path = tmp_path / ("é" * 127)  # 254 bytes
    files.replace_text(files.target_file(path, overwrite=False), "text")
    assert listing(tmp_path) == {path.name: b"text"}


def test_json_is_read_strictly(tmp_path):
    for text, message in [
        ('{"a": 1, "b": {"a": 2, "a": 3}}', r"x\.json: the key 'a' stands there twice\. Do this"),
        ("[NaN]", r"x\.json: NaN is no JSON value\. Do this"),
        ("[-Infinity]", "-Infinity is no JSON value"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            files.strict_json(text, "x.json", "Do this.")
    assert files.strict_json('[{"a": 1}, {"a": 1}, null]', "x.json", "") == [{"a": 1}, {"a": 1}, None]
    (tmp_path / "long.json").write_text('{"a": ' + "9" * 5000 + "}")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        files.read_json(tmp_path / "long.json")
    (tmp_path / "many.json").write_text(json.dumps(dict.fromkeys(map(str, range(50_000)))))
    assert len(files.read_json(tmp_path / "many.json")) == 50_000
