"""Code for mixtures: the standard library in parts, with and without docstrings; programs that give what
their rows say; pages whose parts nest; the command and what it refuses."""

import ast
import json
import sys
from html.parser import HTMLParser
from itertools import islice
from types import SimpleNamespace

import pytest
from small import program, tokenizer

from aya_min import code_data
from aya_min.code_data import DEFINITIONS, WITH_DOCSTRINGS, functions, main, rows_of, stripped, taken_rows
from aya_min.code_shapes import PROGRAMS
from aya_min.data import load_examples


def rows(kind, count, seed=0, **more):
    return list(islice(rows_of(kind, seed, **more), count))


def without_docstrings(text):
    """The tree of a text whose docstrings were taken out of the tree."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, WITH_DOCSTRINGS) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or ([] if isinstance(node, ast.Module) else [ast.Pass()])
    return ast.dump(tree)


# ---- the standard library

@pytest.fixture
def small_library(tmp_path, monkeypatch):
    """A library of three modules, a test folder, an installed package and a file of the machine's build."""
    files = {"one.py": 'def f():\n    """Doc."""\n    return 1  # a comment\n',
             "pack/__init__.py": "class A:\n    @property\n    def g(self):\n        return 2\n",
             "pack/two.py": "x = '''\n  a longer text\n'''\nif x:\n    def hidden():\n        pass\n",
             "bad.py": "print 1\n", "latin.py": b"# \xe9\n", "test/test_one.py": "def t(): pass\n",
             "pack/tests/three.py": "def t(): pass\n", "site-packages/other.py": "def o(): pass\n",
             "_sysconfigdata_x.py": "def s(): pass\n", "place.py": f"def p():\n    return '{tmp_path}/lib'\n"}
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setattr(code_data, "library", lambda: tmp_path)
    return tmp_path


def test_a_library_is_its_modules_without_tests_packages_the_build_and_what_names_its_folder(small_library):
    found = {row["id"]: row["text"] for row in rows("stdlib", 99)}
    assert found == {"one:f:1": 'def f():\n    """Doc."""\n    return 1  # a comment\n',
                     "pack:A.g:2": "@property\ndef g(self):\n    return 2\n"}
    files = {row["id"]: row["text"] for row in rows("stdlib", 99, unit="file", docstring="strip")}
    assert sorted(files) == ["one", "pack", "pack.two"]
    assert files["one"] == "def f():\n    return 1\n"


@pytest.fixture
def asyncio(monkeypatch):
    """One package of the real library, as all of it takes some seconds to read."""
    folder = code_data.library() / "asyncio"
    monkeypatch.setattr(code_data, "library", lambda: folder)


@pytest.mark.long
def test_rows_of_the_real_library_parse_and_name_modules_and_not_the_machine():
    found = rows("stdlib", 400)
    assert len({row["id"] for row in found}) == 400
    for row in found:
        [node] = ast.parse(row["text"]).body
        module, name, line = row["id"].split(":")
        assert isinstance(node, DEFINITIONS) and name.endswith(node.name) and int(line) > 0
        assert "/" not in module and module.partition(".")[0] in sys.stdlib_module_names
        assert str(code_data.library()) not in json.dumps(row) and len(row["text"]) <= 2000


def test_stripping_leaves_the_same_program_without_docstrings_and_comments(asyncio):
    kept, bare = rows("stdlib", 150), rows("stdlib", 150, docstring="strip")
    assert any(row["text"] != other["text"] for row, other in zip(kept, bare))
    assert len({row["id"] for row in kept}) == 150
    for row in kept:
        text = stripped(row["text"])
        assert ast.dump(ast.parse(text)) == without_docstrings(row["text"])
        assert stripped(text) == text


@pytest.mark.long
def test_stripping_leaves_whole_files_of_the_library_the_same_programs():
    for _, text in code_data.pieces(code_data.library(), "file")[::6]:
        assert ast.dump(ast.parse(stripped(text))) == without_docstrings(text)


