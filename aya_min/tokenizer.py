"""Byte-level BPE and the Cohere turn format. A conversation becomes ids AND loss mask in one walk, so the two cannot drift.

    <BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>hello<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>hi<|END_OF_TURN_TOKEN|>
                                                                                                                    `-- supervised -------'

Text is encoded turn by turn, with special tokens never read out of it, so the boundaries are exact and user text cannot forge a turn.
Aya Expanse, Aya 23 and Command R write turns like this. Command R7B, Command A and Tiny Aya put an answer between <|START_RESPONSE|> (which
ends the prompt) and <|END_RESPONSE|> (which the model says before it ends the turn), and always have a system turn: see `read_template`.
One departure: outer white space is left out of every turn; Aya Expanse's template keeps it in the system turn, Tiny Aya's in all.
"""

import json
import re
import unicodedata
from pathlib import Path

from tokenizers import Regex, Tokenizer as BPE, decoders, models, normalizers, pre_tokenizers, trainers

SPECIALS = ["<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK_TOKEN>", "<BOS_TOKEN>", "<EOS_TOKEN>", "<EOP_TOKEN>",
            "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"]
ROLES = {"system": "<|SYSTEM_TOKEN|>", "user": "<|USER_TOKEN|>", "assistant": "<|CHATBOT_TOKEN|>"}

RESPONSE = ["<|START_RESPONSE|>", "<|END_RESPONSE|>"]
CONTROL = re.compile(r"<\|\w+\|>|<[A-Z0-9_]+>")          # names of tokens that are not text

# The same format for tools that read tokenizer_config.json (transformers, vLLM).
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}"
    "{% if message['role'] == 'user' %}{{ '<|USER_TOKEN|>' + message['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}"
    "{% elif message['role'] == 'system' %}{{ '<|SYSTEM_TOKEN|>' + message['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}"
    "{% else %}{{ '<|CHATBOT_TOKEN|>' }}{% generation %}{{ message['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}{% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}")
