"""Byte-level BPE and the turns of a chat template. One walk over a conversation makes its ids AND loss mask.

    <BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>hello<|END_OF_TURN_TOKEN|>
        <|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>hi<|END_OF_TURN_TOKEN|>
                                                `-- supervised -------'

Text is encoded turn by turn, and special tokens are never read out of it, so that boundaries are exact and
user text cannot forge a turn. Aya Expanse, Aya 23 and Command R write turns like this. Command R7B, Command A
and Tiny Aya put an answer between <|START_RESPONSE|>, which ends the prompt, and <|END_RESPONSE|>, which the
model writes before it ends the turn. A model folder's chat template is followed exactly, of other families
too, or the folder is refused: see template_turns.py.
"""

import json
import re
import unicodedata
from itertools import takewhile
from pathlib import Path

from tokenizers import (Regex, Tokenizer as BPE, decoders, models, normalizers, pre_tokenizers, processors,
                        trainers)

from .command import one_line
from .files import dumps, own_file, parse_json, read_bytes
from .template_turns import ANSWERS, PROBES, read_turns

SPECIALS = ["<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK_TOKEN>", "<BOS_TOKEN>", "<EOS_TOKEN>", "<EOP_TOKEN>",
            "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
            "<|SYSTEM_TOKEN|>"]
NEEDED = ["<PAD>", "<BOS_TOKEN>", *SPECIALS[8:]]
RESPONSE = ["<|START_RESPONSE|>", "<|END_RESPONSE|>"]
CONTROL = re.compile(r"<\|\w+\|>|<[A-Z0-9_]+>")          # names of tokens that are not text

# The files of a model folder's tokenizer, beside tokenizer.json and tokenizer_config.json.
FILES = ["chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
         "tokenizer.model"]
OURS = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<BOS_TOKEN>",
        "eos_token": "<|END_OF_TURN_TOKEN|>", "pad_token": "<PAD>", "unk_token": "<UNK>",
        "padding_side": "left", "add_bos_token": True, "add_eos_token": False,
        "clean_up_tokenization_spaces": False}
# The special tokens of transformers' CohereTokenizer, where tokenizer_config.json does not name them.
COHERES = {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "unk_token": "<UNK>",
           "pad_token": "<PAD>", "cls_token": "<CLS>", "sep_token": "<SEP>", "mask_token": "<MASK_TOKEN>"}

# The same turns in Jinja, for tools that read tokenizer_config.json (transformers, vLLM).
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}"
    "{% if message['role'] == 'user' %}"
    "{{ '<|USER_TOKEN|>' + message['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}"
    "{% elif message['role'] == 'system' %}"
    "{{ '<|SYSTEM_TOKEN|>' + message['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}"
    "{% else %}{{ '<|CHATBOT_TOKEN|>' }}{% generation %}"
    "{{ message['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}{% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}")
_END = "<|END_OF_TURN_TOKEN|>' }}{% endgeneration %}"
RESPONSE_TEMPLATE = CHAT_TEMPLATE.replace("<|CHATBOT_TOKEN|>", "<|CHATBOT_TOKEN|><|START_RESPONSE|>").replace(
    _END, "<|END_RESPONSE|>" + _END)


def default_template(config):
    """The chat template of a tokenizer_config.json, or None. Of a list it is the one named "default"."""
    template = config.get("chat_template")
    if isinstance(template, list):
        if not all(isinstance(each, dict) and {"name", "template"} <= each.keys() for each in template):
            raise ValueError("chat_template is a list, but not of names and templates; copy or download it "
                             "again")
        named = {str(each["name"]): each["template"] for each in template}
        if "default" not in named:
            raise ValueError(f"the chat templates are {' '.join(named)}; one must be named default")
        template = named["default"]
    return of_type(template, (str, type(None)), "chat_template")


def of_type(value, types, what):
    """The value. ValueError, with `what` it is, if it is of none of the types."""
    if not isinstance(value, types):
        raise ValueError(f"{what} cannot be a {type(value).__name__}; copy or download it again")
    return value


