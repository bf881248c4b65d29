"""Files: a half-written one is never taken for a whole one, and the user's are never touched.

Everything the package writes goes through `replacing`. Results go into an `OutputFolder`, which
lists what was written there, so that nothing else is ever replaced or removed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import psutil
from filelock import FileLock, Timeout
from PIL import Image

if TYPE_CHECKING:  # torch takes a second to load, and the smallest commands need none
    from torch import Tensor

HIDDEN = ".xmask"  # folder within an output folder: its record, its lock, notes of commands
_RECORD = {"record of": "xmask", "version": 1}  # first line of .xmask/record.jsonl
_NOBODYS = {HIDDEN, ".ds_store", "thumbs.db", "desktop.ini"}  # a folder with only these is empty
_PATIENCE = 60.0  # seconds to wait for what takes others a moment
_ABANDONED = 3600.0  # seconds after which a half-written file is nobody's, whoever wrote it
_NEEDED = 64 << 20  # bytes: with less disk space than that, no work is begun
_NO_LOCKS = errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP  # what network folders may answer
_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"  # whose numbers of processes are meant
_log = logging.getLogger("xmask")


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path`; rename it to `path` on success, remove it on error.

    The content is on the disk before the name is. The temporary name keeps the suffix of `path`,
    because writers such as Pillow read the format from it, and starts with a dot, so that no
    reader lists it. Within an open `OutputFolder` it lies in the hidden part, and the file is
    noted in its record first.
    Raises FileExistsError where `path` is a file of the user in such a folder; an OSError
    always names `path`.
    """
    path = Path(path)
    folder = OutputFolder.around(path)
    if folder:
        folder.make_way(path)
    name = f".partial-{_HOST}-{os.getpid()}-{secrets.token_hex(4)}{path.suffix}"
    temporary = (folder.path / HIDDEN if folder else path.parent) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # opened so, and not by tempfile, the file gets the permissions that the umask asks for
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if folder:
            folder.note(path, sha256(temporary))
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        if error.filename not in (None, str(temporary), temporary):
            raise  # it names another file
        if error.errno is None:
            raise OSError(f"{path}: {error}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):  # a disk that cannot be written to: the first error says so
            temporary.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Put the names in a folder on the disk; Windows cannot, and needs it less."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError:  # some network file systems refuse it
            pass
        finally:
            os.close(handle)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 text file in one move: a reader sees the old one or the whole new one."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def write_json(path: str | os.PathLike, value: object) -> None:
    """Write JSON; NaN and infinities are refused, because JSON has no such numbers."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike) -> dict:
    """The object in a JSON file; ValueError, naming the file, if it holds none."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested without end
        raise ValueError(
            f"{path}: not valid JSON ({str(error)[:100]}). Delete it and run the step again."
        ) from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}. Delete it "
                         "and run the step again.")
    return value


def write_png(path: str | os.PathLike, array: np.ndarray) -> None:
    """Write a uint8 (H, W, 3) picture, or a uint8/uint16 (H, W) map, as PNG."""
    if array.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"{path}: a PNG holds uint8 or uint16 values, not {array.dtype}")
    with replacing(path) as temporary:
        Image.fromarray(array).save(temporary, format="PNG")


