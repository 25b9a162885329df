"""Structured rows to prompts and answers, by templates in the row's language (Aya collection, arXiv
2402.06619, section 3).

    python -m aya_min.templates FILE.jsonl --task qa --out OUT.jsonl

The templates stand in templates/TASK.json, {"language code": [{"id", "prompt", "answer"}, ...]}, for a
speaker to mend. {field} in a prompt or an answer is a field of the row. A row gets one of its language's
templates, drawn by the seed and the row's id. Rows hold:

    classification  {"text", "label"}                   {labels} names the labels of the file's language
    qa              {"question", "answer"}, "context"   those with a context get templates that show it
    translation     {"source", "target"}, or {"id", "language", "text"}: texts of one id are parallel
    summarization   {"document" or "text", "summary"}

A translation's prompt is in the language of the target, which it names, and does not name the source's; the
row's language is the target's. Of parallel texts each is a target once; its source is in the language of
--source or, without it, in one of the others, drawn. Labels get their names of templates/labels.json; those
that it does not have stay as they are and are told. Ids without a pair of texts are counted.

Rows come out with the collection's fields: id inputs targets dataset_name task_type template_id language
script split. language is an ISO 639-3 code, script one of ISO 15924, as the collection writes them.
"""

import argparse
import random
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from .command import WHOLE, Parser, guarded, is_spare_rank, number, printable, shortened
from .files import check_out, jsonl, read_json, write_new
from .iso639 import LANGUAGES as TABLE
from .languages import SCRIPTS, SPELLINGS, entries, home_language, language_code
from .rows_streamed import streamed

FOLDER = Path(__file__).parent / "templates"
FIELD = re.compile(r"\{([A-Za-z_]*)\}")
CARRIED = ("dataset_name", "split")         # fields of a row that its output keeps


class Task(NamedTuple):
    task_type: str          # as the collection writes it
    asked: str              # the field that a prompt must show
    answer: str             # the field that an answer must show
    optional: str = ""      # a field that a prompt may show


TASKS = {"classification": Task("text-classification", "text", "label", "labels"),
         "qa": Task("question-answering", "question", "answer", "context"),
         "translation": Task("translation", "source", "target"),
         "summarization": Task("summarization", "document", "summary")}
# The code that the Aya data sets use where it is not that of the two letters, and the scripts' codes.
AYA = {"ar": "arb", "fa": "pes", "zh-Hant": "zho"}
THREE = {code: rest[0] for code, *rest in entries(TABLE) if len(code) == 2 and len(rest[0]) == 3}
COMMAS = {"ar": "\u060c ", "fa": "\u060c ", "zh": "\u3001", "zh-Hant": "\u3001", "ja": "\u3001"}


def published(code):
    """(language, script) of a code as the Aya collection writes them: tr is (tur, Latn)."""
    home, script = code.partition("-")[0], re.search("-([A-Z][a-z]{3})", code)
    return (AYA.get(home) or THREE.get(home, home),
            script[1] if script else SCRIPTS.get(home, "latn").title())


# ---- the templates -----------------------------------------------------------------------------------------

def read_templates(path, task):
    """{language code: [{"id", "prompt", "answer"}, ...]} of a file. ValueError names the template that has a
    field that its task does not have, or lacks one."""
    found, ids = {}, set()
    for language, some in read_json(path).items():
        code = language_code(language)
        if code is None or code in found:
            raise ValueError(f"{path}: {'two entries for' if code else 'unknown'} language {language!r}; "
                             f"{'give it one' if code else SPELLINGS}")
        if not isinstance(some, list) or not some:
            raise ValueError(f"{path}: {language}: needs a list of templates, {{id, prompt, answer}}")
        for i, template in enumerate(some):
            where = f"{path}: {language}[{i}]"
            check_template(template, TASKS[task], where)
            if template["id"] in ids:
                raise ValueError(f"{where}: the id {template['id']!r} occurs twice; give each its own")
            ids.add(template["id"])
        found[code] = some
    if not found:
        raise ValueError(f"{path}: no language; give {{language code: [{{id, prompt, answer}}, ...]}}")
    return found


def check_template(template, task, where):
    if not isinstance(template, dict) or template.keys() != {"id", "prompt", "answer"} or not all(
            isinstance(text, str) and text.strip() for text in template.values()):
        raise ValueError(f"{where}: a template is {{id, prompt, answer}}, three texts, got "
                         f"{shortened(template)}")
    for key, needed, allowed in (("prompt", task.asked, {task.asked, task.optional} - {""}),
                                 ("answer", task.answer, {task.answer})):
        fields = set(FIELD.findall(template[key]))
        if wrong := fields - allowed:
            raise ValueError(f"{where}: {template['id']!r}: the {key} has {{{sorted(wrong)[0]}}}; it may "
                             f"have {' '.join(f'{{{name}}}' for name in sorted(allowed))}")
        if needed not in fields:
            raise ValueError(f"{where}: {template['id']!r}: the {key} has no {{{needed}}}; add it")


