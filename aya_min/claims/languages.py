"""RLHF Can Speak Many Languages (arXiv 2407.02552): preference data in how many languages, online or offline,
and answers translated from English as what to avoid.

Mixtures. Prompts in English alone, in the paper's five languages and in all 23 (Chinese in both scripts) are
drawn from one source at one total, and ten times as many in all (preset tiny). The teachers answer them and
the arbiter's best is paired with its worst; the three mixtures have equally many pairs. DPO trains on the
pairs, RLOO on their prompts. All start from one model and take the same number of steps of the same number
of prompts, so that more data means more different prompts, not more training. Departures: the pool's worst is
rejected here, not a translation, so that only the languages differ; the world has some 570 English questions
on this split, so that those of the English mixture repeat in another wording; RLOO samples and scores new
answers at each step, so that online is dearer.

Contrast. Three arms prefer the strong student's answer in the language, over (contrast) a weak student's
English answer in translation, (in-language) the weak student's answer in the language, (translated strong)
the strong student's English answer in translation. They share start, prompts and steps. world_translation.py
translates and leaves marks. No student of the recipe has such marks, so that these three start from one that
has: the SFT data of the others, but half of the answers are the strong student's English ones, translated.
The oracle does not know the sentences of a translation and grades them 1 at most; "apart" is the grade of the
same answer without its marks. English, which has no marks, is left out.
"""

import random

from ..arbitrage import candidates_from
from ..experiments import Claim, Comparison
from ..languages import LANGUAGES
from ..mixture import mix
from ..preferences import best_worst, contrast_pairs
from ..world_oracle import grade_apart, naturalness
from ..world_translation import in_english, translated

PAPER = "RLHF Can Speak Many Languages, arXiv 2407.02552"
MINUTES = 11

FIVE = ("en", "vi", "de", "tr", "pt")
MIXTURES = {"one": ("en",), "five": FIVE, "all": None, "large": None}
NOT_ENGLISH = tuple(code for code in LANGUAGES if code != "en")
UNSEEN = tuple(code for code in LANGUAGES if code not in FIVE)


# ---- mixtures ----------------------------------------------------------------------------------------------

