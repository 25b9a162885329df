"""Make aya_min/profiles/: the counts of character n-grams by which language_id.py tells languages apart.

    python tests/golden/make_profiles.py UDHR_FOLDER        # run from the project's root

UDHR_FOLDER holds udhr_*.xml of the UDHR in XML project (https://github.com/eric-muller/udhr, data/udhr, at
the commit below). The text is resolution 217 A (III) of the UN General Assembly; official documents of the
United Nations are left in the public domain (ST/AI/189/Add.9/Rev.2). The repository states no licence of its
own. The profiles hold counts of n-grams and no text.
"""

import json
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
COMMIT = "f93dd614154c47fc4b85ec03d8d6f1abe97869ef"
SOURCE = f"Universal Declaration of Human Rights; github.com/eric-muller/udhr at {COMMIT}"
LICENCE = "counts of n-grams of UN General Assembly resolution 217 A (III), in the public domain"

# Our code: the project's files. Beyond the 23: neighbours of theirs, and large languages of the same scripts.
FILES = {
    "Arabic": {"ar": ["arb"], "fa": ["pes_1"], "ps": ["pbu"], "ur": ["urd"]},
    "Cyrillic": {"be": ["bel"], "bg": ["bul"], "kk": ["kaz"], "mk": ["mkd"], "ru": ["rus"],
                 "sr": ["srp_cyrl"], "uk": ["ukr"]},
    "Devanagari": {"hi": ["hin"], "mr": ["mar"], "ne": ["nep"]},
    "Latin": {"af": ["afr"], "az": ["azj_latn"], "ca": ["cat"], "cs": ["ces"], "da": ["dan"],
              "de": ["deu_1996"], "en": ["eng"], "es": ["spa"], "et": ["est"], "fi": ["fin"], "fr": ["fra"],
              "gl": ["glg"], "hr": ["hrv"], "hu": ["hun"], "id": ["ind"], "it": ["ita"], "lt": ["lit"],
              "lv": ["lav"], "ms": ["mly_latn"], "nb": ["nob"], "nl": ["nld"], "pl": ["pol"],
              "pt": ["por_PT", "por_BR"], "ro": ["ron_2006"], "sk": ["slk"], "sl": ["slv"], "sq": ["als"],
              "sv": ["swe"], "sw": ["swh"], "tl": ["tgl"], "tr": ["tur"], "vi": ["vie"]},
}


def text_of(path):
    """The titles and paragraphs of one version of the declaration."""
    parts = ElementTree.parse(path).getroot().iter()
    return "\n".join(part.text or "" for part in parts if part.tag.endswith(("}para", "}title")))


def profile(code, script, texts, names):
    from aya_min.language_id import LEAST_COUNT, MAX_GRAM, grams_of, words_of
    words = [word for text in texts for word, of in words_of(text) if of == script]
    counts = Counter(gram for word in words for gram in grams_of(word))
    totals = [sum(n for gram, n in counts.items() if len(gram) == size + 1) for size in range(MAX_GRAM)]
    grams = defaultdict(list)
    for gram, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if n >= LEAST_COUNT:
            grams[n].append(gram)
    return {"language": code, "script": script, "source": SOURCE, "files": names, "licence": LICENCE,
            "letters": sum(map(len, words)), "totals": totals,
            "grams": {str(n): " ".join(some) for n, some in grams.items()}}


def main(folder):
    out = ROOT / "aya_min" / "profiles"
    out.mkdir(exist_ok=True)
    for script, codes in FILES.items():
        for code, names in codes.items():
            names = [f"udhr_{name}.xml" for name in names]
            made = profile(code, script, [text_of(Path(folder) / name) for name in names], names)
            text = json.dumps(made, ensure_ascii=False, indent=0)
            (out / f"{code}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
