"""The 23 languages of Aya Expanse (section 1 of arXiv 2412.04261), Chinese in both scripts, and how the recipe groups them.

The report trains one model per cluster of related languages and keeps English, Spanish and French in every cluster
(launch blog, "Maximizing Performance through Model Merging"). It does not publish the clusters: these four are ours, by
family first and by region where a family has one member. A user's own grouping comes as a JSON file {name: [codes]}.
"""

import re
from dataclasses import dataclass

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

# Other spellings met in published data (the Aya collection uses ISO 639-3).
ALIASES = {
    "arb": "ar", "ara": "ar", "zho": "zh", "cmn": "zh", "zh-Hans": "zh", "zh-CN": "zh", "zh-TW": "zh-Hant", "ces": "cs", "nld": "nl",
    "eng": "en", "fra": "fr", "deu": "de", "ell": "el", "heb": "he", "iw": "he", "hin": "hi", "ind": "id", "ita": "it", "jpn": "ja",
    "kor": "ko", "pes": "fa", "fas": "fa", "pol": "pl", "por": "pt", "ron": "ro", "rus": "ru", "spa": "es", "tur": "tr", "ukr": "uk", "vie": "vi",
}
ALIASES |= {"Standard Arabic": "ar", "Simplified Chinese": "zh", "Traditional Chinese": "zh-Hant", "Chinese": "zh", "Iranian Persian": "fa"}
ALIASES["other"] = "other"      # what a row without a language counts as; every cluster trains on it
ALIASES |= {language.name: code for code, language in LANGUAGES.items()}


def language_code(name):
    """The code used here for a language as a file spells it, or None: 'fra', 'French', 'fr' -> 'fr'."""
    known = name if name in LANGUAGES else ALIASES.get(name)
    return known or (name if re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*", name) else None)


def home_of(code, known):
    """The code itself, or the nearest language that it is a kind of, if that is in `known`: pt-BR is at home
    where pt is. None if none is."""
    while code and code not in known:
        code = code.rpartition("-")[0]
    return code or None


def cluster_languages(clusters, name, shared=SHARED):
    """The languages that the cluster's model trains on: its own, then the shared ones."""
    return clusters[name] + [code for code in shared if code not in clusters[name]]


def read_clusters(path):
    """{cluster: [language codes]} from a user's JSON file; every language is in one cluster only."""
    clusters = read_json(path)
    seen = {}
    for name, codes in clusters.items():
        if not isinstance(codes, list) or not codes or not all(isinstance(code, str) for code in codes):
            raise ValueError(f"{path}: cluster {name!r} must be a non-empty list of language codes")
        if not name or "/" in name or name.startswith("."):
            raise ValueError(f"{path}: cluster name {name!r} cannot name a folder; use letters, digits and dashes")
        clusters[name] = [language_code(code) or code for code in codes]
        for code in clusters[name]:
            if language_code(code) is None:
                raise ValueError(f"{path}: cluster {name!r} has unknown language {code!r}; give a BCP 47 tag such "
                                 "as sw or pt-BR")
            if code in seen:
                raise ValueError(f"{path}: language {code!r} is in both {seen[code]!r} and {name!r}; leave it in one")
            seen[code] = name
    return clusters
