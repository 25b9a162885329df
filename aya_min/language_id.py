"""Which language a text is in: scripts first, then character n-grams, without a dependency.

The script that most letters are in decides what may be answered. A script that one language of the table
writes is its answer. Latin, Cyrillic, Arabic and Devanagari have a naive Bayes over the n-grams (1 to 4
letters) of each word (Cavnar and Trenkle, 1994, with log-probs in place of ranks). Chinese in both scripts
and Japanese are told apart by kana and by the standards that hold their characters: GB 2312, Big 5, JIS X
0208.

The counts stand in profiles/CODE.json and come from the Universal Declaration of Human Rights alone; each
file names its source (tests/golden/make_profiles.py made them). SCALE, PRIOR, SWITCH and EXPECTED were chosen
on sentences of Tatoeba, which are in no profile; LATIN came after a look at news in Chinese (NTREX).

Known gaps: a language without a profile is taken for its nearest neighbour. Malay is mostly taken for
Indonesian at any length, Galician for Portuguese at 30 characters; Slovak, Afrikaans, Danish and Norwegian
need more than a short sentence. Transliterated text is not recognised.

    python -m aya_min.language_id --confusion F.jsonl       # rows with a text and its language
    python -m aya_min.language_id --text "Dobrý den"
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path

import numpy as np

from .command import Parser, guarded, is_spare_rank, number, printable
from .files import check_out, dumps, read_json, write_new
from .languages import LANGUAGES, home_language
from .rows import read_jsonl

MAX_GRAM = 4            # letters; 5 and 6 add no accuracy with ten thousand letters a language
LEAST_COUNT = 2         # of an n-gram in the source; the rest is half of a profile and adds little
ALPHA = 0.5             # added to each count
SCALE = 0.15            # of summed log-probs, since n-grams overlap: confidence is then accuracy, on Tatoeba
PRIOR = 2.0             # nats by which a language beyond the 23 must be better to be answered
LEAST_CONFIDENCE = 0.3  # below it nothing is answered, as in the Language Confusion Benchmark
LEAST_LETTERS = 3       # of text that is too short to tell
SWITCH = 6.0            # nats that a change of language inside a text costs
EXPECTED = 2.0          # nats by which another language must be likelier than the one that a text should have

# The letters and marks of each script, as in a regular expression's class, after NFKC and without digits.
SCRIPTS = {
    "Latin": "A-Za-zªºÀ-ÖØ-öø-ʯ\u0300-\u036fḀ-ỿ",
    "Cyrillic": "Ѐ-ҁ\u0483-\u0487Ҋ-ԯ",
    "Greek": "Ͱ-ͷͻ-ͽΆΈ-Ͽἀ-ῼ",
    "Han": "々〇㐀-䶿一-鿿\U00020000-\U0003134f",
    "Kana": "ぁ-ゖァ-ヺー",
    "Hangul": "ᄀ-ᇿㄱ-ㆎ가-힣",
    "Arabic": "\u0620-\u065f\u066e-\u06d3\u06d5-\u06dc\u06df-\u06e8\u06ea-\u06ef\u06fa-\u06ff\u0750-\u077f"
              "\u08a0-\u08ff",
    "Hebrew": "\u0591-\u05bd\u05bf-\u05c2\u05c4-\u05c7\u05d0-\u05f4",
    "Devanagari": "\u0900-\u0963\u0971-\u097f",
    "Bengali": "\u0980-\u09e3\u09f0-\u09f1", "Gurmukhi": "\u0a01-\u0a5e\u0a70-\u0a75",
    "Gujarati": "\u0a81-\u0ae3", "Oriya": "\u0b01-\u0b63", "Tamil": "\u0b82-\u0bd7",
    "Telugu": "\u0c00-\u0c63", "Kannada": "\u0c80-\u0ce3", "Malayalam": "\u0d00-\u0d63",
    "Sinhala": "\u0d81-\u0df3", "Thai": "\u0e01-\u0e3a\u0e40-\u0e4e", "Lao": "\u0e81-\u0ece\u0edc-\u0edf",
    "Tibetan": "\u0f00\u0f40-\u0fbc", "Burmese": "\u1000-\u103f\u1050-\u109f", "Georgian": "Ⴀ-ჿᲐ-Ჿ",
    "Ethiopic": "\u1200-\u135a", "Khmer": "\u1780-\u17d3", "Armenian": "Ա-և",
}
WORD = re.compile("|".join(f"(?P<{name}>[{letters}]+)" for name, letters in SCRIPTS.items())
                  + r"|(?P<other>[^\W\d_]+)")

# The language of a script that one language of this table writes; Chinese and Japanese stand in EAST.
ALONE = {"Greek": "el", "Hangul": "ko", "Hebrew": "he", "Bengali": "bn", "Gurmukhi": "pa", "Gujarati": "gu",
         "Oriya": "or", "Tamil": "ta", "Telugu": "te", "Kannada": "kn", "Malayalam": "ml", "Sinhala": "si",
         "Thai": "th", "Lao": "lo", "Tibetan": "bo", "Burmese": "my", "Georgian": "ka", "Ethiopic": "am",
         "Khmer": "km", "Armenian": "hy"}

# Letters of Latin script that say as much as one letter, from the lengths of the Declaration's versions.
# Beside another script Latin counts half: names and terms stand in texts of every script.
WEIGHT = {"Han": 3.0, "Kana": 2.0, "Hangul": 2.5}
LATIN = 0.5
UNSPACED = {"Han", "Kana", "Thai", "Lao", "Tibetan", "Burmese", "Khmer"}    # written without spaces

EAST = {"zh": "gb2312", "zh-Hant": "big5", "ja": "shift_jis"}       # the standards of their characters
RARE = np.log(0.01)             # a character outside the standard
KANA = np.log([0.001, 0.001, 0.5])      # half of Japanese letters; Chinese quotes one now and then
KANJI = np.log([1.0, 1.0, 0.5])

GROUP = {"Han": "East", "Kana": "East"}         # scripts that are scored together

LENGTHS = (10, 30, 100)                                             # characters, of the confusion matrix
TEXTS = ("text", "completion", "targets")                           # the keys whose text it reads
CLOSE = (("cs", "sk"), ("id", "ms"), ("ru", "uk"), ("es", "pt"), ("nl", "af"))      # hard to tell apart


# ---- profiles ----------------------------------------------------------------------------------------------

def words_of(text):
    """[(word in lower case, its script), ...]: the runs of letters of one script."""
    text = unicodedata.normalize("NFKC", text).lower()
    return [(found[0], found.lastgroup) for found in WORD.finditer(text)]


def grams_of(word):
    """The n-grams of a word: its letters, and 2 to MAX_GRAM characters of the word between two "_"."""
    edged = f"_{word}_"
    return list(word) + [edged[start : start + size] for size in range(2, MAX_GRAM + 1)
                         for start in range(len(edged) - size + 1)]


@lru_cache(maxsize=1)
def profiles():
    """{script: (codes, {gram: row}, log-probs (rows, codes))}; the codes of LANGUAGES come first."""
    found = defaultdict(dict)
    for path in sorted((Path(__file__).parent / "profiles").glob("*.json")):
        data = read_json(path)
        counts = {gram: int(n) for n, grams in data["grams"].items() for gram in grams.split(" ")}
        found[data["script"]][data["language"]] = counts, data["totals"]
    return {script: log_probs(some) for script, some in found.items()}


def log_probs(some):
    """(codes, {gram: row}, log p(gram | code), among the grams of its length). some: {code: (counts,
    totals)}."""
    codes = [code for code in LANGUAGES if code in some] + sorted(some.keys() - LANGUAGES.keys())
    index = {gram: i for i, gram in enumerate(sorted(set().union(*(counts for counts, _ in some.values()))))}
    sizes = np.array([len(gram) - 1 for gram in index])                             # (rows,)
    kinds = np.bincount(sizes, minlength=MAX_GRAM)
    table = np.empty((len(index), len(codes)))
    for column, code in enumerate(codes):
        counts, totals = some[code]
        seen = np.zeros(len(index))
        seen[[index[gram] for gram in counts]] = list(counts.values())
        table[:, column] = np.log((seen + ALPHA) / (np.array(totals) + ALPHA * kinds)[sizes])
    return codes, index, table


@lru_cache(maxsize=1)
def known():
    """The codes that can be answered, those of LANGUAGES first."""
    codes = {code for some, _, _ in profiles().values() for code in some} | set(ALONE.values()) | set(EAST)
    return [code for code in LANGUAGES if code in codes] + sorted(codes - LANGUAGES.keys())


def profile_of(language):
    """The code that answers for a row's language (pt-BR: pt), or None without one."""
    return home_language(language, known())


