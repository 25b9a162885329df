"""The tokenizer of an encoder-decoder: Unigram (T5, mT5, Aya 101), an end token after each text, no BOS, no
turns; <extra_id_0>, <extra_id_1>, ... are the sentinels of span corruption.

These models have no chat template, so a conversation becomes a text by this rule, and the answer is the
target:

    one user turn                   its own text
    a system text                   stands before that, and a blank line
    several turns                   a line for each: "User: " or "Assistant: " and the text

Text is stripped of outer white space. Names of control tokens in it are letters, as in tokenizer.py.

Known gap: --too-long cut-left keeps the first token of a source, which in a decoder is BOS, beside the last.
"""

import json
import re
import unicodedata
from collections import Counter
from itertools import chain, takewhile
from pathlib import Path

from tokenizers import (Tokenizer as Unigram, decoders, models, normalizers, pre_tokenizers, processors,
                        trainers)

from .files import dumps
from .tokenizer import CONTROL, Tokenizer, added_elsewhere, of_type, read_bpe, read_config, read_files

SENTINEL = "<extra_id_{}>"
# As in T5's own vocabulary: the first tokens, and a hundred sentinels that count down to the last id.
FIRST, NUM_SENTINELS = ["<pad>", "</s>", "<unk>"], 100
BYTES = [f"<0x{i:02X}>" for i in range(256)]
OURS = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>",
        "unk_token": "<unk>", "clean_up_tokenization_spaces": False,
        "additional_special_tokens": [SENTINEL.format(i) for i in range(NUM_SENTINELS)]}
SPEAKERS = {"user": "User: ", "assistant": "Assistant: "}
BYTE = r"<0x[0-9A-F]{2}>"
NO_BYTES = ("a ByT5, whose tokens are bytes by a rule and in no tokenizer.json; it is not supported, give a "
            "T5, mT5 or umT5 with a tokenizer.json")


def as_text(messages):
    """The text of a conversation that ends with a user turn, by the rule above."""
    system = messages[0]["content"].strip() if messages[0]["role"] == "system" else ""
    turns = messages[messages[0]["role"] == "system":]
    lines = [turns[0]["content"].strip()] if len(turns) == 1 else [
        SPEAKERS[turn["role"]] + turn["content"].strip() for turn in turns]
    return "\n\n".join(filter(None, [system, "\n".join(lines)]))


class TextTokenizer(Tokenizer):
    """A tokenizer.json with an end token, for sources and targets. Its arguments are those of Tokenizer."""
    # Nothing stands around turns, and there is no BOS.
    begin, asks, after, bos_id, closing = [], [], [], None, {"assistant": []}
    one_answer = True           # an example has one answer, its target

    def __init__(self, bpe, config=None, files=None):
        added = bpe.get_added_tokens_decoder().values()
        control = {token.content for token in added if token.special or CONTROL.fullmatch(token.content)}
        control |= {SENTINEL.format(i) for i in range(bpe.get_vocab_size())
                    if bpe.token_to_id(SENTINEL.format(i)) is not None}
        self.bpe, self.config, self.files = bpe, config or dict(OURS), files or {}
        self.inner = within_text(bpe)
        for name, number in added_elsewhere(self.config, self.files):
            if bpe.token_to_id(name) != number:
                raise ValueError(f"tokenizer_config.json or added_tokens.json gives {name!r:.80} the id "
                                 f"{number!r:.80}, tokenizer.json {bpe.token_to_id(name)}; download the "
                                 "tokenizer again")
        eos, pad = (self.named(key, usual) for key, usual in (("eos_token", "</s>"), ("pad_token", "<pad>")))
        if eos is None:
            raise ValueError("tokenizer.json has no end token, </s> or the eos_token of "
                             "tokenizer_config.json; it must be that of an encoder-decoder (T5, mT5, Aya "
                             "101) or one trained here")
        self.end_of_turn_id, self.stop_ids, self.ending = eos, [eos], [eos]
        self.pad_id = eos if pad is None else pad
        numbers = (bpe.token_to_id(SENTINEL.format(i)) for i in range(len(control)))
        self.sentinels = [*takewhile(lambda number: number is not None, numbers)]
        others = sorted((name for name in control if not CONTROL.fullmatch(name)), key=len, reverse=True)
        self.others = re.compile("|".join(map(re.escape, others)) or "(?!)")
        self.pieces = re.compile("|".join([*map(re.escape, sorted(control)), BYTE]))
        for each in (bpe, self.inner):
            each.no_padding()
            each.no_truncation()
            each.encode_special_tokens = True
            # In published files some are not special. They would be printed in answers.
            each.add_special_tokens(sorted(control, key=bpe.token_to_id))

    def named(self, key, usual):
        """The id of a special token that tokenizer_config.json may name, or None."""
        token = self.config.get(key) or usual
        return self.bpe.token_to_id(of_type(token.get("content") if isinstance(token, dict) else token, str,
                                            key))

    @property
    def turns(self):
        """What data.load_prompts checks conversations by: `texts`."""
        return self

    def texts(self, messages, where=""):
        """[(role, text), ...]: every conversation has a text."""
        return [(message["role"], message["content"].strip()) for message in messages]

    def encode(self, text):
        """The ids of a text. Names of control tokens in it ("</s>") are letters, although they are pieces of
        a Unigram's vocabulary too: such a name is cut after its first letter."""
        cuts = [match.start() + 1 for match in self.pieces.finditer(text)] if "<" in text else []
        first, *rest = [text[start:end] for start, end in zip([0, *cuts], [*cuts, None])]
        encoded = [self.bpe.encode(first, add_special_tokens=False)]
        encoded += [self.inner.encode(part, add_special_tokens=False) for part in rest]
        return [i for part in encoded for i in part.ids]

    def key(self, text):
        return tuple(self.encode(text.strip()))

    def encode_answer(self, text):
        """The ids of a target: its text and the end."""
        return self.encode(text.strip()) + self.ending

    def encode_chat(self, messages, generation_prompt=False, supervised=None, where=""):
        """(ids, mask) of a source and, if the last message is the assistant's, its target. mask is True on
        the target. supervised: as in Tokenizer.encode_chat; an earlier answer is part of the source, and
        cannot be supervised: see data.conversations_of."""
        answer = [] if messages[-1]["role"] != "assistant" else self.encode_answer(messages[-1]["content"])
        assert not (supervised and any(supervised[:-1])), "one answer to an example"
        source = self.encode(as_text(messages[:-1] if answer else messages)) + self.ending
        counts = supervised is None or bool(supervised[-1])
        return source + answer, [False] * len(source) + [counts] * len(answer)

    def save(self, folder):
        """Write tokenizer.json, tokenizer_config.json and the files that came with them, unchanged."""
        made = {"tokenizer.json": self.bpe.to_str(pretty=True).encode(),
                "tokenizer_config.json": dumps(self.config, indent=2).encode()}
        for name, data in {**made, **self.files}.items():
            (Path(folder) / name).write_bytes(data)


