"""Plain files, with nothing of torch: JSON in and out, and the SHA-256 of large files beside other work.

Importing torch takes one core some seconds. merge.py reads its settings and begins to hash the models before that.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

CHUNK = 1 << 22             # bytes read at a time: so long that Python's lock, which each read and each hash takes once, is seldom waited for


def read_json(path):
    """The JSON object in a file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); copy or download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object; copy or download it again")
    return value


def write_whole(path, text):
    """Write a file so that it is the old one or the new one, wherever a kill hits."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path, value):
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256(path):
    """The SHA-256 of a file, as sha256sum prints it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Digests:
    """{path: sha256(path)}, each file read in a thread of its own from `begin` on. Leaving stops what still runs.

    A tree of hashes would not be faster: a file is hashed as fast as one core can, and there are as many files as models at least.
    """

    def __init__(self):
        self.found, self.pool, self.stopped = {}, ThreadPoolExecutor(4), False

    def begin(self, paths):
        self.found |= {path: self.pool.submit(self.of, path) for path in dict.fromkeys(paths) if path not in self.found}

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
