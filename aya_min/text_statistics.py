"""Statistics of answers by language: tokens, lexical diversity, share cut. The arbitrage paper (arXiv
2408.14960) reports such of each route's data; a reward route tends to choose longer answers.

Words are runs of letters, marks and digits in lower case; apostrophes and hyphens separate them. In scripts
without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) each character with its marks counts as a word,
so that their diversity is that of characters and must not be compared with other languages'.
"""

import re
import unicodedata

from .rows import is_cut

FACTOR = 0.72       # the type-token ratio below which a factor of MTLD ends (McCarthy and Jarvis, 2010)
# Thai, Lao, Burmese, Khmer, kana, Han.
NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff" \
            "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
# Marks above and below of Thai, Lao, Burmese, Khmer and kana belong to the character before them.
MARKS = "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece\u102b-\u103e\u1056-\u1059" \
        "\u17b4-\u17d3\u3099\u309a"
WORD = re.compile(f"[{NO_SPACES}][{MARKS}]*|[^\\s{NO_SPACES}]+")


class Separators(dict):
    """A table for str.translate that makes a space of every character but letters, marks and digits."""

    def __missing__(self, number):
        self[number] = number if unicodedata.category(chr(number))[0] in "LMN" else " "
        return self[number]


SEPARATORS = Separators()


def words_of(text):
    """The words of a text, in lower case."""
    return WORD.findall(unicodedata.normalize("NFC", text).casefold().translate(SEPARATORS))


def factors(words):
    """The number of factors in a list of words: runs after which the share of different words falls below
    FACTOR. The rest at the end counts for the part of a factor that its ratio has fallen."""
    count, types, size = 0, set(), 0
    for word in words:
        types.add(word)
        size += 1
        if len(types) / size < FACTOR:
            count, types, size = count + 1, set(), 0
    return count + ((1 - len(types) / size) / (1 - FACTOR) if size else 0)


def mtld(words):
    """The measure of textual lexical diversity (McCarthy and Jarvis, 2010): the mean number of words in a
    factor, forwards and backwards averaged. None if no word is repeated, as no factor then ends."""
    found = [factors(words), factors(words[::-1])]
    return None if not all(found) else sum(len(words) / each for each in found) / 2


def distinct_2(texts):
    """Different pairs of neighbouring words as a share of all such pairs (Li et al., 2016) in lists of words.
    It falls with the number of texts, so that only equal numbers may be compared. None without a pair."""
    pairs = [pair for words in texts for pair in zip(words, words[1:])]
    return len(set(pairs)) / len(pairs) if pairs else None


def text_statistics(rows, count_tokens):
    """{language: {"answers", "tokens", "mtld", "distinct_2", "cut"}} of rows with a "completion", and "all".

    tokens: the mean of count_tokens(text). mtld: of a language's answers in their order as one text, as a
    single answer is often shorter than a factor. cut: the share that ended at the limit. In "all" mtld and
    distinct_2 are means over the languages.
    """
    by_language = {}
    for row in rows:
        by_language.setdefault(row.get("language") or "other", []).append(row)
    found = {code: statistics_of(some, count_tokens) for code, some in sorted(by_language.items())}
    whole = {"answers": len(rows)}
    for name in ("tokens", "cut"):
        whole[name] = sum(each["answers"] * each[name] for each in found.values()) / max(1, len(rows))
    for name in ("mtld", "distinct_2"):
        values = [each[name] for each in found.values() if each[name] is not None]
        whole[name] = sum(values) / len(values) if values else None
    return {**found, "all": whole}


def statistics_of(rows, count_tokens):
    texts = [words_of(row["completion"]) for row in rows]
    return {"answers": len(rows), "tokens": sum(count_tokens(row["completion"]) for row in rows) / len(rows),
            "mtld": mtld([word for words in texts for word in words]), "distinct_2": distinct_2(texts),
            "cut": sum(map(is_cut, rows)) / len(rows)}


def statistics_table(found):
    """Text lines of `text_statistics`."""
    def shown(value, digits):
        return "-" if value is None else f"{value:.{digits}f}"
    lines = [f"{'language':<10}{'answers':>8}{'tokens':>8}{'MTLD':>8}{'distinct-2':>12}{'cut':>7}"]
    for code, each in found.items():
        lines.append(f"{code:<10}{each['answers']:8}{each['tokens']:8.1f}{shown(each['mtld'], 1):>8}"
                     f"{shown(each['distinct_2'], 3):>12}{each['cut']:7.1%}")
    return lines