def fill(text, fields):
    """A template's text with its fields. Braces in the fields stay as they are."""
    return FIELD.sub(lambda found: fields[found[1]], text)


def apply_templates(examples, templates, task, seed=0, dataset=""):
    """The collection's rows of examples.

    examples: [{"where", "id", "language", "fields", "dataset_name"?, "split"?}, ...]. dataset: the
    dataset_name of rows that do not say. ValueError for a language without a template.
    """
    rows = []
    for example in examples:
        home = home_language(example["language"], templates)
        if home is None:
            raise ValueError(f"{example['where']}: no template in {example['language']}; give --templates "
                             f"with some, or --languages without it; there are {' '.join(templates)}")
        some, fields = templates[home], example["fields"]
        if task == "qa":
            some = [each for each in some if ("{context}" in each["prompt"]) == ("context" in fields)]
            if not some:
                raise ValueError(f"{example['where']}: the templates in {home} all "
                                 f"{'lack' if 'context' in fields else 'need'} a context; give --templates "
                                 "with others")
        template = random.Random(f"templates/{seed}/{example['id']}/{home}").choice(some)
        language, script = published(example["language"])
        rows.append({"id": example["id"], "inputs": fill(template["prompt"], fields),
                     "targets": fill(template["answer"], fields),
                     "dataset_name": example.get("dataset_name") or dataset,
                     "task_type": TASKS[task].task_type, "template_id": template["id"],
                     "language": language, "script": script, "split": example.get("split") or "train"})
    return rows


# ---- the structured rows -----------------------------------------------------------------------------------

def field_of(row, keys, task, where):
    """The text of the first of the keys that a row has. A number becomes a text."""
    key = next((key for key in keys if row.get(key) not in (None, "")), None)
    value = row.get(key)
    if type(value) in (int, float):
        value = str(value)
    if key is None or not isinstance(value, str) or not value.strip():
        got = f"a {type(value).__name__}" if key else f"keys {' '.join(sorted(row))}"[:200]
        raise ValueError(f"{where}: {task} needs {' or '.join(map(repr, keys))}, a text; got {got}")
    return value


def examples_of(lines, task, language=None, languages=None, source=None, seed=0):
    """(examples of structured rows, as `apply_templates` takes them; ids of parallel texts without a pair).

    lines: rows_streamed.Line. language: of rows that do not say theirs. languages: only rows in these.
    """
    examples, parallel = [], defaultdict(dict)
    for where, row, *_ in lines:
        code = row.get("language") or language
        if code is None:
            raise ValueError(f"{where}: the row has no language; give it one, or --language")
        example = {"where": where, "id": str(row.get("id", where.rpartition(":")[2])), "language": code,
                   **{key: str(row[key]) for key in CARRIED if row.get(key)}}
        if task == "translation" and "source" not in row:
            text = field_of(row, ["text"], "translation without source and target", where)
            if "id" not in row or code in parallel[example["id"]]:
                raise ValueError(f"{where}: parallel texts need an 'id' that they share, each in another "
                                 f"language; {'two are in ' + code if 'id' in row else 'there is none'}")
            parallel[example["id"]][code] = example | {"fields": {"target": text}}
        elif languages is None or code in languages:
            examples.append(example | {"fields": fields_of(row, task, where)})
    made = [pair for some in parallel.values() for pair in pairs(some, languages, source, seed)]
    return examples + made, sum(not any(pairs(some, None, source)) for some in parallel.values())


def fields_of(row, task, where):
    """{field: text} of a structured row of its own."""
    if task == "classification":
        keys = {"text": ["text"], "label": ["label"]}
    elif task == "qa":
        keys = {"question": ["question"], "answer": ["answer"]}
        keys |= {"context": ["context"]} if row.get("context") not in (None, "") else {}
    elif task == "translation":
        keys = {"source": ["source"], "target": ["target"]}
    else:
        keys = {"document": ["document", "text"], "summary": ["summary"]}
    return {field: field_of(row, some, task, where) for field, some in keys.items()}


def pairs(texts, languages=None, source=None, seed=0):
    """The translations into each language of parallel texts, {code: example with a target}."""
    for code, example in texts.items():
        others = sorted(texts.keys() - {code})
        if source is not None:
            others = [other for other in others if other == source]
        if not others or (languages is not None and code not in languages):
            continue
        other = random.Random(f"pairs/{seed}/{example['id']}/{code}").choice(others)
        fields = {"source": texts[other]["fields"]["target"], **example["fields"]}
        yield example | {"id": f"{example['id']}/{other}-{code}", "fields": fields}


