"""Expressions of Jinja as functions of a scope, which is a dict of variables. None is run as Python.

An expression is rewritten in Python's syntax, parsed by `ast`, and built of the operations below. Anything
else is refused when it is executed.

The text of a turn is a `Said`, which may only be stripped, joined, printed and asked whether it is empty. A
template that reads its letters could treat some texts differently from others, and the few conversations that
we try (template_turns.PROBES) would not show it.
"""

import ast
import operator
from datetime import datetime
from functools import partial
from types import SimpleNamespace

LONGEST = 200_000               # characters of a template, and of a text that it makes
WORDS = {"and", "or", "not", "in", "if", "else"}        # the keywords that Jinja and Python share
# The largest number that is known. The probes, which have 24 turns, would not show a rule for later turns.
FARTHEST = 20
UNDEFINED = ()                  # it is false and empty; the lists of a template are never tuples


class Said:
    """The text of a turn. Its letters must not decide anything: it is no str, and few operations take it."""

    def __init__(self, text, words=None):
        self.text = text
        # The words that the template looks for in texts, which are then refused in them. No probe has one.
        self.words = set() if words is None else words

    def __bool__(self):
        return bool(self.text)


class Loop(SimpleNamespace):
    """The variable `loop` in a `for`."""


TEXTS, SIMPLE = (str, Said), (str, int, type(None), tuple)


def refuse(what):
    raise ValueError(f"it uses {what}, which is not known here")


def later(what):
    """A function that refuses `what` when it is called."""
    return lambda *args, **named: refuse(what)


def known(value, types, what):
    """The value. ValueError if it is of none of the types, for which the operation `what` is known."""
    if not isinstance(value, types):
        refuse(f"{what} of {'the text of a turn' if isinstance(value, Said) else type(value).__name__}")
    return value


def printed(value):
    """The text that a template prints for a value."""
    if isinstance(value, Said):
        return value.text
    return "" if value is UNDEFINED else str(known(value, SIMPLE, "the text"))


def joined(left, right):
    """left ~ right"""
    text = printed(left) + printed(right)
    if len(text) > LONGEST:
        raise ValueError(f"it makes a text of more than {LONGEST:,} characters")
    said = next((part for part in (left, right) if isinstance(part, Said)), None)
    return Said(text, said.words) if said else text


def calculated(function, left, right):
    """function(left, right) of whole numbers; a sum of texts or lists joins them."""
    if function is operator.add and isinstance(left, TEXTS) and isinstance(right, TEXTS):
        return joined(left, right)
    if function is operator.add and isinstance(left, list) and isinstance(right, list):
        return left + right if len(left) + len(right) <= 1000 else refuse("a list of more than 1,000 parts")
    return function(known(left, int, function.__name__), known(right, int, function.__name__))


def equal(left, right):
    """left == right. Of texts only the empty one may be compared with the text of a turn."""
    said, other = (left, right) if isinstance(left, Said) else (right, left)
    if isinstance(said, Said) and isinstance(other, TEXTS):
        return not said if other == "" else refuse("a comparison of the text of a turn")
    return left == right if isinstance(left, SIMPLE) else left == known(right, SIMPLE, "a comparison")


def contains(left, right):
    """left in right"""
    if isinstance(right, Said):
        return looked_for(right, left)
    if isinstance(right, str):
        return known(left, str, "in") in right
    # A longer search could take long.
    if len(known(right, (list, dict, tuple), "in")) > 100:
        refuse("in of more than 100 parts")
    parts = [known(part, SIMPLE, "in") for part in right]
    return known(left, SIMPLE, "in") in parts


def part_of(value, key):
    """value[key] or value.key as in Jinja, UNDEFINED if the value has no such part."""
    if isinstance(value, SimpleNamespace):
        value = vars(value) if key in vars(value) else refuse(f"what was not set, {key!r:.40}")
    if isinstance(known(value, (list, dict), "a part"), list) and type(key) is int:
        return value[key] if -len(value) <= key < len(value) else UNDEFINED
    if known(key, str, "a part") in value and isinstance(value, dict):
        return value[key]
    return refuse(f"the method {key}") if hasattr(value, key) else UNDEFINED


