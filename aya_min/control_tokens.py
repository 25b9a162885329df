"""Texts that spell names of control tokens: a template was applied to them, and must not be a second time."""

import re
from collections import Counter

from . import distributed

# Names of turn tokens. A text that spells one has a chat template applied to it, ours or another family's.
TURN_TOKENS = {
    "Cohere": ["<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
               "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>",
               "<|START_THINKING|>", "<|START_ACTION|>"],
    "ChatML": ["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    "Llama 2, Mistral": ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]"],
    "Llama 3 and 4": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
                      "<|eom_id|>", "<|header_start|>", "<|header_end|>", "<|eot|>"],
    "Gemma": ["<start_of_turn>", "<end_of_turn>"],
    "Phi, GLM, Zephyr": ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|observation|>", "[gMASK]"],
    "DeepSeek": ["<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"],
    "gpt-oss, Granite": ["<|start|>", "<|message|>", "<|channel|>", "<|return|>", "<|start_of_role|>",
                         "<|end_of_role|>", "<|end_of_text|>"]}
TEMPLATED = re.compile("|".join(re.escape(name) for names in TURN_TOKENS.values() for name in names))


class Spelled:
    """Counts the rows whose texts spell names of control tokens: those above, and those of `tokenizer`."""

    def __init__(self, tokenizer=None):
        self.tokenizer = tokenizer
        self.found = Counter()      # {name of a control token: number of rows}
        self.first = None           # where the first of them is, "FILE:LINE"

    def look(self, texts, where):
        """Count a row's texts, at most one name per row. where: the row's "FILE:LINE"."""
        for text in texts:
            if "<" in text or "[" in text:
                match = TEMPLATED.search(text)
                name = match[0] if match else None
                if not match and self.tokenizer:
                    name = self.tokenizer.spelled(text)
                if name:
                    self.first = self.first or where
                    self.found[name] += 1
                    return

    def report(self, paths, total, reading):
        """Raise ValueError if a row was found, or only print it if `reading` allows control tokens.

        paths: the files, of `total` rows. reading: config.Reading or None.
        """
        if not self.found:
            return
        names = " ".join(name for name, _ in self.found.most_common(4))
        what = (f"{sum(self.found.values())} of {total} rows spell control tokens ({names}; the first: "
                f"{self.first}), which are read as letters")
        if not (reading and reading.allow_control_tokens):
            raise ValueError(f"{' '.join(map(str, paths))}: {what}; give texts without a chat template's "
                             "tokens, or --allow-control-tokens")
        distributed.say(what, paths)
