"""The expressions of Jinja that chat templates use, as functions of a scope. Nothing is run as Python.

An expression is written in Python's syntax, parsed by `ast`, and made of the operations below, which are all
that it can do. What is not known here is refused when it is executed. Sizes and steps are bounded.

A text of the class `Said` may only be stripped, joined, printed and asked whether it is there. A template
that looks into it (searches, cuts, changes it) can treat some texts otherwise than others, which no few
examples would show.
"""

import ast
import json
import operator
import re

LONGEST = 200_000               # characters of a template, and of a value that it makes
MOST_STEPS, MOST_WRITTEN = 200_000, 4_000_000

TOKEN = re.compile(r"""(?P<space>\s+)|(?P<number>\d+(?:\.\d+)?)|(?P<name>[^\W\d]\w*)
    |(?P<string>'[^'\\]*(?:\\.[^'\\]*)*'|"[^"\\]*(?:\\.[^"\\]*)*")
    |(?P<operator>==|!=|<=|>=|//|\*\*|[-+*/%~<>=.:|,()\[\]{}])""", re.X | re.S)
WORDS = ("and", "or", "not", "in", "if", "else")        # the words that Jinja and Python share
CONSTANTS = {"true": True, "false": False, "none": None, "True": True, "False": False, "None": None}


class Said(str):
    """A text whose letters must not decide anything."""


class Undefined:
    """What has no value: prints nothing, is false, and has no parts."""
    def __bool__(self):
        return False


class Namespace(dict):
    """namespace(): the one object whose attributes a template may set."""


UNDEFINED = Undefined()


class Scope:
    """Variables of a block; those of the blocks around it show through. All share one budget of steps."""

    def __init__(self, variables, parent=None, budget=None):
        self.variables, self.parent = variables, parent
        self.budget = parent.budget if parent else budget

    def get(self, name):
        scope = self
        while scope:
            if name in scope.variables:
                return scope.variables[name]
            scope = scope.parent
        if name in FUNCTIONS:
            return lambda *args, **more: FUNCTIONS[name](self, *args, **more)
        return refuse(f"{name}()") if name in ("strftime_now", "cycler", "joiner", "lipsum") else UNDEFINED

    def count(self, steps):
        self.budget[0] -= steps
        if self.budget[0] < 0:
            raise ValueError(f"it takes more than {MOST_STEPS:,} steps")

    def bounded(self, value):
        """A value that an operation made, if it is not too large."""
        if isinstance(value, (str, list, tuple, dict)):
            self.count(len(value) >> 8)
            if len(value) > LONGEST:
                raise ValueError(f"it makes a value of more than {LONGEST:,} characters")
        elif isinstance(value, int) and abs(value) >> 63:
            raise ValueError("it makes a number of more than 63 bits")
        return value


def refuse(what):
    raise ValueError(f"it uses {what}, which is not known here")


def looks_into(what):
    raise ValueError(f"it looks into a turn's text ({what}), so that texts may be treated unlike one another")


def new_budget():
    """What a rendering may take: [steps, characters written]."""
    return [MOST_STEPS, MOST_WRITTEN]


# ---- from tokens to functions ------------------------------------------------------------------------------

def expression(tokens):
    """A function of the scope. One that cannot be read refuses itself when it is called."""
    try:
        return built(parsed(tokens))
    except (SyntaxError, RecursionError, MemoryError, ValueError, AttributeError):
        return later("the expression " + repr(" ".join(text for _, text in tokens))[:80])


def later(what):
    """A function that refuses `what` when it is called."""
    return lambda *_: refuse(what)