RESPONSE_TEMPLATE = CHAT_TEMPLATE.replace("<|CHATBOT_TOKEN|>", "<|CHATBOT_TOKEN|><|START_RESPONSE|>").replace(
    "<|END_OF_TURN_TOKEN|>' }}{% endgeneration %}", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>' }}{% endgeneration %}")


def read_template(template):
    """(response markers?, system text if none is given, system text around a given "{system}") of a published chat template.

    The first text is None where a conversation without system turn has none, "" where it has an empty one (Command R7B), and Cohere's
    preamble where the template always speaks it (Command A, Tiny Aya). No Jinja: Cohere's templates differ in nothing else that a plain
    conversation shows, and a template that cannot be read is refused.
    """
    prompt = template.rpartition("<|CHATBOT_TOKEN|>")[2]            # the last one opens the answer that is to be generated
    other = [name for name in ("<|START_THINKING|>", "<|START_TEXT|>") if name in prompt]
    if other:
        raise ValueError(f"the chat template opens answers with {' '.join(other)}, a turn format not known here; known: Aya, Command R, R7B and A, Tiny Aya")
    response = RESPONSE[0] in template
    if "<|SYSTEM_TOKEN|><|END_OF_TURN_TOKEN|>" in template:
        return response, "", "{system}"
    preambles = re.findall(r"<\|SYSTEM_TOKEN\|>([^'\"{<].*?)<\|END_OF_TURN_TOKEN\|>", template, re.DOTALL)
    if not preambles:
        return response, None, "{system}"
    text = re.sub(r"-%}\s*|%}\n", "%}", re.sub(r"\s*{%-", "{%", preambles[-1]))     # Jinja's white space; earlier ones are for tools
    plain = r"((?:(?!{[%{]).)*)"
    text = re.sub(rf"{{% *if [^%]*%}}{plain}{{% *else *%}}{plain}{{% *endif *%}}", r"\2", text, flags=re.DOTALL)    # nobody asks for the strict safety mode
    parts = re.fullmatch(rf"{plain}{{% *if [^%]*%}}{plain}{{{{[^}}]*}}}}{plain}{{% *endif *%}}{plain}", text, re.DOTALL)
    if not parts:
        raise ValueError("the chat template has a preamble in a form not known here; known: those of Command A and Tiny Aya")
    before, heading, ending, after = parts.groups()
    return response, before + after, before + heading + "{system}" + ending + after


def default_template(config):
    """The chat template of a tokenizer_config.json for plain conversations: a string, or the one named "default" of a list; None without."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {each["name"]: each["template"] for each in template}
        if "default" not in named:
            raise ValueError(f"the chat templates are {' '.join(named)}; one must be named default")
        template = named["default"]
    return template


class Tokenizer:
    """A tokenizer.json of the `tokenizers` library plus the ids of Cohere's turn tokens, found by name.

    text, config: tokenizer.json and tokenizer_config.json as they were read; `save` writes them again as they came.
    """

    def __init__(self, bpe, text=None, config=None):
        self.bpe, self.text, self.config = bpe, text, config or {}
        self.bpe.encode_special_tokens = True           # "<BOS_TOKEN>" typed by a user is seven letters, not a token
        self.bpe.no_padding()
        self.bpe.no_truncation()
        # Published files call <|USER_TOKEN|> and others not special, and then they are read out of a user's text and printed in answers.
        added = bpe.get_added_tokens_decoder().values()
        self.bpe.add_special_tokens([token.content for token in added if CONTROL.fullmatch(token.content) and not token.special])
        ids = {name: bpe.token_to_id(name) for name in SPECIALS + RESPONSE}
        template = default_template(self.config)
        in_tokenizer = all(ids[name] is not None for name in RESPONSE)
        response, self.no_system, self.around_system = read_template(template) if template else (in_tokenizer, None, "{system}")
        needed = ["<PAD>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"]
        missing = [name for name in needed + RESPONSE * response if ids[name] is None]
        if missing:
            raise ValueError(f"tokenizer.json lacks {' '.join(missing)}; it must be a Cohere tokenizer (Aya, Command R) or one trained here")
        self.pad_id, self.bos_id, self.end_of_turn_id = ids["<PAD>"], ids["<BOS_TOKEN>"], ids["<|END_OF_TURN_TOKEN|>"]
        self.start_of_turn_id = ids["<|START_OF_TURN_TOKEN|>"]
        self.opening = {role: [self.start_of_turn_id, ids[name]] for role, name in ROLES.items()}
        self.closing = {role: [self.end_of_turn_id] for role in ROLES}
        if response:
            self.opening["assistant"].append(ids["<|START_RESPONSE|>"])
            self.closing["assistant"].insert(0, ids["<|END_RESPONSE|>"])
        self.stop_ids = self.closing["assistant"]       # an answer is over at the first of these
        self.config["chat_template"] = self.config.get("chat_template") or (RESPONSE_TEMPLATE if response else CHAT_TEMPLATE)

    @property
    def vocab_size(self):
        return self.bpe.get_vocab_size()

    @property
    def meaning(self):
        """A text that is equal for tokenizers that do the same, however their files are written."""
        return self.bpe.to_str()

    def key(self, text):
        """What makes two answers the same: their ids, after outer white space and the normalizer are gone."""
        return tuple(self.encode(text.strip()))

    def spelled(self, text):
        """The first name of a control token that a text spells, or None. `encode` takes such a name as letters."""
        names = {token.content for token in self.bpe.get_added_tokens_decoder().values()}
        return next((found[0] for found in CONTROL.finditer(text) if found[0] in names), None)

    def encode(self, text):
        """Ids of plain text: no BOS, no special tokens, whatever the text contains."""
        return self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.bpe.decode([int(i) for i in ids], skip_special_tokens=True)

    def stream(self, ids):
        """The text of ids that arrive one by one, never half a character: for each id a piece, "" while a character is incomplete, then what is
        left (bytes that are no text, as U+FFFD). The pieces together are `decode` of all ids."""
        decoder, seen, length = decoders.DecodeStream(skip_special_tokens=True), [], 0
        for i in ids:
            seen.append(int(i))
            piece = decoder.step(self.bpe, seen[-1]) or ""
            length += len(piece)
            yield piece
        yield self.decode(seen)[length:]

    def encode_answer(self, text):
        """Ids of an assistant's turn after the generation prompt: its text and the end, all of which the model has to say."""
        return self.encode(text.strip()) + self.closing["assistant"]

    def encode_chat(self, messages, generation_prompt=False):
        """(ids, mask) of [{"role", "content"}, ...]; mask is True on each assistant turn's text and its end, the end of turn included.

        Roles: an optional system turn first, then user and assistant in turn. With `generation_prompt` the ids end where
        the assistant is to speak.
        """
        ids, mask = [self.bos_id], [False]
        for message in self.with_system_turn(messages):
            role = message["role"]
            text = self.encode(message["content"].strip()) + self.closing[role]
            ids += self.opening[role] + text
            mask += [False] * len(self.opening[role]) + [role == "assistant"] * len(text)
        if generation_prompt:
            ids += self.opening["assistant"]
            mask += [False] * len(self.opening["assistant"])
        return ids, mask

    def with_system_turn(self, messages):
        """The messages with the system turn that the model was trained with: as given, an empty one, or a preamble and what is given."""
        given = messages[0]["content"].strip() if messages and messages[0]["role"] == "system" else ""
        text = self.around_system.replace("{system}", given) if given else self.no_system
        return messages if text is None else [{"role": "system", "content": text}] + [m for m in messages if m["role"] != "system"]

    def encode_prompt(self, prompt):
        """Ids of a user's prompt (a string, or messages), ready for the assistant to answer."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.encode_chat(messages, generation_prompt=True)[0]

    def save(self, folder):
        folder = Path(folder)
        (folder / "tokenizer.json").write_text(self.text or self.bpe.to_str(pretty=True), encoding="utf-8")
        ours = {"tokenizer_class": "CohereTokenizerFast", "bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "pad_token": "<PAD>",
                "unk_token": "<UNK>", "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False,
                "legacy": True, "use_default_system_prompt": False}
        config = self.config if self.config.keys() > {"chat_template"} else {**ours, **self.config}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def load_tokenizer(folder):
    """The tokenizer of a model folder, with the turn format that its chat template (chat_template.jinja, or in tokenizer_config.json) has."""
    folder = Path(folder)
    path, config, jinja = folder / "tokenizer.json", folder / "tokenizer_config.json", folder / "chat_template.jinja"
    if not path.is_file():
        raise ValueError(f"{folder}: no tokenizer.json; give a model folder, or --tokenizer DIR")
    try:
        text = path.read_bytes().decode("utf-8")
        bpe = BPE.from_str(text)
    except Exception as error:      # the tokenizers library raises bare Exception for a file that it cannot read
        raise ValueError(f"{path}: not a readable tokenizer.json ({error})") from None
    try:
        about = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{config}: not JSON ({error}); copy or download it again") from None
    if jinja.is_file():
        about["chat_template"] = jinja.read_text(encoding="utf-8")
    try:
        return Tokenizer(bpe, text, about)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def train_tokenizer(texts, vocab_size):
    """Byte-level BPE as Cohere's: NFC, digits one by one, no prefix space; here also one Han character at a time, which
    keeps a small vocabulary shared between Chinese and Japanese. `texts` is an iterable of strings."""
    bpe = BPE(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated"),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIALS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    bpe.train_from_iterator((unicodedata.normalize("NFC", text) for text in texts), trainer)
    return Tokenizer(bpe)
