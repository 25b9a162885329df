"""Small programs and pages that are made by rule, for code_data.py: verified synthetic code and markup.

A shape is a function rng -> (parameters, sentence, body lines, draw); draw(rng) gives the arguments of one
call. PROGRAMS makes of each shape a function with its docstring, and calls of it; nothing is executed here.
Numbers are small and loops end by rule, so that each call ends at once. PAGES makes pages.
"""

import html
import json
from functools import partial

WORDS = """apple river stone cloud garden paper window yellow silver winter summer morning letter number table
    music bread honey horse bird green blue small quick north south ocean forest island bridge""".split()
SIGNS = {"+": "sum", "-": "difference", "*": "product"}
COMPARED = ("<", ">", "<=", ">=")
LETTERS = "aeioulnrst"


def number(rng, low=0, high=12):
    return rng.randint(low, high)


def numbers(rng):
    return [number(rng) for _ in range(rng.randint(3, 5))]


def some_words(rng):
    return rng.sample(WORDS, rng.randint(2, 4))


def pairs(rng):
    return number(rng), number(rng)


def term(rng, names):
    """An expression of the names and of small numbers, which never divides by zero."""
    a, b = rng.choice(names), rng.choice([*names, str(rng.randint(1, 9))])
    kind = rng.randrange(4)
    if kind == 0:
        return f"{a} {rng.choice('+-*')} {b}"
    if kind == 1:
        return f"{a} {rng.choice(['//', '%'])} {rng.randint(2, 7)}"
    if kind == 2:
        return f"({a} {rng.choice('+-')} {b}) * {rng.randint(2, 5)}"
    return f"{a} * {rng.randint(2, 6)} {rng.choice('+-')} {b}"


# ---- shapes: arithmetic, conditionals, loops ---------------------------------------------------------------

def arithmetic(rng):
    expression = term(rng, ["a", "b"])
    return "a, b", f"Return {expression}.", [f"return {expression}"], pairs


def steps(rng):
    first, second = term(rng, ["a", "b"]), term(rng, ["c"])
    return "a, b", f"Return {second}, where c is {first}.", [f"c = {first}", f"return {second}"], pairs


def conditional(rng):
    sign, one, other = rng.choice(COMPARED), term(rng, ["a", "b"]), term(rng, ["b", "a"])
    body = [f"if a {sign} b:", f"    return {one}", f"return {other}"]
    return "a, b", f"Return {one} if a {sign} b, else {other}.", body, pairs


def grades(rng):
    low, high = sorted(rng.sample(range(2, 11), 2))
    names = rng.sample(WORDS, 3)
    body = [f"if n < {low}:", f"    return {names[0]!r}", f"if n < {high}:", f"    return {names[1]!r}",
            f"return {names[2]!r}"]
    return "n", f"Say {names[0]} below {low}, {names[1]} below {high}, else {names[2]}.", body, \
        lambda rng: (number(rng),)


def loop(rng):
    expression, start = term(rng, ["i"]), rng.randint(0, 3)
    body = [f"total = {start}", "for i in range(n):", f"    total += {expression}", "return total"]
    return "n", f"Add {expression} to {start} for each i below n.", body, lambda rng: (number(rng, 1, 6),)


def while_loop(rng):
    by = rng.randint(2, 4)
    body = ["count = 0", f"while n >= {by}:", f"    n = n // {by}", "    count += 1", "return count"]
    return "n", f"Count how often n can be divided by {by}.", body, lambda rng: (number(rng, 0, 100),)


def countdown(rng):
    by = rng.randint(2, 5)
    body = ["items = []", "while n > 0:", "    items.append(n)", f"    n -= {by}", "return items"]
    return "n", f"List n and what is left as {by} is taken away.", body, lambda rng: (number(rng, 1, 15),)


def digits(rng):
    sign = rng.choice("+*")
    body = [f"result = {int(sign == '*')}", "for digit in str(n):", f"    result {sign}= int(digit)",
            "return result"]
    return "n", f"Return the {SIGNS[sign]} of the digits of n.", body, lambda rng: (number(rng, 10, 999),)


def calendar(rng):
    size = rng.randint(5, 9)
    return "day, n", f"Go n days forward in a week of {size} days.", [f"return (day + n) % {size}"], \
        lambda rng: (number(rng, 0, size - 1), number(rng))


# ---- shapes: texts -----------------------------------------------------------------------------------------

