"""Choosing what is trained on: scores worked by hand, an order without chance, and a step that is the same
however it is cut, on any number of ranks, after a resume and when it is replayed."""

import json
import re

import numpy as np
import pytest
import torch
from small import CPU, assert_close, language_model, logged, on_ranks, run, tokenizer

from aya_min import estimate, irreducible, selection, weights
from aya_min.config import SFT, settings_from
from aya_min.data import Example, collate, load_examples
from aya_min.files import read_json, write_jsonl
from aya_min.irreducible_command import run_irreducible
from aya_min.losses import supervised_logps
from aya_min.model_config import ModelConfig
from train import make_parser

LIMIT = 256


def examples_of(world):
    return load_examples([world / "sft.jsonl"], tokenizer(), LIMIT, SFT())


def toy(answers, languages="other"):
    """Examples of one prompt token and an answer each; the answers' tokens are supervised."""
    return [Example(np.array([1, *ids], np.int32), np.arange(len(ids) + 1) > 0, languages, f"toy:{i + 1}")
            for i, ids in enumerate(answers)]


def selector_of(items, **settings):
    return selection.Selector(items, tokenizer(), LIMIT, SFT(select="loss", **settings), num_steps=1)


@pytest.fixture(scope="module")
def losses_file(world, tmp_path_factory):
    """Irreducible losses of write_world's examples under a smaller model of other weights."""
    path = tmp_path_factory.mktemp("losses") / "il.safetensors"
    write_losses(path, world)
    return path


def write_losses(path, world, seed=7):
    small = language_model(seed, hidden_size=16, intermediate_size=32)
    examples, settings = examples_of(world), SFT()
    logps = selection.answer_logps(small, examples, tokenizer().pad_id, CPU, settings, by_token=True)
    irreducible.write(path, [-each for each in logps], examples, tokenizer(), LIMIT, "print")


def chosen(run_folder):
    """The examples of each step, and their tokens."""
    lines = [json.loads(line) for line in (run_folder / "selected.jsonl").read_text().splitlines()[1:]]
    return [(line["examples"], line.get("tokens")) for line in lines]


def steps(run_folder):
    return [{k: v for k, v in row.items() if k != "scoring_seconds"} for row in logged(run_folder)]


def train(world, out, losses_file=None, **changes):
    select = changes.get("select")
    file = {"irreducible": str(losses_file)} if select in ("rho", "irreducible") else {}
    size = {} if "select_tokens" in changes or not select else {"select_from": 3}
    return run("sft", world, out, **{**size, **file, **changes})


WAYS = ["rho", "loss", "irreducible", "uniform", "grad-norm"]
TOKENS = [("rho", 0.5), ("grad-norm", 0.3), ("uniform", 0.5)]
ALL = [dict(select=way) for way in WAYS] + [dict(select=way, select_tokens=share) for way, share in TOKENS]
NAMES = ["-".join(map(str, each.values())) for each in ALL]


# ---- scores by hand ----------------------------------------------------------------------------------------

class Told(torch.nn.Module):
    """A model that gives a token the loss LOSSES[its id], or the same logits at each position."""
    LOSSES = torch.tensor([0.0, 0.0, 2.0, 4.0, 1.0, 5.0])

    def __init__(self):
        super().__init__()
        self.model, self.config = torch.nn.Module(), ModelConfig(vocab_size=3)

    def forward(self, ids, mask, *rest):
        if mask is None:
            return torch.tensor([0.5, 0.25, 0.25]).log().expand(*ids.shape, 3)
        return -self.LOSSES[ids[mask]]


def test_scores_of_three_examples_are_those_worked_by_hand():
    """Losses of the model 2, 4 | 1 | 5, 5, 5, irreducible losses 1, 1 | 1 | 5, 5, 2. The means of the
    differences are 2, 0 and 1, where the sums would be 4, 0 and 3."""
    items = toy([[2, 3], [4], [5, 5, 5]])
    known = [torch.tensor([1.0, 1.0]), torch.tensor([1.0]), torch.tensor([5.0, 5.0, 2.0])]

    def scores(select, known=None):
        settings = SFT(select=select, irreducible="F" if known else None)
        return [each.mean().item() for each in selection.token_scores(Told(), items, 0, CPU, settings, known)]
    assert scores("rho", known) == [2.0, 0.0, 1.0]
    assert scores("loss") == [3.0, 1.0, 5.0]
    assert scores("irreducible", known) == [-1.0, -1.0, -4.0]


