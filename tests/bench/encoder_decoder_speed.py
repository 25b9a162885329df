"""How fast an encoder-decoder trains and decodes here and in transformers, on the same model in one run.

    python tests/bench/encoder_decoder_speed.py [--threads 1] [--seconds 6]     (needs transformers)

A model of 6M parameters (d_model 256, 4 + 4 layers); an SFT step of 32 rows with sources of 8 to 64 and
targets of 4 to 48 tokens, both sides with AdamW (torch's fused one); greedy decoding of 48 tokens for 1, 16
and 64 such sources, without an end token. The two are timed in turn, and the fastest round of each counts.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from aya_min.data import Example, collate
from aya_min.encoder_decoder import EncoderDecoder
from aya_min.encoder_decoder_config import EncoderDecoderConfig
from aya_min.losses import sft_loss
from aya_min.model import init_weights
from aya_min.sampling import fused_of, generate

SIZES = dict(vocab_size=8000, d_model=256, d_kv=32, d_ff=512, num_layers=4, num_heads=8,
             feed_forward_proj="gated-gelu", tie_word_embeddings=False)
NEW = 48


def both_models():
    ours = EncoderDecoder(EncoderDecoderConfig(model_type="t5", **SIZES))
    init_weights(ours, torch.Generator().manual_seed(0))
    config = transformers.T5Config(**SIZES, decoder_start_token_id=0, dropout_rate=0.0)
    theirs = transformers.T5ForConditionalGeneration(config)
    theirs.lm_head.weight = torch.nn.Parameter(torch.zeros_like(theirs.shared.weight))
    theirs.load_state_dict(ours.state_dict(), strict=False)
    return ours, theirs


def texts(count, seed=0):
    """[(source, target), ...] of random ids."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: torch.randint(low, high, (1,), generator=generator).item()     # noqa: E731
    return [tuple(torch.randint(3, 8000, (n,), generator=generator) for n in (draw(8, 65), draw(4, 49)))
            for _ in range(count)]


def padded(rows, value=0):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def raced(first, second, seconds):
    """The fastest of each of two functions, called in turn for that many seconds."""
    took, end = ([], []), time.perf_counter() + seconds
    for function in (first, second):
        function()
    while time.perf_counter() < end or not took[1]:
        for function, list_of in zip((first, second), took):
            start = time.perf_counter()
            function()
            list_of.append(time.perf_counter() - start)
    return min(took[0]), min(took[1])


def step(ours, theirs, seconds):
    rows = texts(32)
    is_target = [np.arange(len(source) + len(target)) >= len(source) for source, target in rows]
    batch = collate([Example(torch.cat(row).numpy(), mask, "other") for row, mask in zip(rows, is_target)])
    sources = padded([source for source, _ in rows])
    given = dict(input_ids=sources, attention_mask=(sources > 0).long(),
                 labels=padded([target for _, target in rows], -100))
    losses = {}

    def take(name, model, optimizer, loss_of):
        losses[name] = loss_of(model)
        losses[name].backward()
        optimizer.step()
        optimizer.zero_grad()

    def stepper(name, model, loss_of):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        return lambda: take(name, model.train(), optimizer, loss_of)
    found = raced(stepper("ours", ours, lambda model: sft_loss(model, batch)[0] / batch.count),
                  stepper("theirs", theirs, lambda model: model(**given).loss), seconds)
    return found, losses


def decoding(ours, theirs, count, seconds):
    sources = [source for source, _ in texts(count, 1)]
    prompts, ids = [source.tolist() for source in sources], padded(sources)
    fused, made = fused_of(ours.eval()), {}
    theirs.eval()

    def mine():
        made["ours"] = [group[0].ids for group in generate(fused, prompts, 1, NEW, 0, batch_size=count)]

    @torch.inference_mode()
    def other():
        answers = theirs.generate(input_ids=ids, attention_mask=(ids > 0).long(), max_new_tokens=NEW,
                                  min_new_tokens=NEW, do_sample=False, eos_token_id=None)
        made["theirs"] = answers[:, 1:].tolist()
    found = raced(mine, other, seconds)
    equal = sum(a == b for a, b in zip(made["ours"], made["theirs"]))
    return found, f"{equal} of {count} answers equal"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=6)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ours, theirs = both_models()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {args.threads} threads")
    for count in (1, 16, 64):
        (mine, other), about = decoding(ours, theirs, count, args.seconds)
        print(f"decoding, {count:2} rows: {count * NEW / mine:7.0f} and {count * NEW / other:7.0f} tokens/s, "
              f"{other / mine:.2f} times; {about}", flush=True)
    (mine, other), losses = step(ours, theirs, args.seconds)
    print(f"SFT step: {1000 * mine:.0f} and {1000 * other:.0f} ms, {other / mine:.2f} times")


if __name__ == "__main__":
    main()
