"""The 23 languages of Aya Expanse (arXiv 2412.04261, section 1), Chinese in both scripts, and their clusters.

The report trains one model per cluster of related languages and keeps English, Spanish and French in every
cluster (launch blog, "Maximizing Performance through Model Merging"). It does not publish the clusters. These
four are ours: by family first, and by region where a family has one member. A user's own clusters come as a
JSON file {name: [codes]}.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from . import iso639
from .files import read_json


@dataclass(frozen=True)
class Language:
    code: str       # ISO 639-1, with the script where it matters (zh-Hant)
    name: str
    script: str
    family: str


LANGUAGES = {code: Language(code, name, script, family) for code, name, script, family in [
    ("ar", "Arabic", "Arabic", "Semitic"),
    ("zh", "Chinese (simplified)", "Han", "Sinitic"),
    ("zh-Hant", "Chinese (traditional)", "Han", "Sinitic"),
    ("cs", "Czech", "Latin", "Slavic"),
    ("nl", "Dutch", "Latin", "Germanic"),
    ("en", "English", "Latin", "Germanic"),
    ("fr", "French", "Latin", "Romance"),
    ("de", "German", "Latin", "Germanic"),
    ("el", "Greek", "Greek", "Hellenic"),
    ("he", "Hebrew", "Hebrew", "Semitic"),
    ("hi", "Hindi", "Devanagari", "Indo-Iranian"),
    ("id", "Indonesian", "Latin", "Austronesian"),
    ("it", "Italian", "Latin", "Romance"),
    ("ja", "Japanese", "Japanese", "Japonic"),
    ("ko", "Korean", "Hangul", "Koreanic"),
    ("fa", "Persian", "Arabic", "Indo-Iranian"),
    ("pl", "Polish", "Latin", "Slavic"),
    ("pt", "Portuguese", "Latin", "Romance"),
    ("ro", "Romanian", "Latin", "Romance"),
    ("ru", "Russian", "Cyrillic", "Slavic"),
    ("es", "Spanish", "Latin", "Romance"),
    ("tr", "Turkish", "Latin", "Turkic"),
    ("uk", "Ukrainian", "Cyrillic", "Slavic"),
    ("vi", "Vietnamese", "Latin", "Austroasiatic"),
]}

SHARED = ["en", "es", "fr"]     # in every cluster (launch blog)

CLUSTERS = {                    # ours; the shared languages are added by `cluster_languages`
    "west-europe": ["it", "pt", "ro", "de", "nl", "el"],
    "slavic": ["cs", "pl", "ru", "uk"],
    "west-asia": ["ar", "he", "fa", "tr", "hi"],
    "east-asia": ["zh", "zh-Hant", "ja", "ko", "vi", "id"],
}

# ---- the codes and names that files give a language --------------------------------------------------------

# BCP 47, section 2.1: language, extended language, script, region, variants, extensions, private use.
TAG = re.compile(r"([a-z]{2,3})(?:-([a-z]{3}))?(?:-([a-z]{4}))?(?:-([a-z]{2}|[0-9]{3}))?"
                 r"((?:-(?:[a-z0-9]{5,8}|[0-9][a-z0-9]{3}))*(?:-[0-9a-wyz](?:-[a-z0-9]{2,8})+)*"
                 r"(?:-x(?:-[a-z0-9]{1,8})+)?)")
PRIVATE = re.compile("x(?:-[a-z0-9]{1,8})+")
EXTENDED = ("ar", "kok", "lv", "ms", "sgn", "sw", "uz", "zh")       # may stand before a code: zh-yue is yue
# The registry gives no code for zh-min, which is not Minangkabau.
GRANDFATHERED = {"art-lojban": "jbo", "en-gb-oed": "en-gb-oxendict", "i-ami": "ami", "i-bnn": "bnn",
                 "i-hak": "hak", "i-klingon": "tlh", "i-lux": "lb", "i-navajo": "nv",
                 "i-pwn": "pwn", "i-tao": "tao", "i-tay": "tay", "i-tsu": "tsu", "no-bok": "nb",
                 "no-nyn": "nn", "sgn-be-fr": "sfb", "sgn-be-nl": "vgt", "sgn-ch-de": "sgg",
                 "zh-guoyu": "zh", "zh-hakka": "hak", "zh-min": "", "zh-min-nan": "nan", "zh-xiang": "hsn"}
CHINESE = {"cn": "hans", "sg": "hans", "my": "hans", "tw": "hant", "hk": "hant", "mo": "hant"}


def plain_name(text):
    """A name without case, accents, apostrophes and the brackets of ISO 639, as in Malay (macrolanguage)."""
    text = re.sub(r"\((macrolanguage|individual language|[^()]*[0-9][^()]*)\)", "", text)
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return " ".join(re.sub("[-_]", " ", re.sub("['`\u2019\u02bc]", "", text)).casefold().split())


def entries(text):
    return [entry.split() for entry in text.replace("\n", " ").split(";")]


def read_table():
    """The tables of iso639: (code to the code used here, plain name to code, two-letter codes, scripts)."""
    codes, names, two_letters = dict(entries(iso639.ALIASES)), {}, set()
    for code, *rest in entries(iso639.LANGUAGES) + entries(iso639.NAMES):
        if len(code) == 2 and len(rest[0]) == 3 and rest[0].islower():
            two_letters.add(code)
            codes[rest.pop(0)] = code
        names |= {plain_name(name): code for name in " ".join(rest).split("|")}
    names |= {plain_name(language.name): code for code, language in LANGUAGES.items()}
    scripts = {code: script.lower() for script, *some in entries(iso639.SCRIPTS) for code in some}
    return codes, names, two_letters, scripts


SPELLINGS = "give a BCP 47 tag (pt-BR), an ISO 639 code (fr, fra) or an English name (French)"
CODES, NAMES, TWO_LETTERS, SCRIPTS = read_table()


def code_of_name(text):
    """The code of an English name, or None. ISO 639 also writes "Spanish; Castilian" and "Greek, Modern"."""
    if ";" in text:
        codes = {language_code(part) for part in text.split(";")}
        if None not in codes and len(codes) > 1:                # Dutch; Flemish: nl, nl-BE
            codes = {re.sub("-[A-Z]{2}$", "", code) for code in codes}
        return codes.pop() if len(codes) == 1 else None
    name = plain_name(text)
    first, _, last = name.partition(", ")
    return NAMES.get(name) or NAMES.get(f"{last} {first}")


@cache
def language_code(text):
    """The code used here for a language as a file spells it, or None: 'fra', 'French', 'fr_Latn' -> 'fr'.

    The text may be any BCP 47 tag, ISO 639 code or English name. A two-letter code must exist; a three-letter
    code is taken as it is. A region is kept (pt-BR), except for Chinese, where it only tells the script. A
    script is kept if the language is usually written in another.
    """
    tag = text.strip().replace("_", "-").lower()
    if PRIVATE.fullmatch(tag):
        return tag
    parts = TAG.fullmatch(GRANDFATHERED.get(tag, tag))
    if not parts:
        return code_of_name(text)
    language, extended, script, region, rest = parts.groups()
    exists = len(language) == 3 or language in TWO_LETTERS or language in CODES
    if not exists or (extended and language not in EXTENDED):
        return code_of_name(text)
    code = extended or language
    code = CODES.get(code, code)
    code, _, more = code.partition("-")                         # sh became sr-Latn, cnr sr-ME
    script = script or (more.lower() if len(more) == 4 else None)
    region = region or (more.lower() if len(more) == 2 else None)
    if code == "zh" and region in CHINESE:
        script, region = script or CHINESE[region], None
    if script == SCRIPTS.get(code, "latn") or (code, script) == ("ko", "hang"):
        script = None
    return "-".join(filter(None, (code, script and script.title(), region and region.upper()))) + rest


def home_language(code, known):
    """The code itself or, without its last parts, the one that is in `known` (pt-BR: pt), else None."""
    while code and code not in known and "-" in code:
        code = code.rpartition("-")[0]
    return code if code and code in known else None


# ---- clusters ----------------------------------------------------------------------------------------------

def cluster_languages(clusters, name, shared=SHARED):
    """The languages that the cluster's model trains on: its own come first, then the shared ones."""
    return clusters[name] + [code for code in shared if code not in clusters[name]]


