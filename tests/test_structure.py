"""Model 1 by hand and against a slow loop; grammars read back; the pairs of Bash; the claim on structure."""

import math
import random
import re
from types import SimpleNamespace

import pytest
import torch

from aya_min import grammars, nl2bash, real_text
from aya_min.alignment import EMPTY, SHARES, explained, fit, log_probs, unigrams, words
from aya_min.claims import structure as claims
from aya_min.data import load_examples
from aya_min.experiments import Comparison, Figure, measured
from aya_min.files import dumps, read_bytes, write_jsonl
from aya_min.grammars import LEXICONS, STRUCTURES, Query, is_of, lexicon, queries, texts
from aya_min.held_out import WHOLE
from aya_min.tokenizer import train_tokenizer

# ---- model 1 -----------------------------------------------------------------------------------------------

TOY = [("the house".split(), "das Haus".split()), ("the".split(), "das".split())]


def value_of(table, source, target):
    """t(target | source) of two words; source None: of the empty word."""
    e = EMPTY if source is None else table.sources[source]
    return table.at(torch.tensor([e * len(table.targets) + table.targets[target]])).item()


def test_one_round_of_em_by_hand():
    """All t begin at 1/2. Each word of the first pair then counts 1/3 to each of the, house and the empty
    word, das of the second 1/2 to the and to the empty word: the has 5/6 of das and 1/3 of Haus."""
    table, likelihoods = fit(TOY, rounds=1)
    assert value_of(table, "the", "das") == pytest.approx((5 / 6) / (7 / 6))
    assert value_of(table, "the", "Haus") == pytest.approx((1 / 3) / (7 / 6))
    assert value_of(table, None, "das") == pytest.approx((5 / 6) / (7 / 6))
    assert value_of(table, "house", "das") == pytest.approx(1 / 2)
    assert likelihoods == [pytest.approx(3 * math.log(1 / 2))]


def test_two_pairs_converge_to_the_right_table():
    table, _ = fit(TOY, rounds=500)
    assert value_of(table, "the", "das") == pytest.approx(1, abs=1e-2)
    assert value_of(table, "house", "Haus") == pytest.approx(1, abs=1e-2)
    assert value_of(table, "house", "das") < 1e-2


def slow_round(pairs, t):
    """One round of EM over dicts, with "" as the empty word."""
    counts, totals = {}, {}
    for e, f in pairs:
        for target in f:
            whole = sum(t[source, target] for source in ["", *e])
            for source in ["", *e]:
                part = t[source, target] / whole
                counts[source, target] = counts.get((source, target), 0) + part
                totals[source] = totals.get(source, 0) + part
    return {(source, target): count / totals[source] for (source, target), count in counts.items()}


def drawn(seed, num=30):
    rng = random.Random(seed)
    return [(rng.choices("abcdef", k=rng.randint(0, 4)), rng.choices("uvwxyz", k=rng.randint(1, 5)))
            for _ in range(num)]


def test_em_gives_what_a_slow_loop_gives_and_the_likelihood_never_falls():
    pairs = drawn(0)
    table, likelihoods = fit(pairs, rounds=6)
    num = len({word for _, f in pairs for word in f})
    t = {(source, target): 1 / num for e, f in pairs for source in ["", *e] for target in f}
    for _ in range(6):
        t = slow_round(pairs, t)
    for (source, target), value in t.items():
        assert value_of(table, source or None, target) == pytest.approx(value)
    assert all(a <= b + 1e-9 for a, b in zip(likelihoods, likelihoods[1:]))


def test_log_probs_of_the_fitted_pairs_are_the_likelihood():
    pairs = drawn(1)
    table, _ = fit(pairs, rounds=3)
    _, likelihoods = fit(pairs, rounds=4)
    assert sum(log_probs(table, unigrams(pairs), pairs, 0.0)) == pytest.approx(likelihoods[3])


def test_unknown_words_on_both_sides_by_hand():
    """Three words of two kinds and one place for unknown ones: das has 2 + 1 of 3 + 2 + 1. Of new, the and
    the empty word, new speaks for nothing."""
    unigram = unigrams(TOY)
    assert unigram("das") == pytest.approx(3 / 6) and unigram("Katze") == pytest.approx(1 / 6)
    table, _ = fit(TOY, rounds=1)
    found = log_probs(table, unigram, [(["new", "the"], ["das", "Katze"]), ([], [])], 0.1)
    das = 0.1 / 2 + 0.9 * (5 / 7 + 5 / 7 + 1 / 2) / 3
    unknown = 0.1 / 6 + 0.9 * (1 / 6) / 3
    assert found == [pytest.approx(math.log(das) + math.log(unknown)), 0.0]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_probabilities_of_all_words_sum_to_one(share):
    pairs = drawn(2)
    table, unigram = fit(pairs)[0], unigrams(pairs)
    targets = [*{word for _, f in pairs for word in f}, "unknown"]
    found = log_probs(table, unigram, [(["a", "new", "b"], [word]) for word in targets], share)
    assert torch.tensor(found).exp().sum().item() == pytest.approx(1)


