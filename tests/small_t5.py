"""What the tests of the encoder-decoder share: a Unigram tokenizer of 700 tokens, random models of two
layers, and each of its stages run on small.write_world's files."""

from functools import cache

import torch
from small import CPU
from tokenizers import Tokenizer as Unigram

from aya_min import stages, weights
from aya_min.encoder_decoder import EncoderDecoder
from aya_min.encoder_decoder_config import EncoderDecoderConfig
from aya_min.files import write_jsonl
from aya_min.model import init_weights
from aya_min.tokenizer_text import TextTokenizer, train_text_tokenizer
from aya_min.world import questions

FILES = {"pretrain": "text.jsonl", "sft": "sft.jsonl", "dpo": "pairs.jsonl", "kto": "labelled.jsonl"}


@cache
def trained():
    texts = [q["prompt"] for q in questions("train", 240, 0, level="tiny")]
    return train_text_tokenizer(texts, 700).bpe.to_str()


def tokenizer():
    return TextTokenizer(Unigram.from_str(trained()))


def t5(seed=0, **changes):
    """A model whose weights are large enough that what a token says depends on all others."""
    sizes = dict(vocab_size=tokenizer().vocab_size, d_model=32, d_kv=8, d_ff=48, num_layers=2,
                 num_decoder_layers=2, num_heads=4, relative_attention_num_buckets=8,
                 relative_attention_max_distance=12, feed_forward_proj="gated-gelu",
                 tie_word_embeddings=False)
    model = EncoderDecoder(EncoderDecoderConfig(**{**sizes, **changes}))
    return init_weights(model, torch.Generator().manual_seed(seed))


def write_texts(world):
    """text.jsonl beside write_world's files: prompts, several of them to a row."""
    rows = questions("train", 60, 0, level="tiny")
    write_jsonl(world / "text.jsonl", [{"text": " ".join(q["prompt"] for q in rows[i:i + 3]),
                                        "language": rows[i]["language"]} for i in range(0, 60, 2)])
    return world


def run_t5(stage, world, out, resume=False, held_out=False, start=None, architecture={}, **changes):
    """Run a stage of an encoder-decoder on write_texts' files in this process or on these ranks."""
    values = dict(batch_size=8, max_steps=3, learning_rate=1e-3, warmup_steps=2, max_length=256)
    settings = stages.STAGES[stage].settings(**{**values, **changes})
    model = weights.load(start, sharded=True)[0] if start else t5(**architecture)
    more = {"eval_data": [world / "held-out-sft.jsonl"]} if held_out else {}
    stages.train_stage(stage, model, tokenizer(), [world / FILES[stage]], settings, out, CPU, resume=resume,
                       **more)
    return out


def plain_logps(model, source, target, temperature=1):
    """log p (U,) of each token of a target after its source, without a cache, a batch or a line."""
    model.packing = False
    with torch.no_grad():
        given = [source], [len(source)], [target], [len(target)]
        logits = model.logits(*map(torch.tensor, given))
    model.packing = None
    return (logits[0] / temperature).log_softmax(-1).gather(1, torch.tensor(target)[:, None])[:, 0]