def special_tokens(config, files=()):
    """((name, text), ...) of the special tokens that transformers gives to a template, such as bos_token.

    As in transformers, special_tokens_map.json is read only if tokenizer_config.json has no
    added_tokens_decoder.
    """
    defaults = COHERES if is_coheres(config) else {}
    path = "special_tokens_map.json"
    more = {} if "added_tokens_decoder" in config or path not in files else parse_json(files[path], path)
    given = {**defaults, **config, **of_type(more, dict, path)}
    found = [(name, given[name]) for name in COHERES if given.get(name) is not None]
    found = [(name, token.get("content") if isinstance(token, dict) else token) for name, token in found]
    return tuple((name, of_type(token, str, name)) for name, token in found)


def is_coheres(config):
    """True if transformers takes its CohereTokenizer. It does so for Cohere's models that name no class."""
    return (config.get("tokenizer_class") or "CohereTokenizer").startswith("CohereTokenizer")


def is_rebuilt_alike(bpe, config):
    """True if transformers' CohereTokenizer, which keeps only a file's tokens and merges, encodes like `bpe`.

    It takes the added tokens from the added_tokens_decoder of tokenizer_config.json, if that has one.
    """
    if config.get("add_prefix_space"):
        return False
    listed = config.get("added_tokens_decoder")
    for number, token in bpe.get_added_tokens_decoder().items() if listed else ():
        about = listed.get(str(number), {})
        flags = ("content", "lstrip", "rstrip", "single_word")
        if any(about.get(key, False) != getattr(token, key) for key in flags):
            return False

    def parts(part, key):
        spec = json.loads(part.__getstate__()) if part else {}
        return spec.get(key, [spec] if spec else [])

    letters = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    cut, model = parts(bpe.pre_tokenizer, "pretokenizers"), bpe.model
    return (parts(bpe.normalizer, "normalizers") == [{"type": "NFC"}]
            and len(cut) == 2 and cut[0] == {"type": "Digits", "individual_digits": True}
            and letters.items() <= cut[1].items()
            and [part["type"] for part in parts(bpe.decoder, "decoders")] == ["ByteLevel"]
            and isinstance(model, models.BPE)
            and not any((model.dropout, model.continuing_subword_prefix, model.end_of_word_suffix,
                         model.byte_fallback, model.ignore_merges)))


def as_it_is(config):
    """The config with a class for which transformers reads tokenizer.json as it is, without rebuilding it."""
    return {**OURS, **config, "tokenizer_class": OURS["tokenizer_class"]}


def added_elsewhere(config, files):
    """[(token, id), ...] that transformers adds to a tokenizer.json from other files."""
    listed = config.get("added_tokens_decoder") or {}
    more = parse_json(files.get("added_tokens.json", b"{}"), "added_tokens.json")
    if not isinstance(listed, dict) or not isinstance(more, dict) or not all(
            isinstance(token, dict) and isinstance(token.get("content"), str) and number.isdecimal()
            for number, token in listed.items()):
        raise ValueError("added_tokens_decoder of tokenizer_config.json, or added_tokens.json, is not an "
                         "object of tokens and ids")
    return [*((token["content"], int(number)) for number, token in listed.items()), *more.items()]


