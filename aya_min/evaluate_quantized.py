"""What a quantized model loses, by language, script and task (arXiv 2407.03211): averages hide who pays.

    python -m aya_min.evaluate quantized --model QUANTIZED --against MODEL --data F.jsonl [--out F.json]

Of rows with an answer, conversations and texts: the relative change of the log-likelihood in percent, negative
where the model finds the text less likely. Of rows with a prompt: the share of greedy answers that are the
same text, the language pass rate (evaluate_languages), and of the embedded world's questions the oracle's
mean grade. The two models are loaded one after the other.
"""

import os
from collections import defaultdict

import torch

from .command import Parser, is_spare_rank, number, printable
from .config import SFT, Reading, add_flags, settings_from
from .data import load_examples, load_prompts
from .evaluate_languages import verdict
from .files import dumps, taken, write_new
from .language_id import profile_of
from .languages import LANGUAGES
from .reference import answer_logps
from .rows import is_plain_text, read_jsonl
from .rows_keys import SHAPES
from .sampling import answer_rows
from .weights import KINDS, CohereForCausalLM, load, load_meta
from .world_oracle import check_question, grade

COLUMNS = [("texts", 7, "num_texts", "d"), ("nats/token", 12, "logp", ".3f"), ("change %", 10, "change", "+.3f"),
           ("answers", 9, "num_answers", "d"), ("same %", 8, "same", ".1f"),
           ("grade", 7, "grade", ".2f"), ("against", 8, "grade_against", ".2f"),
           ("LPR", 7, "lpr", ".1f"), ("against", 8, "lpr_against", ".1f")]


def rows_of(path, reading):
    """([rows with a text to score], [rows with a prompt]) of a file; a row may be both."""
    texts, prompts = 0, []
    for where, row in read_jsonl(path, reading):
        plain = is_plain_text(row)
        texts += plain or any(row.get(key) is not None for key in ("completion", "targets", "messages"))
        prompts.append(None if plain else where)
    return texts, [where for where in prompts if where]


def measured(folder, paths, reading, dtype, max_new_tokens, device):
    """([(language, task, tokens, nats) of each text], [row with "completion" of each prompt])."""
    model, tokenizer = load(folder, device, dtype, packed=True)
    model.eval()
    examples, prompts = [], []
    for path in paths:
        num_texts, asked = rows_of(path, reading)
        if num_texts:
            examples += load_examples([path], tokenizer, model.config.max_position_embeddings, reading)
        if asked:
            prompts += load_prompts([path], reading, tokenizer)
    texts = []
    if examples:
        settings = SFT(dtype="bfloat16" if dtype == torch.bfloat16 else "float32")
        logps = answer_logps(model, examples, tokenizer.pad_id, device, settings, name=folder)
        texts = [(e.language, int(e.mask.sum()), logp) for e, logp in zip(examples, logps.tolist())]
    answers = answer_rows(model, tokenizer, prompts, max_new_tokens=max_new_tokens, temperature=0,
                          name=folder, progress="answers") if prompts else []
    return texts, [row | {"completion": group[0]["completion"]} for row, group in zip(prompts, answers)]