def write_safetensors(path: str | os.PathLike, tensors: dict[str, Tensor],
                      metadata: dict[str, str]) -> None:
    """Write tensors, of any shape () to (N, ...) and device, with metadata: the same ones give the
    same bytes.

    (safetensors itself writes metadata in an order of chance, so that every copy of a model had
    a checksum of its own.)
    """
    from safetensors.torch import save
    content = save({name: one.contiguous().cpu() for name, one in tensors.items()}, metadata)
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text = text.ljust(-8 * (-len(text) // 8))  # the numbers begin at a multiple of 8 bytes
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(memoryview(content)[end:])


def sha256(path: str | os.PathLike) -> str:
    """Checksum of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_plain(name: object) -> bool:
    """Whether `name` is the name of a file and no path: it cannot lead out of its folder."""
    return (isinstance(name, str) and name not in ("", ".", "..")
            and not re.search(r"[/\0]" if os.name == "posix" else r"[/\\\0:]", name))


def check_new(path: str | os.PathLike, overwrite: bool, suffix: str = "") -> None:
    """Raises FileExistsError where a result would replace a file that is there, unless wanted, or
    one without the suffix of such a result."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; give the name of a file (--out)")
    if os.path.lexists(path) and not overwrite:  # a link to a disk that is away, too
        raise FileExistsError(f"{path}: is there already, and nothing was written. Give another "
                              "name (--out), or --overwrite to replace it")
    if path.exists() and suffix and path.suffix.lower() != suffix:
        raise FileExistsError(f"{path}: is no {suffix} file, as this command writes, and stays as "
                              "it is. Give another name (--out)")
    _check_space(path.parent)


def _check_space(folder: Path) -> None:
    """Raises OSError where the disk that will hold `folder` is full."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    try:
        space = shutil.disk_usage(there)
    except OSError:
        return
    if space.total and space.free < _NEEDED:
        raise OSError(errno.ENOSPC, f"{space.free >> 20} MB of disk space left, and results need "
                      f"at least {_NEEDED >> 20}", str(folder))


# -- output folders --------------------------------------------------------------------------


class FolderInUse(ValueError):
    """Another process is writing into the folder."""


@contextmanager
def lock(folder: str | os.PathLike, wait: float = 0.0) -> Iterator[None]:
    """Hold a folder, made if need be, as the only process; it is free again when the process
    ends, however it ends.

    wait: seconds to wait for another process.
    Raises FolderInUse, saying who holds the folder, if another one still does.
    """
    place = Path(folder) / HIDDEN
    place.mkdir(parents=True, exist_ok=True)
    holder = place / "holder.json"

    def in_use() -> str:
        try:
            who = read_json(holder)
        except (OSError, ValueError):  # it has only just begun, or just ended
            who = {}
        return (f"{folder}: another process works in it (pid {who.get('pid', '?')} on "
                f"{who.get('host', '?')}, since {who.get('since', '?')}). Wait for it or end it, "
                "then run the same command again")

    with _held(place / "lock", wait, in_use):
        try:
            write_json(holder, {"pid": os.getpid(), "host": socket.gethostname(),
                                "since": time.strftime("%Y-%m-%d %H:%M:%S")})
            yield
        finally:
            holder.unlink(missing_ok=True)


@contextmanager
def _held(path: Path, wait: float, message: str | Callable[[], str] = "") -> Iterator[None]:
    """Hold a file as the only process; FolderInUse if another one does after `wait` seconds."""
    held = FileLock(path)
    try:
        held.acquire(timeout=wait)
    except Timeout:
        said = message() if callable(message) else message
        raise FolderInUse(said or f"{path}: held by another process for {wait:.0f} s") from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        yield  # a file system without locks
        return
    try:
        yield
    finally:
        held.release()


class OutputFolder:
    """A folder for results: new, empty, or one that carries the record of what we wrote there.

    `with OutputFolder(path):` makes it, locks it (see `lock`), and from then on all that
    `replacing` writes into it is listed in `.xmask/record.jsonl` with its SHA-256. A file that
    the record does not list is the user's and stays as it is; one that it lists, but with another
    content, was edited or damaged, and is set aside under a new name before it is made again.
    A name has every checksum it ever had, because a process may be killed after it noted a new
    content and before it renamed the file. Entering it again within it is fine.

    overwrite: write beside the user's files, and replace those whose names are needed.
    cloned: the files in it may have come with a clone, which carries no record. One in the way of
    a result that says the same is ours from then on; any other one is set aside.
    kept: files that are not replaced even so, under whatever name, because the command reads them.
    shard: "2/5" for the second of five processes that fill a folder together, each with images of
    its own. What is not theirs alone, such as a manifest, they write within `alone`.
    wait: seconds to wait for another process that is writing there.
    Raises, before anything is written: NotADirectoryError for a file, FileExistsError for a
    folder with other files and no record, ValueError for a damaged record, OSError where nothing
    can be written or the disk is full, FolderInUse where another process is writing.
    """

    _open: dict[Path, OutputFolder] = {}

    def __init__(self, path: str | os.PathLike, *, overwrite: bool = False, cloned: bool = False,
                 kept: Iterable[Path] = (), shard: str = "", wait: float = 0.0) -> None:
        self.path, self.overwrite, self.cloned, self.wait = Path(path), overwrite, cloned, wait
        self.shard, self.kept = shard, {_identity(one): one for one in kept}
        self._stack, self._key, self._made = ExitStack(), self.path.resolve(), False
        self._known: dict[str, set[str]] = {}

    @classmethod
    def around(cls, path: Path) -> OutputFolder | None:
        """The innermost open folder that `path` lies in, or in a folder of it; None for its hidden
        part."""
        if not cls._open:
            return None
        for parent in path.absolute().parents[:2]:  # what a record lists, see `read_record`
            if parent.name == HIDDEN:
                return None
            if found := cls._open.get(parent) or cls._open.get(parent.resolve()):
                return found
        return None

    def __enter__(self) -> OutputFolder:
        if self._key in self._open:
            outer = self._open[self._key]
            outer._known = read_record(self.path)
            return outer
        self.check()
        self._made = not self.path.exists()
        hidden = self.path / HIDDEN
        hidden.mkdir(parents=True, exist_ok=True)
        with ExitStack() as whole:
            whole.enter_context(lock(self.path, _PATIENCE if self.shard else self.wait))
            own = self.shard.replace("/", "-of-")
            # shards of as many are apart; a whole call, and shards of another number, are not
            shards = [one.name.removeprefix("shard-") for one in hidden.glob("shard-*")]
            if own:
                shards = [one for one in shards if one.split("-")[-1] != own.split("-")[-1]] + [own]
            for shard in shards:
                held = whole.enter_context(ExitStack())
                held.enter_context(_held(
                    hidden / f"shard-{shard}", self.wait, f"{self.path}: another process fills it "
                    f"as shard {shard}. Wait for it or end it, then run the same command again"))
            with _held(hidden / "record.lock", _PATIENCE):
                read_record(self.path)  # whether it is one, before it is changed
                _begin_record(self.path)
            for place in hidden.glob("**/"):
                _remove_abandoned(place)
            self._stack = held.pop_all() if self.shard else whole.pop_all()
        return self.join()

    def join(self) -> OutputFolder:
        """Take part in the work of the process that has entered the folder, for its workers."""
        self._known = read_record(self.path)
        self._open[self._key] = self
        return self

    def __exit__(self, *_: object) -> None:
        if self._open.get(self._key) is not self:
            return  # entered within itself
        del self._open[self._key]
        with self._stack, suppress(OSError):  # another process may make the folder anew meanwhile
            if self._made and not self.shard and all(map(_is_nobodys, self.path.iterdir())):
                hidden = self.path / HIDDEN
                for one in sorted(hidden.iterdir(), key=lambda one: one.name == "lock"):
                    shutil.rmtree(one) if one.is_dir() else one.unlink()  # the lock goes last
                hidden.rmdir()
                self.path.rmdir()

    def check(self) -> None:
        """Raises, writing nothing, where results cannot go into this folder."""
        if os.path.lexists(self.path) and not self.path.is_dir():
            what = "is a file" if self.path.exists() else "is a link that leads nowhere"
            raise NotADirectoryError(f"{self.path}: {what}; results need a folder, give the name "
                                     "of one (--out)")
        _check_space(self.path)
        if not self.path.is_dir():
            return
        hidden = self.path / HIDDEN
        for path in (hidden, *hidden.rglob("*")):
            if path.is_symlink():
                raise ValueError(f"{path}: is a link, and xmask makes none there, so what it leads "
                                 "to stays as it is. Give a new or empty folder (--out)")
        others = sorted(one.name for one in self.path.iterdir() if not _is_nobodys(one))
        if others and not (self.overwrite or self.cloned) and not _record(self.path).is_file():
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            raise FileExistsError(
                f"{self.path}: holds {others[0]}{more} and no record of xmask, so these are not "
                "its results, and nothing was written. Give a new or empty folder (--out), or "
                "--overwrite to write beside them and replace files of the same names")

    def make_way(self, path: Path) -> None:
        """Let `path` be written: raises FileExistsError if the user's file is there."""
        if self.cloned or not os.path.lexists(path):
            return
        self._check_kept(path)
        if self.is_intact(path):
            return
        self._known = read_record(self.path)  # another process may have written it since
        if self.is_intact(path):
            return
        if self.is_listed(path):
            self.set_aside(path)
        elif not self.overwrite:
            raise FileExistsError(
                f"{path}: was not written by xmask, and stays as it is. Move or rename it, give "
                "another folder (--out), or --overwrite to replace it")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For a moment be the only process that writes here, and know what the others wrote.

        Raises FolderInUse after a minute.
        """
        if not self.shard:
            yield
            return
        with lock(self.path, _PATIENCE):
            self._known = read_record(self.path)
            yield

    def note(self, path: Path, checksum: str) -> None:
        """Put a file that is about to get its name on record."""
        name = self._name(path)
        if not all(map(is_plain, name.split("/"))):
            raise ValueError(f"{path}: leads out of {self.path}")
        if self.cloned and os.path.lexists(path) and not self.is_intact(path) and (
                not path.is_file() or sha256(path) != checksum):
            self.set_aside(path, "not as xmask wrote it here")
        if checksum in self._known.get(name, ()):
            return
        line = json.dumps({"file": name, "sha256": checksum}) + "\n"
        with _held(self.path / HIDDEN / "record.lock", _PATIENCE):  # workers append to it, too
            with open(_record(self.path), "rb+") as file:
                _cut_half_a_line(file)
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())
        self._known.setdefault(name, set()).add(checksum)

    def is_listed(self, path: Path) -> bool:
        """Whether a file of this name was written by us."""
        return self._name(path) in self._known

    def is_intact(self, path: Path) -> bool:
        """Whether a file is there and as we wrote it."""
        return (self.is_listed(path) and path.is_file()
                and sha256(path) in self._known[self._name(path)])

    def remove(self, path: Path) -> None:
        """Remove a file as we wrote it; set it aside if it was changed; leave the user's alone."""
        self._check_kept(path)
        if self.is_intact(path):
            path.unlink()
        elif self.is_listed(path) and os.path.lexists(path):
            self.set_aside(path)

    def keep_earlier(self, *names: str) -> None:
        """Move results that are about to be made anew into a new folder, `earlier-1`, and say so.

        Ours are copied there before the first one is removed, in the order of `names`: whenever
        the process is killed, they are whole in one of the two. Others go with them.
        """
        there = [path for path in map(self.path.joinpath, names) if os.path.lexists(path)]
        ours, number = list(filter(self.is_intact, there)), 1
        while os.path.lexists(aside := self.path / f"earlier-{number}"):
            number += 1
        aside.mkdir()
        for path in ours:
            with replacing(aside / path.name) as temporary:
                shutil.copyfile(path, temporary)
        for path in there:
            path.unlink() if path in ours else os.rename(path, aside / path.name)
        _log.warning("%s: what was there is kept in %s, and made anew", self.path, aside.name)

    def remove_earlier(self) -> None:
        """Remove what `keep_earlier` has kept, now that the new results are there; a folder with
        anything that we did not write stays."""
        for aside in self.path.glob("earlier-*"):
            found = [] if aside.is_symlink() or not aside.is_dir() else list(aside.iterdir())
            if found and all(map(self.is_intact, found)):
                for path in found:
                    self.remove(path)
                aside.rmdir()

    def _check_kept(self, path: Path) -> None:
        found = _identity(path)
        if found in self.kept and found and found == _identity(self.kept[found]):
            raise FileExistsError(f"{path}: is read by this command, and stays as it is. Give "
                                  "another folder (--out)")

    def names(self) -> list[str]:
        """What was ever written, relative to the folder, in the order of first writing."""
        return list(self._known)

    def _name(self, path: Path) -> str:
        path = Path(path)
        for base in (self.path, self.path.absolute(), self._key):
            if path.is_relative_to(base):
                return path.relative_to(base).as_posix()
        return (path.parent.resolve() / path.name).relative_to(self._key).as_posix()

    def set_aside(self, path: Path, why: str = "changed since xmask wrote it") -> None:
        """Give a file another name, which is free, and say so; FileExistsError if the command reads
        it."""
        self._check_kept(path)
        number = 1
        while os.path.lexists(aside := path.with_name(f"{path.name}.set-aside-{number}")):
            number += 1
        os.rename(path, aside)
        _log.warning("%s: %s; set aside as %s", path, why, aside.name)


def read_record(folder: str | os.PathLike) -> dict[str, set[str]]:
    """What this package wrote into a folder: name -> checksums; {} for a folder without record.

    Raises ValueError, naming file and line, for a record that is none or whose names lead out
    of the folder.
    """
    path = _record(Path(folder))
    if not path.is_file():
        return {}
    content = path.read_bytes()
    lines = content.split(b"\n")[:-1]  # the last one is empty, or was cut off by a kill
    if content and not lines:
        lines = [content]  # the first one never is
    known: dict[str, set[str]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if number == 1 and entry == _RECORD:
                continue
            name, checksum = entry["file"], entry["sha256"]
            good = (number > 1 and all(map(is_plain, name.split("/"))) and name.count("/") <= 1
                    and re.fullmatch("[0-9a-f]{64}", checksum))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            good = False
        if not good:
            raise ValueError(f"{path}, line {number}: not a record of xmask, so nobody knows which "
                             "files are its own. Give a new or empty folder (--out)")
        known.setdefault(name, set()).add(checksum)
    return known


def without_ours(paths: Iterable[Path]) -> list[Path]:
    """The paths, sorted, without files that this package wrote; one that it wrote and somebody
    changed is left out, too, and named."""
    read = cache(read_record)
    left = []
    for path in sorted(paths):
        beside, above = path.absolute().parents[0], path.absolute().parents[:2][-1]
        known = read(beside).get(path.name) or read(above).get(f"{beside.name}/{path.name}")
        if known is None:
            left.append(path)
        elif path.is_file() and sha256(path) not in known:
            _log.warning("%s: left out, because it has the name of a result of xmask, and was "
                         "changed since. Rename it if it is a file of yours", path)
    return left


def _record(folder: Path) -> Path:
    return folder / HIDDEN / "record.jsonl"


def _begin_record(folder: Path) -> None:
    """Make the record if there is none; cut off a last line that a kill left incomplete."""
    path = _record(folder)
    if not path.is_file() or not path.stat().st_size:
        write_text(path, json.dumps(_RECORD) + "\n")
    with open(path, "rb+") as file:
        _cut_half_a_line(file)


def _cut_half_a_line(file: BinaryIO) -> None:
    """Go to the end of an open record, without what a process left that was killed over it."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - 1))
    if file.read(1) != b"\n":
        file.seek(0)
        end = file.read().rfind(b"\n") + 1
        file.truncate(end)
    file.seek(end)


def _remove_abandoned(folder: Path) -> None:
    """Half-written files of processes that were killed; a worker of theirs may live a little."""
    for half in folder.glob(".partial-*"):
        writer = re.match(rf"\.partial-{_HOST}-(\d{{1,9}})-", half.name)
        try:
            if (time.time() - half.stat().st_mtime > _ABANDONED
                    or (writer and not psutil.pid_exists(int(writer[1])))):
                half.unlink()
        except FileNotFoundError:  # its process has just finished it
            continue


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file this is, whatever it is called; None if it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _is_nobodys(path: Path) -> bool:
    return path.name.lower() in _NOBODYS