def test_the_gradients_norm_at_a_token_is_worked_by_hand():
    """p = (1/2, 1/4, 1/4). y = 0: the gradient (-1/2, 1/4, 1/4) has the norm sqrt(6)/4; y = 1: (1/2, -3/4,
    1/4) has sqrt(14)/4."""
    items = toy([[0], [0, 1]])
    norms = selection.token_scores(Told(), items, 0, CPU, SFT(select="grad-norm"), None)
    torch.testing.assert_close(torch.cat(norms), torch.tensor([6, 6, 14]).sqrt() / 4)


def test_the_gradients_norms_are_those_of_autograd(world):
    model, items = language_model(), examples_of(world)[:3]
    norms = selection.gradient_norms(model, items, 0, CPU, SFT(select="grad-norm"))
    for item, found in zip(items, norms):
        logits = model(torch.tensor(item.ids[None], dtype=torch.long))[0, :-1].detach().requires_grad_()
        places = torch.tensor(item.mask[1:])
        targets = torch.tensor(item.ids[1:], dtype=torch.long)[places]
        torch.nn.functional.cross_entropy(logits[places], targets, reduction="sum").backward()
        torch.testing.assert_close(found, logits.grad[places].norm(dim=1), rtol=1e-5, atol=1e-6)


def test_equal_scores_go_to_the_lower_index_and_then_to_the_earlier_place():
    assert selection.best([1.0, 2.0, 2.0, 2.0, 0.0], [9, 8, 3, 3, 1], 3) == [2, 3, 1]
    assert selection.best([1.0, 1.0], [5, 4], 1) == [1]


def test_scores_that_differ_in_their_last_bits_are_equal():
    low, high = selection.rounded([1.2345678, 1.2345679])
    assert low == high and selection.rounded([1.2345678])[0] != selection.rounded([1.2346678])[0]


def test_the_tokens_of_a_batch_are_chosen_by_hand():
    """Of six tokens the best half: 9 and 8 of the first example, 7 of the third; the second has none."""
    items = toy([[2, 3, 4], [5], [6, 7]])
    selector = selector_of(items, select_tokens=0.5, batch_size=3)
    choice = selector.choose_tokens([0, 1, 2], [torch.tensor([9.0, 1.0, 8.0]), torch.tensor([5.0]),
                                                torch.tensor([7.0, 2.0])])
    assert dict(zip(choice.examples, choice.tokens)) == {0: [1, 3], 1: [], 2: [1]}
    assert choice.examples == [1, 2, 0]                 # in order of length
    masked = selection.with_tokens(items[0], [1, 3])
    assert masked.mask.tolist() == [False, True, False, True] and items[0].mask.sum() == 3
    table = selector.table(choice, ("other",), 0.5)
    assert table[:, :, 0].tolist() == [[3, 6], [24, 3], [32, 6], [0.5, 1]]


def test_shares_by_language_and_mean_scores_are_logged_as_counted_by_hand():
    items = toy([[2], [3], [4], [5]])
    for item, code in zip(items, ("fr", "de", "fr", "xx")):
        item.language = code
    selector = selector_of(items, select_from=2, batch_size=2)
    units = [(0, 4.0, True), (1, 1.0, False), (2, 2.0, False), (3, 3.0, True)]
    choice = selection.Choice([0, 3], None, units)
    table = selector.table(choice, ("de", "fr", "other"), 0.25)
    assert table[0].tolist() == [[0, 1, 1], [1, 2, 1]]
    assert table[1].tolist() == [[0, 4, 3], [0, 1, 1]] and table[2].tolist() == [[1, 6, 3], [1, 2, 1]]


# ---- a step ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("select", ["rho", "loss", "grad-norm"])
def test_the_first_step_takes_the_best_of_a_loop_that_scores_each_example_alone(
    select, world, losses_file, tmp_path
):
    folder = train(world, tmp_path / "run", losses_file, select=select, max_steps=1)
    model, items = language_model().eval(), examples_of(world)
    known = irreducible.read(losses_file, items, tokenizer(), LIMIT)
    drawn = np.random.default_rng([0, 0]).permutation(len(items))[:24]          # SFT's seed, epoch 0

    def score(i):
        batch = collate([items[i]])
        loss = -supervised_logps(model, batch).detach()
        if select == "rho":
            return (loss - known[i]).mean().item()
        if select == "loss":
            return loss.mean().item()
        logits = model(batch.input_ids).detach()[:, :-1][batch.mask[:, 1:]]
        onehot = torch.nn.functional.one_hot(batch.input_ids[batch.mask], logits.shape[-1])
        return (logits.softmax(-1) - onehot).norm(dim=1).mean().item()
    # Sampler shuffles whole large batches; the first is whichever of them it put first.
    selector = selector_of(items, select_from=3, batch_size=8)
    assert sorted(selector.sampler.take(0, 24)) == sorted(drawn.tolist())
    assert set(chosen(folder)[0][0]) == set(sorted(drawn.tolist(), key=score)[-8:])


