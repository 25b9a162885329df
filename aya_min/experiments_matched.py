"""Matched conditions: compared arms share start, steps, tokens and tuning, or the claim says why not.

"On Scientific Debt in NLP" (arXiv 2306.02870) asks for one difference at a time. A record holds each arm's
start, steps and tokens. Compared are the two arms of a Comparison and the `pairs` of a Figure; one that asks
for two arms and names none is refused (experiments_records.py). A claim file holds TUNED, {arm: settings
tried for it alone} (an arm without an entry has one), and UNMATCHED, {claim: why its arms differ}. A record
without the reason is refused.
"""

STEPS, TOKENS = 0.01, 0.1           # what may differ, as a share of the larger of two numbers


def differences(a, b):
    """What two arms {"start", "steps", "tokens", "tuned"} differ in, as words. Those that began from new
    weights, merges and arms of older records say no start."""
    apart = lambda key, share: abs(a[key] - b[key]) > share * max(a[key], b[key])
    found = ["start"] if a.get("start") != b.get("start") else []
    found += ["steps"] if apart("steps", STEPS) else []
    found += ["tokens"] if apart("tokens", TOKENS) else []
    return found + (["tuning"] if a.get("tuned", 1) != b.get("tuned", 1) else [])


def unmatched(record, module):
    """{claim: [(arm, arm, [what differs]), ...]} of the claim file's pairs of arms, whichever seed of the
    record shows it. ValueError for an arm that the record does not hold."""
    tuned, found = getattr(module, "TUNED", {}), {}
    names = [claim["name"] for claim in record["results"]]
    for claim in (claim for claim in module.CLAIMS if claim.name in names):
        for pair in dict.fromkeys(pair for c in claim.comparisons for pair in c.pairs):
            differ = set()
            for seed, arms in record["arms"].items():
                if missing := [arm for arm in pair if arm not in arms]:
                    raise ValueError(f"{record['claims']}, claim {claim.name}, seed {seed}: the record does "
                                     f"not say how the arm {missing[0]!r} was trained; let the Figure that "
                                     "names it ask for it, or record an older claim anew")
                a, b = ({**arms[arm], "tuned": tuned.get(arm, 1)} for arm in pair)
                differ |= set(differences(a, b))
            if differ:
                found.setdefault(claim.name, []).append((*pair, sorted(differ)))
    return found


def differing(record, module):
    """{claim: what its arms differ in, and why} in words, for the pages."""
    reasons, said = getattr(module, "UNMATCHED", {}), {}
    for claim, pairs in unmatched(record, module).items():
        what = ", ".join(dict.fromkeys(each for *_, some in pairs for each in some))
        said[claim] = f"Arms differ in {what}: {reasons.get(claim) or 'the claim file gives no reason'}."
    return said


def check_matched(record, module):
    """What `unmatched` finds. ValueError for arms that differ without a reason in UNMATCHED, and for an arm
    that the record does not hold."""
    found, reasons = unmatched(record, module), getattr(module, "UNMATCHED", {})
    for claim, pairs in found.items():
        if not reasons.get(claim):
            a, b, what = pairs[0]
            raise ValueError(f"{record['claims']}, claim {claim}: the arms {a!r} and {b!r} differ in "
                             f"{' and '.join(what)}; match them, or say why in UNMATCHED of the claim file")
    return found