def prompts(lab, name):
    """The prompts of a mixture. All are drawn from one source, which takes a while to make."""
    def make(folder):
        r = lab.recipe
        total = max(2 * r.batch_size, r.num_prompts // 10)
        source = lab.questions("preference", len(LANGUAGES) * total, "languages")
        sizes = {**dict.fromkeys(MIXTURES, total), "large": max(2 * total, r.num_prompts)}
        return {"prompts": {mixture: mix(source, sizes[mixture], codes, temperature=0, seed=lab.seed)
                            for mixture, codes in MIXTURES.items()}}
    return lab.step("languages-prompts", make)["prompts"][name]


def pool_pairs(lab, name):
    """The arbiter's best against its worst of the teachers' answers to the prompts of a mixture."""
    rows, r = prompts(lab, name), lab.recipe
    answers, scores = {}, {}
    for i, (teacher, folder) in enumerate(lab.teachers.items()):
        groups = lab.sample(f"languages-{name}-{teacher}", folder, rows, 1, r.teacher_temperature, seed=i)
        answers[teacher] = [group[0] for group in groups]
        texts = [{**row, "completion": a["completion"]} for row, a in zip(rows, answers[teacher])]
        scores[teacher] = lab.scores(f"languages-{name}-{teacher}", texts)
    return best_worst(candidates_from(rows, answers, scores), keep_cut=r.keep_cut, same=lab.tokenizer.key)[0]


def pairs(lab, name):
    """The pairs of a mixture: equally many in "one", "five" and "all"."""
    made = pool_pairs(lab, name)
    if name == "large":
        return made
    total = min(len(pool_pairs(lab, other)) for other in ("one", "five", "all"))
    return mix(made, total, temperature=0, seed=lab.seed)


def offline(name):
    def arm(lab):
        r, rows = lab.recipe, pairs(lab, name)
        return lab.train(f"languages-dpo-{name}", "dpo", lab.sft, rows, learning_rate=r.offline_learning_rate,
                         beta=r.offline_beta, nll_weight=r.offline_nll_weight, max_steps=r.rloo_steps,
                         batch_size=lab.batch_of(rows, f"arm dpo {name}"))
    return arm


def online(name):
    def arm(lab):
        r, rows = lab.recipe, pairs(lab, name)
        asked = [{k: v for k, v in row.items() if k not in ("chosen", "rejected")} for row in rows]
        return lab.train(f"languages-rloo-{name}", "rl", lab.sft, asked, reward_model=lab.arbiter,
                         learning_rate=r.rloo_learning_rate, beta=r.rloo_beta, num_samples=r.rloo_samples,
                         max_new_tokens=r.max_new_tokens, max_steps=r.rloo_steps, too_long=r.too_long,
                         batch_size=lab.batch_of(rows, f"arm rloo {name}"), keep_cut=False)
    return arm


# ---- translation contrast ----------------------------------------------------------------------------------

def answered(lab, name, model, rows):
    """The model's answers, sampled as the pool's are."""
    groups = lab.sample(f"languages-{name}", model, rows, 1, lab.recipe.teacher_temperature)
    return [group[0] for group in groups]


def in_translation(lab, name, model, rows):
    """The model's English answers to the questions, translated into the questions' languages."""
    english = answered(lab, f"{name}-english", model, [in_english(row) for row in rows])
    return [{**a, "completion": translated(row, a["completion"], lab.seed)} for row, a in zip(rows, english)]


def sft(lab, name, rows):
    r = lab.recipe
    return lab.train(name, "sft", lab.base, rows, learning_rate=r.sft_learning_rate, epochs=r.sft_epochs)


def weak(lab):
    """A student that saw an eighth of the SFT data."""
    rows = lab.best_answers
    return sft(lab, "languages-weak", rows[:max(lab.recipe.batch_size, len(rows) // 8)])


def marked(lab):
    """The start of the contrast: half of its SFT answers are translated from the strong student's English."""
    rows, rng = lab.best_answers, random.Random(f"marked/{lab.seed}")
    said = in_translation(lab, "sft-rows", lab.sft, rows)
    mixed = [{**row, **answer} if rng.random() < 0.5 and answer["completion"].strip() else row
             for row, answer in zip(rows, said)]
    return sft(lab, "languages-marked", mixed)


def contrast_sides(lab):
    """(rows, chosen, {arm: rejected}); in every arm the two answers to each prompt differ."""
    source = lab.questions("preference", lab.recipe.num_prompts // 2, "contrast")
    rows = [row for row in source if row["language"] != "en"]
    chosen = answered(lab, "strong", lab.sft, rows)
    rejected = {"contrast": in_translation(lab, "weak", weak(lab), rows),
                "in-language": answered(lab, "weak-own", weak(lab), rows),
                "translated strong": in_translation(lab, "strong", lab.sft, rows)}
    keep = [all(a["completion"].strip() not in ("", best["completion"].strip()) for a in answers)
            and best["completion"].strip() != "" for best, *answers in zip(chosen, *rejected.values())]

    def kept(values):
        return [value for value, keeps in zip(values, keep) if keeps]
    return kept(rows), kept(chosen), {name: kept(answers) for name, answers in rejected.items()}


def contrasted(name):
    def arm(lab):
        r, (rows, chosen, rejected) = lab.recipe, contrast_sides(lab)
        made, _ = contrast_pairs(rows, chosen, rejected[name], keep_cut=True)
        return lab.train(f"languages-{name.replace(' ', '-')}", "dpo", marked(lab), made,
                         learning_rate=r.offline_learning_rate, beta=r.offline_beta,
                         nll_weight=r.offline_nll_weight, epochs=r.offline_epochs,
                         batch_size=lab.batch_of(made, f"arm {name}"))
    return arm


MEASURES = {
    "translated": lambda row: float(naturalness(row, row["completion"])[0] is False),
    "apart": lambda row: float(grade_apart(row, row["completion"]).grade),
    "language apart": lambda row: float(grade_apart(row, row["completion"]).language == row["language"]),
}

ARMS = {"start": lambda lab: lab.sft,
        **{f"dpo {name}": offline(name) for name in MIXTURES},
        **{f"rloo {name}": online(name) for name in MIXTURES},
        "marked": marked,
        **{name: contrasted(name) for name in ("contrast", "in-language", "translated strong")}}

# ---- claims ------------------------------------------------------------------------------------------------

CLAIMS = (
    Claim("transfer", "preference data in English alone helps the other languages",
          "English-only preference training already helps other languages",
          (Comparison("dpo one", "start", languages=NOT_ENGLISH),
           Comparison("rloo one", "start", languages=NOT_ENGLISH))),
    Claim("more-languages", "at one total, five and 23 languages beat one, also in languages without pairs",
          "46.4% -> 53.4% from English to all languages",
          (*(Comparison(f"{how} {name}", f"{how} one")
             for how in ("dpo", "rloo") for name in ("five", "all")),
           *(Comparison(f"{how} five", f"{how} one", languages=UNSEEN) for how in ("dpo", "rloo")))),
    Claim("more-data", "ten times the prompts in 23 languages help", "ML-23-230K above ML-23",
          (Comparison("dpo large", "dpo all"), Comparison("rloo large", "rloo all"))),
    Claim("online-transfers", "online beats offline, and transfers better", "RLOO 54.4%, DPO 43.8%",
          (*(Comparison(f"rloo {name}", f"dpo {name}") for name in MIXTURES),
           Comparison("rloo one", "dpo one", languages=NOT_ENGLISH),
           Comparison("rloo five", "dpo five", languages=UNSEEN))),
    Claim("contrast", "rejecting a weak translation removes marks of translation that an in-language "
          "rejected answer leaves", "steers away from translation artefacts",
          (Comparison("contrast", "marked", "below", "translated", languages=NOT_ENGLISH),
           Comparison("contrast", "in-language", "below", "translated", languages=NOT_ENGLISH),
           Comparison("contrast", "marked", measure="language apart", languages=NOT_ENGLISH),
           Comparison("contrast", "in-language", languages=NOT_ENGLISH))),
    Claim("weak-side", "the rejected translation should be weak: a strong one removes the marks as well, and "
          "teaches less about what is right", "rejected: a weaker model's completion",
          (Comparison("translated strong", "marked", "below", "translated", languages=NOT_ENGLISH),
           Comparison("contrast", "translated strong", measure="apart", languages=NOT_ENGLISH))),
)

# Why arms of these claims differ in start, steps, tokens or tuning (experiments_matched.py).
UNMATCHED = {
    "transfer": "a stage is held against its start",
    "online-transfers": "RLOO samples four answers where DPO reads two; prompts and steps are equal",
    "contrast": "a stage is held against its start",
    "weak-side": "a stage is held against its start",
}
