"""Pairs of answers written in a language and answers translated from English: whose answer becomes which
side, what is counted, what `generate.py --contrast` refuses."""

import json

import pytest
import generate
from small import CPU, program, tokenizer

from aya_min.data import load_pairs
from aya_min.files import write_jsonl
from aya_min.preferences import contrast_pairs

OWN = [{"prompt": "frage", "language": "de", "question_id": "q1", "completion": "eigen",
        "finish_reason": "stop", "num_tokens": 3, "logp": -1.0, "model": "M", "seed": 0, "sample": 0},
       {"messages": [{"role": "user", "content": "soru"}, {"role": "assistant", "content": "kendi"}],
        "language": "tr", "task": "sum"},
       {"prompt": "same", "completion": "equal"},
       {"prompt": "long", "completion": "whole"}]
TRANSLATED = [{"prompt": "other", "completion": "never asked"},
              {"prompt": "long", "completion": "cut of", "finish_reason": "length"},
              {"prompt": "same", "completion": " equal "},
              {"prompt": "soru", "language": "tur", "completion": "translated to Turkish"},
              {"prompt": "frage", "completion": "translated to German"}]


def test_contrast_pairs_count_what_makes_no_pair():
    def answers(*texts):
        return [{"completion": text, "finish_reason": "length" if text == "cut" else "stop"}
                for text in texts]
    rows = [{"prompt": str(i), "language": "de", "candidates": []} for i in range(5)]
    sides = answers("a", "b", "c", "cut", "e"), answers("x", " b", " ", "y", "z")
    pairs, counts = contrast_pairs(rows, *sides)
    assert [(p["prompt"], p["chosen"], p["rejected"]) for p in pairs] == [("0", "a", "x"), ("4", "e", "z")]
    assert counts == {"pairs": 2, "equal_texts": 1, "empty": 1, "cut_prompts": 1}
    assert "candidates" not in pairs[0] and pairs[0]["rejected_finish_reason"] == "stop"
    pairs, counts = contrast_pairs(rows, *sides, keep_cut=True, same=len)
    assert counts == {"pairs": 2, "equal_texts": 2, "empty": 1, "cut_prompts": 0}


@pytest.fixture
def folder(tmp_path):
    write_jsonl(tmp_path / "own.jsonl", OWN)
    write_jsonl(tmp_path / "translated.jsonl", TRANSLATED)
    return tmp_path


def contrasted(folder, *flags, out="pairs.jsonl"):
    """What `generate.py --contrast` does in its process."""
    words = ["--answers", folder / "own.jsonl", "--contrast", folder / "translated.jsonl", "--out",
             folder / out, *flags]
    generate.run_command(generate.parsed(list(map(str, words))), CPU)


def test_the_command_joins_two_files_by_prompt_and_language_into_pairs_that_dpo_reads(folder, capsys):
    contrasted(folder)
    done = capsys.readouterr()
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[0] == {"prompt": "frage", "language": "de", "question_id": "q1", "chosen": "eigen",
                       "rejected": "translated to German", "chosen_finish_reason": "stop",
                       "rejected_finish_reason": None}
    assert len(rows) == 2 and rows[1].items() >= {
        "prompt": "soru", "language": "tr", "task": "sum", "chosen": "kendi",
        "rejected": "translated to Turkish"}.items()
    assert "pairs 2, equal texts 1, empty 0, cut prompts 1" in done.out and "cut: 1 of 8" in done.out
    assert "1 of 5 prompts were not asked" in done.err
    assert len(load_pairs([folder / "pairs.jsonl"], tokenizer(), 256)) == 2


@pytest.mark.parametrize("rows, flags, message", [
    (TRANSLATED[:4], [], "no answer for 1 of 4 prompts, the first: "),
    ([{"prompt": "other", "completion": "x"}], [], "no answer for 4 of 4 prompts"),
    ([{"prompt": prompt, "completion": text} for prompt, text in
      (("frage", "eigen"), ("soru", "kendi"), ("same", "equal"), ("long", "whole"))], [],
     "no pair is left (pairs 0, equal texts 4, empty 0, cut prompts 0)"),
    (TRANSLATED, ["--model", "M"], "leave out --model"),
    (TRANSLATED, ["--prompts", "P.jsonl"], "leave out --prompts"),
    (TRANSLATED, ["--num-samples", "4"], "leave out --num-samples"),
    (TRANSLATED, ["--temperature", "0.3"], "leave out --temperature"),      # its default
])
def test_what_makes_no_pair_or_asks_a_model_is_refused_before_it_writes(folder, rows, flags, message):
    write_jsonl(folder / "translated.jsonl", rows)
    with pytest.raises(ValueError) as refused:
        contrasted(folder, *flags)
    assert message in str(refused.value)
    assert {path.name for path in folder.iterdir()} == {"own.jsonl", "translated.jsonl"}


def test_half_a_command_and_outputs_that_cannot_be_written_are_refused(folder):
    for out, message in (("own.jsonl", "exists; give a new file"), ("none/pairs.jsonl", "does not exist")):
        with pytest.raises(ValueError, match=message):
            contrasted(folder, out=out)
    done = program("generate.py", "--contrast", folder / "translated.jsonl", "--out", folder / "pairs.jsonl")
    assert done.returncode == 2 and "give --answers G.jsonl" in done.stderr
    assert len(done.stderr.splitlines()) == 1