def within_text(bpe):
    """The Unigram as it encodes the rest of a text, which begins with no space. ValueError for another
    kind."""
    spec = json.loads(bpe.to_str())
    if spec["model"]["type"] != "Unigram":
        raise ValueError(f"tokenizer.json is a {spec['model']['type']}; an encoder-decoder has a Unigram")
    cut = spec.get("pre_tokenizer") or {}
    for part in cut.get("pretokenizers", [cut]):
        if "prepend_scheme" in part:
            part["prepend_scheme"] = "never"
    return Unigram.from_str(json.dumps(spec))


def load_text_tokenizer(folder):
    """The TextTokenizer of a model folder. ValueError names the folder."""
    files = read_files(folder)
    if "tokenizer.json" not in files:
        if read_config(folder, files).get("tokenizer_class") == "ByT5Tokenizer":
            raise ValueError(f"{folder}: {NO_BYTES}")
        raise ValueError(f"{folder}: no tokenizer.json (a spiece.model is not read); write one with "
                         "transformers' AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)")
    bpe = read_bpe(files["tokenizer.json"], Path(folder) / "tokenizer.json")
    try:
        return TextTokenizer(bpe, read_config(folder, files), files)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def train_text_tokenizer(texts, vocab_size):
    """A Unigram tokenizer like T5's, with pieces for the 256 bytes (mT5 has them), so that no text is
    unknown. Unlike theirs it keeps line breaks and double spaces: its normalizer is NFC alone, and digits are
    single. At most half of the pieces are single characters; rarer ones are written in bytes.

    Two trainings on the same texts have the same pieces with the same ids, but scores that differ in the
    third decimal, because the library adds up in no fixed order; a run therefore keeps its tokenizer."""
    fixed = len(FIRST) + len(BYTES) + NUM_SENTINELS
    if vocab_size <= fixed:
        raise ValueError(f"a vocabulary of {vocab_size} is too small: {fixed} are the first tokens, the "
                         "bytes and the sentinels")
    made = Unigram(models.Unigram())
    made.normalizer = normalizers.NFC()
    texts = [unicodedata.normalize("NFC", text) for text in texts]
    found = Counter(chain.from_iterable(texts)).most_common()
    most = (vocab_size - fixed) // 2
    rare = str.maketrans(dict.fromkeys((character for character, _ in found[most:]), " "))
    cut = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    made.pre_tokenizer = pre_tokenizers.Sequence([
        cut, pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Digits(individual_digits=True)])
    trainer = trainers.UnigramTrainer(vocab_size=vocab_size - len(BYTES) - NUM_SENTINELS,
                                      special_tokens=FIRST, shrinking_factor=0.5, unk_token="<unk>",
                                      show_progress=False)
    made.train_from_iterator((text.translate(rare) for text in texts), trainer)
    spec = json.loads(made.to_str())
    pieces = sorted(spec["model"]["vocab"][len(FIRST):])
    least = min((score for _, score in pieces), default=0.0)
    spec["model"]["vocab"] = [*([name, 0.0] for name in FIRST), *([byte, least] for byte in BYTES), *pieces]
    spec["model"]["byte_fallback"] = True
    made = Unigram.from_str(json.dumps(spec))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(
        replacement="\u2581", prepend_scheme="always")])
    made.add_special_tokens([SENTINEL.format(i) for i in reversed(range(NUM_SENTINELS))])
    made.post_processor = processors.TemplateProcessing(
        "$A </s>", "$A </s> $B:1 </s>:1", [("</s>", FIRST.index("</s>"))])
    return TextTokenizer(made)
