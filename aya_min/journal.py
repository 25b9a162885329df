"""Finished answers of a long generation on disk, so that a killed run goes on: a folder of JSONL files beside the output, one for each rank and start.

A line that a kill cut short has no end and is read as if it were not there. The folder goes when the output is in place.
"""

import json
import shutil
from pathlib import Path

from . import distributed
from .files import write_json


class Journal:
    """What is finished, {key: answers}, and a file of this rank to which more is added.

    key: a string made of what was answered. settings (a dict of JSON values): a folder left by a run with others is refused.
    """

    def __init__(self, folder, settings):
        self.folder = Path(folder)
        distributed.from_main(lambda: self.open(json.loads(json.dumps(settings))))
        files = sorted(self.folder.glob("*.jsonl"))
        lines = [line for path in files for line in path.read_bytes().split(b"\n")[:-1]]      # not splitlines: an answer may hold U+2028
        self.done = dict(json.loads(line) for line in lines)
        distributed.barrier()                                       # all have looked before anyone adds a file
        self.file = open(self.folder / f"{len(files):04d}-{distributed.rank():04d}.jsonl", "x", encoding="utf-8")

    def open(self, settings):
        path = self.folder / "settings.json"
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            if changed := sorted(k for k in settings.keys() | before.keys() if settings.get(k) != before.get(k)):
                raise ValueError(f"{self.folder} holds an unfinished run with other {', '.join(changed)}; give the same settings to go on with it, or remove it")
            return
        self.folder.mkdir(exist_ok=True)
        write_json(path, settings)

    def add(self, key, answers):
        """One finished piece of work; on disk, as far as the system goes, when this returns."""
        self.done[key] = answers
        self.file.write(json.dumps([key, answers], ensure_ascii=False) + "\n")
        self.file.flush()

    def close(self):
        self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def remove(self):
        self.file.close()
        distributed.barrier()
        if distributed.is_main():
            shutil.rmtree(self.folder)