# ---- one text ----------------------------------------------------------------------------------------------

@lru_cache(maxsize=1 << 16)
def word_scores(word, script):
    """The log-likelihood of a word in each of its script's codes, (codes,), in nats as SCALE makes them."""
    if script == "East":
        return sum(character_scores(character) for character in word)
    _, index, table = profiles()[script]
    rows = [row for row in map(index.get, grams_of(word)) if row is not None]
    return SCALE * table.take(rows, axis=0).sum(axis=0) if rows else np.zeros(table.shape[1])


@lru_cache(maxsize=1 << 14)
def character_scores(character):
    """The log-likelihood of a Han character or a kana in each code of EAST, (3,)."""
    if WORD.match(character).lastgroup == "Kana":
        return KANA
    return KANJI + [0.0 if is_in(character, standard) else RARE for standard in EAST.values()]


def is_in(character, standard):
    try:
        return bool(character.encode(standard))
    except UnicodeEncodeError:
        return False


@lru_cache(maxsize=None)
def codes_of(group):
    """(codes, log priors) of a group of scripts."""
    if group == "East":
        codes = list(EAST)
    else:
        codes = profiles()[group][0] if group in profiles() else [ALONE[group]]
    return codes, np.array([0.0 if code in LANGUAGES else -PRIOR for code in codes])