def parsed(tokens):
    """The syntax tree of tokens. Names begin with j_, filters are attributes f_NAME, tests t_NAME and n_NAME
    (is not).

    As attributes they bind as tightly as in Jinja. `~` becomes <<, which binds less tightly, but where that
    matters Jinja adds a number to a text, which is an error. An `if` without `else` gets one.
    """
    out, open_ifs, i = [], [0], 0
    while i < len(tokens):
        (kind, text), i = tokens[i], i + 1
        if kind == "operator":
            if text in ",:)]}":
                out += [" else ... "] * open_ifs[-1]
                open_ifs[-1] = 0
            if text in "([{":
                open_ifs.append(0)
            elif text in ")]}":
                if len(open_ifs) == 1:
                    raise ValueError("a bracket that nothing opened")
                open_ifs.pop()
            if text == "|" or text == "**":
                (kind, name), i = tokens[i:i + 1][0] if tokens[i:] and text == "|" else ("", ""), i + 1
                text = f" .f_{name} " if kind == "name" else "?"
            out.append(" << " if text == "~" else text)
        elif (kind, text) == ("name", "is"):
            negated = tokens[i:i + 1] == [("name", "not")]
            i += negated
            (kind, name), i = tokens[i] if tokens[i:] else ("", "?"), i + 1
            out.append(f" .{'n' if negated else 't'}_{name} ")
            end = argument_end(tokens, i)
            if end > i:                                     # is divisibleby 3
                inner = ast.unparse(parsed(tokens[i:end]))
                out.append(f"({inner})")
                i = end
        elif kind == "name" and text in WORDS:
            open_ifs[-1] += (text == "if") - (text == "else")
            out.append(f" {text} ")
        else:
            out.append({"name": f" j_{text} ", "string": f" {text!r} ", "number": f" {text} "}.get(kind, "?"))
    out += [" else ... "] * open_ifs[-1]
    return ast.parse("(" + "".join(out) + "\n)", mode="eval").body


def argument_end(tokens, start):
    """Where a test's argument without brackets ends: one text, number, name or list."""
    if not tokens[start:] or tokens[start] == ("operator", "(") or tokens[start][1] in (*WORDS, "is"):
        return start
    end = start + 1
    if tokens[start] == ("operator", "["):
        end = next((i + 1 for i in range(start, len(tokens)) if tokens[i] == ("operator", "]")), start)
    elif tokens[start][0] == "operator":
        return start
    if tokens[end:end + 1] and tokens[end][1] in (".", "[", "("):
        raise ValueError("not known here")
    return end