def home_clusters(clusters):
    """{language: its cluster}; the shared languages have "shared"."""
    return {code: "shared" for code in SHARED} | {code: name for name in clusters for code in clusters[name]}


def read_clusters(path):
    """{cluster: [language codes]} from a user's JSON file. No language may be in two clusters."""
    clusters = read_json(Path(path), "give a JSON object of name -> list of languages")
    if not all(isinstance(codes, list) and codes for codes in clusters.values()):
        raise ValueError(f"{path}: clusters must be a JSON object of name -> non-empty list of languages")
    if not clusters:
        raise ValueError(f"{path}: no cluster; give a JSON object of name -> list of languages")
    seen = {}
    for name, codes in clusters.items():
        if not name or "/" in name or name.startswith("."):
            raise ValueError(f"{path}: cluster name {name!r} cannot name a folder; use letters, digits and "
                             "dashes")
        for i, text in enumerate(codes):
            code = language_code(text) if isinstance(text, str) else None
            if code in (None, "other"):
                raise ValueError(f"{path}: cluster {name!r} has unknown language {text!r:.40}; {SPELLINGS}")
            if code in seen:
                raise ValueError(f"{path}: language {code!r} is in both {seen[code]!r} and {name!r}; leave "
                                 "it in one")
            seen[code], codes[i] = name, code
    return clusters
