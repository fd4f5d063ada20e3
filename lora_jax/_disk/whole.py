"""Files and folders that appear whole or not at all, whatever happens meanwhile: no space left, an error, a kill.

What is written goes to a temporary folder first, is brought to the disk (fsync), and is then moved into its place.
What was there before stays until then, and comes back should a move fail.
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

DISKS_OWN = "lost+found"  # which an ext4 disk has at its top
PARTIAL = ".partial"


def write(path: Path, content: str | bytes) -> None:
    """Writes one file, whole or not at all.

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
    """A temporary folder to write into, which takes `folder`'s place when the block ends without an error.

    It is a sibling, or inside where `folder` is a mounted disk: that can't be renamed, but what it holds can.
    What was there is whole whatever goes wrong: in its place, or where even putting it back fails, beside it under a
    name that ends in `-old`.

    Args:
      folder: Made, with its parents.
      overwrite: Replace what is there.
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
            with contextlib.suppress(OSError):  # it is empty if all was put back
                old.rmdir()
            if old.exists():
                raise OSError(
                    f"{folder}: couldn't be replaced, nor put back ({error}): what it held is in {old}"
                ) from error
            raise
    gone = old.with_name(old.name.removesuffix("-old") + "-gone")
    with contextlib.suppress(OSError):
        old.rename(gone)  # one that is called old is whole
    shutil.rmtree(gone if gone.exists() else old, ignore_errors=True)


@contextlib.contextmanager
def placing(folder: Path, *, remove: Collection[str] = ()) -> Iterator[Path]:
    """A temporary folder, whose files take their places in `folder` when the block ends without an error.

    Args:
      folder: Made where it isn't there. What else it holds is kept.
      remove: Files of `folder` that go, unless there are new ones of their names.
    """
    # In a folder that is there, not beside it: it may be a mounted disk, and files are moved within one disk only.
    home = folder if folder.exists() else folder.parent
    home.mkdir(parents=True, exist_ok=True)
    with _temporary(home, folder.name) as temporary:
        yield temporary
        _sync_all(temporary)
        if folder.exists():
            _place_all(temporary, folder, remove)
        else:
            temporary.rename(folder)
            _sync_folder(folder.parent)


def check_free(folder: Path, *, overwrite: bool, what: str = "", ours: Callable[[Path], bool] | None = None) -> None:
    """Refuses a folder that can't be written to, or that would lose something, before anything is computed for it.

    Args:
      folder: May be missing.
      overwrite: Whether what it holds is to be replaced.
      what: What is written there, for the message: "a report".
      ours: Whether an entry of it is of such a thing; None where all that is there may be lost.

    Raises:
      FileExistsError: A file; not empty, and `overwrite` isn't set; holds what isn't ours; the current folder.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: a file, expected a folder to write")
    held = sorted(path for path in folder.iterdir() if path.name != DISKS_OWN) if folder.is_dir() else []
    if held and not overwrite:
        raise FileExistsError(f"{folder}: already there and not empty; choose another folder or ask to overwrite it")
    for path in held:
        if ours is not None and not ours(path):
            raise FileExistsError(
                f"{folder}: holds {path.name}, which is not of {what} and would be lost; choose another folder"
            )
    if folder.resolve() in (here := Path.cwd(), *here.parents):
        raise FileExistsError(f"{folder}: the current folder can't be replaced; choose another, also within it")


@contextlib.contextmanager
def _temporary(home: Path, name: str) -> Iterator[Path]:
    """A new folder in `home`, removed at the end if it is still there; those of killed processes are removed too."""
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
    """A descriptor that holds the folder; None where another process does, or where there are no locks."""
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
    """Brings a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            sync(path)


def _sync_folder(folder: Path) -> None:
    """Brings names to the disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _is_mounted(folder: Path) -> bool:
    """Whether a disk begins here. One bound from elsewhere on the same disk looks like any folder: Linux lists it."""
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
    """Moves what `folder` holds to `old` and what `new` holds to `folder`, all of it within that folder; or nothing."""
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


def _place_all(new: Path, folder: Path, remove: Collection[str]) -> None:
    """Moves each file over its predecessor; should one move fail, the predecessors of the others come back."""
    names = [str(path.relative_to(new)) for path in sorted(new.rglob("*")) if path.is_file()]
    names += [name for name in remove if name not in names]
    with contextlib.ExitStack() as undo:
        for name in names:
            if (folder / name).exists():
                kept = new / f"{name}.before"
                kept.parent.mkdir(exist_ok=True)
                os.replace(folder / name, kept)
                undo.callback(os.replace, kept, folder / name)
            else:
                undo.callback((folder / name).unlink, missing_ok=True)
            if (new / name).exists():
                (folder / name).parent.mkdir(exist_ok=True)
                os.replace(new / name, folder / name)
        undo.pop_all()
    for emptied in {(folder / name).parent for name in names} - {folder}:
        with contextlib.suppress(OSError):  # it isn't empty, or was never there
            emptied.rmdir()
    _sync_folder(folder)