def looked_for(said, word):
    """Whether a word is in, begins or ends the text of a turn: never, as texts with it are refused."""
    said.words.add(known(word, str, "in") or refuse("an empty word in the text of a turn"))
    return False


def stripping(method):
    """The function value.strip(), lstrip() or rstrip(), with or without a text of characters."""
    def function(value, characters=None):
        known(characters, (str, type(None)), method.__name__)
        text = method(printed(known(value, TEXTS, method.__name__)), characters)
        return Said(text, value.words) if isinstance(value, Said) else text
    return function


def beginning(method):
    """The function value.startswith(word) or endswith(word)."""
    def function(value, word):
        if isinstance(value, Said):
            return looked_for(value, word)
        return method(known(value, str, method.__name__), known(word, str, method.__name__))
    return function


def selected(values, key, test="", other=None):
    """values | selectattr(key, "equalto", other)"""
    if test not in ("equalto", "==", "eq"):
        refuse(f"the filter selectattr with {test!r:.40}")
    return [value for value in known(values, list, "the filter selectattr")
            if equal(part_of(value, key), other)]


def today(form):
    """The date as transformers gives it to templates that ask (Llama 3.2): that of the day of reading."""
    return datetime.now().strftime(known(form, str, "strftime_now"))


GLOBALS = {
    "true": True, "false": False, "none": None, "True": True, "False": False, "None": None,
    "raise_exception": lambda message="": refuse(f"raise_exception: {printed(message)[:100]}"),
    "namespace": SimpleNamespace, "strftime_now": today, **{name: later(name + "()") for name in (
        "range", "dict", "lipsum", "cycler", "joiner", "self")}}
ATTRIBUTES = {
    "j_strip": stripping(str.strip), "f_trim": stripping(str.strip),
    "j_lstrip": stripping(str.lstrip), "j_rstrip": stripping(str.rstrip),
    "j_get": lambda value, key: known(value, dict, "the method get").get(known(key, str, "the method get")),
    "j_startswith": beginning(str.startswith), "j_endswith": beginning(str.endswith),
    "f_selectattr": selected, "f_list": lambda value: [*known(value, list, "the filter list")],
    "f_upper": lambda value: printed(known(value, SIMPLE, "the filter upper")).upper(),
    "f_lower": lambda value: printed(known(value, SIMPLE, "the filter lower")).lower(),
    "f_length": lambda value: len(known(value, (str, list), "the filter length")),
    "t_defined": lambda value: value is not UNDEFINED, "t_undefined": lambda value: value is UNDEFINED,
    "t_none": lambda value: value is None, "t_string": lambda value: isinstance(value, TEXTS),
    "t_not": operator.not_}
OPERATIONS = {
    ast.Eq: equal, ast.NotEq: lambda left, right: not equal(left, right), ast.In: contains,
    ast.NotIn: lambda left, right: not contains(left, right), ast.MatMult: joined,
    **{sign: partial(calculated, function) for sign, function in (
        (ast.Lt, operator.lt), (ast.LtE, operator.le), (ast.Gt, operator.gt), (ast.GtE, operator.ge),
        (ast.Add, operator.add), (ast.Sub, operator.sub), (ast.Mod, operator.mod))}}


def expression(tokens, form="({})"):
    """The tokens of an expression as a function of the scope. What is not known is refused when it is called.

    form: Python's syntax around the expression.
    """
    try:
        return built(ast.parse(form.format(python(tokens)), mode="eval").body)
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError):
        return later("the expression " + repr(" ".join(text for _, text in tokens))[:80])


def python(tokens):
    """The tokens of an expression in Python's syntax, to be parsed and never run.

    A name becomes j_NAME. Filters and tests become the attributes f_NAME and t_NAME, which bind as tightly as
    in Jinja. ~ becomes @, which binds more tightly than + as well.
    """
    out, tokens = [], iter(tokens)
    for kind, text in tokens:
        if (kind, text) in (("operator", "|"), ("name", "is")):
            kind, name = next(tokens, ("", ""))
            negated = text == "is" and (kind, name) == ("name", "not")
            kind, name = next(tokens, ("", "")) if negated else (kind, name)
            prefix = {"name": ".f_" if text == "|" else ".t_"}.get(kind, "?")
            out.append(prefix + name + " .t_not" * negated)
        elif kind == "name":
            out.append(text if text in WORDS else "j_" + text)
        else:
            out.append(repr(text) if kind == "string" else text.replace("~", "@"))
    return " ".join(out)