def test_what_is_explained_takes_the_share_that_other_pairs_like_best():
    train, other, pairs = drawn(3), drawn(4), drawn(5)
    plain, mixed = explained(train, other, pairs)
    table, unigram = fit(train)[0], unigrams(train)
    nats = {share: [-value for value in log_probs(table, unigram, pairs, share)] for share in (*SHARES, 1.0)}
    best = min(SHARES, key=lambda share: -sum(log_probs(table, unigram, other, share)))
    assert plain == nats[1.0] and mixed == nats[best]


def test_words_are_runs_of_letters_and_single_signs():
    assert words("find . -name '*.c'") == ["find", ".", "-", "name", "'", "*", ".", "c", "'"]


def test_pairs_without_words_are_refused():
    with pytest.raises(ValueError, match="no word on the side to be explained"):
        fit([(["a"], [])])


# ---- grammars ----------------------------------------------------------------------------------------------

# What a condition in a command is.
CONDITIONS = {"pipes": r"-(?P<attribute>\w+) (?P<value>\w+)",
              "frames": r"(?P<value>\w+) = (?P<attribute>\w+)"}


def read(command, words, structure):
    """The Query of a command; None if it is none of this structure in this lexicon."""
    found = re.fullmatch(STRUCTURES[structure][2], command, re.ASCII)
    numbers = {kind: {token: i for i, (_, token) in enumerate(pairs)}
               for kind, pairs in lexicon(words).items()}
    try:
        conditions = tuple((numbers["attribute"][each["attribute"]], numbers["value"][each["value"]])
                           for each in re.finditer(CONDITIONS[structure], found["conditions"]))
        then = found["then_verb"] and (numbers["verb"][found["then_verb"]],
                                       numbers["attribute"][found["then_attribute"]])
        return Query(numbers["verb"][found["verb"]], numbers["place"][found["place"]], conditions, then)
    except (KeyError, TypeError):               # a token of another kind; no match
        return None


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("number", range(LEXICONS))
def test_a_command_is_read_back_as_its_query_and_as_nothing_else(structure, number):
    for query in queries("train", 200, 0):
        _, command = texts(query, number, structure)
        assert read(command, number, structure) == query and is_of(command, structure)
        for other_words in range(LEXICONS):
            for other in STRUCTURES:
                if (other_words, other) != (number, structure):
                    assert read(command, other_words, other) is None
        assert not any(is_of(command, other) for other in STRUCTURES if other != structure)
        assert read(f"{command} X", number, structure) is None


def test_a_query_in_both_structures_by_hand():
    query = grammars.Query(0, 1, ((2, 3), (4, 5)), (6, 2))
    w = lambda kind, number: f"{kind[0]}{number}"
    assert grammars.ask_pipes(w, query) == "v0 in p1 whose a2 is v3 and a4 is v5 , then v6 by a2"
    assert grammars.command_pipes(w, query) == "v0 p1 -a2 v3 -a4 v5 | v6 -a2"
    asked = "please for v5 of a4 plus for v3 of a2 from p1 do v0 after v6 on a2"
    assert grammars.ask_frames(w, query) == asked
    assert grammars.command_frames(w, query) == "( v6 : a2 ( v3 = a2 ; v5 = a4 @ p1 ) v0 )"


def test_lexicons_and_structures_share_no_word():
    own = [{word for pairs in lexicon(number).values() for pair in pairs for word in pair}
           for number in range(LEXICONS)]
    assert len(own[0]) == len(own[1]) == 2 * sum(grammars.NUM.values()) and not own[0] & own[1]
    of = [set(), set()]
    for found, structure in zip(of, STRUCTURES):
        for query in queries("train", 100, 0):
            for text in texts(query, 0, structure):
                found |= {word.lstrip("-") for word in text.split()} - own[0]
    assert of[0] and of[1] and not of[0] & of[1]


def test_splits_share_no_query_and_seeds_differ():
    train, test = (queries(split, 500, 0) for split in ("train", "test"))
    assert len({*train, *test}) == 1000 and queries("train", 500, 1) != train
    assert queries("train", 500, 0) == train


# ---- the pairs of English and Bash -------------------------------------------------------------------------