@pytest.mark.parametrize("text, bare", [
    ('"""Module."""\nx = 1\n', "x = 1\n"),
    ('def f():\n    "doc"\n', "def f():\n    pass\n"),
    ('def f(): "doc"; return 1  # why\n', "def f(): return 1\n"),
    ('def f():\n    """é\n    # no comment\n    """  # one\n\n    return "# text"\n',
     'def f():\n\n    return "# text"\n'),
    ("class A:\n    # alone\n    'doc' 'more'\n    x = [1,  # one\n         2]\n",
     "class A:\n    x = [1,\n         2]\n"),
    ('x = 1\n"no docstring"\n', 'x = 1\n"no docstring"\n'),
    ("def f():\n    x = 1\n    # last", "def f():\n    x = 1\n")])
def test_stripping_worked_by_hand(text, bare):
    assert stripped(text) == bare
    assert ast.dump(ast.parse(bare)) == without_docstrings(text)


def test_a_function_that_cannot_stand_at_the_margin_is_left_out(small_library):
    (small_library / "margin.py").write_text("class A:\n    def f(self):\n        return '''\nx'''\n")
    text = (small_library / "margin.py").read_text()
    assert [name for name, _, _ in functions(text, ast.parse(text))] == ["A.f"]
    assert not any("margin" in row["id"] for row in rows("stdlib", 99))


# ---- verified programs

@pytest.mark.parametrize("docstring", ["keep", "strip"])
def test_every_program_gives_what_its_row_says_when_it_is_run_again(docstring):
    """With all of Python, not the few names that it was executed with."""
    found = rows("verified", 440, docstring=docstring)
    assert {row["kind"] for row in found} == set(PROGRAMS)
    for row in found:
        space = {}
        exec(row["text"], space)                    # its asserts hold
        results = [repr(eval(call, space)) for call in row["calls"]]
        assert results == row["results"] and len(results) == 3 == row["text"].count("\nassert ")
        for call, result in zip(row["calls"], results):
            assert f"assert {call} == {result}\n" in row["text"]
        assert ('"""' in row["text"]) == (docstring == "keep")


def test_no_two_programs_have_the_same_function_and_a_shape_with_no_other_leaves_the_turns(monkeypatch):
    found = rows("verified", 500)
    assert len({row["text"].partition("assert")[0] for row in found}) == 500

    def once(rng, num):
        return "f", "def f(x):\n    return x\n", ["f(1)", "f(2)"]
    monkeypatch.setattr(code_data, "PROGRAMS", {"once": once, "loop": PROGRAMS["loop"]})
    assert [row["kind"] for row in rows("verified", 4)] == ["once", "loop", "loop", "loop"]
    monkeypatch.setattr(code_data, "PROGRAMS", {"once": once})
    with pytest.raises(ValueError, match="only 1 rows are there"):
        taken_rows(rows_of("verified", 0), count=2)


def test_a_program_whose_results_are_all_the_same_or_too_long_is_not_kept():
    assert code_data.run("def f(x):\n    return 1\n", ["f(1)", "f(2)"]) is None
    assert code_data.run("def f(x):\n    return 'a' * x\n", ["f(1)", "f(90)"]) is None
    assert code_data.run("def f(x):\n    return 'a' * x\n", ["f(1)", "f(2)"]) == ["'a'", "'aa'"]


def test_a_program_has_no_other_names_than_those_of_its_own_and_a_few_functions():
    for text in ("open('x')", "__import__('os')", "exec('1')"):
        with pytest.raises(NameError):
            code_data.run(f"def f():\n    return {text}\n", ["f()"])


# ---- markup

class Nesting(HTMLParser):
    """Checks that each element ends where it should."""

    def __init__(self):
        super().__init__()
        self.open, self.deepest = [], 0

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.deepest = max(self.deepest, len(self.open))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def depth(value):
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if parts is None else 1 + max(map(depth, parts))


def test_pages_nest():
    found = rows("markup", 90)
    by_kind = {kind: [row["text"] for row in found if row["kind"] == kind]
               for kind in ("html", "json", "markdown")}
    assert [len(texts) for texts in by_kind.values()] == [30] * 3
    deepest = []
    for text in by_kind["html"]:
        reader = Nesting()
        reader.feed(text)
        assert reader.open == []
        deepest.append(reader.deepest)
    assert max(deepest) >= 4
    assert max(depth(json.loads(text)) for text in by_kind["json"]) >= 3
    assert all(text.startswith("# ") for text in by_kind["markdown"])
    assert any("\n- " in text and "\n  - [" in text for text in by_kind["markdown"])


