"""The house rules that can be read off the source: imports point down the floors, six third-party
packages, no pickle."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "aya_min").rglob("*.py"), *(ROOT / "tests").glob("*.py")])
PACKAGES = {"torch", "numpy", "tokenizers", "safetensors", "pytest", "tqdm"}

FLOORS = [
    # 0: the command line, the table of model families
    {"command", "families"},
    # 1: a model's sizes, plain files, pure functions on texts and tensors
    {"alignment", "cmaes", "code_shapes", "config_selection", "critiques", "discrete_functions", "dropout",
     "files", "flops", "iso639", "lasso", "line", "linear", "merge_methods", "mixture_draw", "model_config",
     "norms", "patience", "quantization", "report_charts", "rope", "rows_keys", "span_corruption",
     "template_expressions"},
    # 2: settings, languages, ranks, losses, templates, tensors on disk
    {"config", "distributed", "encoder_decoder_config", "languages", "merge_config", "merge_front",
     "quantized", "recurrent", "template", "tensorfiles", "token_logps"},
    # 3: losses, the world, one HTTP request, how to resume, what a line of JSONL means, whether two
    # folders are alike
    {"adafactor", "alike", "checkpoint", "control_tokens", "endpoint_http", "fused", "irreducible",
     "journal", "lengths", "loss_scale", "losses", "mixture_spec", "report_data", "rows", "template_turns",
     "world"},
    # 4: the layers of a mixture of experts, its losses over a step
    {"balance", "grammars", "mixture_index", "moe", "nl2bash"},
    # 5: the decoder, the encoder-decoder; text to ids
    {"encoder_decoder", "mixture_rows", "model", "tokenizer"},
    # 6: rows to batches, the engine's tensors, an endpoint asked, figures, the oracle
    {"classifier", "critic", "data", "endpoint", "engine", "evaluate_rates", "language_id", "mixture",
     "preferences", "pruning_duplicates", "report_table", "rows_streamed", "sequence_models",
     "text_statistics", "tokenizer_text", "world_oracle"},
    # 7: an encoder-decoder's tensors while it samples
    {"encoder_decoder_engine"},
    # 8: what is done with a model or with folders
    {"arbitrage", "code_data", "domains", "endpoint_answers", "evaluate_languages", "filtration_scores",
     "frames", "loop", "merge_folders", "mixture_stream", "report", "reward", "sampling", "separations",
     "templates", "text_encoders", "weights", "world_data", "world_translation"},
    # 9: run folders, conversations, log-probs under a fixed model, judges, a recipe's checks, the server's
    # batch, models in fewer bits and what stands in their way, examples to classify
    {"chat", "classify", "contrast", "evaluate_answers", "filtration", "in_context", "judges", "kto",
     "merge_embed", "merge_quantize", "outliers", "pipeline_checks", "pruning_checks", "reference", "runs",
     "serve_batch"},
    # 10: samples of the policy as batches, what judges say, what a client of the server asks, mixtures made,
    # what a model does with held-out rows, SideNets before a classifier
    {"early_exit", "evaluate_judges", "held_out", "judges_rates", "merge_upcycle", "pruning", "rollouts",
     "router", "selection", "serve_request"},
    # 11: the stages, the leaderboard, the server
    {"evaluate_bias", "evaluate_early_exit", "evaluate_leaderboard", "evaluate_quantized", "generate_pool",
     "serve", "stages"},
    # 12: a recipe's run on disk; what a stage will need; what a search measures
    {"estimate", "evaluate", "generate_critique", "generate_route", "irreducible_command", "merge_fitness",
     "pipeline_steps"},
    # 13: what a run shows for itself; the search; real text for claims
    {"merge_search", "pipeline_results", "real_text"},
    # 14: the recipe; train.py, generate.py and merge.py stand on it
    {"pipeline"},
    # 15: one seed of a claim; what claims leave
    {"experiments", "experiments_page"},
    # 16: whether arms are matched
    {"experiments_matched"},
    {"experiments_records"},
]
FLOOR = {module: number for number, modules in enumerate(FLOORS) for module in modules}


def imports(path):
    """(modules of aya_min, other top-level names) that a file imports, inside functions too."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(filter(None, ["aya_min" if node.level else "", node.module]))
            names = [package] if package != "aya_min" else [f"aya_min.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            (ours if top == "aya_min" else others).add(rest.partition(".")[0] if top == "aya_min" else top)
    return ours - {"", "__version__"}, others


CLAIM_FILES = sorted((ROOT / "aya_min" / "claims").glob("[!_]*.py"))


@pytest.mark.parametrize("path", CLAIM_FILES, ids=lambda path: path.stem)
def test_a_claim_file_imports_mechanisms_and_no_other_claim_file(path):
    ours, others = imports(path)
    assert ours <= set(FLOOR) and others <= PACKAGES | set(sys.stdlib_module_names)


def test_every_module_has_exactly_one_floor():
    modules = {path.stem for path in (ROOT / "aya_min").glob("*.py")} - {"__init__"}
    assert modules == set(FLOOR) and sum(map(len, FLOORS)) == len(FLOOR)


@pytest.mark.parametrize("module", FLOOR)
def test_a_module_imports_only_from_lower_floors(module):
    ours, _ = imports(ROOT / "aya_min" / f"{module}.py")
    wrong = {f"{name} (floor {FLOOR[name]})" for name in ours if FLOOR[name] >= FLOOR[module]}
    assert not wrong, f"{module} (floor {FLOOR[module]}) imports {wrong}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_only_the_six_packages_are_imported(path):
    of_this_repository = (
        set()
        if path.parent.name == "aya_min"
        else {
            other.stem
            for other in [*SOURCES, *ROOT.glob("tests/golden/*.py")]
            if other.parent in (path.parent, path.parent / "golden", ROOT)
        }
    )
    _, others = imports(path)
    assert others <= PACKAGES | set(sys.stdlib_module_names) | of_this_repository


def test_the_requirements_are_the_six_packages():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    assert {line.partition("==")[0] for line in lines} == PACKAGES


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_is_read_with_pickle(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"torch\.load\b|(import|from) pickle\b", text)


def test_the_reader_of_imports_sees_every_way_to_write_one(tmp_path):
    lines = [
        "import os, torch.nn as nn",
        "from numpy import array",
        "from . import data, __version__",
        "from .losses import dpo_loss",
        "import aya_min.model",
        "from aya_min import loop",
        "def f():",
        "    from .report import page",
    ]
    (tmp_path / "a.py").write_text("\n".join(lines))
    assert imports(tmp_path / "a.py") == (
        {"data", "losses", "model", "loop", "report"},
        {"os", "torch", "numpy"},
    )


def test_the_commands_start_without_sympy_and_fsdp():
    """They took 0.7 s of every start; only ranks that share a model need them."""
    names = "sympy", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint"
    code = f"import sys, train, generate, aya_min.evaluate; print([n for n in {names} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