def texts(rng):
    n = rng.randint(1, 3)
    sentence, expression = rng.choice([
        ("Turn the word round.", "word[::-1]"), (f"Return the first {n} letters.", f"word[:{n}]"),
        (f"Return the word without its first {n} letters.", f"word[{n}:]"),
        (f"Write the word {n + 1} times.", f"word * {n + 1}"), ("Write it in capitals.", "word.upper()"),
        ("Return the last letter and the first.", "word[-1] + word[0]"),
        (f"Add the length of the word to {n}.", f"len(word) + {n}")])
    return "word", sentence, [f"return {expression}"], lambda rng: (rng.choice(WORDS),)


def letters(rng):
    wanted = "".join(sorted(rng.sample(LETTERS, rng.randint(1, 3))))
    body = ["count = 0", "for letter in word:", f"    if letter in {wanted!r}:", "        count += 1",
            "return count"]
    return "word", f"Count the letters of {wanted} in the word.", body, lambda rng: (rng.choice(WORDS),)


def joined(rng):
    sign, part = rng.choice("-+ ,"), rng.choice(["word", "word[0]", "word.upper()", "word[::-1]"])
    return "words", f"Join {part} of each word with {sign!r}.", \
        [f"return {sign!r}.join({part} for word in words)"], lambda rng: (some_words(rng),)


# ---- shapes: lists, sorting, counting ----------------------------------------------------------------------

def picked(rng):
    expression, by, rest = term(rng, ["x"]), rng.randint(2, 4), rng.randint(0, 1)
    test, said = rng.choice([(f"x % {by} == {rest}", f"x % {by} is {rest}"),
                             (f"x > {by}", f"x is above {by}"), (f"x != {by}", f"x is not {by}")])
    return "items", f"Return {expression} for each x where {said}.", \
        [f"return [{expression} for x in items if {test}]"], lambda rng: (numbers(rng),)


def places(rng):
    i, j = rng.sample([0, 1, 2, -1, -2], 2)
    sign = rng.choice("+-*")
    return "items", f"Return the {SIGNS[sign]} of the items at {i} and {j}.", \
        [f"return items[{i}] {sign} items[{j}]"], lambda rng: (numbers(rng),)


def ordered(rng):
    first, more = rng.choice([("smallest", ""), ("largest", ", reverse=True")])
    part, said = rng.choice([("", ""), ("[:2]", " Keep two."), ("[1:]", " Leave out the first."),
                             ("[-1]", " Return the last."), ("[0]", " Return the first.")])
    draw = rng.choice([numbers, some_words])
    return "items", f"Put the items in order, {first} first.{said}", \
        [f"return sorted(items{more}){part}"], lambda rng: (draw(rng),)


def by_key(rng):
    sentence, key = rng.choice([("Sort the words by their lengths.", "len"),
                                ("Sort the words by their last letters.", "lambda word: word[-1]"),
                                ("Sort the words by their second letters.", "lambda word: word[1]")])
    return "words", sentence, [f"return sorted(words, key={key})"], lambda rng: (some_words(rng),)


def insertion(rng):
    sign, first = rng.choice([("<", "smallest"), (">", "largest")])
    body = ["result = []", "for item in items:", "    place = 0",
            f"    while place < len(result) and result[place] {sign} item:", "        place += 1",
            "    result.insert(place, item)", "return result"]
    return "items", f"Insert each item at its place, {first} first.", body, lambda rng: (numbers(rng),)


def best(rng):
    sign, word = rng.choice([(">", "largest"), ("<", "smallest")])
    body = ["best = items[0]", "for item in items:", f"    if item {sign} best:", "        best = item",
            f"return best + {rng.randint(1, 9)}" if rng.random() < 0.5 else "return best"]
    return "items", f"Find the {word} item.", body, lambda rng: (numbers(rng),)


def occurrences(rng):
    more = rng.choice(["", f" + {rng.randint(1, 9)}", f" * {rng.randint(2, 9)}"])
    body = ["count = 0", "for item in items:", "    if item == wanted:", "        count += 1",
            f"return count{more}"]

    def draw(rng):
        few = rng.sample(WORDS, 2)
        return [rng.choice(few) for _ in range(4)], few[0]
    return "items, wanted", "Count how many times the wanted item is in the list.", body, draw


def counted(rng):
    key, of = rng.choice([("item", numbers), ("len(item)", some_words), ("item[0]", some_words),
                          (f"item % {rng.randint(2, 4)}", numbers)])
    body = ["counts = {}", "for item in items:", f"    counts[{key}] = counts.get({key}, 0) + 1",
            "return counts"]
    return "items", f"Count how often each {key} occurs.", body, lambda rng: (of(rng),)


