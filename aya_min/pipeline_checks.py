"""A recipe's settings and what a user brings to it, looked at before anything is made: a mistake that is seen
late costs the run. Each check raises ValueError with the flag, what is wrong and what to do.
"""

from pathlib import Path

from . import critiques, weights, world_data
from .alike import identity
from .arbitrage import read_answers
from .command import progress
from .config import check_batch_size, flag_of
from .model_config import model_preset
from .data import load_prompts
from .distributed import say
from .endpoint import Endpoint, is_endpoint
from .files import Digests, read_json
from .languages import LANGUAGES, SHARED, cluster_languages, home_language
from .lengths import fit_prompts
from .model import RewardModel
from .tensorfiles import read_header
from .tokenizer import train_tokenizer
from .world import gold_answer, questions

RESERVED = ("pairs", "shared", "other")         # names that steps and tables give to something else
KEPT = ("question_id", "id", "language", "task", "prompt", "prompt_messages", "prompt_where")


def check_clusters(clusters, own):
    """Clusters whose names can be those of folders and of rows in a table; without a user's own teachers two
    or more, as each has its teacher."""
    if len(clusters) < 2 and not own:
        raise ValueError(f"--clusters: {len(clusters)} clusters; the embedded world has a teacher for each, "
                         "give two or more")
    for name in clusters:
        if name in RESERVED or not name.isprintable() or len(name.encode()) > 100:
            raise ValueError(f"--clusters: {name[:100]!r} cannot be a cluster's name; give another (not "
                             f"{', '.join(RESERVED)}, at most 100 bytes, no line ends)")