class Tokenizer:
    """A tokenizer.json of the `tokenizers` library plus the ids of its turns.

    files: {name: bytes} of tokenizer.json, tokenizer_config.json and FILES as they were read; `save` writes
    them again. config: tokenizer_config.json as a dict.
    """

    def __init__(self, bpe, config=None, files=None):
        self.bpe, self.config, self.files = bpe, config or {}, files or {}
        self.bpe.no_padding()
        self.bpe.no_truncation()
        added = bpe.get_added_tokens_decoder().values()
        control = {token.content for token in added if token.special or CONTROL.fullmatch(token.content)}
        jinja = self.files.get("chat_template.jinja")
        template = default_template(self.config) if jinja is None else decoded(jinja, "chat_template.jinja")
        if is_coheres(self.config) or template is None:
            self.check_tokens(NEEDED)
        if template is None:
            marked = all(bpe.token_to_id(name) is not None for name in RESPONSE)
            template = self.config["chat_template"] = RESPONSE_TEMPLATE if marked else CHAT_TEMPLATE
            self.files.pop("tokenizer_config.json", None)       # save then writes self.config
        self.check_tokens([name for name in RESPONSE if name in template])
        for name, number in added_elsewhere(self.config, self.files):
            if self.bpe.token_to_id(name) != number:
                raise ValueError(f"tokenizer_config.json or added_tokens.json gives {name!r:.80} the id "
                                 f"{number!r:.80}, tokenizer.json {self.bpe.token_to_id(name)}; download the "
                                 "tokenizer again")
        if is_coheres(self.config) and not is_rebuilt_alike(bpe, self.config):
            self.config = as_it_is(self.config)
            self.files.pop("tokenizer_config.json", None)
        specials = special_tokens(self.config, self.files)
        try:
            self.turns = read_turns(template, specials, frozenset(control))
        except ValueError as error:
            raise ValueError(f"the chat template cannot be followed: {error}") from None
        self.inner = within_text(bpe)
        probes = [probe for probe in PROBES if not (self.turns.refuses and probe[0][0]["role"] == "system")]
        written = [self.turns.pieces(*probe) for probe in probes]
        wanted = [sum(map(self.encode_inner, pieces), []) for pieces in written]
        others = sorted((name for name in control if not CONTROL.fullmatch(name)), key=len, reverse=True)
        self.others = re.compile("|".join(map(re.escape, others)) or "(?!)")
        for each in {id(bpe): bpe, id(self.inner): self.inner}.values():
            each.encode_special_tokens = True       # "<BOS_TOKEN>" typed by a user is letters, not a token
            # In published files some are not special. They would be read out of texts and printed in answers.
            each.add_special_tokens([token.content for token in added if token.content in control])
        self.set_turns(control, dict(specials))
        for probe, pieces, ids in zip(probes, written, wanted):
            if ids != self.encode_chat(*probe)[0]:
                raise ValueError("the chat template cannot be followed: the tokens around turns take white "
                                 f"space or letters of the text, in {''.join(pieces)!r:.80}")

    def set_turns(self, control, specials):
        """Set the ids around turns. control: names of control tokens. specials: {name: text}."""
        split = re.compile("(" + "|".join(map(re.escape, sorted(control, key=len, reverse=True))) + ")")

        def ids_of(text):
            """The ids of a text of the template, in which control tokens are read as such."""
            return [i for part in filter(None, split.split(text)) for i in (
                [self.bpe.token_to_id(part)] if part in control else self.encode_inner(part))]

        def cut(role):
            """(ids, words that are encoded with the text, words after it that are, ids)"""
            before, after = self.turns.opening[role], self.turns.closing[role]
            asks = self.turns.asks if role in ANSWERS else ""
            words = before[len(asks):] if role in ANSWERS else split.split(before)[-1]
            ending = split.split(after)[0]
            return (ids_of(before.removesuffix(words)), words, ending, ids_of(after.removeprefix(ending)))
        cuts = {role: cut(role) for role in self.turns.opening}
        self.words = {role: each[1:3] for role, each in cuts.items()}
        self.opening, self.closing = ({role: each[i] for role, each in cuts.items()} for i in (0, 3))
        self.asks, self.begin = ids_of(self.turns.asks), ids_of(self.turns.bos)
        # An answer ends at the first of the control tokens that follow it; words after them are no answer's.
        ending = list(takewhile(control.__contains__, filter(None, split.split(self.turns.closing["last"]))))
        self.ending = [self.bpe.token_to_id(name) for name in ending]
        self.after = self.closing["last"][len(self.ending):]
        self.stop_ids = sorted(set(self.ending))
        named = {name: self.bpe.token_to_id(text) for name, text in specials.items()}
        self.bos_id = named.get("bos_token", self.bpe.token_to_id(SPECIALS[5]))
        self.start_of_turn_id = self.bpe.token_to_id(SPECIALS[8])
        self.end_of_turn_id = self.bpe.token_to_id(SPECIALS[9])
        if self.end_of_turn_id is None:
            self.end_of_turn_id = named.get("eos_token", self.ending[0])
        pads = self.bpe.token_to_id("<PAD>"), *map(named.get, ("pad_token", "eos_token")), self.ending[-1]
        self.pad_id = next(i for i in pads if i is not None)

    def check_tokens(self, names):
        """ValueError if the vocabulary lacks one of the names."""
        if missing := [name for name in names if self.bpe.token_to_id(name) is None]:
            raise ValueError(f"tokenizer.json lacks {' '.join(missing)}; it must be a Cohere tokenizer (Aya, "
                             "Command R), one trained here, or have a chat_template and a tokenizer_class")

    @property
    def vocab_size(self):
        return self.bpe.get_vocab_size()

    @property
    def largest_id(self):
        """The largest id of a token, which is above vocab_size - 1 if ids are left out."""
        return max(self.bpe.get_vocab(with_added_tokens=True).values())

    @property
    def meaning(self):
        """A text that is equal for tokenizers that encode alike, however their files are written."""
        return meaning_of(self.files.get("tokenizer.json") or self.bpe.to_str())

    def key(self, text):
        """The ids of an answer, after the normalizer and the template's strip: equal for equal answers."""
        return tuple(self.encode_inner(self.turns.text("last", text)))

    def spelled(self, text):
        """The first name of a control token in a text, or None. `encode` reads it as letters."""
        if found := self.others.search(text):
            return found[0]
        names = (found[0] for found in CONTROL.finditer(text)) if "<" in text else ()
        return next((name for name in names if self.bpe.token_to_id(name) is not None), None)

    def encode(self, text):
        """The ids of a text, without BOS. Names of special tokens in it are letters."""
        return self.bpe.encode(text, add_special_tokens=False).ids

    def encode_inner(self, text):
        """The ids of a text that follows other tokens, see `within_text`."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """The text of ids, without special tokens."""
        return self.bpe.decode([int(i) for i in ids], skip_special_tokens=True)

    def stream(self, ids):
        """Yields a piece of text for each id that arrives, "" while a character is incomplete, and at the end
        the rest: incomplete bytes as U+FFFD. The pieces together are `decode` of all ids."""
        decoder, seen, length = decoders.DecodeStream(skip_special_tokens=True), [], 0
        for i in ids:
            seen.append(int(i))
            piece = decoder.step(self.bpe, seen[-1]) or ""
            length += len(piece)
            yield piece
        yield self.decode(seen)[length:]

    def encode_answer(self, text):
        """The ids of an answer, which follow the generation prompt: its text and the end."""
        return self.encode_turn("last", self.turns.text("last", text)) + self.ending

    def encode_turn(self, role, text):
        """The ids of a turn's text as the template writes it, with the words that touch it."""
        before, after = self.words[role]
        return self.encode_inner(before + text + after)

    def encode_chat(self, messages, generation_prompt=False, supervised=None, where=""):
        """(ids, mask) of [{"role", "content"}, ...], two lists of equal length.

        mask is True on the text and the end of supervised turns. Roles: an optional system turn, then user
        and assistant in turn. With `generation_prompt` the ids end where the assistant's answer begins. An
        answer is encoded by itself, as it is sampled: white space at its beginning never joins a line break
        before it, as it may in transformers.
        supervised: a bool for each message (not for each assistant turn, as in rows.py), read for assistant
        turns only; None: all assistant turns. where: its place, for errors.
        """
        ids, mask = list(self.begin), [False] * len(self.begin)
        texts = self.turns.texts(messages, where)
        supervised_turns = [role in ANSWERS for role, _ in texts]
        if supervised is not None:
            given = [bool(b) for m, b in zip(messages, supervised, strict=True) if m["role"] != "system"]
            # The template may add a system turn, which is not supervised.
            given = [False] * (len(texts) - len(given)) + given
            supervised_turns = [a and b for a, b in zip(supervised_turns, given)]
        for (role, text), counts in zip(texts, supervised_turns):
            said, closing = self.encode_turn(role, text), self.closing[role]
            ids += self.opening[role] + said + closing
            ended = [counts] * len(self.ending) + [False] * len(closing)
            mask += [False] * len(self.opening[role]) + [counts] * len(said) + ended[:len(closing)]
        if generation_prompt:
            ids += self.asks
            mask += [False] * len(self.asks)
        return ids, mask

    def encode_prompt(self, prompt, where=""):
        """The ids of a user's prompt (a string, or messages), which end where the answer begins."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.encode_chat(messages, generation_prompt=True, where=where)[0]

    def save(self, folder):
        """Write tokenizer.json, tokenizer_config.json and the files that came with them, unchanged."""
        config = self.config if self.config.keys() > {"chat_template"} else {**OURS, **self.config}
        made = {"tokenizer.json": self.bpe.to_str(pretty=True).encode(),
                "tokenizer_config.json": dumps(config, indent=2).encode()}
        for name, data in {**made, **self.files}.items():
            (Path(folder) / name).write_bytes(data)


def within_text(bpe):
    """The BPE as it encodes a text that follows other tokens: one that puts a space before a text
    (SentencePiece's Metaspace, as in Mistral 0.3) does so at the beginning of all only."""
    spec = json.loads(bpe.to_str())
    cut = spec.get("pre_tokenizer") or {}
    spaced = [part for part in cut.get("pretokenizers", [cut]) if part.get("prepend_scheme") == "first"]
    for part in spaced:
        part["prepend_scheme"] = "never"
    return BPE.from_str(json.dumps(spec)) if spaced else bpe


def read_bpe(data, where):
    """The BPE of the bytes or text of a tokenizer.json. where: its path, for errors."""
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        return BPE.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:      # the library raises PanicException too, which is no Exception
        raise ValueError(f"{where}: not a readable tokenizer.json ({one_line(error)}); copy or download it "
                         "again") from None


def meaning_of(source):
    """A text that is equal for tokenizer.json files that encode alike. source: a path, text or bytes.

    These make no difference: indentation, order of keys, merges as strings or pairs, padding or truncation,
    and the post_processor, which adds tokens around a text (here the turns do that).
    """
    where = "tokenizer.json"
    if isinstance(source, Path):
        source, where = read_bytes(source), source
    bpe = read_bpe(source, where)
    bpe.no_padding()
    bpe.no_truncation()
    return dumps({key: value for key, value in json.loads(bpe.to_str()).items() if key != "post_processor"})


def decoded(data, where):
    """The text of UTF-8 bytes."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte {error.start}); copy or download it again") from None


def read_files(folder):
    """{name: bytes} of the tokenizer's files in a folder."""
    paths = {name: own_file(folder, name) for name in ["tokenizer.json", "tokenizer_config.json", *FILES]}
    return {name: read_bytes(path) for name, path in paths.items() if path}


def read_config(folder, files):
    """tokenizer_config.json as a dict, {} without one. ValueError if its settings cannot be followed."""
    path = Path(folder) / "tokenizer_config.json"
    config = parse_json(files.get(path.name, b"{}"), path)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: a JSON {type(config).__name__}, not an object; copy or download it again")
    of_type(config.get("tokenizer_class"), (str, type(None)), f"{path}: tokenizer_class")
    if config.get("split_special_tokens"):
        raise ValueError(f"{path}: split_special_tokens makes other tools cut control tokens into letters; "
                         "set it to false")
    return config


def files_to_publish(folder):
    """{name: bytes} of a folder's tokenizer, of any family, to write into a folder that is made from it.

    If its class is CohereTokenizer but transformers would rebuild it differently, the class is corrected.
    """
    files = read_files(folder)
    config = read_config(folder, files)
    if "tokenizer.json" in files and config.get("tokenizer_class") and is_coheres(config):
        added_elsewhere(config, files)                  # checks their types
        if not is_rebuilt_alike(read_bpe(files["tokenizer.json"], Path(folder) / "tokenizer.json"), config):
            files["tokenizer_config.json"] = dumps(as_it_is(config), indent=2).encode()
    return files


def load_tokenizer(folder):
    """The Tokenizer of a model folder, with the turns of its chat template. ValueError names the folder."""
    files = read_files(folder)
    if "tokenizer.json" not in files:
        raise ValueError(f"{folder}: no tokenizer.json; give a model folder, or --tokenizer DIR")
    bpe = read_bpe(files["tokenizer.json"], Path(folder) / "tokenizer.json")
    config = read_config(folder, files)
    if not config.get("chat_template") and "chat_template.jinja" not in files:
        if own_file(folder, "additional_chat_templates/default.jinja"):
            raise ValueError(f"{folder}: its chat template is additional_chat_templates/default.jinja; move "
                             "it to chat_template.jinja")
    try:
        return Tokenizer(bpe, config, files)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def train_tokenizer(texts, vocab_size):
    """A byte-level BPE like Cohere's: NFC, single digits, no prefix space. Unlike Cohere's it also keeps Han
    characters single, so that Chinese and Japanese share a small vocabulary."""
    bpe = BPE(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated"),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False)
    bpe.train_from_iterator((unicodedata.normalize("NFC", text) for text in texts), trainer)
    # transformers adds BOS to a text by this.
    bpe.post_processor = processors.TemplateProcessing(
        "<BOS_TOKEN> $A", "<BOS_TOKEN> $A $B:1", [("<BOS_TOKEN>", SPECIALS.index("<BOS_TOKEN>"))])
    return Tokenizer(bpe)