def built(tree):
    """A syntax tree as a function of the scope."""
    match tree:
        case (ast.Constant(value=int(number))
              | ast.UnaryOp(operand=ast.Constant(value=int(number)))) if number > FARTHEST:
            return later(f"the number {number}, a rule for many turns")
        case ast.Constant(value=value):
            return constant(value)
        case ast.Name(id=name):
            name = name[2:]
            return applied(lambda value: refuse(name) if callable(value) else value,
                           lambda scope: scope.get(name, UNDEFINED))
        case ast.Attribute(value=ast.Name(id=name), attr="t_defined"):
            return lambda scope: scope.get(name[2:], UNDEFINED) is not UNDEFINED
        case ast.Attribute(value=value, attr=name):
            part = partial(part_of, key=name[2:]) if name[0] == "j" else attribute(name)
            return applied(part, built(value))
        case ast.Call(func=ast.Attribute(value=value, attr=name), args=args, keywords=[]):
            return applied(attribute(name), *map(built, [value, *args]))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=named):
            args, named = [*map(built, args)], {part.arg[2:]: built(part.value) for part in named}
            return lambda scope: scope.get(name[2:], later(name[2:] + "()"))(
                *[part(scope) for part in args], **{key: part(scope) for key, part in named.items()})
        case ast.Subscript(value=value, slice=ast.Slice(lower=start, upper=stop, step=step)):
            parts = [built(part or ast.Constant(None)) for part in (value, start, stop, step)]
            return applied(lambda items, *bounds: known(items, list, "a slice")[slice(*bounds)], *parts)
        case ast.Subscript(value=value, slice=key):
            return applied(part_of, built(value), built(key))
        case (ast.BinOp(left=left, op=sign, right=right)
              | ast.Compare(left=left, ops=[sign], comparators=[right])) if type(sign) in OPERATIONS:
            return applied(OPERATIONS[type(sign)], built(left), built(right))
        case ast.BoolOp(op=sign, values=[part, *parts]):
            left, right = built(part), built(ast.BoolOp(sign, parts) if parts[1:] else parts[0])
            if isinstance(sign, ast.Or):
                return lambda scope: left(scope) or right(scope)
            return lambda scope: left(scope) and right(scope)
        case ast.UnaryOp(op=ast.Not(), operand=value):
            return applied(operator.not_, built(value))
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(number))):
            return constant(-number)
        case ast.IfExp(test=test, body=value, orelse=other):
            test, value, other = built(test), built(value), built(other)
            return lambda scope: value(scope) if test(scope) else other(scope)
        case ast.List(elts=parts) | ast.Tuple(elts=parts):      # no known operation tells them apart
            return applied(lambda *parts: [*parts], *map(built, parts))
        case ast.ListComp(generators=[ast.comprehension(target=ast.Name(id=name), iter=items, ifs=tests)]):
            items, tests = built(items), [*map(built, tests)]

            def rounds(scope):
                """The scopes of the rounds of a for."""
                scopes = [{**scope, name[2:]: item} for item in known(items(scope), (list, tuple), "for")]
                return [inner for inner in scopes if all(test(inner) for test in tests)]
            return rounds
    return later(f"the expression {ast.unparse(tree)!r:.80}")


def constant(value):
    """A function of the scope that always returns the value."""
    return lambda scope: value


def applied(function, *parts):
    """A function of the scope, which calls `function` with the values of the parts in this scope."""
    return lambda scope: function(*[part(scope) for part in parts])


def attribute(name):
    """The operation of a method, filter or test (j_NAME, f_NAME, t_NAME), or one that refuses it."""
    kind = {"j": "method", "f": "filter", "t": "test"}[name[0]]
    return ATTRIBUTES.get(name, later(f"the {kind} {name[2:]}"))