def built(node):
    """The function of the scope that a syntax tree stands for."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, int):
            Scope({}, budget=new_budget()).bounded(node.value)
        return lambda scope: UNDEFINED if node.value is ... else node.value
    if isinstance(node, ast.Name):
        name = node.id.removeprefix("j_")
        if name in CONSTANTS:
            return lambda scope: CONSTANTS[name]
        return lambda scope: scope.get(name)
    if isinstance(node, (ast.List, ast.Tuple)):
        parts = [built(part) for part in node.elts]
        kind = list if isinstance(node, ast.List) else tuple
        return lambda scope: kind(part(scope) for part in parts)
    if isinstance(node, ast.Dict):
        pairs = [(built(key), built(value)) for key, value in zip(node.keys, node.values)]
        return lambda scope: {key(scope): value(scope) for key, value in pairs}
    if isinstance(node, ast.BoolOp):
        return chosen([built(part) for part in node.values], isinstance(node.op, ast.Or))
    if isinstance(node, ast.UnaryOp):
        part = built(node.operand)
        if isinstance(node.op, ast.Not):
            return lambda scope: not part(scope)
        if isinstance(node.op, ast.USub) and isinstance(node.operand, (ast.Constant, ast.Name)):
            return lambda scope: -part(scope)
    if isinstance(node, ast.IfExp):
        test, value, other = map(built, (node.test, node.body, node.orelse))
        return lambda scope: value(scope) if test(scope) else other(scope)
    if isinstance(node, ast.Compare):
        signs, parts = [type(each) for each in node.ops], [node.left, *node.comparators]
        return compared(signs, [built(part) for part in parts])
    if isinstance(node, ast.BinOp):
        return calculation(type(node.op), built(node.left), built(node.right))
    if isinstance(node, ast.Subscript):
        if isinstance(node.slice, ast.Slice):
            bounds = node.slice.lower, node.slice.upper, node.slice.step
            return cut(built(node.value), [built(bound or ast.Constant(None)) for bound in bounds])
        return subscript(built(node.value), built(node.slice))
    if isinstance(node, ast.Attribute):
        return attribute(built(node.value), node.attr, [], {})
    if isinstance(node, ast.Call):
        args = [built(arg) for arg in node.args]
        named = {arg.arg.removeprefix("j_"): built(arg.value) for arg in node.keywords}
        if isinstance(node.func, ast.Attribute) and node.func.attr[:2] != "j_":
            return attribute(built(node.func.value), node.func.attr, args, named)
        return call(built(node.func), args, named)
    raise ValueError("not known here")


def attribute(f, name, args, named):
    """A part, a method, a filter or a test, as the first letter of its name in the tree says."""
    kind, name = name[0], name[2:]
    if kind == "j":
        return member(f, name)
    return filtered(name, f, args, named) if kind == "f" else tested(name, f, args, kind == "n")


def chosen(parts, wanted):
    """`or` (wanted: True) or `and`: the first part that decides, else the last."""
    def f(scope):
        for part in parts:
            value = part(scope)
            if bool(value) == wanted:
                break
        return value
    return f


def compared(signs, parts):
    def f(scope):
        left = parts[0](scope)
        for sign, part in zip(signs, parts[1:]):
            right = part(scope)
            if not compare(sign, left, right):
                return False
            left = right
        return True
    return f


def cut(f, bounds):
    def g(scope):
        value = f(scope)
        if isinstance(value, Said):
            looks_into("a slice")
        return value[slice(*(bound(scope) for bound in bounds))]
    return g


def is_text(value):
    return isinstance(value, str)


def is_flat(value):
    if not isinstance(value, (list, tuple, dict)):
        return True
    parts = value.values() if isinstance(value, dict) else value
    return not any(isinstance(part, (list, tuple, dict)) for part in parts)


def compare(sign, left, right):
    """Whether a comparison (a class of `ast`) holds."""
    if sign in (ast.In, ast.NotIn):
        if right is UNDEFINED:
            return sign is ast.NotIn
        if isinstance(left, Said) or isinstance(right, Said):
            looks_into("in")
        if not is_flat(left) or isinstance(left, (list, tuple, dict)):
            refuse("in for lists")
        return (left in right) == (sign is ast.In)
    if isinstance(left, Said) or isinstance(right, Said):
        other = right if isinstance(left, Said) else left
        if sign not in (ast.Eq, ast.NotEq) or is_text(other) and other != "":
            looks_into("a comparison")
    if not (is_flat(left) and is_flat(right)):
        refuse("a comparison of nested lists")
    if sign in (ast.Eq, ast.NotEq):
        return (left == right) == (sign is ast.Eq)
    order = {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge}
    return order[sign](left, right)


def iterable(value):
    if value is UNDEFINED:
        return ()
    if isinstance(value, Said):
        looks_into("for")
    if not isinstance(value, (str, list, tuple, dict, range)):
        refuse(f"a loop over {type(value).__name__}")
    return value


def calculation(sign, left, right):
    numbers = {ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
               ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod}
    if sign not in (ast.Add, ast.LShift, *numbers):
        raise ValueError("not known here")

    def f(scope):
        a, b = left(scope), right(scope)
        if sign is ast.LShift:                          # ~
            a, b = text_of(a), text_of(b)
        if is_text(a) and is_text(b) and sign in (ast.Add, ast.LShift):
            return joined(scope, (a, b))
        if isinstance(a, list) and isinstance(b, list) and sign is ast.Add:
            return scope.bounded(a + b)
        if not (isinstance(a, (int, float)) and isinstance(b, (int, float))):
            refuse(f"{sign.__name__} of {type(a).__name__} and {type(b).__name__}")
        return scope.bounded(a + b if sign is ast.Add else numbers[sign](a, b))
    return f


def joined(scope, parts):
    text = scope.bounded("".join(parts))
    return Said(text) if any(isinstance(part, Said) for part in parts) else text


def text_of(value):
    """What `~` and the filters for texts make of a value."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple, dict)) or callable(value):
        refuse(f"the text of a {type(value).__name__}")
    return "" if value is UNDEFINED else str(value)


