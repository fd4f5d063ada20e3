"""Writing files and folders completely or not at all, even if the disk fills up or the process is killed.

Content is written to a temporary folder, flushed to the disk (fsync), and then moved into its place. The earlier
content stays until then, and is restored if a move fails.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:
    fcntl = None

DISKS_OWN = "lost+found"  # a folder of the file system's own, at the root of an ext4 disk
PARTIAL = ".partial"


def write(path: Path, content: str | bytes) -> None:
    """Write one file, completely or not at all.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> write(folder / "labels.json", "{}")
    >>> [path.name for path in folder.iterdir()]
    ['labels.json']
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(path.parent)


@contextlib.contextmanager
def replacing(
    folder: Path, *, overwrite: bool, what: str = "", ours: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """Yield a temporary folder to write into, which replaces `folder` when the block ends without an error.

    The temporary folder is a sibling of `folder`, or is inside it if `folder` is a mounted disk, which can't be
    renamed. If anything fails, the earlier content stays complete: in its place, or, if even moving it back fails,
    beside it under a name that ends in `-old`.

    Args:
        folder: The folder, which is created with its parents.
        overwrite: Whether to replace the earlier content.
        what: As for `check_free`.
        ours: As for `check_free`.

    Raises:
        FileExistsError: As `check_free`.
    """
    check_free(folder, overwrite=overwrite, what=what, ours=ours)
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    mounted = _is_mounted(folder)
    with _temporary(folder if mounted else folder.parent, folder.name) as temporary:
        old = temporary.with_name(temporary.name + "-old")
        try:
            yield temporary
            _sync_all(temporary)
            (_replace_contents if mounted else _replace_folder)(folder, temporary, old)
        except BaseException as error:
            with contextlib.suppress(OSError):  # it is empty if everything was moved back
                old.rmdir()
            if old.exists():
                raise OSError(
                    f"{folder}: can't be replaced or restored ({error}); its earlier content is in {old}"
                ) from error
            raise
    gone = old.with_name(old.name.removesuffix("-old") + "-gone")
    with contextlib.suppress(OSError):
        old.rename(gone)  # a folder with the name -old must be complete, so it is renamed before it is removed
    shutil.rmtree(gone if gone.exists() else old, ignore_errors=True)


@contextlib.contextmanager
def placing(folder: Path, *, remove: Collection[str] = (), last: Collection[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder, whose files are moved into `folder` when the block ends without an error.

    Args:
        folder: The folder, which is created if it doesn't exist. Its other files stay.
        remove: Files of `folder` to remove, unless there are new ones with their names.
        last: Files to move after all others, because readers take their presence as a sign that all are there.
    """
    # Inside an existing folder, not beside it: it may be a mounted disk, and files can be moved within one disk only.
    home = folder if folder.exists() else folder.parent
    home.mkdir(parents=True, exist_ok=True)
    with _temporary(home, folder.name) as temporary:
        yield temporary
        _sync_all(temporary)
        if folder.exists():
            _place_all(temporary, folder, remove, last)
        else:
            temporary.rename(folder)
            _sync_folder(folder.parent)


def check_free(folder: Path, *, overwrite: bool, what: str = "", ours: Callable[[Path], bool] | None = None) -> None:
    """Refuse a folder that can't be written, or whose files would be lost, before anything is computed for it.

    Args:
        folder: The folder, which need not exist.
        overwrite: Whether its content may be replaced.
        what: The name of the things that are written there, for the message: "a report".
        ours: Whether an entry of the folder is part of such a thing; None if everything may be replaced.

    Raises:
        FileExistsError: It is a file or the current folder, or it isn't empty and `overwrite` isn't set, or it has
            files that `ours` doesn't accept.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: a file, expected a folder")
    held = sorted(path for path in folder.iterdir() if path.name != DISKS_OWN) if folder.is_dir() else []
    if held and not overwrite:
        raise FileExistsError(f"{folder}: exists and isn't empty; choose another folder or overwrite it")
    for path in held:
        if ours is not None and not ours(path):
            raise FileExistsError(
                f"{folder}: has {path.name}, which is no part of {what} and would be lost; choose another folder"
            )
    if folder.resolve() in (here := Path.cwd(), *here.parents):
        raise FileExistsError(
            f"{folder}: the current folder can't be replaced; choose another folder, for example in it"
        )


@contextlib.contextmanager
def _temporary(home: Path, name: str) -> Iterator[Path]:
    """Yield a new folder in `home`, removed at the end if it still exists; remove folders of killed processes."""
    for stale in home.glob(f".{name}.*{PARTIAL}"):
        if stale.is_dir() and (descriptor := _lock(stale)) is not None:
            shutil.rmtree(stale, ignore_errors=True)
            os.close(descriptor)
    temporary = home / f".{name}.{secrets.token_hex(4)}{PARTIAL}"
    temporary.mkdir()
    descriptor = _lock(temporary)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """Lock a folder and return its descriptor; None if another process has locked it, or if there are no locks."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def sync(path: Path) -> None:
    """Flush a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)


def _sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, if the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_mounted(folder: Path) -> bool:
    """Return whether a folder is a mount point; Linux lists bind mounts, which look like ordinary folders otherwise."""
    listed = Path("/proc/self/mountinfo")
    mounts = [line.split()[4] for line in listed.read_text().splitlines()] if listed.exists() else []
    return folder.is_mount() or str(folder).replace(" ", r"\040") in mounts


def _replace_folder(folder: Path, new: Path, old: Path) -> None:
    try:
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    _sync_folder(folder.parent)


def _replace_contents(folder: Path, new: Path, old: Path) -> None:
    """Move the content of `folder` to `old` and the content of `new` to `folder`, which both are in it; or nothing."""
    old.mkdir()
    before = [path for path in folder.iterdir() if path not in (new, old) and path.name != DISKS_OWN]
    with contextlib.ExitStack() as undo:
        for path in before:
            path.rename(old / path.name)
            undo.callback((old / path.name).rename, path)
        for path in list(new.iterdir()):
            path.rename(folder / path.name)
            undo.callback((folder / path.name).rename, path)
        undo.pop_all()
    _sync_folder(folder)


def _place_all(new: Path, folder: Path, remove: Collection[str], last: Collection[str]) -> None:
    """Move each file of `new` over its predecessor in `folder`; if one move fails, restore the predecessors."""
    names = [str(path.relative_to(new)) for path in sorted(new.rglob("*")) if path.is_file()]
    names += [name for name in remove if name not in names]
    names.sort(key=lambda name: name in last)
    with contextlib.ExitStack() as undo:
        for name in names:
            if (folder / name).exists():
                before = new / f"{name}.before"
                before.parent.mkdir(exist_ok=True)
                os.replace(folder / name, before)
                undo.callback(os.replace, before, folder / name)
            else:
                undo.callback((folder / name).unlink, missing_ok=True)
            if (new / name).exists():
                (folder / name).parent.mkdir(exist_ok=True)
                os.replace(new / name, folder / name)
        undo.pop_all()
    for emptied in {(folder / name).parent for name in names} - {folder}:
        with contextlib.suppress(OSError):  # it isn't empty, or never existed
            emptied.rmdir()
    _sync_folder(folder)
