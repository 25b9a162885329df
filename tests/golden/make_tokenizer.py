"""Make tokenizer.json.gz: a tokenizer trained and saved here, and the ids and texts that transformers has for
it.

    python tests/golden/make_tokenizer.py        # needs transformers; run from the project's root

test_golden.py compares with what is recorded, where transformers is not installed too.
"""

import gzip
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
WORDS = sorted((ROOT / "aya_min" / "words").glob("*.json"))
NAMES = ("tokenizer.json", "tokenizer_config.json")


def texts():
    """A few words of each language, and the texts that were seen to differ."""
    found = [" ".join(w for w in json.loads(path.read_text(encoding="utf-8"))["words"]["days"] if
        isinstance(w, str))
             for path in WORDS]
    return [*found, "画像が、訪問した 国連に対し", "中国は大きい国です 2024", " a  b\n\n\nc\t", "🙂👩‍🚀 Việt é", "<|USER|> <b>"]


def conversations():
    for i, text in enumerate(texts()):
        for system in ([], [{"role": "system", "content": " Be kind.\n"}]):
            turns = [{"role": "user", "content": text}, {"role": "assistant",
                "content": f"\n{texts()[i - 1]} "}]
            yield system + turns, False
            yield system + turns + turns[:1], True


def main():
    import transformers

    from aya_min.tokenizer import train_tokenizer

    corpus = [path.read_text(encoding="utf-8") for path in WORDS] + texts()
    corpus += [kana + end for kana in "くハ" for end in "のがして"] * 1000
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(corpus, 700).save(folder)
        their = transformers.AutoTokenizer.from_pretrained(folder)
        made = {"transformers": transformers.__version__,
            "files": {name: (Path(folder) / name).read_text(encoding="utf-8") for name in NAMES}}
    made["texts"] = [[text, their(text, add_special_tokens=False)["input_ids"]] for text in texts()]
    made["conversations"] = [
        [messages, prompt, their.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False),
         their.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)]
        for messages, prompt in conversations()]
    data = json.dumps(made, ensure_ascii=False).encode()
    (Path(__file__).parent / "tokenizer.json.gz").write_bytes(gzip.compress(data, mtime=0))


if __name__ == "__main__":
    main()
