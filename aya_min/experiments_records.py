"""What a claim leaves: the table on the terminal, OUT/NAME/claim.json, OUT/NAME/report.html, and the rows of
results/README.md that are generated from the records in results/.

    python -m aya_min.experiments_records results        writes the generated part of results/README.md
"""

import platform
import re
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from textwrap import wrap

import torch

from . import distributed, linear, runs
from .command import guarded, printable
from .config import RECIPES, Recipe, settings_from
from .experiments import (MEASURES, SIDES, Comparison, Lab, claim_files, code_version, find_claims, hash_of,
                          measured, together)
from .experiments_matched import check_matched, differing
from .experiments_page import labelled, ours, page, preset_of, shown, source
from .files import parse_object, read_bytes, read_json, write_json, write_whole
from .pipeline_steps import digest_of, read_done

RESULTS = Path(__file__).parent.parent / "results"
ELSEWHERE = "move it elsewhere, or give another --out"
LEAST_SEEDS = 3             # of a record in results/
BEGIN, END = "<!-- claims: generated from results/*.json -->\n", "<!-- end of the claims -->\n"


# ---- running -----------------------------------------------------------------------------------------------

def check(name, seeds, preset, out, record, config=None):
    """Refuse, before any work, an unknown name, a seed given twice, a folder that holds what no claim made,
    the record of another claim, and a record of less than a whole file with enough seeds that chose no
    setting."""
    file, module, claims = find_claims(name)
    skipped = skipped_of(claims)
    if len(skipped) == len(claims):
        raise ValueError(f"{name}: {next(iter(skipped.values()))}, which is not there; give another claim")
    if skipped and record:
        raise ValueError(f"--record keeps a whole claim file, and {' '.join(skipped)} "
                         f"{next(iter(skipped.values()))}, which is not there")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--seeds {' '.join(map(str, seeds))}: a seed is given twice; give each once")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: not a folder; give another")
    for path in sorted(out.iterdir()) if out.exists() else ():
        of_seed = re.fullmatch(r"seed-\d+-[0-9a-f]{10}", path.name)
        if not (path.is_dir() and (of_seed or any(path.glob("claim*.json")) or not any(path.iterdir()))):
            raise ValueError(f"--out {out} holds {path.name}, which no claim made; give another folder")
    earlier = out / name / "claim.json"
    made = read_record(earlier) if earlier.is_file() else {}
    for key, this in (("preset", preset), ("claims", name)) if made else ():
        if made.get(key) != this:
            raise ValueError(f"{earlier} is a record of {key} {made.get(key)}, which would be lost; "
                             "give another --out")
    if record and (name != file or preset != "tiny" or len(seeds) < LEAST_SEEDS or 0 in seeds or config):
        raise ValueError(f"--record keeps a whole claim file at preset tiny as it is, with {LEAST_SEEDS} "
                         "seeds or more, without seed 0, on which settings are chosen")
    if hasattr(module, "check"):
        changed = read_changes(config) if config else {}
        module.check(settings_from(Recipe, RECIPES[preset] | changed), claims)


def skipped_of(claims):
    """{name: why} of the claims that cannot be tried here."""
    return {claim.name: claim.skipped for claim in claims if claim.skipped}


def read_changes(path):
    """{setting of the recipe: value} of --config's JSON file."""
    changed = read_json(path, "give a JSON object of recipe settings")
    if chosen := sorted({"seed", "eval_split"} & changed.keys()):
        raise ValueError(f"--config {path}: {chosen[0]} is chosen by --seeds; leave it out")
    try:
        settings_from(Recipe, config_file=path)
    except ValueError as error:
        raise ValueError(f"--config {path}: {str(error).removeprefix(f'--config {path}: ')}") from None
    return changed