@pytest.mark.parametrize("how", [*ALL[:1], *ALL[3:6]], ids=[*NAMES[:1], *NAMES[3:6]])
def test_a_replay_has_the_losses_of_the_run_that_chose(how, world, losses_file, tmp_path):
    """To the last bit: the same examples stand in the same order in the same batches."""
    first = train(world, tmp_path / "first", losses_file, held_out=True, **how)
    again = train(world, tmp_path / "again", held_out=True, replay=str(first / "selected.jsonl"))
    keys = "step", "loss", "grad_norm", "eval/loss", "tokens"
    assert [[row.get(key) for key in keys] for row in logged(first)] == [
        [row.get(key) for key in keys] for row in logged(again)]
    assert chosen(first) == chosen(again)


def test_another_architecture_replays_the_same_sequence_also_on_two_ranks_and_resumed(world, tmp_path):
    first = train(world, tmp_path / "first", select="loss", max_steps=4)
    replay, more = str(first / "selected.jsonl"), dict(schedule="constant", warmup_steps=0)
    other = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    one = train(world, tmp_path / "one", replay=replay, max_steps=4, architecture=other, **more)

    def on_two():
        train(world, tmp_path / "two", replay=replay, max_steps=2, architecture=other, **more)
    on_ranks(2, on_two)
    train(world, tmp_path / "two", replay=replay, max_steps=4, architecture=other, resume=True, **more)
    assert chosen(first) == chosen(one) == chosen(tmp_path / "two")
    assert_close(steps(one), steps(tmp_path / "two"), rtol=2e-4, atol=2e-5)


def test_without_select_the_batches_are_those_of_before(world, tmp_path):
    """Nothing of selection.py is in the step: no file, no figure, the Sampler's batches by length."""
    folder = train(world, tmp_path / "run")
    assert not (folder / "selected.jsonl").exists()
    assert not any("selec" in key or "scoring" in key for row in logged(folder) for key in row)
    settings = read_json(folder / "config.json")["settings"]
    assert [settings[key] for key in ("select", "select_from", "select_tokens", "irreducible", "replay")] == [
        None] * 5


def test_the_model_that_scores_has_no_dropout_and_trains_with_it_afterwards(world, tmp_path):
    plain = train(world, tmp_path / "plain", select="loss", max_steps=1)
    drops = train(world, tmp_path / "drops", select="loss", max_steps=1, residual_dropout=0.3)
    assert chosen(plain) == chosen(drops)
    assert steps(plain)[0]["loss"] != steps(drops)[0]["loss"]


def test_without_sorting_by_length_the_large_batch_is_drawn_evenly(world):
    items = examples_of(world)
    selector = selector_of(items, select_from=3, batch_size=4, seed=5)
    order = selector.sampler.take(0, len(items)).tolist()
    assert sorted(order) == list(range(len(items)))
    means = [np.mean([len(items[i].ids) for i in order[start:start + 12]]) for start in (0, 12, 24)]
    whole = np.mean([len(item.ids) for item in items])
    assert max(abs(mean - whole) for mean in means) < 0.25 * whole


@pytest.mark.parametrize("how", ALL, ids=NAMES)
def test_micro_batches_choose_the_same_and_take_the_same_step(how, world, losses_file, tmp_path):
    whole = train(world, tmp_path / "whole", losses_file, **how)
    cut = train(world, tmp_path / "cut", losses_file, micro_batch_size=1, **how)
    assert chosen(whole) == chosen(cut)
    assert_close(steps(whole), steps(cut), rtol=2e-4, atol=2e-5)
    assert all(row["grad_norm"] > 0 for row in steps(whole))


