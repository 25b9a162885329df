"""Ask a model folder to learn Boolean functions from examples in its prompt, as arXiv 2310.03016 asks
language models: functions drawn anew, which are in no training set, against one nearest neighbour and the
optimal learner.

    python -m aya_min.in_context --model RUN/model --function conjunction --entries 5 --examples 5 10 20 40

A prompt holds an instruction, examples as lines of 0 and 1, and one more input; the answer is greedy, and its
first word must be 0 or 1, with or without a sign around it. Any other answer counts as half right, as a guess
is, and is reported. Of a DNF there are too many functions for an optimal learner.

The paper's defaults: 5 entries, up to 50 examples, 100 functions. The words of the prompt are ours.
"""


import torch

from .command import WHOLE, Parser, guarded, is_spare_rank, number
from .discrete_functions import CLASSES, MANY, nearest_neighbour, num_functions, optimal, rate, sample
from .evaluate_rates import bootstrap_mean
from .files import check_out, dumps, write_new
from .model import CohereForCausalLM
from .sampling import answer_rows
from .weights import ONE, load, load_meta

INSTRUCTION = ("Below are inputs of 0 and 1, each with the output of one and the same unknown Boolean "
               "function. Find out what the function is. Answer with the output for the last input, 0 or 1, "
               "and nothing else.")
FUNCTIONS = [name for name in CLASSES if name != "nearest"]
LEARNERS = ("nearest neighbour", "optimal")
NEW_TOKENS = 4              # of an answer: a tokenizer may put a blank or a sign before it


def bits(x):
    """A vector of +-1 as a line of 0 and 1."""
    return " ".join("1" if value > 0 else "0" for value in x)


def prompt_of(xs, ys, asked):
    """The prompt of the examples xs (k, d), ys (k,) and an input (d,)."""
    shown = [f"Input: {bits(x)}\nOutput: {int(y)}" for x, y in zip(xs, ys, strict=True)]
    return "\n\n".join([INSTRUCTION, *shown, f"Input: {bits(asked)}\nOutput:"])


def read_answer(text):
    """0 or 1, or None if the answer does not begin with one of them, alone."""
    found = text.split()[0].strip(".,:;!*`'\"") if text.split() else ""
    return int(found) if found in ("0", "1") else None


def ask(model, tokenizer, name, d, examples, count, seed, batch_size=32):
    """{k: {"model": [how often right, of each function], "unreadable": [...], "nearest neighbour": [...],
    "optimal": [...] or no such key}} after k examples of `count` functions of a class on d entries."""
    generator = torch.Generator().manual_seed(seed)
    xs, ys, _ = sample(name, count, max(examples) + 1, d, generator)
    few = name != "dnf" and num_functions(name, d) <= MANY
    learners = {"nearest neighbour": nearest_neighbour}
    learners |= {"optimal": lambda xs, ys: optimal(name, xs, ys)} if few else {}
    rows = [{"prompt": prompt_of(x[:k], y[:k], x[k])} for k in examples for x, y in zip(xs, ys)]
    check_room(model, tokenizer, rows, [k for k in examples for _ in range(count)])
    known = {who: rate(learn(xs, ys), ys) for who, learn in learners.items()}           # (count, n)
    answers = answer_rows(model, tokenizer, rows, max_new_tokens=NEW_TOKENS, temperature=0.0, seed=seed,
                          batch_size=batch_size, progress="asking", name=model.came_from)
    texts = iter(answer["completion"] for answer, in answers)
    return {k: graded([next(texts) for _ in range(count)], ys[:, k].tolist())
            | {who: rates[:, k].tolist() for who, rates in known.items()} for k in examples}


def check_room(model, tokenizer, rows, examples):
    """ValueError for a prompt that is too long for the model, with what fits. examples: the number in each
    row."""
    longest, room = {}, model.config.max_position_embeddings - NEW_TOKENS
    for k, row in zip(examples, rows, strict=True):
        longest[k] = max(longest.get(k, 0), len(tokenizer.encode_prompt(row["prompt"])))
    if (most := max(longest.values())) > room:
        fit = " ".join(str(k) for k, length in longest.items() if length <= room)
        remedy = f"of these --examples {fit} fit" if fit else "give fewer --examples or --entries"
        raise ValueError(f"--model {model.came_from}: a prompt of {max(longest)} examples has {most} tokens, "
                         f"its positions hold {room} and an answer; {remedy}")


def graded(texts, ys):
    """{"model": how often each answer is right, "unreadable": 1 for each that is no answer, else 0}."""
    said = [read_answer(text) for text in texts]
    return {"model": [0.5 if one is None else float(one == y) for one, y in zip(said, ys, strict=True)],
            "unreadable": [float(one is None) for one in said]}


def figures_of(found):
    """{k: {name: {"value", "ci95"}}}, intervals over functions."""
    return {k: {name: dict(zip(("value", "ci95"), bootstrap_mean(values, range(len(values)))))
                for name, values in each.items()} for k, each in found.items()}


def table(figures):
    names = ["model", "unreadable", *(who for who in LEARNERS if who in next(iter(figures.values())))]
    lines = [f"{'examples':>8}" + "".join(f"{name:>28}" for name in names)]
    for k, each in figures.items():
        cells = (f"{each[name]['value']:.1%} [{each[name]['ci95'][0]:.1%}, {each[name]['ci95'][1]:.1%}]"
                 for name in names)
        lines.append(f"{k:8}" + "".join(f"{cell:>28}" for cell in cells))
    return "\n".join(lines)


def main(argv=None):
    parser = Parser(prog="aya_min.in_context", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--function", default="conjunction", choices=FUNCTIONS)
    parser.add_argument("--entries", type=number(int, "[2, 64]"), default=5,
                        help="entries of an input; default: %(default)s")
    parser.add_argument("--examples", type=number(int, "[0, 1000]"), nargs="+",
                        default=[0, 5, 10, 20, 30, 40, 49],
                        help="numbers of examples in the prompt; with another largest one other functions "
                             "are drawn")
    parser.add_argument("--count", type=number(int, "[2, 100000]"), default=100,
                        help="functions; default: %(default)s")
    parser.add_argument("--batch-size", type=number(int, "[1, inf)"), default=32)
    parser.add_argument("--seed", type=number(int, WHOLE), default=0)
    parser.add_argument("--out", help="JSON file to write the figures to; must not exist")
    args = parser.parse_args(argv)
    if is_spare_rank():
        return
    if args.out:
        check_out(args.out)
    model, _, _ = load_meta(args.model, packed=True)
    if type(model) is not CohereForCausalLM:
        raise ValueError(f"--model {args.model}: {ONE[type(model)]}; give a language model of a "
                         "decoder alone")
    model, tokenizer = load(args.model, "cuda" if torch.cuda.is_available() else "cpu", packed=True)
    figures = figures_of(ask(model, tokenizer, args.function, args.entries, sorted(set(args.examples)),
                             args.count, args.seed, args.batch_size))
    if args.out:
        about = {key: getattr(args, key) for key in ("model", "function", "entries", "count", "seed")}
        write_new({args.out: dumps({**about, "examples": figures}, indent=1) + "\n"})
    print(table(figures))


if __name__ == "__main__":
    guarded(main, "in_context")
