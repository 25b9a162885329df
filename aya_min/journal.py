"""Finished work on disk, from which a killed run resumes: a folder of JSONL files, one per rank and start.

The folder carries our mark (files.mark), and one process works on it at a time. A line that a kill cut short
has no line end and is ignored. When the output is in place, the journal's files are removed, the settings and
the mark last: answers without the settings that made them are never used.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

from . import distributed
from .files import (MARK, dumps, mark, marked, own_file, parse_json, publish_folder, read_bytes, read_json,
                    scratch, sha256, taken, write_and_sync, write_json, write_new)

PURPOSE = "unfinished work"
ANSWERS = re.compile(r"\d{4,}-\d{4,}\.jsonl")
WORK = re.compile(ANSWERS.pattern + r"|output-\d+|new")         # the files beside the settings and the mark
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)      # the file system has no locks


class Journal:
    """The finished pieces of work, `done` = {key: value}, and a file of this rank for more. `with` closes it.

    key: a text made from the question that was answered. settings: a dict of JSON values; a folder that a run
    with other settings left is refused. fits(value): whether a value has the shape that the caller adds; a
    value that has not is refused. finished: the value that a process passed to `finishing` before it was
    killed, or None.
    """

    def __init__(self, folder, settings, fits=lambda value: True):
        self.folder, self.lock, self.file = Path(folder), None, None
        settings = json.loads(dumps(settings))
        self.digest = hashlib.sha256(dumps(settings, sort_keys=True).encode("utf-8")).hexdigest()
        try:
            self.about = distributed.from_main(lambda: self.open(settings))
            self.finished = self.about.get("finishing") if self.about.get("settings") == self.digest else None
            names = sorted(filter(ANSWERS.fullmatch, os.listdir(self.folder)))
            self.done = dict(entry for name in names for entry in self.read(name, fits))
            distributed.barrier()                               # all ranks list the files before one is added
            start = 1 + max((int(name.split("-")[0]) for name in names), default=-1)
            self.path = self.folder / f"{start:04d}-{distributed.rank():04d}.jsonl"
            self.file = open(self.path, "x", encoding="utf-8")
        except BaseException:
            self.close()
            raise

    # ---- on the main rank ----------------------------------------------------------------------------------

    def open(self, settings):
        """Make the folder, or open an existing one. Returns the content of its mark.

        ValueError if the folder is not ours, is held by another process, or is of other settings.
        """
        if not os.path.lexists(self.folder):
            try:
                with scratch(self.folder) as made:
                    write_json(made / "settings.json", settings)
                    mark(made, PURPOSE)
                    with suppress(ValueError):              # another process was first, see `hold`
                        publish_folder(made, self.folder)
            except OSError as error:
                raise ValueError(f"{self.folder}: cannot be made ({error.strerror}); give another name for "
                                 "the output") from None
        if not marked(self.folder, PURPOSE):
            raise ValueError(f"{self.folder} is in the way: it was not made by this program; move it, or "
                             "give another name for the output")
        self.hold()
        path = own_file(self.folder, "settings.json")
        if path is None and self.holds_work():
            raise ValueError(f"{self.folder} holds answers but not the settings that made them; remove it")
        if path is None:                                        # a kill left only the mark
            self.put("settings.json", settings)
        try:
            before = read_json(self.folder / "settings.json", "copy it again")
        except ValueError as error:
            raise ValueError(f"{error}; or remove {self.folder} to start anew") from None
        if changed := differences(settings, before):
            raise ValueError(f"{self.folder} holds an unfinished run with other {', '.join(changed)}; give "
                             "the same settings to resume it, or remove it")
        return marked(self.folder, PURPOSE)

    def hold(self):
        """Lock the folder until this process closes it or ends."""
        self.lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.folder}: another process is at work on it; wait until it ends, or give "
                             "another name for the output") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        same = marked(self.folder, PURPOSE) and os.path.samestat(os.fstat(self.lock), os.stat(self.folder))
        if not same:
            raise ValueError(f"{self.folder}: another process has just finished it; give the command again")

    def put(self, name, value):
        """Write a file in one step. As the folder is locked, the temporary name can be a fixed one."""
        write_and_sync(self.folder / "new", dumps(value, indent=2) + "\n").replace(self.folder / name)

    def clear(self):
        """Remove the journal's own files and the folder. Other files stay, which is printed."""
        for name in [*filter(WORK.fullmatch, os.listdir(self.folder)), "settings.json", MARK]:
            (self.folder / name).unlink(missing_ok=True)
        try:
            self.folder.rmdir()
        except OSError:
            left = " ".join(sorted(os.listdir(self.folder)))
            print(f"{self.folder} stays: {left} was not made by this program; move it and remove the folder",
                  file=sys.stderr)

    # ---- on every rank -------------------------------------------------------------------------------------

    def read(self, name, fits):
        """Yield (key, value) of each whole line of a file."""
        path = own_file(self.folder, name)
        # splitlines would also split at a U+2028 inside an answer
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            where = f"{path}:{number}"
            try:
                entry = parse_json(line, where)
            except ValueError as error:
                raise ValueError(f"{error}; remove the line, or {self.folder} to start anew") from None
            pair = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)
            if not pair or not fits(entry[1]):
                raise ValueError(f"{where}: not what this program writes there; remove the line, or "
                                 f"{self.folder} to start anew")
            yield tuple(entry)

    def add(self, key, value):
        """Append one finished piece of work. When this returns, it survives a kill of the process."""
        line = dumps([key, value]) + "\n"
        self.done[key] = value
        try:
            self.file.write(line)
            self.file.flush()
        except OSError as error:                                # the error of a full disk does not name it
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def finishing(self, value):
        """Keep a JSON value, which describes the output to be published, in the mark (removed last)."""
        about = {**self.about, "settings": self.digest, "finishing": value}
        distributed.from_main(lambda: self.put(MARK, about))
        self.about, self.finished = about, value

    def publish(self, texts, about):
        """Write {path: text}: all files appear or none does, and none is overwritten. A collective.

        If the process is killed meanwhile, `finish_publishing` of the next one completes this. about: a JSON
        value that says, beside the settings, what the files were made from.
        """
        def lay_down():
            for i, text in enumerate(texts.values()):
                write_and_sync(self.folder / f"output-{i}", text)
        distributed.from_main(lay_down)
        digests = [hashlib.sha256(text.encode("utf-8")).hexdigest() for text in texts.values()]
        self.finishing({"about": about, "sha256": digests})
        self.finish_publishing(list(texts), about)

    def finish_publishing(self, paths, about):
        """Put in place what an earlier `publish` of these files left undone. A collective.

        Returns False if it was not begun, or if a file that was in place was removed again.
        """
        if self.finished is None or self.finished.get("about") != json.loads(dumps(about)):
            return False

        def complete():
            missing = {}
            for i, (path, digest) in enumerate(zip(paths, self.finished["sha256"], strict=True)):
                with scratch(path):             # removes the folders that the killed process left beside it
                    pass
                laid = own_file(self.folder, f"output-{i}")
                if os.path.lexists(path):
                    if os.path.islink(path) or sha256(path) != digest:
                        raise taken(path)
                elif laid:
                    missing[path] = read_bytes(laid).decode("utf-8")
                else:                                           # it was in place and was removed again
                    return False
            write_new(missing)
            return True
        return distributed.from_main(complete)

    def remove(self):
        """Close and remove the journal, once the output is in place. A collective."""
        self.file.close()
        distributed.barrier()
        distributed.from_main(self.clear)
        self.close()

    def close(self):
        if self.file:
            with suppress(OSError):                 # `add` has reported a full disk
                self.file.close()
        if self.lock:
            os.close(self.lock)
        self.file = self.lock = None

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        """Close; a refused command (ValueError, OSError) with nothing finished removes the folder too."""
        try:
            refused = kind and issubclass(kind, (ValueError, OSError))
            if refused and distributed.is_main() and self.lock and not self.holds_work():
                self.clear()
        finally:
            self.close()

    def holds_work(self):
        """Whether the folder holds finished work: answers or outputs."""
        names = [name for name in os.listdir(self.folder) if WORK.fullmatch(name) and name != "new"]
        return any((self.folder / name).stat().st_size for name in names)


def differences(now, before):
    """The names of the settings that differ; of a dict, the first three keys that differ."""
    found = []
    for name in sorted(now.keys() | before.keys()):
        one, other = now.get(name), before.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            parts = sorted(part for part in one.keys() | other.keys() if one.get(part) != other.get(part))
            found += [f"{name} ({' '.join(parts[:3])})"] if parts else []
        elif one != other or name not in now or name not in before:
            found.append(name)
    return found