def name_labels(examples, names):
    """Give labels their names in the examples' languages, and each example the list of its language's labels.

    names: {language: {label: its name}}. Returns {language: labels that are not named there}. English labels
    that other languages name are their own names.
    """
    english = set().union(*names.values())
    labels, unnamed = defaultdict(set), defaultdict(set)
    for example in examples:
        fields, code = example["fields"], example["language"]
        home = home_language(code, names)
        if home is not None and fields["label"] in names[home]:
            fields["label"] = names[home][fields["label"]]
        elif code.partition("-")[0] != "en" or fields["label"] not in english:
            unnamed[code].add(fields["label"])
        labels[code].add(fields["label"])
    for example in examples:
        code = example["language"]
        example["fields"]["labels"] = COMMAS.get(code, ", ").join(sorted(labels[code]))
    return {code: some - set(names.get(code, {}).values()) for code, some in unnamed.items()}


# ---- the command -------------------------------------------------------------------------------------------

def code_of(text):
    """An argparse type: the code of a language."""
    if (code := language_code(text)) is None:
        raise argparse.ArgumentTypeError(f"unknown language {text!r}; {SPELLINGS}")
    return code


def table(rows):
    """Text lines: rows, and the templates they got, by language."""
    used = defaultdict(Counter)
    for row in rows:
        used[f"{row['language']} {row['script']}"][row["template_id"]] += 1
    lines = [f"{'language':<10}{'rows':>8}  rows by template"]
    for name, some in sorted(used.items()):
        listed = ", ".join(f"{template} {count}" for template, count in sorted(some.items()))
        lines.append(f"{name:<10}{some.total():8}  {listed}")
    return [*lines, f"{'all':<10}{len(rows):8}"]


def main(argv=None):
    parser = Parser(prog="python -m aya_min.templates", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", metavar="FILE.jsonl", help="structured rows")
    add("--task", required=True, choices=list(TASKS))
    add("--out", required=True, help="JSONL file to write; must not exist")
    add("--language", type=code_of, metavar="CODE", help="of rows that do not say theirs")
    add("--languages", nargs="+", type=code_of, metavar="CODE", help="only rows in these (default: all)")
    add("--source", type=code_of, metavar="CODE",
        help="the source's language of parallel texts (default: any)")
    add("--templates", metavar="T.json", help="a file of templates of this task (default: those of aya_min)")
    add("--labels", metavar="L.json", help="{language: {label: its name}} (default: that of aya_min)")
    add("--dataset-name", metavar="NAME", help="of rows that do not say theirs (default: the file's name)")
    add("--seed", type=number(int, WHOLE), default=0, metavar="N")
    args = parser.parse_args(argv)
    if is_spare_rank():
        return
    for flag, task in (("source", "translation"), ("labels", "classification")):
        if getattr(args, flag) and args.task != task:
            raise ValueError(f"--{flag} is for --task {task}; leave it out")
    check_out(args.out)
    templates = read_templates(args.templates or FOLDER / f"{args.task}.json", args.task)
    names = read_labels(args.labels or FOLDER / "labels.json") if args.task == "classification" else None
    examples, alone = examples_of(streamed(args.file), args.task, args.language, args.languages, args.source,
                                  args.seed)
    if not examples:
        raise ValueError(f"{args.file}: no row is left; give other --languages, another --source, or "
                         "parallel texts in two languages")
    unnamed = name_labels(examples, names) if names is not None else {}
    dataset = args.dataset_name or Path(args.file).stem
    rows = apply_templates(examples, templates, args.task, args.seed, dataset)
    write_new({args.out: jsonl(rows)})
    for line in table(rows):
        print(printable(line))
    if alone:
        print(f"left out: {alone} ids of parallel texts, which have no second language, or not --source")
    for code, some in sorted(unnamed.items()):
        if some:
            print(printable(f"labels kept as they are in {code}: {', '.join(sorted(some))[:200]}"))


def read_labels(path):
    """{language code: {label: its name}} of a file."""
    found = {}
    for language, names in read_json(path).items():
        code = language_code(language)
        if code is None or not isinstance(names, dict) or not all(
                isinstance(name, str) and name.strip() for name in names.values()):
            raise ValueError(f"{path}: {language}: needs {{language: {{label: its name}}}}")
        found[code] = names
    return found


if __name__ == "__main__":
    guarded(main, "aya_min.templates")