def run_claims(name, seeds, preset, out, device, changed=None):
    """Make the arms of a claim file (or of one of its claims) with every seed, compare them, write the record
    and the page after each seed, beside the seeds that are there. Returns the record of these seeds.

    changed: settings of the recipe that differ from the preset's."""
    file, module, claims = find_claims(name)
    skipped = skipped_of(claims)
    claims = [claim for claim in claims if claim.name not in skipped]
    for claim in claims:
        check_claim(claim, module)
    folder, source = out / name, Path(module.__file__).read_text(encoding="utf-8")
    code = hash_of(code_version(), source, changed or {}, skipped)
    distributed.from_main(lambda: earlier_seeds(folder, code))          # refuses a record that is damaged
    made = {}
    for seed in seeds:
        lab = Lab(out, preset, seed, device, module, changed)
        with ExitStack() as held:
            linear.choose(distributed.from_main(lambda: open_seed(lab, held)))
            found = {claim.name: [with_pairs(lab, c) for c in claim.comparisons] for claim in claims}
        about = {"claims": name, "file": file, "code": code, "paper": module.PAPER, "preset": preset,
                 "changed": changed or {}, "skipped": skipped, "machine": machine(),
                 "products": linear.chosen(), "versions": runs.versions(),
                 "recipe": {**asdict(lab.recipe), "seed": None, "eval_split": None}}
        pictures = {claim.name: claim.picture(lab) for claim in claims if claim.picture}
        made[seed] = {"arms": arms_of(lab), "minutes": round(seconds_of(lab) / 60, 1), "found": found,
                      "pictures": pictures}

        def write():
            folder.mkdir(parents=True, exist_ok=True)
            # read only now: another command may have written other seeds meanwhile
            record = joined(about, claims, dict(sorted((earlier_seeds(folder, code) | made).items())))
            set_aside(folder, code)
            write_json(folder / "claim.json", {**record, "sha256": digest_of(record)})
            write_whole(folder / "report.html", page(record, differing(record, module)))
        distributed.from_main(write)
    return joined(about, claims, made)


def with_pairs(lab, c):
    """`measured`. ValueError for a Figure that asks for two arms and names no pairs."""
    lab.asked = set()
    found = measured(lab, c)
    if len(lab.asked) > 1 and not c.pairs:
        raise ValueError(f"the figure {c.label!r} asks for the arms {' and '.join(sorted(lab.asked))}; name "
                         "the pairs of them that it holds against each other")
    return found


def joined(about, claims, with_seeds):
    """The record of {seed: its arms, minutes and what `measured` found for each comparison of each claim}."""
    seeds = " ".join(map(str, with_seeds))
    return {**about, "seeds": list(with_seeds),
            "command": f"train.py claim {about['claims']} --seeds {seeds} --preset {about['preset']}",
            "arms": {str(seed): one["arms"] for seed, one in with_seeds.items()},
            "minutes": [one["minutes"] for one in with_seeds.values()],
            "results": [result(claim, [one["found"][claim.name] for one in with_seeds.values()],
                               [one["pictures"].get(claim.name) for one in with_seeds.values()])
                        for claim in claims]}


def earlier_seeds(folder, code):
    """The seeds that a claim's folder has records of by this code, as `joined` takes them."""
    paths = (folder / "claim.json", folder / f"claim-{code}.json")
    records = [record for path in paths if path.is_file() and (record := read_record(path))["code"] == code]
    return seeds_in(records[0]) if records else {}


def set_aside(folder, code):
    """Give a record of other code in claim.json, and its page, other names, under which they stay."""
    path = folder / "claim.json"
    if not path.is_file() or (other := read_record(path)["code"]) == code:
        return
    name = other if re.fullmatch("[0-9a-f]{10}", str(other)) else "earlier"
    if name == "earlier" and (before := len(list(folder.glob("claim-earlier*.json")))):
        name += f"-{before + 1}"
    path.replace(folder / f"claim-{name}.json")
    if (shown_on := folder / "report.html").is_file():
        shown_on.replace(folder / f"report-{name}.html")