def posterior(text):
    """({code: probability}, letters): of the script that most letters are in, times its share of the letters.

    Empty without letters of a script that is known. letters: weighed by WEIGHT.
    """
    letters, of = {}, defaultdict(list)
    for word, script in words_of(text):
        group = GROUP.get(script, script)
        letters[group] = letters.get(group, 0.0) + WEIGHT.get(script, 1.0) * len(word)
        of[group].append(word)
    size = sum(letters.values())
    if not letters.keys() - {"other"}:
        return {}, size
    letters["Latin"] = LATIN * letters.get("Latin", 0.0)
    group = max(letters.keys() - {"other"}, key=lambda name: (letters[name], name))
    codes, scores = codes_of(group)
    if len(codes) > 1:
        scores = sum((word_scores(word, group) for word in of[group]), scores)
    chances = np.exp(scores - scores.max())
    chances *= letters[group] / sum(letters.values()) / chances.sum()
    return dict(zip(codes, chances.tolist())), size


def identify(text):
    """(code, confidence in [0, 1]); the code is None if there are no letters or too few to tell.

    Of codes that are equally likely, the first in the order of LANGUAGES is answered: characters that both
    Chinese scripts have are zh.
    """
    chances, letters = posterior(text)
    code = max(chances, key=chances.get, default=None)
    return (code if can_tell(chances, letters) else None), chances.get(code, 0.0)


def can_tell(chances, letters):
    return letters >= LEAST_LETTERS and max(chances.values(), default=0.0) > LEAST_CONFIDENCE


def is_in_language(text, code):
    """Whether a text that should be in the language of a code is: no other is EXPECTED nats likelier."""
    chances, letters = posterior(text)
    return can_tell(chances, letters) and chances.get(code, 0.0) * math.exp(EXPECTED) >= max(chances.values())


def identify_words(text):
    """[(word, code or None), ...]: the likeliest languages in sequence (Viterbi); a change costs SWITCH.

    A word of another script is in that script's likeliest language. None: letters of an unknown script.
    """
    words = words_of(text)
    codes, best, back = known(), None, []
    prior = np.array([0.0 if code in LANGUAGES else -PRIOR for code in codes])
    for word, script in words:
        group = GROUP.get(script, script)
        if group == "other":
            back.append(None)
            continue
        scores = np.full(len(codes), -1e6)                                          # (codes,)
        places, _ = places_of(group)
        scores[places] = word_scores(word, group) if len(places) > 1 else 0.0
        if best is None:
            came, best = np.arange(len(codes)), prior + scores
        else:
            moved = best.max() - SWITCH + prior
            came = np.where(best >= moved, np.arange(len(codes)), best.argmax())
            best = np.maximum(best, moved) + scores
        back.append(came)
    place, seen = None if best is None else int(best.argmax()), []
    for came in reversed(back):
        seen.append(None if came is None else codes[place])
        place = place if came is None else int(came[place])
    return [(word, code) for (word, _), code in zip(words, reversed(seen), strict=True)]


@lru_cache(maxsize=None)
def places_of(group):
    """(where the codes of a group stand in `known`, the codes)."""
    codes, _ = codes_of(group)
    return [known().index(code) for code in codes], codes


# ---- the confusion matrix ----------------------------------------------------------------------------------

def first(text, length):
    """The first `length` characters of a text, without a last word that is cut; None if it is shorter."""
    if len(text) < length:
        return None
    for found in WORD.finditer(text):
        if found.start() < length < found.end() and found.lastgroup not in UNSPACED:
            return text[: found.start()]
    return text[:length]


