"""`python -m aya_min.claims page`: all verdicts of results/ as one page that needs no other file."""

import os
from pathlib import Path

from ..command import Parser, guarded, is_spare_rank
from ..experiments import claim_files
from ..experiments_matched import differing
from ..experiments_page import TITLE, all_claims
from ..experiments_records import records
from ..files import read_bytes, write_whole


def main(argv=None):
    parser = Parser(prog="python -m aya_min.claims", description=__doc__)
    parser.add_argument("what", choices=["page"], help="page: write all verdicts as a page")
    parser.add_argument("--out", default="runs/claims.html", metavar="FILE",
                        help="the page, which is made anew (default runs/claims.html)")
    args = parser.parse_args(argv)
    if is_spare_rank():
        return
    path = Path(args.out)
    if os.path.lexists(path) and not (path.is_file() and f"<title>{TITLE}<".encode() in read_bytes(path)):
        raise ValueError(f"--out {path} is there, and no earlier page of claims; give another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    kept, files = records(), claim_files()
    differ = {name: differing(record, files[name]) for name, record in kept.items()}
    recorded = {claim["name"] for record in kept.values() for claim in record["results"]}
    without = [claim.name for file in files.values() for claim in file.CLAIMS if claim.name not in recorded]
    write_whole(path, all_claims(kept, differ, without))
    print(path)


if __name__ == "__main__":
    guarded(main, "aya_min.claims")