def read_record(path):
    """A claim's record, whose "code" is None if an older version wrote it. ValueError for any other file, and
    for a record that is not as a claim wrote it."""
    record = parse_object(read_bytes(path), path, ELSEWHERE)
    digest = record.pop("sha256", None)
    try:
        seeds_in(record)
        whole = digest == digest_of(record) if "code" in record else digest is None
    except (KeyError, TypeError, IndexError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{path}: not the record of a claim, as a claim wrote it; {ELSEWHERE}")
    return {"code": None, **record}


def seeds_in(record):
    """{seed: its part of a record}, as `joined` takes them."""
    return {seed: {"arms": record["arms"][str(seed)], "minutes": record["minutes"][i],
                   "found": {claim["name"]: [row["seeds"][i] for row in claim["comparisons"]]
                             for claim in record["results"]},
                   "pictures": {claim["name"]: claim["pictures"][i] for claim in record["results"]
                                if "pictures" in claim}}
            for i, seed in enumerate(record["seeds"])}


def open_seed(lab, held):
    """Lock a seed's folder and say in it what it holds. Returns the library of its matrix products."""
    lab.folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(runs.lock(lab.folder))
    path = lab.folder / "config.json"
    if path.is_file():
        return runs.products_before(path)
    write_json(path, {"stage": "claims", "seed": lab.seed, "recipe": asdict(lab.recipe),
                      "products": linear.chosen(), "versions": runs.versions()})
    return linear.chosen()


def check_claim(claim, module):
    """ValueError, before any arm is made, for a claim whose comparisons name what its file does not have."""
    for c in claim.comparisons:
        known = {"side": SIDES}
        if isinstance(c, Comparison):
            measures = [*MEASURES, *getattr(module, "MEASURES", {}), "win rate", "loss"]
            known |= {"measure": measures, "decoding": ("greedy", "sampled")}
        if getattr(c, "measure", "") == "loss":
            known["held_out"] = getattr(module, "HELD_OUT", {})
        for name, values in known.items():
            if (value := getattr(c, name)) not in values:
                raise ValueError(f"claim {claim.name}, {c.label}: unknown {name} {value!r}; give one of "
                                 f"{', '.join(values)}")
        if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in c.pairs):
            raise ValueError(f"claim {claim.name}, {c.label}: pairs {c.pairs!r} are no pairs; give "
                             "((arm, arm), ...)")
    if missing := [arm for arm in claim.arms if arm not in module.ARMS]:
        raise ValueError(f"claim {claim.name}: the arm {missing[0]!r} is not in ARMS of its file; add it")


def machine():
    """The processor's name, the threads of a rank and the number of ranks."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"processor": names[0] if names else platform.machine(), "threads": torch.get_num_threads(),
            "ranks": distributed.num_ranks()}


def seconds_of(lab):
    """Seconds of all steps that a lab was asked for, also of those that an earlier command or claim made."""
    folders = [lab.folder / "steps" / name for name in dict.fromkeys(lab.run.used)]
    return sum(read_done(folder)["seconds"] for folder in folders)


def arms_of(lab):
    """{arm: its folder, steps, tokens, seconds, start} of the arms that a claim asked for; of a merge those
    of the models that were trained for it."""
    about = {}
    for name, folder in lab.arms.items():
        own = lab.name_of(folder).split("/")[1]
        done = [read_done(path.parent) for path in (lab.folder / "steps").glob(f"{own}*/done.json")]
        steps, tokens, seconds = (sum(one[key] for one in done)
                                  for key in ("training_steps", "tokens", "seconds"))
        start = lab.starts.get(lab.name_of(folder))
        about[name] = {"folder": f"steps/{own}", "steps": steps, "tokens": tokens,
                       "seconds": round(seconds, 1), **({"start": start} if start else {})}
    return about


def result(claim, by_seed, pictures=()):
    """A claim's part of the record. by_seed: for each seed what `measured` gave for each comparison.
    pictures: of each seed, if the claim has one."""
    rows = []
    for c, each in zip(claim.comparisons, zip(*by_seed)):
        is_arms = isinstance(c, Comparison)
        rows.append({"label": c.label, "side": c.side, "measure": c.measure if is_arms else "figure",
                     "arms": [c.a, c.b] if is_arms else [], "seeds": list(each),
                     "verdict": together(one["verdict"] for one in each)})
    made = {"name": claim.name, "statement": claim.statement, "theirs": claim.theirs, "comparisons": rows,
            "verdict": together(row["verdict"] for row in rows)}
    return made | ({"pictures": list(pictures)} if claim.picture else {})


# ---- showing -----------------------------------------------------------------------------------------------

def table(record):
    """The terminal's table: one row a comparison, one column a seed."""
    lines = []
    for claim in record["results"]:
        lines += ["", f"{claim['name']}: {claim['statement']}", f"    {source(claim)}"]
        width = max(len(labelled(row)) for row in claim["comparisons"])
        for row in claim["comparisons"]:
            values = "  ".join(f"{shown(one):>22}" for one in row["seeds"])
            lines.append(f"    {labelled(row):{width}}  {values}  {row['verdict']}")
        lines.append(f"    verdict: {claim['verdict']}")
    lines += ["", *(f"{name}: skipped, {why}" for name, why in record.get("skipped", {}).items())]
    seeds = " ".join(map(str, record["seeds"]))
    lines.append(f"\nseeds {seeds}, {preset_of(record)}, minutes {record['minutes']}")
    return printable("\n".join(lines[1:]))


