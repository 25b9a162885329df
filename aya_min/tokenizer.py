"""Byte-level BPE and the Cohere turn format. A conversation becomes ids AND loss mask in one walk, so the two cannot drift.

    <BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>hello<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>hi<|END_OF_TURN_TOKEN|>
                                                                                                                    `-- supervised -------'

Text is encoded turn by turn, with special tokens never read out of it, so the boundaries are exact and user text cannot forge a turn.
"""

import json
import unicodedata
from pathlib import Path

from tokenizers import Regex, Tokenizer as BPE, decoders, models, normalizers, pre_tokenizers, trainers

SPECIALS = ["<PAD>", "<UNK>", "<CLS>", "<SEP>", "<MASK_TOKEN>", "<BOS_TOKEN>", "<EOS_TOKEN>", "<EOP_TOKEN>",
            "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"]
ROLES = {"system": "<|SYSTEM_TOKEN|>", "user": "<|USER_TOKEN|>", "assistant": "<|CHATBOT_TOKEN|>"}

# The same format for tools that read tokenizer_config.json (transformers, vLLM).
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}"
    "{% if message['role'] == 'user' %}{{ '<|USER_TOKEN|>' + message['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}"
    "{% elif message['role'] == 'system' %}{{ '<|SYSTEM_TOKEN|>' + message['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}"
    "{% else %}{{ '<|CHATBOT_TOKEN|>' }}{% generation %}{{ message['content'].strip() + '<|END_OF_TURN_TOKEN|>' }}{% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}")


class Tokenizer:
    """A tokenizer.json of the `tokenizers` library plus the ids of Cohere's turn tokens, found by name."""

    def __init__(self, bpe):
        self.bpe = bpe
        self.bpe.encode_special_tokens = True           # "<BOS_TOKEN>" typed by a user is seven letters, not a token
        self.bpe.no_padding()
        self.bpe.no_truncation()
        ids = {name: bpe.token_to_id(name) for name in SPECIALS}
        needed = ["<PAD>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"]
        missing = [name for name in needed if ids[name] is None]
        if missing:
            raise ValueError(f"tokenizer.json lacks {' '.join(missing)}; it must be a Cohere tokenizer (Aya, Command R) or one trained here")
        self.pad_id, self.bos_id, self.end_of_turn_id = ids["<PAD>"], ids["<BOS_TOKEN>"], ids["<|END_OF_TURN_TOKEN|>"]
        self.start_of_turn_id = ids["<|START_OF_TURN_TOKEN|>"]
        self.role_ids = {role: ids[name] for role, name in ROLES.items()}

    @property
    def vocab_size(self):
        return self.bpe.get_vocab_size()

    def encode(self, text):
        """Ids of plain text: no BOS, no special tokens, whatever the text contains."""
        return self.bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.bpe.decode([int(i) for i in ids], skip_special_tokens=True)

    def encode_chat(self, messages, generation_prompt=False):
        """(ids, mask) of [{"role", "content"}, ...]; mask is True on each assistant turn's text and its end token.

        Roles: an optional system turn first, then user and assistant in turn. With `generation_prompt` the ids end where
        the assistant is to speak.
        """
        ids, mask = [self.bos_id], [False]
        for message in messages:
            opening = [self.start_of_turn_id, self.role_ids[message["role"]]]
            text = self.encode(message["content"].strip()) + [self.end_of_turn_id]
            ids += opening + text
            mask += [False, False] + [message["role"] == "assistant"] * len(text)
        if generation_prompt:
            ids += [self.start_of_turn_id, self.role_ids["assistant"]]
            mask += [False, False]
        return ids, mask

    def encode_prompt(self, prompt):
        """Ids of a user's prompt (a string, or messages), ready for the assistant to answer."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.encode_chat(messages, generation_prompt=True)[0]

    def save(self, folder):
        folder = Path(folder)
        self.bpe.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "CohereTokenizerFast", "bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>", "pad_token": "<PAD>",
                  "unk_token": "<UNK>", "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False,
                  "legacy": True, "use_default_system_prompt": False, "chat_template": CHAT_TEMPLATE}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def load_tokenizer(folder):
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no tokenizer.json; give a model folder, or --tokenizer DIR")
    try:
        return Tokenizer(BPE.from_file(str(path)))
    except ValueError:
        raise
    except Exception as error:      # the tokenizers library raises bare Exception for a file that it cannot read
        raise ValueError(f"{path}: not a readable tokenizer.json ({error})") from None


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
