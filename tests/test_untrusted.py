"""What is asked of a file before it is opened."""

import os
import socket

import pytest

from lora_jax._untrusted import git_lfs_pointer, not_a_file

VERSION = "version https://git-lfs.github.com/spec/v1\n"
OID, SIZE = f"oid sha256:{'0a' * 32}\n", "size 132\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (VERSION + OID + SIZE, "pointer to 132 bytes"),
        ((VERSION + OID + SIZE).replace("\n", "\r\n"), "pointer to 132 bytes"),
        (VERSION + "ext-0-foo sha256:" + "1" * 64 + "\n" + OID + SIZE, "pointer to 132 bytes"),
        ("version https://hawser.github.com/spec/v1\n" + OID + SIZE, "pointer to 132 bytes"),
        (VERSION + OID, "pointer to a file"),
    ],
)
def test_pointers(tmp_path, content, words):
    (tmp_path / "f").write_bytes(content.encode())
    said = git_lfs_pointer(tmp_path / "f")
    assert said.startswith("a Git LFS ")
    assert words in said
    assert len(said) < 150


@pytest.mark.parametrize("content", ["", "version", VERSION, "{}", VERSION + "x" * 2000 + OID, OID + SIZE])
def test_other_files_are_none(tmp_path, content):
    (tmp_path / "f").write_text(content)
    assert git_lfs_pointer(tmp_path / "f") == ""


def test_what_is_no_file_is_named_and_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        kinds = {name: not_a_file(tmp_path / name) for name in ("pipe", ".", "socket", "link", "file")}
    assert kinds == {"pipe": "a pipe", ".": "a folder", "socket": "a socket", "link": "", "file": ""}
    assert not_a_file(tmp_path / "/dev/zero") == "a device"
    assert all(git_lfs_pointer(tmp_path / name) == "" for name in (*kinds, "loop", "nowhere"))
    with pytest.raises(OSError, match="loop"):
        not_a_file(tmp_path / "loop")