# ---- results -----------------------------------------------------------------------------------------------

def records(folder=RESULTS):
    """The records that the repository keeps, {file: record}."""
    return {path.stem: read_record(path) for path in sorted(folder.glob("*.json"))}


def keep(record, folder=RESULTS):
    """Write the record to results/NAME.json, in place of an earlier one, and make results/README.md anew.

    ValueError for arms that are compared but not matched, without a reason."""
    check_matched(record, claim_files()[record["claims"]])
    command = f"train.py claim {record['claims']} --seeds {' '.join(map(str, record['seeds']))}"
    kept = {**record, "command": command}           # without the paths of a machine
    write_json(folder / f"{record['claims']}.json", {**kept, "sha256": digest_of(kept)})
    path = folder / "README.md"
    write_whole(path, with_claims(path.read_text(encoding="utf-8"), folder))


def last_verdicts(folder=RESULTS):
    return {claim["name"]: claim["verdict"] for record in records(folder).values()
            for claim in record["results"]}


def listing():
    """The text of `train.py claims`."""
    verdicts, lines = last_verdicts(), []
    for file, module in claim_files().items():
        lines.append(f"{file}: {module.PAPER}, {module.MINUTES} minutes a seed")
        lines += [f"    {claim.name}: {claim.statement} [{verdicts.get(claim.name, 'no record')}]"
                  for claim in module.CLAIMS]
    return printable("\n".join(lines))


def row_of(cells):
    """A row of a Markdown table; a bar in a text would begin another cell."""
    return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def generated(folder=RESULTS):
    """The generated part of results/README.md: a row a claim, then every comparison."""
    kept = records(folder)
    lines = ["| claim | paper | it says | the paper's figure | ours, by seed | verdict | command | minutes |",
             "|---|---|---|---|---|---|---|---|"]
    for record in kept.values():
        command = f"`train.py claim {record['claims']} --seeds {' '.join(map(str, record['seeds']))}`"
        for claim in record["results"]:
            cells = (claim["name"], record["paper"], claim["statement"], claim["theirs"], ours(claim),
                     claim["verdict"], command, f"{sum(record['minutes']):.0f}")
            lines.append(row_of(cells))
    for file, record in kept.items():
        lines += ["", f"### {file}", "", *details(record)]
    return "\n".join(lines) + "\n"


def details(record):
    """The lines of a record: what made it, and every comparison."""
    versions, seeds = record["versions"], record["seeds"]
    lines = [*wrap(f"{record['paper']}.", 110),
             f"Preset {record['preset']}, commit {versions['commit']}, torch {versions['torch']},",
             f"{record['machine']['processor']}, {record['machine']['threads']} threads.", "",
             f"| comparison | {' | '.join(f'seed {seed}' for seed in seeds)} | verdict |",
             "|---|" + "---|" * (len(seeds) + 1)]
    for claim in record["results"]:
        lines.append(f"| **{claim['name']}** |{' |' * len(seeds)} **{claim['verdict']}** |")
        lines += [row_of([labelled(row), *map(shown, row["seeds"]), row["verdict"]])
                  for row in claim["comparisons"]]
    return lines


def with_claims(text, folder=RESULTS):
    """results/README.md with its generated part made anew. ValueError without the two marks."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"results/README.md lacks the lines {BEGIN.strip()} and {END.strip()}")
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + generated(folder) + "\n" + END + rest.split(END)[1]


def main(argv=None):
    arguments = sys.argv[1:] if argv is None else argv
    if arguments != ["results"]:
        raise ValueError("give one word: python -m aya_min.experiments_records results")
    path = RESULTS / "README.md"
    write_whole(path, with_claims(path.read_text(encoding="utf-8")))
    print(path)


if __name__ == "__main__":
    guarded(main, "aya_min.experiments_records")