def check_sizes(recipe, clusters, num_ranks, num_prompts=None):
    """Every set of data gives at least one batch. num_prompts: of a user's own; None: of the embedded
    world."""
    r, size = recipe, recipe.batch_size
    check_batch_size(size, num_ranks)
    if num_prompts is None:
        lessons = int(0.6 * r.lessons) + int(0.2 * r.lessons)
        rows = {"corpus": r.corpus, "lessons": lessons, "arbiter_gold": r.arbiter_gold,
                # half the pairs may be ties
                "arbiter_pairs": r.arbiter_pairs // 2, "num_prompts": r.num_prompts}
        for name, num in rows.items():
            if num < size:
                raise ValueError(f"{flag_of(name)} {getattr(r, name)} gives as few as {num} examples, fewer "
                                 f"than one batch of {size}; raise it, or lower --batch-size")
    elif num_prompts < size:
        raise ValueError(f"--prompts: {num_prompts} prompts are fewer than one batch of {size}; give more, "
                         "or lower --batch-size")
    num_prompts = num_prompts or r.num_prompts
    if int(r.sft_epochs * num_prompts) < 1:
        raise ValueError(f"--sft-epochs {r.sft_epochs} of {num_prompts} prompts is less than one example; "
                         "raise it")
    if r.rounds and r.online_prompts < len(clusters) * num_ranks:
        raise ValueError(f"--online-prompts {r.online_prompts} are fewer than one for each of "
                         f"{len(clusters)} clusters on {num_ranks} ranks; raise it")


def check_world(recipe, clusters):
    """The embedded world has these languages and so many questions, and they fit the model."""
    r = recipe
    if foreign := [code for codes in clusters.values() for code in codes if code not in LANGUAGES]:
        raise ValueError(f"--clusters: {foreign[0]!r} is no language of the embedded world "
                         f"({' '.join(LANGUAGES)}); leave it out, or bring your own --base, --prompts, "
                         "--teachers and --arbiter")
    try:
        questions(r.eval_split, r.eval_count, f"eval/{r.seed}", level=r.level, unique=True)
    except ValueError as error:
        raise ValueError(f"--eval-count {r.eval_count}: {error}") from None
    rows = [row for row in world_data.corpus(960, r.seed, r.level) if "prompt" in row]
    tokenizer = train_tokenizer([row["prompt"] for row in rows] + list(map(gold_answer, rows)), r.vocab_size)
    prompts = [len(tokenizer.encode_prompt(row["prompt"])) for row in rows]
    whole = [n + len(tokenizer.encode_answer(gold_answer(row))) for n, row in zip(prompts, rows)]
    if sum(n <= r.max_length for n in whole) < len(rows) / 10:
        raise ValueError(f"--max-length {r.max_length}: of the world's questions with their answers fewer "
                         f"than one in ten fit, the mean is {sum(whole) // len(whole)} tokens; raise it")
    positions = model_preset(r.model).max_position_embeddings
    # these are a sample: others are somewhat longer
    if 2 * max(prompts) + r.max_new_tokens > positions:
        raise ValueError(f"--max-new-tokens {r.max_new_tokens}: with the world's prompts that passes the "
                         f"{positions} positions of {r.model}; give at most {positions - 2 * max(prompts)}")


def check_own(recipe, clusters, arms, base, prompts, teachers, arbiter, judge=None, eval_prompts=None):
    """(prompts, evaluation prompts) of a user's files, as far as --too-long keeps them, once all that the
    user brings has been looked at: files, folders, what kind of model is in each, and whether the texts fit
    it. Teachers that are endpoints are not asked here, see endpoint_answers.check_all_there."""
    at_home = [t for t in teachers if not is_endpoint(t)]
    folders = [t for t in at_home if not Path(t).is_file()]
    models = {("--base", base): False, **{("--teachers", t): False for t in folders},
              ("--arbiter", arbiter): True}
    models |= {("--judge", judge): True} if judge else {}
    looked = {}
    for (flag, folder), wanted in models.items():
        looked[flag, folder] = model, tokenizer, _ = weights.load_meta(folder)
        kind = "reward model" if wanted else "language model"
        if weights.KINDS[type(model)] != kind:
            raise ValueError(f"{flag} {folder}: {weights.ONE[type(model)]}, not a {kind}; give the other "
                             "kind")
        if wanted:
            critiques.refuse_unread(model, f"{flag} {folder}")
    tokenizer = looked["--base", base][1]
    rows = [plain_prompt(row) for row in load_prompts(prompts, recipe, tokenizer)]
    eval_rows = None
    if eval_prompts:
        eval_rows = [plain_prompt(row) for row in load_prompts(eval_prompts, recipe, tokenizer)]
    check_languages(rows, clusters, recipe.cluster_spill)
    for (flag, folder), (model, its_tokenizer, _) in looked.items():
        room = model.config.max_position_embeddings - recipe.max_new_tokens
        room -= 2 * isinstance(model, RewardModel)              # it reads the end of the answer too
        if room < 8:
            raise ValueError(f"{flag} {folder}: --max-new-tokens {recipe.max_new_tokens} leaves no room for "
                             f"a prompt in its {model.config.max_position_embeddings} positions; lower it")

        def fit(some):
            def length_of(row):
                return len(its_tokenizer.encode_prompt(row["prompt_messages"]))
            return fit_prompts(some, length_of, room, recipe.too_long, f"{flag} {folder}")
        rows = rows if flag == "--judge" else fit(rows)
        eval_rows = eval_rows and fit(eval_rows)
        if flag == "--judge" and eval_rows is None:             # the evaluation is on --prompts then
            eval_rows = fit(rows)
    for path in filter(lambda t: Path(t).is_file(), at_home):
        check_answers(path, rows, recipe, tokenizer, *looked["--arbiter", arbiter][:2])
    if eval_rows == []:
        raise ValueError("--eval-prompts: none of them fits; give shorter ones, or take --too-long cut-left")
    names = [teacher_name(t) for t in teachers]
    if len(set(names)) < len(names):
        raise ValueError(f"--teachers: two have the same name ({' '.join(names)}); rename one")
    if len(names) < 2:
        raise ValueError("--teachers: arbitrage chooses among the answers of two teachers or more; give "
                         "another")
    if arms == "all" and tokenizer.meaning != looked["--arbiter", arbiter][1].meaning:
        raise ValueError("--arms all trains RLOO, which needs base and arbiter to share a tokenizer; use "
                         "--arms main")
    return rows, eval_rows or rows


def check_languages(rows, clusters, spill):
    """Every prompt is at home in a cluster, or in all of them, and every cluster has prompts to train on."""
    known, homes = SHARED + sum(clusters.values(), []), set()
    for row in rows:
        homes.add(home_language(row.get("language"), known))
        if row.get("language") not in (None, "other") and home_language(row["language"], known) is None:
            raise ValueError(f"{row['prompt_where']}: language {row['language']!r} is in no cluster; add it "
                             "to --clusters")
    for name in clusters:
        if not spill and not homes & {None, *cluster_languages(clusters, name)}:
            raise ValueError(f"--clusters: {name!r} has no prompt in its languages, and with --cluster-spill "
                             "0 none of the others; give such prompts, or fewer clusters")


def plain_prompt(row):
    """What the recipe takes of a user's row. No column of theirs can be taken for an answer or a judge's
    verdict."""
    return {key: value for key, value in row.items() if key in KEPT}


def contents(base, prompts, teachers, arbiter, judge=None, eval_prompts=None):
    """{flag: {file: SHA-256}} of all that a user brings, of a model folder the files that decide what it
    computes. An endpoint has none."""
    at_home = [t for t in teachers if not is_endpoint(t)]
    brought = {"base": [base], "prompts": prompts, "teachers": at_home, "arbiter": [arbiter],
               "judge": [judge] if judge else [], "eval_prompts": eval_prompts or []}
    files = {name: [file for path in paths for file in files_of(path)] for name, paths in brought.items()}
    with Digests() as digests:
        digests.begin(file for each in files.values() for file in each)
        hashed = {file: digests[file] for file in progress(list(digests.found), desc="SHA-256", unit="file")}
    return {flag_of(name): {str(file): hashed[file] for file in each}
            for name, each in files.items() if each}


def files_of(path):
    """The file itself, or those of a model folder."""
    return [path] if Path(path).is_file() else list(identity(path, read_header(path)))


def check_contents(out, now):
    """Raise ValueError if a run of the recipe began with other contents of what a user brings. now: what
    `contents` gives."""
    path = out / "config.json"
    if not path.is_file():
        return
    before = read_json(path).get("sha256")
    if before is None:
        say(f"{path} does not say what the files of this run held when it began; they are not compared")
    elif before != now:
        whole = isinstance(before, dict) and all(isinstance(each, dict) for each in before.values())
        changed = [f"{flag} {file}" for flag, each in now.items() for file, digest in each.items()
                   if whole and before.get(flag, {}).get(file) != digest]
        file = changed[0] if changed else path
        raise ValueError(f"{file} does not hold what it held when the run in {out} began; give what it held, "
                         "or another --out")


def check_answers(path, rows, recipe, tokenizer, arbiter, its_tokenizer):
    """The completions in a teacher's file: one for each prompt, without control tokens, within the arbiter's
    positions."""
    room = arbiter.config.max_position_embeddings
    for row, answer in zip(rows, read_answers(path, rows, recipe, tokenizer)):
        where = f"{path}: the answer to {row['prompt_where']}"
        size = len(its_tokenizer.encode_prompt(row["prompt_messages"])
                   + its_tokenizer.encode_answer(answer["completion"]))
        if size > room and recipe.too_long == "refuse":
            raise ValueError(f"{where} has {size} tokens with its prompt, the arbiter {room} positions; "
                             "leave such answers out with --too-long skip, or drop their oldest tokens with "
                             "--too-long cut-left")


def teacher_name(path):
    """What a user's teacher is called: its file or folder, or the run of a folder named model; an endpoint's
    host/model."""
    if is_endpoint(path):
        return Endpoint.of(path).name
    path = Path(path).resolve()
    return path.parent.name if path.name == "model" else path.stem