def confusion(rows, lengths=LENGTHS):
    """How often each language is taken for each: {"lengths": {length: {code: {seen: texts}}}, and what was
    left out: "too short" {length: texts}, "no language" rows, "no profile" {language: rows}}.

    rows: [(where, row), ...] with a language and a text (one of TEXTS). What is not answered is "none".
    ValueError for a row without a text, or if no row is left.
    """
    found = {length: {} for length in lengths}
    short, without, unknown = Counter(), 0, Counter()
    for where, row in rows:
        text = next((row[key] for key in TEXTS if isinstance(row.get(key), str)), None)
        if text is None:
            raise ValueError(f"{where}: no text; give a row one of {', '.join(TEXTS)}")
        language = row.get("language")
        code = profile_of(language) if language else None
        if code is None:
            without += not language
            unknown.update([language] if language else [])
            continue
        for length in lengths:
            if (cut := first(" ".join(text.split()), length)) is None:
                short[length] += 1
            else:
                found[length].setdefault(code, Counter())[identify(cut)[0] or "none"] += 1
    if not any(found.values()):
        raise ValueError(f"no text of {min(lengths)} characters in a language with a profile: give rows with "
                         "a language and a text")
    return {"lengths": found, "too short": short, "no language": without, "no profile": unknown}


def accuracies(found):
    """{code: percent of its texts that are answered right}, in the order of `known`. found: {code: {seen:
    texts}}."""
    return {code: 100 * found[code][code] / sum(found[code].values()) for code in known() if code in found}


def mean(values):
    return f"{sum(values) / len(values):8.1f}" if values else f"{'-':>8}"


def confusion_table(result):
    """The terminal's table: accuracy of each language at each length, the close pairs, what was left out."""
    of = {length: accuracies(found) for length, found in result["lengths"].items()}
    lines = [f"{'right, % of texts, at':24}" + "".join(f"{length:>8}" for length in of) + "  characters"]
    for name, wanted in (("mean of the 24 codes", LANGUAGES), ("mean of all", known())):
        lines.append(f"{name:24}" + "".join(mean([rate for code, rate in rates.items() if code in wanted])
                                            for rates in of.values()))
    for code in known():
        if any(code in rates for rates in of.values()):
            texts = max(sum(found.get(code, {}).values()) for found in result["lengths"].values())
            rates = "".join(f"{rate[code]:8.1f}" if code in rate else f"{'-':>8}" for rate in of.values())
            others = Counter()
            for found in result["lengths"].values():
                others.update({seen: n for seen, n in found.get(code, {}).items() if seen != code})
            most = sorted(others.items(), key=lambda item: (-item[1], item[0]))[:3]
            lines.append(f"{code:8}{texts:9} texts {rates}  taken for: "
                         + (" ".join(f"{seen} {n}" for seen, n in most) or "-"))
    for pair in CLOSE:
        for code, other in (pair, pair[::-1]):
            taken = [f"{100 * found[code][other] / sum(found[code].values()):8.1f}" if code in found
                     else f"{'-':>8}" for found in result["lengths"].values()]
            lines.append(f"{f'{code} taken for {other}':24}" + "".join(taken))
    lines.append("left out, too short:    " + "".join(f"{result['too short'][length]:8}" for length in of))
    lines.append(f"left out, no language: {result['no language']}; no profile: "
                 + (", ".join(f"{code} {n}" for code, n in sorted(result["no profile"].items())) or "0"))
    return printable("\n".join(lines))


def main(argv=None):
    parser = Parser(prog="aya_min.language_id", description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--confusion", metavar="F.jsonl", help="rows with a text or completion and a language")
    what.add_argument("--text", type=str, help="print the text's language and the confidence")
    parser.add_argument("--lengths", nargs="+", type=number(int, "[1, 100000]"), default=LENGTHS,
                        help="characters that are read of each text (default: 10 30 100)")
    parser.add_argument("--out", help="JSON file for the whole matrix; must not exist")
    args = parser.parse_args(argv)
    if is_spare_rank():
        return
    if args.text is not None:
        if args.out:
            raise ValueError("--out is for --confusion; leave it out with --text")
        code, confidence = identify(args.text)
        print(f"{code or 'not told'} {confidence:.2f}")
        return
    if args.out:
        check_out(args.out)
    result = confusion(read_jsonl(args.confusion), args.lengths)
    if args.out:
        write_new({args.out: dumps(result, indent=1) + "\n"})
    print(confusion_table(result))


if __name__ == "__main__":
    guarded(main, "aya_min.language_id")