def two_lists(rng):
    expression = term(rng, ["x", "y"])
    return "left, right", f"Return {expression} for each x and y of two lists.", \
        [f"return [{expression} for x, y in zip(left, right)]"], lambda rng: (numbers(rng), numbers(rng))


def questions(rng):
    word, sign, n = rng.choice(["any", "all"]), rng.choice(COMPARED), rng.randint(2, 8)
    return "items", f"Say whether {word} of the items is {sign} {n}.", \
        [f"return {word}(item {sign} {n} for item in items)"], lambda rng: (numbers(rng),)


SHAPES = (arithmetic, steps, conditional, grades, loop, while_loop, countdown, digits, calendar, texts,
          letters, joined, picked, places, ordered, by_key, insertion, best, occurrences, counted, two_lists,
          questions)
VERBS = "find make get take give solve compute work show build".split()


def program(shape, rng, num_calls):
    """(name, the function's text, [its calls]) of one draw of a shape."""
    parameters, sentence, body, draw = shape(rng)
    name = f"{rng.choice(VERBS)}_{rng.choice(WORDS)}"
    lines = [f"def {name}({parameters}):", f'    """{sentence}"""', *(f"    {line}" for line in body), ""]
    calls = []
    while len(calls) < num_calls:
        call = f"{name}({', '.join(map(repr, draw(rng)))})"
        if call not in calls:
            calls.append(call)
    return name, "\n".join(lines), calls


PROGRAMS = {shape.__name__: partial(program, shape) for shape in SHAPES}


# ---- pages -------------------------------------------------------------------------------------------------

def phrase(rng, longest=5):
    return " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))


def elements(rng, depth, num):
    """Lines of `num` HTML elements, which may hold others."""
    lines = []
    for _ in range(num):
        kind = rng.choice(["p", "h2", "a", "ul", "div", "table"] if depth < 3 else ["p", "a", "span"])
        indent = "  " * depth
        if kind == "ul":
            items = [f"{indent}  <li>{phrase(rng)}</li>" for _ in range(rng.randint(2, 3))]
            lines += [f"{indent}<ul>", *items, f"{indent}</ul>"]
        elif kind == "div":
            lines += [f'{indent}<div class="{rng.choice(WORDS)}">', *elements(rng, depth + 1, 2),
                      f"{indent}</div>"]
        elif kind == "table":
            cells = "".join(f"<td>{rng.randint(0, 99)}</td>" for _ in range(2))
            lines += [f"{indent}<table>", f"{indent}  <tr>{cells}</tr>", f"{indent}</table>"]
        else:
            more = f' href="/{rng.choice(WORDS)}"' if kind == "a" else ""
            lines.append(f"{indent}<{kind}{more}>{html.escape(phrase(rng))}</{kind}>")
    return lines


def html_page(rng):
    body = elements(rng, 1, rng.randint(2, 4))
    return "\n".join(["<body>", f"  <h1>{phrase(rng, 3)}</h1>", *body, "</body>", ""])


def value(rng, depth):
    kind = rng.choice(["text", "number", "list", "object"] if depth < 3 else ["text", "number", "truth"])
    if kind == "list":
        return [value(rng, depth + 1) for _ in range(2)]
    if kind == "object":
        return {word: value(rng, depth + 1) for word in rng.sample(WORDS, 2)}
    return {"text": phrase(rng, 3), "number": rng.randint(0, 999), "truth": rng.random() < 0.5}[kind]


def json_page(rng):
    page = {word: value(rng, 1) for word in rng.sample(WORDS, rng.randint(4, 6))}
    return json.dumps(page, indent=2) + "\n"


def markdown_page(rng):
    lines = [f"# {phrase(rng, 3)}", ""]
    for _ in range(rng.randint(3, 5)):
        kind = rng.choice(["text", "list", "table", "part"])
        if kind == "part":
            lines += [f"## {phrase(rng, 3)}", "", f"{phrase(rng)} **{rng.choice(WORDS)}** {phrase(rng)}.", ""]
        elif kind == "list":
            word = rng.choice(WORDS)
            lines += [f"- {phrase(rng)}", f"  - [{word}](/{word}.md)", f"- {phrase(rng)}", ""]
        elif kind == "table":
            one, other = rng.sample(WORDS, 2)
            lines += [f"| {one} | {other} |", "| --- | --- |",
                      f"| {rng.randint(0, 99)} | {rng.randint(0, 99)} |", ""]
        else:
            lines += [f"{phrase(rng, 8)} `{rng.choice(WORDS)}` {phrase(rng, 8)}.", ""]
    return "\n".join(lines)


PAGES = {"html": html_page, "json": json_page, "markdown": markdown_page}
