"""Plain files, without torch: strict JSON, files of a folder, writing whole and without overwriting, SHA-256.

Temporary files lie in folders that carry a mark, which names the host, the process and the purpose. Only
marked folders are ever removed, and no finished output replaces an existing file.

Importing torch takes one core some seconds, so merge.py reads its settings and begins to hash the models
before it does.
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

# Bytes per read. Each read and each hash takes Python's lock once, so large ones seldom wait for it.
CHUNK = 1 << 22
MARK = ".aya_min"           # the mark's file name


# ---- JSON --------------------------------------------------------------------------------------------------

def unique(items):
    """The dict of an object's items. ValueError if a key occurs twice."""
    made = dict(items)
    if len(made) < len(items):
        keys = [key for key, _ in items]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:40]!r} occurs twice in one object; keep one")
    return made


def finite(text):
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is beyond the range of a number")
    return value


def no_constant(name):
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(object_pairs_hook=unique, parse_float=finite, parse_constant=no_constant)
BAD = re.compile(rb"\\u(?:[dD][89a-fA-F]|0000)")      # may be half a surrogate pair, or is a NUL


def parse_json(data, where, remedy=None):
    """The JSON value of bytes. ValueError names `where` and the key of the first fault.

    Refused: bytes that are not UTF-8 or not JSON (NaN, 1e999, numbers of thousands of digits, a thousand
    levels), an object with a key that occurs twice, and texts that cannot be written again as they came (half
    a surrogate pair, a NUL). A byte-order mark is removed. remedy: what to do if the bytes are not JSON.
    """
    try:
        value = DECODER.decode(data.decode("utf-8-sig"))
        # UTF-8 and JSON refuse every spelling of a bad text other than the escapes that BAD finds.
        fault = bad_text(value) if BAD.search(data) else None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte {error.start}); convert the file to UTF-8") from None
    except (ValueError, RecursionError) as error:
        remedy = f"; {remedy}" if remedy else ""
        raise ValueError(f"{where}: {in_key(data)}not JSON ({error}){remedy}") from None
    if fault:
        raise ValueError(f"{where}: {fault}; remove it")
    return value


def in_key(data):
    """The beginning of a message that names the first key with a number that is not finite; "" if none is."""
    try:
        for key, value in leaves(json.loads(data)):
            if isinstance(value, float) and not math.isfinite(value):
                return f"{key} is not a finite number: "
    except (ValueError, RecursionError):
        pass
    return ""


def bad_text(value, key=""):
    """A message that names the first text of a JSON value with half a surrogate pair or a NUL, or None.

    key: the name of the value itself.
    """
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
    """Yield (name of its place, text or number) for each leaf of a JSON value and each key of an object."""
    if not isinstance(value, (dict, list)):
        yield key or "the value", value
        return
    for name, part in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(name, str):
            yield "a key", name
        yield from leaves(part, f"{key}[{name!r}]" if key else repr(name))


def parse_object(data, where, remedy=None):
    """The JSON object of bytes: `parse_json`, which also refuses every value that is not an object."""
    value = parse_json(data, where, remedy)
    if not isinstance(value, dict):
        remedy = remedy or "copy or download it again"
        said = "null" if value is None else type(value).__name__
        raise ValueError(f"{where}: a JSON {said}, not an object; {remedy}")
    return value


def read_json(path, remedy="copy or download it again"):
    """The JSON object in a file. ValueError with the file's name for anything else: a pipe, text, a list.

    remedy: what to do then."""
    return parse_object(read_bytes(path), path, remedy)


def depth(value):
    """How deep lists and objects are nested; a loop, as recursion could overflow the stack."""
    levels, parts = 0, [value]
    while parts := [part for part in parts if isinstance(part, (list, dict))]:
        levels += 1
        parts = [inner for part in parts for inner in (part.values() if isinstance(part, dict) else part)]
    return levels


def read_bytes(path):
    """The bytes of a plain file. ValueError if it is another kind of file or cannot be read."""
    refuse_pipe(path)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give an existing file") from None


def refuse_pipe(path):
    """Refuse an existing path that is not a plain file: reading a pipe or a device might never end."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: not a plain file (a folder, a pipe or a device); give a file")


def dumps(value, **more):
    """JSON text that `parse_json` reads. ValueError for a number that is not finite."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, **more)


# ---- the files of a folder that came from elsewhere --------------------------------------------------------

def own_file(folder, name):
    """The path folder/name if it is a plain file of the folder itself, None if nothing has that name.

    ValueError if it is not a plain file, or is a link out of the folder. One kind of link is allowed, that of
    the Hugging Face hub's cache: snapshots/REVISION/name -> ../../blobs/HASH.
    """
    folder = Path(folder)
    path = folder / name
    place = folder.resolve()
    if not os.path.lexists(path):
        return None
    real = path.resolve()
    if place not in real.parents and real.parent != place.parent.parent / "blobs":
        raise ValueError(f"{path}: a link out of the folder; if you trust it, put the file itself there")
    if not real.is_file():
        raise ValueError(f"{path}: not a plain file; copy or download it again")
    return path


# ---- temporary folders -------------------------------------------------------------------------------------

def boot():
    """An id that changes each time the machine starts; "" where the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def mark(folder, purpose):
    """Write the mark of a folder: this program made it, on this host, in this process, for `purpose`."""
    about = {"made by": "aya_min", "host": socket.gethostname(), "boot": boot(), "process": os.getpid(),
             "for": purpose}
    (Path(folder) / MARK).write_text(dumps(about) + "\n", encoding="utf-8")


def marked(folder, purpose):
    """The content (a dict) of a folder's mark if this program wrote it for `purpose`, else None."""
    path = Path(folder) / MARK
    if Path(folder).is_symlink() or path.is_symlink() or not path.is_file():
        return None
    try:
        about = read_json(path)
    except ValueError:
        return None
    return about if about.get("made by") == "aya_min" and about.get("for") == purpose else None


