"""From Aya 101 to Aya 23 (arXiv 2402.07827, 2405.15032): an encoder-decoder of many languages gives way to a
decoder of fewer, on the embedded world.

A decoder of the recipe's size and an encoder-decoder (T5 v1.1's layers) of as many parameters, within 2%, are
trained by SFT from random weights on the same questions with right answers, in the same order of batches for
the same steps. All 24 codes, or 8 of them (every third), at one capacity, compared in the 8.

Departures: both are trained from scratch on questions alone; Aya 101 began with mT5, Aya 23 with Command R,
and their pretraining differed in data and size too. Of small models the embeddings are most of the
parameters, so the encoder-decoder's are tied, which mT5's are not. Each model has a tokenizer of its own kind
(BPE, Unigram) with as many entries, trained on the same texts; since losses by token then differ in their
unit, answers alone are compared. Both take AdamW at the recipe's rate: in 300 steps of seed 0 it gave a lower
loss on right answers than 0.3 and 3 times it, for either kind. All comparisons were written before the first
run; nothing else was seen of seed 0.
"""

import random

import torch

from .. import weights
from ..encoder_decoder import EncoderDecoder
from ..encoder_decoder_config import EncoderDecoderConfig
from ..experiments import Claim, Comparison
from ..languages import LANGUAGES
from ..model import init_weights
from ..model_config import MODEL_PRESETS
from ..tokenizer_text import train_text_tokenizer
from ..world import gold_answer, questions

PAPER = "Aya 23, arXiv 2405.15032; Aya 101, arXiv 2402.07827: architecture and breadth"
MINUTES = 11
ALL, EIGHT = tuple(LANGUAGES), tuple(list(LANGUAGES)[::3])
DECODER, BOTH = "decoder", "encoder-decoder"
# Two layers each, so narrow that encoder and decoder have the parameters of the decoder's three.
LAYERS, D_FF = 2, 1


def rows(lab, codes):
    """A fifth of the base's rows: questions in these languages, in turn, with right answers."""
    asked = questions("train", lab.recipe.corpus // 5, f"aya-101/{lab.seed}", codes, lab.recipe.level)
    made = [{**q, "completion": gold_answer(q)} for q in asked]
    return random.Random(lab.seed).sample(made, len(made))


def texts(lab):
    return [f"{row['prompt']} {row['completion']}" for row in rows(lab, ALL)[:20000]]


def config_of(lab, tokenizer):
    """The encoder-decoder of as many parameters as the recipe's model."""
    preset = MODEL_PRESETS[lab.recipe.model]
    width, heads = preset["hidden_size"], preset["num_attention_heads"]
    return EncoderDecoderConfig(
        model_type="t5", vocab_size=tokenizer.vocab_size, d_model=width, d_kv=width // heads,
        d_ff=D_FF * width, num_layers=LAYERS, num_heads=heads, feed_forward_proj="gated-gelu",
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_id,
        decoder_start_token_id=tokenizer.pad_id, eos_token_id=tokenizer.end_of_turn_id)


def untrained(lab):
    """The encoder-decoder as it is initialized, with its tokenizer. -> its folder"""
    def make(folder):
        tokenizer = train_text_tokenizer(texts(lab), lab.recipe.vocab_size)
        model = init_weights(EncoderDecoder(config_of(lab, tokenizer)),
                             torch.Generator().manual_seed(lab.recipe.seed))
        weights.save(folder / "model", model, tokenizer)
    return lab.step("start-of-encoder-decoder", make)["folder"] / "model"


def trained(kind, codes):
    def arm(lab):
        start = untrained(lab) if kind == BOTH else lab.untrained(texts(lab))
        steps = max(1, lab.recipe.corpus // 5 // lab.recipe.batch_size)
        return lab.train(f"{kind}, {len(codes)} languages", "sft", start, rows(lab, codes), max_steps=steps,
                         warmup_steps=min(50, steps // 10), learning_rate=lab.recipe.base_learning_rate)
    return arm


ARMS = {f"{kind}, {len(codes)} languages": trained(kind, codes)
        for kind in (DECODER, BOTH) for codes in (ALL, EIGHT)}
MANY, FEW = (f", {len(codes)} languages" for codes in (ALL, EIGHT))


def both(a, b, languages=None):
    return tuple(Comparison(a, b, decoding=how, languages=languages) for how in ("greedy", "sampled"))


CLAIMS = (
    Claim("architecture", "At equal parameters and rows a decoder is better than an encoder-decoder.",
          "MGSM: 36.6 with Aya 23 8B, a decoder, 8.1 with Aya 101 13B, an encoder-decoder",
          both(DECODER + MANY, BOTH + MANY) + both(DECODER + FEW, BOTH + FEW, EIGHT)),
    Claim("architecture-breadth", "At one capacity 8 languages are better than 24 in the 8, for both kinds.",
          "more capacity for fewer languages is what Aya 23 is an experiment in",
          both(DECODER + FEW, DECODER + MANY, EIGHT) + both(BOTH + FEW, BOTH + MANY, EIGHT)),
)

# Why arms of these claims differ in start, steps, tokens or tuning (experiments_matched.py).
UNMATCHED = {"architecture": "each kind has a start and a tokenizer of its own; rows and steps are equal"}