def part_of(value, key):
    """value[key], as Jinja finds it: undefined if there is none."""
    if value is UNDEFINED:
        raise ValueError(f"it asks for a part ({key!r}) of what is not defined")
    if isinstance(value, Said):
        looks_into(f"[{key!r}]")
    if isinstance(value, dict):
        return value.get(key, UNDEFINED)
    if isinstance(value, (list, tuple, str)) and type(key) is int:
        return value[key] if -len(value) <= key < len(value) else UNDEFINED
    return UNDEFINED


def subscript(f, key):
    return lambda scope: part_of(f(scope), key(scope))


def member(f, name):
    def g(scope):
        value = f(scope)
        methods = TEXT_METHODS if is_text(value) else DICT_METHODS if isinstance(value, dict) else {}
        if name in methods and not isinstance(value, Namespace):
            return lambda *args, **more: methods[name](scope, value, *args, **more)
        if hasattr(value, name) and not isinstance(value, (Namespace, Undefined)):
            refuse(f"the method {name}")
        return part_of(value, name)
    return g


def call(f, args, named):
    def g(scope):
        function = f(scope)
        if not callable(function):
            refuse("a call of what is no function")
        scope.count(1)
        return function(*(arg(scope) for arg in args), **{name: arg(scope) for name, arg in named.items()})
    return g


def filtered(name, f, args, named):
    def g(scope):
        if name not in FILTERS:
            refuse(f"the filter {name}")
        value = f(scope)
        if isinstance(value, Said) and name not in ("trim", "default", "d", "string", "safe"):
            looks_into(f"the filter {name}")
        return scope.bounded(FILTERS[name](scope, value, *(arg(scope) for arg in args),
                                           **{key: arg(scope) for key, arg in named.items()}))
    return g


def tested(name, f, args, negated):
    def g(scope):
        if name not in TESTS:
            refuse(f"the test {name}")
        return bool(TESTS[name](f(scope), *(arg(scope) for arg in args))) != negated
    return g


# ---- functions, methods, filters, tests --------------------------------------------------------------------

def strip(method):
    def f(scope, value, chars=None):
        value = text_of(value)
        if isinstance(value, Said):
            return Said(getattr(str, method)(value)) if chars is None else looks_into(f"{method}({chars!r})")
        return getattr(str, method)(value, chars)
    return f


def of_text(method):
    """A method or filter of texts that makes nothing longer than they are."""
    def f(scope, value, *args):
        if isinstance(value, Said) or any(isinstance(arg, Said) for arg in args):
            looks_into(method)
        return scope.bounded(getattr(str, method)(text_of(value), *args))
    return f


def replace(scope, value, old, new, count=-1):
    value, old, new = text_of(value), text_of(old), text_of(new)
    if isinstance(value, Said) or isinstance(old, Said) or isinstance(new, Said):
        looks_into("replace")
    if (value.count(old) + 1) * len(new) > LONGEST:
        raise ValueError(f"it makes a text of more than {LONGEST:,} characters")
    return value.replace(old, new, count)


def join(scope, value, between="", attribute=None):
    parts = iterable(value) if attribute is None else [part_of(part, attribute) for part in iterable(value)]
    parts, between = [text_of(part) for part in parts], text_of(between)
    if sum(map(len, parts)) + len(between) * len(parts) > LONGEST:
        raise ValueError(f"it makes a text of more than {LONGEST:,} characters")
    mixed = [text for part in parts for text in (between, part)][1:]
    return joined(scope, mixed)