def is_left(folder, purpose):
    """Whether a marked folder was left behind by a process of this host that no longer runs."""
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
    """Remove a marked folder. The mark goes last, so that after a kill the folder still counts as ours."""
    for path in Path(folder).iterdir():
        if path.name != MARK:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (Path(folder) / MARK).unlink(missing_ok=True)
    Path(folder).rmdir()


@contextmanager
def scratch(path):
    """A new marked folder beside `path`, on the same disk, in which `path` is made; it is removed at the end.

    Folders that killed processes of this host left for the same path are removed first.
    """
    path = Path(path)
    prefix, purpose = f".{path.name[:60]}.", f"to make {path.name}"
    for left in sorted(path.parent.glob(f".*{MARK}")):
        if left.name.startswith(prefix):
            if is_left(left, purpose):
                remove_marked(left)
            # An empty folder is left if a kill hit before the mark was written or after it was removed.
            with suppress(OSError):
                left.rmdir()
    with naming(path):
        folder = marked_folder(path.parent, prefix, purpose)
    try:
        yield folder
    finally:
        with suppress(OSError):
            remove_marked(folder)


def marked_folder(parent, prefix, purpose):
    """A new folder with our mark. It is made anew if another process removes it before it has the mark."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=MARK, dir=parent))
        with suppress(FileNotFoundError):
            mark(folder, purpose)
            return folder


# ---- writing -----------------------------------------------------------------------------------------------

@contextmanager
def naming(path):
    """An OSError inside names this path, which the user knows, not a temporary one or, as that of a full
    disk, none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def publish_file(made, path):
    """Give a finished file its name in one step. ValueError if the name is taken."""
    try:
        os.link(made, path)
    except FileExistsError:
        raise taken(path) from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        publish_copy(made, path)                    # the file system has no links


def publish_copy(made, path):
    """Copy a finished file to its name. ValueError if the name is taken."""
    try:
        with open(path, "xb") as target:
            target.write(Path(made).read_bytes())
    except FileExistsError:
        raise taken(path) from None


def taken(path):
    """The error for an output whose name is taken."""
    return ValueError(f"{path} exists; give a new file, nothing is overwritten")


def check_out(*paths):
    """Refuse, before any work, output files that could not be written after it, and two that are one."""
    for path in paths:
        if os.path.lexists(path):
            raise taken(path)
        check_place(path)
    if len({os.path.realpath(path) for path in paths}) < len(paths):
        raise ValueError(f"{' and '.join(map(str, paths))} are one file; give each a name of its own")


def check_place(path):
    """Refuse an output whose folder is missing or cannot be written."""
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise ValueError(f"{path}: its folder does not exist; make it first")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{path}: its folder is not writable; give another")


def publish_folder(made, path):
    """Give a finished folder its name in one step. Only an empty folder is replaced, else ValueError."""
    try:
        Path(made).rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise ValueError(f"{path} exists; give another folder, nothing is overwritten") from None


@contextmanager
def new_folder(path, publish=None):
    """A new folder to fill, which becomes `path` at the end and is removed after an error.

    publish(made, path): gives it its name (default publish_folder).
    """
    with scratch(path) as place:
        made = place / Path(path).name
        made.mkdir()
        yield made
        (publish or publish_folder)(made, path)


def write_new(texts):
    """Write {path: text, or its parts}: all files appear, in this order, or none does. ValueError if one
    exists."""
    made, done = {}, []
    with ExitStack() as stack:
        for path, text in texts.items():
            folder = stack.enter_context(scratch(path))
            with naming(path):
                made[path] = write_and_sync(folder / "file", text)
        try:
            for path, file in made.items():
                with naming(path):
                    publish_file(file, path)
                done.append(path)
        except BaseException:
            for path in done:
                Path(path).unlink(missing_ok=True)
            raise


def write_whole(path, text):
    """Write or replace a file of our own. A kill at any time leaves the old file or the new one, whole.

    A link of that name is replaced, not followed.
    """
    with scratch(path) as folder, naming(path):
        write_and_sync(folder / "file", text).replace(path)


def write_and_sync(path, text):
    """Write a text, or the parts of one, to a file and fsync it. Returns the path; an OSError names it."""
    with naming(path), open(path, "w", encoding="utf-8", newline="") as file:
        file.writelines([text] if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())
    return path


def write_json(path, value):
    write_whole(path, dumps(value, indent=2) + "\n")


def jsonl(rows):
    """The text of a JSONL file: one object per line."""
    return "".join(dumps(row) + "\n" for row in rows)


def write_jsonl(path, rows):
    """Write or replace a JSONL file of our own, whole at any time (`write_whole`)."""
    write_whole(Path(path), jsonl(rows))


# ---- SHA-256 -----------------------------------------------------------------------------------------------

def sha256(path):
    """The SHA-256 of a plain file, as sha256sum prints it."""
    refuse_pipe(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Digests:
    """{path: sha256(path)}. Four threads hash the files in the background; leaving the `with` stops them.

    A tree of hashes would not be faster: one core hashes one file, and several models have several files.
    """

    def __init__(self):
        self.found = {}             # {path: future of its digest}
        self.pool = ThreadPoolExecutor(4)
        self.stopped = False

    def begin(self, paths):
        """Start to hash those of the files that were not begun before."""
        new = [path for path in dict.fromkeys(paths) if path not in self.found]
        self.found |= {path: self.pool.submit(self.of, path) for path in new}

    def of(self, path):
        """The SHA-256 of a file, in a thread of the pool."""
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