@pytest.mark.parametrize("how", ALL, ids=NAMES)
def test_two_ranks_choose_the_same_and_take_the_same_step(how, world, losses_file, tmp_path):
    one = train(world, tmp_path / "one", losses_file, **how)

    def on_two():
        train(world, tmp_path / "two", losses_file, **how)
    on_ranks(2, on_two)
    assert chosen(one) == chosen(tmp_path / "two")
    assert_close(steps(one), steps(tmp_path / "two"), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("how", [ALL[0], ALL[3], ALL[5]], ids=[NAMES[0], NAMES[3], NAMES[5]])
def test_a_resumed_run_chooses_as_one_that_was_not_stopped(how, world, losses_file, tmp_path):
    more = dict(schedule="constant", warmup_steps=0)
    whole = train(world, tmp_path / "whole", losses_file, max_steps=4, **how, **more)
    stopped = train(world, tmp_path / "stopped", losses_file, max_steps=2, **how, **more)
    with open(stopped / "selected.jsonl", "a") as f:
        f.write('{"step": 2, "examples": [0]}\n{"st')       # a step that was chosen and not taken, and a kill
    train(world, stopped, losses_file, max_steps=4, resume=True, **how, **more)
    assert chosen(whole) == chosen(stopped) and steps(whole) == steps(stopped)


# ---- files -------------------------------------------------------------------------------------------------

def refused(world, out, said, **changes):
    with pytest.raises(ValueError, match=said):
        train(world, out, **changes)
    assert not out.exists()


def test_irreducible_losses_of_other_rows_are_refused_with_the_first_of_them(world, losses_file, tmp_path):
    rows = [json.loads(line) for line in (world / "sft.jsonl").read_text().splitlines()]
    rows[4] = {**rows[4], "completion": "another answer"}
    (tmp_path / "world").mkdir()
    write_jsonl(tmp_path / "world" / "sft.jsonl", rows)
    more, first = dict(select="rho", losses_file=losses_file), "the first is .*sft.jsonl:5"
    refused(tmp_path / "world", tmp_path / "a", f"other rows: 1 of 36 examples, {first}", **more)
    write_jsonl(tmp_path / "world" / "sft.jsonl", rows[:30])
    refused(tmp_path / "world", tmp_path / "b", "losses of 36 examples, not of the 30", **more)
    refused(world, tmp_path / "c", "examples of at most 256 tokens, not 128", max_length=128, **more)


def test_irreducible_losses_of_another_tokenizer_and_damaged_ones_are_refused(world, losses_file, tmp_path):
    class Other:
        bpe = type("", (), {"to_str": lambda self: "{}"})()
    examples = examples_of(world)
    with pytest.raises(ValueError, match="another tokenizer than --model"):
        irreducible.read(losses_file, examples, Other, LIMIT)
    content = bytearray(losses_file.read_bytes())
    content[-2] ^= 1
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(ValueError, match="not as train.py irreducible writes it"):
        irreducible.read(tmp_path / "bad", examples, tokenizer(), LIMIT)
    for text in (b"", b"no safetensors"):
        (tmp_path / "bad").write_bytes(text)
        with pytest.raises(ValueError, match="cannot be read"):
            irreducible.read(tmp_path / "bad", examples, tokenizer(), LIMIT)


def test_the_command_writes_the_losses_of_a_model_folder_by_which_a_run_then_chooses(world, tmp_path):
    model = run("sft", world, tmp_path / "small") / "model"
    words = ["irreducible", "--model", model, "--data", world / "sft.jsonl", "--max-length", LIMIT, "--out"]

    def command(out, *more):
        run_irreducible(make_parser().parse_args([*map(str, [*words, out, *more])]), CPU)
    command(tmp_path / "il.safetensors")
    losses = irreducible.read(tmp_path / "il.safetensors", examples_of(world), tokenizer(), LIMIT)
    loaded, _ = weights.load(model)
    batch = collate(examples_of(world)[:1])
    torch.testing.assert_close(losses[0], -supervised_logps(loaded.eval(), batch).detach(), rtol=1e-4,
                               atol=1e-5)
    with pytest.raises(ValueError, match="il.safetensors exists"):
        command(tmp_path / "il.safetensors")
    command(tmp_path / "short.safetensors", "--max-length", 60)
    refused(world, tmp_path / "run", "examples of at most 60 tokens, not 256", select="rho",
            losses_file=tmp_path / "short.safetensors")
    # A model trained on the same rows knows what it was trained on: choosing by it still ends well.
    train(world, tmp_path / "run", tmp_path / "il.safetensors", select="rho")


def test_a_dry_run_counts_the_scoring_and_refuses_what_a_run_refuses(world, losses_file):
    def dry(**changes):
        settings = SFT(batch_size=8, max_length=LIMIT, **changes)
        return estimate.dry_run("sft", "M", language_model(), settings, [world / "sft.jsonl"], None,
                                tokenizer(), 1)
    plain, scored = dry(), dry(select="rho", select_from=3, irreducible=str(losses_file))
    operations = [float(re.search(r"(\S+) floating-point", text)[1]) for text in (plain, scored)]
    more = float(re.search(r"(\S+) more to score 24 examples", scored)[1])
    assert operations[0] == operations[1] and more == pytest.approx(operations[0], rel=0.02)  # 3 forwards
    assert "while it scores" in scored and "scor" not in plain.partition("settings")[0]
    assert "scor" not in dry(select="uniform", select_from=2).partition("settings")[0]
    with pytest.raises(ValueError, match="times --select-from 10 is 80"):
        dry(select="grad-norm")


def test_irreducible_losses_are_kept_token_by_token_and_their_file_is_not_overwritten(world, losses_file):
    examples = examples_of(world)
    losses = irreducible.read(losses_file, examples, tokenizer(), LIMIT)
    assert [len(each) for each in losses] == [int(e.mask.sum()) for e in examples]
    small = language_model(7, hidden_size=16, intermediate_size=32).eval()
    batch = collate(examples[3:4])
    torch.testing.assert_close(losses[3], -supervised_logps(small, batch).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="exists"):
        irreducible.write(losses_file, losses, examples, tokenizer(), LIMIT, "print")


def test_other_losses_than_before_are_refused_at_a_resume(world, losses_file, tmp_path):
    folder = train(world, tmp_path / "run", losses_file, select="rho", max_steps=2, schedule="constant")
    write_losses(tmp_path / "other", world, seed=8)
    with pytest.raises(ValueError, match="another irreducible"):
        train(world, folder, tmp_path / "other", select="rho", max_steps=3, schedule="constant", resume=True)


def test_a_replay_of_other_examples_another_size_or_fewer_steps_is_refused(world, tmp_path):
    file = train(world, tmp_path / "run", select="uniform") / "selected.jsonl"
    replay = dict(replay=str(file))
    refused(world, tmp_path / "a", "chosen from other examples", max_length=60, **replay)
    refused(world, tmp_path / "b", "its batches have 8 examples", batch_size=4, **replay)
    refused(world, tmp_path / "c", "3 steps, fewer than the 5 .* --max-steps 3", max_steps=5, **replay)
    lines = file.read_text().splitlines(keepends=True)
    for bad in ('{"step": 1, "examples": [1, 2, 3]}\n',
                '{"step": 1, "examples": [1, 2, 3, 4, 5, 6, 7, 999]}\n',
                '{"step": 7, "examples": [1, 2, 3, 4, 5, 6, 7, 8]}\n'):
        (tmp_path / "bad").write_text("".join([*lines[:2], bad, lines[3]]))
        refused(world, tmp_path / "d", "bad:3: not what a run chose in step 1", replay=str(tmp_path / "bad"))
    (tmp_path / "bad").write_text('{"a": 1}\n')
    refused(world, tmp_path / "e", "not what a run chose; give the selected.jsonl",
            replay=str(tmp_path / "bad"))


def test_a_large_batch_of_more_than_all_examples_is_refused(world, tmp_path):
    refused(world, tmp_path / "run", "--batch-size 8 times --select-from 10 is 80, more than the 36",
            select="loss", select_from=10)


@pytest.mark.parametrize("given, said", [
    (dict(select="rho"), "--select rho needs --irreducible"),
    (dict(select="loss", irreducible="F"), "--irreducible F is for rho and irreducible"),
    (dict(select_from=4), "--select-from 4 goes with --select"),
    (dict(select_tokens=0.5), "--select-tokens 0.5 goes with --select"),
    (dict(select="loss", replay="F"), "leave --select out"),
    (dict(select="loss", select_tokens=0.5, select_from=2), "--select-from 2: --select-tokens"),
    (dict(select="hardest"), "must be one of rho"), (dict(select="loss", select_from=1), "at least 2"),
    (dict(select="loss", select_tokens=1.0), "below 1")])
def test_settings_that_do_not_go_together_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        settings_from(SFT, given)


def test_what_is_unset_is_filled_in_so_that_config_json_says_it():
    assert SFT(select="loss").select_from == 10 and SFT().select_from is None
    assert SFT(select="loss", select_tokens=0.6).select_from is None
