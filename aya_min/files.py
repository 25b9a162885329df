"""Plain files, without torch: strict JSON, the files of a folder, whole and exclusive writing, SHA-256.

What this program makes only to remove it again stands in a folder that carries a mark: the host, the process,
and what it is for. Nothing without such a mark is removed, and no finished file replaces one that is there.

Importing torch takes one core some seconds. merge.py reads its settings and begins to hash the models before.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import socket
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

# Bytes read at a time. Each read and each hash takes Python's lock once: long ones seldom wait for it.
CHUNK = 1 << 22
MARK = ".aya_min"           # the name of the mark


# ---- JSON --------------------------------------------------------------------------------------------------

def unique(items):
    made = dict(items)
    if len(made) < len(items):
        keys = [key for key, _ in items]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:40]!r} stands twice in one object; keep one")
    return made


def finite(text):
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is beyond the range of a number")
    return value


def no_constant(name):
    raise ValueError(f"{name} is no JSON")


DECODER = json.JSONDecoder(object_pairs_hook=unique, parse_float=finite, parse_constant=no_constant)
BAD = re.compile(rb"\\u(?:[dD][89a-fA-F]|0000)")      # what may be half a surrogate pair, or a NUL


def parse_json(data, where, remedy=None):
    """The JSON value of bytes, checked as a whole. ValueError names `where` and the key of the first fault.

    Refused: what is not UTF-8 or not JSON (NaN, 1e999, numbers of thousands of digits, a thousand levels), a
    key that an object has twice, and texts that cannot be written again as they came (half of a surrogate
    pair, a NUL). A byte-order mark is taken off. remedy: what to do where it is not JSON.
    """
    try:
        value = DECODER.decode(data.decode("utf-8-sig"))
        fault = bad_text(value) if BAD.search(data) else None       # no other spelling passes UTF-8 and JSON
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte {error.start}); convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        remedy = f"; {remedy}" if remedy else ""
        raise ValueError(f"{where}: {in_key(data)}not JSON ({error}){remedy}") from None
    if fault:
        raise ValueError(f"{where}: {fault}; remove it")
    return value


def in_key(data):
    """Which key of a JSON value holds a number that is not finite, in words; "" if none does."""
    try:
        for key, value in leaves(json.loads(data)):
            if isinstance(value, float) and not math.isfinite(value):
                return f"{key} is no finite number: "
    except (ValueError, RecursionError):
        pass
    return ""


def bad_text(value, key=""):
    """Which text of a JSON value holds half of a surrogate pair or a NUL, in words; None if none does. key:
    what the value is called."""
    for place, text in leaves(value, key):
        if isinstance(text, str):
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                return f"{place} holds half a surrogate pair, which is not text"
            if "\0" in text:
                return f"{place} holds a NUL character"
    return None


def leaves(value, key=""):
    """(what its place is called, text or number) of all that a JSON value holds, the keys of objects too."""
    if not isinstance(value, (dict, list)):
        yield key or "the value", value
        return
    for name, part in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(name, str):
            yield "a key", name
        yield from leaves(part, f"{key}[{name!r}]" if key else repr(name))


def parse_object(data, where, remedy=None):
    """`parse_json` of what must be an object."""
    value = parse_json(data, where, remedy)
    if not isinstance(value, dict):
        remedy = remedy or "copy or download it again"
        raise ValueError(f"{where}: a JSON {type(value).__name__}, not an object; {remedy}")
    return value


def read_json(path):
    """The JSON object in a file. ValueError with the file's name for all else: a pipe, no JSON, a list."""
    return parse_object(read_bytes(path), path)


def depth(value):
    """How many lists and objects lie within one another, without a call for each level."""
    levels, parts = 0, [value]
    while parts := [part for part in parts if isinstance(part, (list, dict))]:
        levels += 1
        parts = [inner for part in parts for inner in (part.values() if isinstance(part, dict) else part)]
    return levels


def read_bytes(path):
    """A plain file's bytes."""
    refuse_pipe(path)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give an existing file") from None


def refuse_pipe(path):
    """Refuse what is there and no plain file: a pipe or a device could wait for ever, or never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: not a plain file (a folder, a pipe or a device); give a file")


def dumps(value, **more):
    """JSON text that `parse_json` takes: a number that is not finite is refused."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, **more)


# ---- the files of a folder that came from elsewhere --------------------------------------------------------

def own_file(folder, name):
    """Path of folder/name if it is a plain file of the folder itself, None if nothing has that name.

    ValueError for what is not a plain file, and for a link that leaves the folder. Only the hub's cache keeps
    its files elsewhere: snapshots/REVISION/name -> ../../blobs/HASH.
    """
    folder = Path(folder)
    path, place = folder / name, folder.resolve()
    if not os.path.lexists(path):
        return None
    real = path.resolve()
    if place not in real.parents and real.parent != place.parent.parent / "blobs":
        raise ValueError(f"{path}: a link out of the folder; if you trust it, put the file itself there")
    if not real.is_file():
        raise ValueError(f"{path}: not a plain file; copy or download it again")
    return path


# ---- what is made to be removed again ----------------------------------------------------------------------