def test_the_rule_keeps_short_printable_pairs_once():
    sentences = [" list ", "list", "tab\there", "long", "", "café", "count"]
    commands = ["ls", "ls ", "cat", "x" * 121, "ls", "ls", "wc -l"]
    assert nl2bash.kept(sentences, commands) == [{"prompt": "list", "completion": "ls"},
                                                 {"prompt": "count", "completion": "wc -l"}]
    assert len(nl2bash.kept([str(i) for i in range(50)], ["ls"] * 50, 7)) == 7
    with pytest.raises(ValueError, match="1 sentences and 2 commands"):
        nl2bash.kept(["a"], ["b", "c"])


def test_the_file_is_as_the_rule_says_and_splits_share_no_command():
    parts = {split: nl2bash.rows(split) for split in ("train", "preference", "validation", "test")}
    whole = [(row["prompt"], row["completion"]) for part in parts.values() for row in part]
    assert len(whole) == len(set(whole)) == nl2bash.NUM
    assert all(0 < len(text) <= nl2bash.LONGEST and text.isascii() for pair in whole for text in pair)
    commands = [{row["completion"] for row in part} for part in parts.values()]
    assert sum(map(len, commands)) == len(set().union(*commands))


def test_the_command_writes_a_new_file_and_refuses_one_that_is_there(tmp_path):
    for name, text in (("nl", "list\ncount\n"), ("cm", "ls\nwc -l\n")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    paths = [str(tmp_path / name) for name in ("nl", "cm", "out.jsonl")]
    nl2bash.main(paths)
    rows = [{"prompt": "list", "completion": "ls"}, {"prompt": "count", "completion": "wc -l"}]
    assert read_bytes(tmp_path / "out.jsonl").decode() == "".join(dumps(row) + "\n" for row in rows)
    with pytest.raises(ValueError, match="out.jsonl"):
        nl2bash.main(paths)


def test_translations_pair_two_languages_within_a_split(tmp_path, monkeypatch):
    monkeypatch.setattr(real_text, "FOLDER", tmp_path)
    write_jsonl(tmp_path / "parallel.jsonl", [
        {"id": f"ntrex/{n}", "language": code, "text": f"{code} {n}"}
        for code in ("de", "en", "fr") for n in range(40) if (code, n) != ("de", 0)])
    splits = "train", "preference", "validation", "test"
    parts = [real_text.translations("en", "de", split) for split in splits]
    found = {row["question_id"]: (row["prompt"], row["completion"]) for part in parts for row in part}
    assert found == {f"ntrex/{n}": (f"en {n}", f"de {n}") for n in range(1, 40)}
    assert sum(map(len, parts)) == 39 and all(parts)


# ---- the claim ---------------------------------------------------------------------------------------------

class StandIn(SimpleNamespace):
    """A lab that says what would be trained: a model is the list of what it was trained on."""

    def untrained(self, texts, size):
        return [("start", len(texts), size)]

    def train(self, name, stage, start, rows, **settings):
        return [*start, (rows, settings)]

    def batch_of(self, rows, name):
        return min(32, len(rows))


def lab_of(**more):
    recipe = SimpleNamespace(corpus=12 * 64, eval_count=40, eval_split="validation")
    return StandIn(seed=0, recipe=recipe, module=claims, **more)


def test_arms_differ_in_the_source_alone_and_budgets_are_parts_of_one_training():
    lab, made = lab_of(), {}
    for arm in [*(f"{source}, {budget}" for source in claims.SOURCES for budget in claims.BUDGETS),
                "from scratch"]:
        made[arm] = claims.ARMS[arm](lab)
    for source in claims.SOURCES:
        for budget, num in (("1/16", 4), ("1/4", 16), ("1", 64)):
            start, *parts, (rows, settings) = made[f"{source}, {budget}"]
            assert start == made["from scratch"][0]
            assert (rows, settings) == made["from scratch"][-1]
            assert [row for part, _ in parts for row in part] == claims.source_rows(lab, source)[:num]
    ids = [[row["question_id"] for row in claims.source_rows(lab, source)] for source in claims.SOURCES]
    assert all(each == ids[0] for each in ids)
    assert not set(ids[0]) & {row["question_id"] for row in claims.target_rows(lab, "validation")}


def test_sources_share_with_the_target_what_their_names_say():
    lab = lab_of()
    shown = {source: {word.strip("-") for row in claims.source_rows(lab, source)
                      for word in row["completion"].split() if word.strip("-").isalpha()}
             for source in claims.SOURCES}
    assert shown["lexicon"] == shown["both"] and shown["structure"] == shown["neither"]
    assert not shown["both"] & shown["neither"]
    for source, is_shared in (("both", 1), ("structure", 1), ("lexicon", 0), ("neither", 0)):
        assert all(claims.well_formed("", row["completion"]) == is_shared
                   for row in claims.source_rows(lab, source))


def test_sorted_words_and_another_pair_s_sentence_leave_the_commands_as_they_are():
    lab = lab_of()
    own, some, other = (claims.bash_rows(lab, "train", how) for how in claims.HOW)
    for a, b, c in zip(own, some, other, strict=True):
        assert a["completion"] == b["completion"] == c["completion"]
        assert sorted(a["prompt"].split()) == b["prompt"].split()
    assert sorted(row["prompt"] for row in own) == sorted(row["prompt"] for row in other)
    place = {row["prompt"]: i for i, row in enumerate(own)}
    assert all(place[row["prompt"]] != i for i, row in enumerate(other) if len(place) == len(own))


def test_measures_of_answers_by_hand():
    assert claims.right_words("HIDE BARN -SIZE BIG", "BARN x HIDE HIDE") == 0.5
    assert claims.well_formed("", "A B -C D | E -F") == 1.0 and claims.well_formed("", "A B -C") == 0.0


def values(figure, lab):
    return measured(lab, figure)["value"]


def test_the_longest_pre_training_is_held_against_the_shorter_one_that_other_rows_choose(monkeypatch):
    """Other rows prefer 1/16, although 1/4 is better on those that are reported."""
    found = {("target", "1/16"): 2.0, ("target", "1/4"): 1.0, ("target", "1"): 2.5,
             ("target, others", "1/16"): 1.0, ("target, others", "1/4"): 2.0}
    monkeypatch.setattr(claims, "nats", lambda lab, arm, held_out: [found[held_out, arm.split(", ")[1]]] * 10)
    assert values(claims.longest("neither", claims.BUDGETS, "target"), lab_of()) == pytest.approx(0.5)


def test_shares_of_gains_by_hand(monkeypatch):
    """Without pre-training 5 nats, after the lexicon 3.5, after the target 1: 1.5 less half of 4."""
    found = {"from scratch": 5.0, "lexicon, 1": 3.5, "both, 1": 1.0}
    monkeypatch.setattr(claims, "nats", lambda lab, arm: [found[arm]] * 10)
    figure = Figure("", claims.share_of_gain, "above", 0.0, ())
    assert values(figure, lab_of()) == pytest.approx(-0.5)
    assert measured(lab_of(), figure)["verdict"] == "reversed"


def test_what_sorted_words_keep_by_hand():
    """Of a sentence worth 3 - 1 nats sorted words lose 1.8 - 1: they keep 1.2, which is 0.2 above a half."""
    nats = dict(zip(claims.HOW, (1.0, 1.8, 3.0)))
    lab = lab_of(arm=lambda name: name)
    lab.losses = lambda arm, rows: [nats[arm.removeprefix("bash, ")]] * len(rows)
    assert values(Figure("", claims.kept_when_sorted, "above", 0.0, ()), lab) == pytest.approx(0.2)


def test_the_share_saved_is_resampled_by_question_and_each_set_apart(monkeypatch):
    """a twice and b once: 4 of 10 nats; a alone half, b alone nothing. Sets whose questions are all alike
    have an interval of no width, however unlike the sets."""
    share, drawn = claims.share_saved([("a", 4.0, 2.0), ("a", 4.0, 2.0), ("b", 2.0, 2.0)], 0)
    assert share == pytest.approx(0.4) and {round(float(each), 9) for each in drawn} == {0.0, 0.4, 0.5}
    found = {"bash": [("a", 4.0, 1.0), ("b", 4.0, 1.0)], "german": [(name, 2.0, 1.0) for name in "cdefg"]}
    monkeypatch.setattr(claims, "bash_rows", lambda lab, split: "bash")
    monkeypatch.setattr(claims, "german_rows", lambda lab, split: "german")
    monkeypatch.setattr(claims, "aligned", lambda rows_of, split, limit: found[rows_of(split)])
    less = claims.more_aligned(SimpleNamespace(recipe=SimpleNamespace(eval_split="test")))
    assert less == {"value": 0.25, "ci95": [0.25, 0.25], "num": 7}


def test_the_tokens_by_which_nats_are_summed_are_those_of_the_loss(tmp_path):
    rows = nl2bash.rows("train")[:20]
    tokenizer = train_tokenizer([row["completion"] for row in rows], 320)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    examples = load_examples([tmp_path / "rows.jsonl"], tokenizer, 1000, WHOLE)
    assert ([int(example.mask.sum()) for example in examples]
            == [len(tokenizer.encode_answer(row["completion"])) for row in rows])


def test_every_claim_compares_arms_that_are_there():
    for claim in claims.CLAIMS:
        assert set(claim.arms) <= claims.ARMS.keys()
        assert all(isinstance(c, Figure) or c.held_out in claims.HELD_OUT for c in claim.comparisons)
        if any(isinstance(c, Comparison) for c in claim.comparisons):
            assert claim.name in claims.UNMATCHED
    assert set(claims.UNMATCHED) <= {claim.name for claim in claims.CLAIMS}
