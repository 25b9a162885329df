"""The server under load: clients that ask at once, beside batch generation of the same requests, in turn in
one run.

    OMP_NUM_THREADS=2 python tests/bench/serve_load.py [--clients 64] [--requests 256] [--rounds 5] [--wide]

A Cohere model of 5.6M parameters in fp32 (--wide: 34M), greedy; prompts of one to four questions of the
embedded world, answers of at most 8 to 128 tokens. Batch generation is sampling.generate with as many rows as
there are clients, after the model has been loaded. The server is generate.py --serve, a process of its own;
each client is a thread of this process that asks its next request when it has an answer, whole or streamed,
so that clients, sockets and JSON are in the server's time. An answer that is not the batch's own text is
counted as lost. Each figure is the median over the rounds, with minimum and maximum; the first round warms
up.
"""

import argparse
import http.client
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from queue import Empty, SimpleQueue

import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from aya_min import weights                                         # noqa: E402
from aya_min.fused import Fused                                    # noqa: E402
from aya_min.model import CohereForCausalLM, init_weights           # noqa: E402
from aya_min.model_config import ModelConfig                        # noqa: E402
from aya_min.sampling import generate                               # noqa: E402
from aya_min.tokenizer import train_tokenizer                       # noqa: E402
from aya_min.world import questions                                 # noqa: E402
from tests.bench.generate_speed import CONFIG                       # noqa: E402

ROOT = Path(__file__).parent.parent.parent
WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 10, "num_key_value_heads": 4}


def requests(count):
    """[(prompt, most new tokens), ...]"""
    rng, texts = random.Random(0), [q["prompt"] for q in questions("test", 480, 0)]
    return [(" ".join(rng.sample(texts, rng.randint(1, 4))), rng.randint(8, 128)) for _ in range(count)]


def ask(port, prompt, limit, stream):
    """The text of one answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": limit, "temperature": 0,
            "stream": stream}
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    response = connection.getresponse()
    data = response.read().decode()
    if response.status != 200:
        raise OSError(data)
    if not stream:
        return json.loads(data)["choices"][0]["message"]["content"]
    *events, done, end = data.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    choices = [json.loads(event.removeprefix("data: "))["choices"] for event in events]
    return "".join(each[0]["delta"].get("content", "") for each in choices)


def all_at_once(port, asked, num_clients, stream):
    """The answers, in the order of the requests; None for a lost one."""
    left, answers, start = SimpleQueue(), [None] * len(asked), threading.Barrier(num_clients)
    for i in range(len(asked)):
        left.put(i)

    def client():
        start.wait()
        while True:
            try:
                i = left.get_nowait()
            except Empty:
                return
            try:
                answers[i] = ask(port, *asked[i], stream)
            except OSError as error:
                print(f"request {i} is lost: {error}")
    threads = [threading.Thread(target=client) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--wide", action="store_true")
    args = parser.parse_args()
    tokenizer = train_tokenizer([q["prompt"] for q in questions("train", 2400, 0)], CONFIG["vocab_size"])
    model = init_weights(CohereForCausalLM(ModelConfig(**{
        **CONFIG, **(WIDE if args.wide else {}), "vocab_size": tokenizer.vocab_size,
        "eos_token_id": tokenizer.end_of_turn_id})),
        torch.Generator().manual_seed(0)).eval()
    asked = requests(args.requests)
    prompts = [tokenizer.encode_prompt(prompt) for prompt, _ in asked]
    limits, fused = [limit for _, limit in asked], Fused(model)
    cores = len(os.sched_getaffinity(0))
    print(f"{platform.processor() or platform.machine()}, {cores} of {os.cpu_count()} cores,"
          f" {torch.get_num_threads()} threads, torch {torch.__version__},"
          f" load {os.getloadavg()[0]:.1f} before; {sum(p.numel() for p in model.parameters()):,} parameters;"
          f" {len(asked)} requests of {min(map(len, prompts))} to {max(map(len, prompts))} tokens,"
          f" {args.clients} clients")
    with tempfile.TemporaryDirectory() as folder:
        weights.save(Path(folder) / "model", model, tokenizer)
        server = subprocess.Popen(
            [sys.executable, ROOT / "generate.py", "--model", Path(folder) / "model", "--serve",
             "--port", "0", "--batch-size", str(args.clients)], stderr=subprocess.PIPE, text=True)
        try:
            port = next(int(found[1]) for line in server.stderr if (found := re.search(r":(\d+)/ \(", line)))
            compare(args, fused, tokenizer, asked, prompts, limits, port)
        finally:
            server.kill()
            server.wait()


def compare(args, fused, tokenizer, asked, prompts, limits, port):
    own = []

    def texts():
        """A NUL becomes U+FFFD, as in sampling.answer_rows."""
        return [tokenizer.decode(ids).replace("\0", "\ufffd") for ids in own]

    def batch():
        made = generate(fused, prompts, max_new_tokens=limits, temperature=0, batch_size=args.clients,
                        stop_ids=tokenizer.stop_ids)
        own[:] = [c.ids for [c] in made]
        return texts()
    ways = {"batch generation": batch,
            "served, whole": lambda: all_at_once(port, asked, args.clients, False),
            "served, streamed": lambda: all_at_once(port, asked, args.clients, True)}
    rates, lost = {name: [] for name in ways}, dict.fromkeys(ways, 0)
    for _ in range(args.rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            answers = way()
            seconds = time.perf_counter() - start
            rates[name].append(sum(map(len, own)) / seconds)
            lost[name] += sum(a != text for a, text in zip(answers, texts()))
    middle = {name: sorted(r[1:])[len(r[1:]) // 2] for name, r in rates.items()}
    for name, r in rates.items():
        print(f"{name:18} {middle[name]:6.0f} tokens/s [{min(r[1:]):.0f}, {max(r[1:]):.0f}], "
              f"{middle[name] / middle['batch generation']:.2f} of batch generation, {lost[name]} lost")


if __name__ == "__main__":
    main()