def boot():
    """A text that changes when the machine starts anew; "" where the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def mark(folder, purpose):
    """Say in a folder who made it: this program, on this host, in this process, for `purpose`."""
    about = {"made by": "aya_min", "host": socket.gethostname(), "boot": boot(), "process": os.getpid(),
             "for": purpose}
    (Path(folder) / MARK).write_text(dumps(about) + "\n", encoding="utf-8")


def marked(folder, purpose):
    """What the mark of a folder says, if it is ours and for `purpose`; None if it is not."""
    path = Path(folder) / MARK
    if Path(folder).is_symlink() or path.is_symlink() or not path.is_file():
        return None
    try:
        about = read_json(path)
    except ValueError:
        return None
    return about if about.get("made by") == "aya_min" and about.get("for") == purpose else None


def is_left(folder, purpose):
    """Whether a marked folder is what a process of this host, which is no more, left behind."""
    about = marked(folder, purpose)
    if about is None or about.get("host") != socket.gethostname() or type(about.get("process")) is not int:
        return False
    if about.get("boot") != boot():
        return True
    try:
        os.kill(about["process"], 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:                         # another user's process
        pass
    return False


def remove_marked(folder):
    """Remove a folder that carries our mark, the mark last: after a kill it is still known as ours."""
    for path in Path(folder).iterdir():
        if path.name != MARK:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (Path(folder) / MARK).unlink(missing_ok=True)
    Path(folder).rmdir()


@contextmanager
def scratch(path):
    """A new marked folder beside `path`, on the same disk, for what is to become `path`; removed at the end.

    Those that killed processes of this host left for the same path are removed first; so are empty ones,
    which a kill leaves after their mark went.
    """
    path = Path(path)
    prefix, purpose = f".{path.name[:60]}.", f"to make {path.name}"
    for left in sorted(path.parent.glob(f".*{MARK}")):
        if left.name.startswith(prefix):
            if is_left(left, purpose):
                remove_marked(left)
            with suppress(OSError):
                left.rmdir()                        # an empty one: a kill came before the mark, or after it
    folder = marked_folder(path.parent, prefix, purpose)
    try:
        yield folder
    finally:
        with suppress(OSError):
            remove_marked(folder)


def marked_folder(parent, prefix, purpose):
    """A new folder with our mark. Another process may take an unmarked one for a left one: then again."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=MARK, dir=parent))
        with suppress(FileNotFoundError):
            mark(folder, purpose)
            return folder


# ---- writing -----------------------------------------------------------------------------------------------

def publish_file(made, path):
    """Give a finished file its name in one step. ValueError if anything has that name already."""
    try:
        os.link(made, path)
    except FileExistsError:
        raise taken(path) from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        publish_copy(made, path)                    # a file system without links


def publish_copy(made, path):
    try:
        with open(path, "xb") as target:
            target.write(Path(made).read_bytes())
    except FileExistsError:
        raise taken(path) from None


def taken(path):
    """The error for an output whose name a file has already."""
    return ValueError(f"{path} exists; give a new file, nothing is overwritten")


def publish_folder(made, path):
    """Give a finished folder its name in one step. ValueError if anything but an empty folder has it."""
    try:
        Path(made).rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise ValueError(f"{path} exists; give another folder, nothing is overwritten") from None


@contextmanager
def new_folder(path, publish=None):
    """A folder to fill, on the disk of `path`, which it becomes at the end; after an error it goes away."""
    with scratch(path) as place:
        made = place / Path(path).name
        made.mkdir()
        yield made
        (publish or publish_folder)(made, path)


def write_new(texts):
    """Write {path: text}: all of the files appear, in this order, or none. ValueError if one exists."""
    made, done = {}, []
    with ExitStack() as stack:
        for path, text in texts.items():
            made[path] = write_and_sync(stack.enter_context(scratch(path)) / "file", text)
        try:
            for path, file in made.items():
                publish_file(file, path)
                done.append(path)
        except BaseException:
            for path in done:
                Path(path).unlink(missing_ok=True)
            raise


def write_whole(path, text):
    """Write a file of our own: it is the old one or the new one, wherever a kill hits. Follows no link."""
    with scratch(path) as folder:
        write_and_sync(folder / "file", text).replace(path)


def write_and_sync(path, text):
    try:
        with open(path, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:                        # a full disk does not say which file it was
        raise OSError(error.errno, error.strerror, str(path)) from None
    return path


def write_json(path, value):
    write_whole(path, dumps(value, indent=2) + "\n")


def jsonl(rows):
    """The text of rows, one object a line."""
    return "".join(dumps(row) + "\n" for row in rows)


def write_jsonl(path, rows):
    """One object a line; a file that is there is whole, and an older one of ours is replaced."""
    write_whole(Path(path), jsonl(rows))


# ---- SHA-256 -----------------------------------------------------------------------------------------------

def sha256(path):
    """The SHA-256 of a plain file, as sha256sum prints it."""
    refuse_pipe(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Digests:
    """{path: sha256(path)}, each file read in a thread of its own from `begin` on. Leaving stops what runs.

    A tree of hashes would not be faster: one core hashes one file, and there are as many files as models.
    """

    def __init__(self):
        self.found, self.pool, self.stopped = {}, ThreadPoolExecutor(4), False

    def begin(self, paths):
        new = [path for path in dict.fromkeys(paths) if path not in self.found]
        self.found |= {path: self.pool.submit(self.of, path) for path in new}

    def of(self, path):
        digest, chunk = hashlib.sha256(), memoryview(bytearray(CHUNK))
        with open(path, "rb", buffering=0) as file:
            while not self.stopped and (size := file.readinto(chunk)):
                digest.update(chunk[:size])
        return digest.hexdigest()

    def __getitem__(self, path):
        return self.found[path].result()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stopped = True
        self.pool.shutdown(cancel_futures=True)