def tojson(scope, value, indent=None, ensure_ascii=False, separators=None, sort_keys=False):
    if isinstance(value, (list, tuple, dict)) or indent:
        refuse("tojson of a list or an object")
    return json.dumps(None if value is UNDEFINED else value, ensure_ascii=ensure_ascii)


def default(scope, value, other="", boolean=False):
    return other if value is UNDEFINED or boolean and not value else value


def select(wanted):
    def f(scope, value, key, test=None, *args):
        if test is not None and test not in TESTS:
            refuse(f"the test {test}")
        found = []
        for part in iterable(value):
            scope.count(1)
            item = part_of(part, key)
            if bool(item if test is None else TESTS[test](item, *args)) == wanted:
                found.append(part)
        return found
    return f


def attributes(scope, value, name=None, attribute=None):
    if attribute is None:
        refuse("map without attribute")
    return [part_of(part, attribute) for part in iterable(value)]


def items(scope, value):
    return [] if value is UNDEFINED else list(value.items())


def error(scope, message=""):
    raise ValueError(f"it says: {text_of(message)[:100]}")


def numbers(scope, *args):
    made = range(*args)
    scope.count(len(made) >> 3)
    return list(scope.bounded(made[:LONGEST + 1]))


def length(scope, value):
    return 0 if value is UNDEFINED else len(iterable(value))


def equals(left, right):
    return compare(ast.Eq, left, right)


STRIPS = {name: strip(name) for name in ("strip", "lstrip", "rstrip")}
TEXT_METHODS = STRIPS | {"replace": replace, "join": lambda scope, value, parts: join(scope, parts, value)}
TEXT_METHODS |= {name: of_text(name) for name in (
    "split", "rsplit", "splitlines", "startswith", "endswith", "find", "count", "upper", "lower", "title",
    "capitalize", "isdigit", "isspace")}
DICT_METHODS = {"items": items, "keys": lambda scope, value: list(value),
                "values": lambda scope, value: list(value.values()),
                "get": lambda scope, value, key, other=None: value.get(key, other)}
FUNCTIONS = {"raise_exception": error, "range": numbers, "dict": lambda scope, **more: more,
             "namespace": lambda scope, *args, **more: Namespace(*args, **more)}
FILTERS = {
    "trim": STRIPS["strip"], "replace": replace, "join": join, "tojson": tojson, "default": default,
    "d": default,
    "length": length, "count": length, "items": items, "map": attributes, "selectattr": select(True),
    "rejectattr": select(False), "list": lambda scope, value: list(iterable(value)),
    "first": lambda scope, value: next(iter(iterable(value)), UNDEFINED),
    "last": lambda scope, value: next(iter(list(iterable(value))[-1:]), UNDEFINED),
    "reverse": lambda scope, value: value[::-1] if is_text(value) else list(iterable(value))[::-1],
    "string": lambda scope, value: text_of(value), "safe": lambda scope, value: value,
    "int": lambda scope, value: int(value) if isinstance(value, (int, float)) else refuse("int of a text")
} | {name: of_text(name) for name in ("lower", "upper", "capitalize")}
TESTS = {
    "defined": lambda value: value is not UNDEFINED, "undefined": lambda value: value is UNDEFINED,
    "none": lambda value: value is None, "string": is_text, "mapping": lambda value: isinstance(value, dict),
    "number": lambda value: isinstance(value, (int, float)), "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: type(value) is int, "float": lambda value: isinstance(value, float),
    "true": lambda value: value is True, "false": lambda value: value is False, "callable": callable,
    "iterable": lambda value: isinstance(value, (str, list, tuple, dict, Undefined)),
    "sequence": lambda value: isinstance(value, (str, list, tuple, dict, Undefined)),
    "odd": lambda value: value % 2 == 1, "even": lambda value: value % 2 == 0,
    "divisibleby": lambda value, other: value % other == 0,
    "in": lambda value, other: compare(ast.In, value, other),
    "ne": lambda value, other: not equals(value, other), "!=": lambda value, other: not equals(value, other),
} | dict.fromkeys(("eq", "equalto", "=="), equals)