def test_pages_are_of_the_size_of_programs():
    sizes = [sorted(len(row["text"]) for row in rows(kind, 300)) for kind in ("verified", "markup")]
    assert 0.7 < sizes[0][150] / sizes[1][150] < 1.4


# ---- rows and the command

@pytest.mark.parametrize("kind", ["stdlib", "verified", "markup"])
def test_the_same_seed_gives_the_same_rows_and_another_one_others(asyncio, kind):
    assert rows(kind, 30) == rows(kind, 30, seed=0) != rows(kind, 30, seed=1)


def test_rows_are_taken_until_they_have_the_tokens():
    few = [{"text": "a" * n} for n in (3, 4, 5)]
    size_of = lambda row: len(row["text"])
    taken = [len(taken_rows(few, tokens=n, size_of=size_of)) for n in (1, 3, 4, 7, 8, 12)]
    assert taken == [1, 1, 2, 2, 3, 3]
    with pytest.raises(ValueError, match="only 12 tokens are there"):
        taken_rows(few, tokens=13, size_of=size_of)


def test_the_command_writes_rows_that_a_stage_reads(asyncio, tmp_path, capsys):
    for kind in ("stdlib", "verified", "markup"):
        out = tmp_path / f"{kind}.jsonl"
        main(["--kind", kind, "--count", "5", "--out", str(out), "--max-characters", "400"])
        found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        assert found == rows(kind, 5, longest=400) and "5 rows" in capsys.readouterr().out
        assert {row["source"] for row in found} == {"code"}
        assert len(load_examples([out], tokenizer(), 1024)) == 5
        assert "not read" not in "".join(capsys.readouterr())       # no key of ours is unknown


def test_the_command_counts_tokens_of_a_model_s_tokenizer(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(code_data, "load_tokenizer", lambda folder: SimpleNamespace(encode=str.split))
    main(["--kind", "markup", "--tokens", "100", "--tokenizer", "m", "--out", str(tmp_path / "a.jsonl")])
    found = [json.loads(line)["text"].split() for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert sum(map(len, found[:-1])) < 100 <= sum(map(len, found))
    assert f"{sum(map(len, found))} tokens" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    (["--count", "0"], "a whole number of at least 1"),
    (["--count", "3", "--tokens", "3"], "not allowed with"),
    ([], "one of the arguments"), (["--tokens", "3"], "go together"),
    (["--count", "3", "--tokenizer", "m"], "go together"), (["--tokens", "3", "--tokenizer", "none"], "none"),
    (["--count", "3", "--unit", "file"], "goes with --kind stdlib"),
    (["--count", "3", "--kind", "markup", "--docstrings", "strip"], "markup has none"),
    (["--count", "3", "--seed", "-1"], "--seed"),
    (["--count", "3", "--max-characters", "5"], "of at least 100"),
    (["--count", "3", "--out", "taken.jsonl"], "exists; give a new file"),
    (["--count", "3", "--out", "no/a.jsonl"], "its folder does not exist"),
    (["--count", "3", "--kind", "stdlib"], "only 2 rows are there with these flags, not 3")])
def test_the_command_refuses_in_one_line_and_writes_nothing(small_library, tmp_path_factory, flags, message,
                                                            capsys, monkeypatch):
    folder = tmp_path_factory.mktemp("work")
    monkeypatch.chdir(folder)
    (folder / "taken.jsonl").write_text("mine")
    more = ["--out", "a.jsonl"] if "--out" not in flags else []
    more += ["--kind", "verified"] if "--kind" not in flags else []
    try:
        main([*flags, *more])
        error = "nothing was refused"
    except SystemExit as end:
        assert end.code == 2
        error = capsys.readouterr().err
    except (ValueError, OSError) as fault:
        error = str(fault)
    assert message in error and "\n" not in error.strip()
    assert [path.name for path in folder.iterdir()] == ["taken.jsonl"]
    assert (folder / "taken.jsonl").read_text() == "mine"


def test_a_mistake_ends_the_process_with_code_2_and_one_line(tmp_path):
    done = program("-m", "aya_min.code_data", "--kind", "markup", "--count", "3", "--unit", "file", "--out",
                   tmp_path / "a.jsonl")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
