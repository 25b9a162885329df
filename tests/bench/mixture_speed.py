"""A mixture of experts beside the dense model of equal active parameters: milliseconds of a training step,
and of decoding 96 tokens.

    python tests/bench/mixture_speed.py [--rounds 5] [--experts 4] [--hidden 96 256] [--attention own]

Both sides run in turn in one process; a figure is the fastest of the rounds. Of a mixture with attention
experts the dense side has the plain attention: the ratio then shows what those cost.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import torch                                                                            # noqa: E402

from aya_min.balance import Auxiliary                                                   # noqa: E402
from aya_min.config import SFT                                                          # noqa: E402
from aya_min.data import collate                                                        # noqa: E402
from aya_min.fused import Fused                                                         # noqa: E402
from aya_min.flops import training_flops                                                # noqa: E402
from aya_min.loop import make_optimizer                                                 # noqa: E402
from aya_min.losses import sft_loss                                                     # noqa: E402
from aya_min.model import CohereForCausalLM, init_weights                               # noqa: E402
from aya_min.model_config import ModelConfig, model_preset                              # noqa: E402
from aya_min.sampling import generate                                                   # noqa: E402
from aya_min.stages import blank_example                                                # noqa: E402

CPU = torch.device("cpu")


def step(model, optimizer, batch, settings):
    """A training step with the losses of the mixture."""
    auxiliary = Auxiliary(model, [batch], settings, CPU, None)
    (sft_loss(model, batch)[0] / batch.count + auxiliary.loss()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--hidden", type=int, nargs=2, default=[96, 256], help="hidden and intermediate size")
    parser.add_argument("--attention", choices=["own", "shared"])
    args = parser.parse_args()
    dense = {**vars(model_preset("tiny")), "hidden_size": args.hidden[0], "intermediate_size": args.hidden[1],
             "head_dim": None, "num_attention_heads": args.hidden[0] // 32, "num_key_value_heads": None}
    names = [f"expert {i}" for i in range(args.experts)]
    kinds = {"dense": None, "mixture": dict(experts=names, attention=args.attention)}
    models = {name: init_weights(CohereForCausalLM(ModelConfig(**{**dense, "mixture": mixture})),
                                 torch.Generator().manual_seed(0)) for name, mixture in kinds.items()}
    settings, rng = SFT(learning_rate=1e-4), torch.Generator().manual_seed(1)
    batch = collate([blank_example(None, 64, None)] * 32)
    batch.input_ids = torch.randint(10, 6000, batch.input_ids.shape, generator=rng)
    prompts = torch.randint(10, 6000, (64, 16), generator=rng).tolist()
    fused = {name: Fused(copy.deepcopy(model)) for name, model in models.items()}
    optimizers = {name: make_optimizer(model, settings) for name, model in models.items()}
    kinds = {"step, ms": lambda name: step(models[name], optimizers[name], batch, settings),
             **{f"decoding {n} rows, ms": lambda name, n=n: generate(
                 fused[name], prompts[:n], max_new_tokens=96, temperature=1.0, seed=0, batch_size=n)
                for n in (1, 64)}}
    flops = [training_flops(model.config, batch.lengths.tolist(), int(batch.mask.sum()))
             for model in models.values()]
    print(f"{torch.get_num_threads()} threads, {args.experts} experts of {args.hidden}, attention "
          f"{args.attention}; operations of the mixture / dense {flops[1] / flops[0]:.3f}")
    for what, run in kinds.items():
        times = {name: [] for name in models}
        for _ in range(args.rounds + 1):
            for name in models:
                times[name].append(seconds(lambda: run(name)))
        fastest = {name: 1e3 * min(each[1:]) for name, each in times.items()}
        print(f"{what:24} dense {fastest['dense']:8.1f}, mixture {fastest['mixture']:8.1f}, ratio "
              f"{fastest['mixture'] / fastest['dense']:.2f}")


if __name__ == "__main__":
    main()
