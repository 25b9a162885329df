"""The part of Jinja that chat templates use, rendered without Jinja: `Template(source).render(variables)`.

Settings are those of transformers (trim_blocks, lstrip_blocks, `generation` blocks, break and continue). What is
not known here is refused when it is executed, not when it is read: a branch for tools does not matter to a plain
conversation. Sizes, steps and lengths are bounded, so that a foreign template can neither hang nor fill memory.

A text of the class `Said` may only be stripped, joined, printed and asked whether it is there. A template that looks
into it (searches, cuts, changes it) can treat some texts otherwise than others, which no few examples would show.
"""

import json
import operator
import re

LONGEST = 200_000               # characters of a template, of its output, and of a value in between
MOST_STEPS = 200_000
MOST_WRITTEN = 4_000_000

OPEN = re.compile(r"\{(?:%([-+]?)\s*raw\s*(-?)%\}|([{%#])([-+]?))")
CLOSE = {"%": re.compile(r"\+%\}|-%\}\s*|%\}\n?"), "{": re.compile(r"-\}\}\s*|\}\}"),
         "#": re.compile(r"\+#\}|-#\}\s*|#\}\n?")}
ENDRAW = re.compile(r"\{%([-+]?)\s*endraw\s*(?:\+%\}|-%\}\s*|%\}\n?)")
TOKEN = re.compile(r"""(?P<space>\s+)|(?P<number>\d+(?:\.\d+)?)|(?P<name>[^\W\d]\w*)
    |(?P<string>'[^'\\]*(?:\\.[^'\\]*)*'|"[^"\\]*(?:\\.[^"\\]*)*")
    |(?P<operator>==|!=|<=|>=|//|\*\*|[-+*/%~<>=.:|,()\[\]{}])""", re.X | re.S)
COMPARISONS = ("==", "!=", "<", "<=", ">", ">=", "in", "not in")


class Said(str):
    """A text whose letters must not decide anything."""


class Undefined:
    """What has no value: prints nothing, is false, and has no parts."""
    def __bool__(self):
        return False


class Namespace(dict):
    """namespace(): the one object whose attributes a template may set."""


class Break(Exception):
    pass


class Continue(Exception):
    pass


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


class Template:
    def __init__(self, source):
        if len(source) > LONGEST:
            raise ValueError(f"it has {len(source):,} characters, more than {LONGEST:,}")
        try:
            parser = Blocks(list(pieces(source)))
            self.body = parser.body(())
        except RecursionError:
            raise ValueError("its blocks are nested too deeply") from None

    def render(self, variables, budget=None):
        """The text for these variables. budget: `new_budget()`, to share one between several renderings."""
        out, scope = [], Scope(dict(variables), budget=budget or new_budget())
        try:
            run(self.body, Scope({}, scope), out)
        except RecursionError:
            raise ValueError("its expressions or macros are nested too deeply") from None
        except (TypeError, KeyError, IndexError, AttributeError, ArithmeticError, Break, Continue) as error:
            raise ValueError(f"it fails ({type(error).__name__}: {str(error)[:100]})") from None
        return "".join(out)


# ---- source to pieces --------------------------------------------------------------------------------------

def pieces(source):
    """("text", str), ("{", tokens) and ("%", tokens) of a template, white space trimmed as Jinja trims it."""
    source = re.sub(r"\r\n?", "\n", source)
    source = source.removesuffix("\n")
    at, line_start = 0, True
    while match := OPEN.search(source, at):
        kind, sign = match[3] or "raw", match[4] or match[1]
        yield "text", trimmed(source[at:match.start()], sign, kind, line_start)
        if kind == "raw":
            end = ENDRAW.search(source, match.end())
            if not end:
                raise ValueError("a raw block has no end")
            text = source[match.end():end.start()]
            yield "text", trimmed(text.lstrip() if match[2] else text, end[1], "raw", False)
        else:
            tokens, end = [], None
            if kind == "#":
                end = CLOSE["#"].search(source, match.end())
            else:
                tokens, end = lex(source, match.end(), CLOSE[kind])
            if not end:
                raise ValueError(f"{match[0]} has no end")
            if kind != "#":
                yield kind, tokens
        at, line_start = end.end(), end[0].endswith("\n")
    yield "text", source[at:]


def trimmed(text, sign, kind, line_start):
    """The text before a tag: without white space for `-`; without a tag's own indentation unless `+`."""
    if sign == "-":
        return text.rstrip()
    start = text.rfind("\n") + 1
    if sign != "+" and kind != "{" and (start or line_start) and text[start:].isspace():
        return text[:start]
    return text


def lex(source, at, close):
    """(tokens, match of the end or None) of a tag that begins before `at`."""
    tokens, depth = [], 0
    while at < len(source):
        if not depth and (end := close.match(source, at)):
            return tokens, end
        match = TOKEN.match(source, at)
        if not match:                                   # no Jinja that is known; the tag is refused if executed
            tokens.append(("bad", source[at]))
            end = close.search(source, at)
            return tokens, end
        kind, text, at = match.lastgroup, match[0], match.end()
        if kind == "operator":
            depth += (text in "([{") - (text in ")]}")
        if kind == "string":
            text = text[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape") if "\\" in text \
                else text[1:-1]
        if kind != "space":
            tokens.append((kind, text))
    return tokens, None


# ---- blocks ------------------------------------------------------------------------------------------------

def run(body, scope, out):
    for cost, node in body:
        scope.count(cost)
        node(scope, out)


def emit(scope, out, value):
    if isinstance(value, (list, tuple, dict)) or callable(value):
        refuse(f"the printing of a {type(value).__name__}")
    text = value if isinstance(value, str) else "" if value is UNDEFINED else str(value)
    scope.budget[1] -= len(text)
    if scope.budget[1] < 0:
        raise ValueError(f"it writes more than {MOST_WRITTEN:,} characters")
    out.append(text)


class Blocks:
    """The pieces of a template as nested lists of (cost, function(scope, out))."""

    def __init__(self, items):
        self.items, self.at = items, 0

    def body(self, ends):
        """Nodes up to a tag whose name is in `ends`, which is then `self.tag`."""
        nodes = []
        while self.at < len(self.items):
            kind, value = self.items[self.at]
            self.at += 1
            if kind == "text":
                if value:
                    nodes.append((1, lambda scope, out, text=value: emit(scope, out, text)))
                continue
            cost = 1 + len(value) // 4
            if kind == "{":
                f = expression(value)
                nodes.append((cost, lambda scope, out, f=f: emit(scope, out, f(scope))))
                continue
            self.tag = value
            name = value[0][1] if value and value[0][0] == "name" else ""
            if name in ends:
                return nodes
            if name in ("elif", "else", "endif", "endfor", "endmacro", "endset", "endgeneration"):
                raise ValueError(f"the tag {name} stands where no block is open for it")
            make = getattr(self, "make_" + name, None)
            nodes.append((cost, make(value[1:]) if make else later(f"the tag {name or value[:1]}")))
        if ends:
            raise ValueError(f"a block has no {ends[-1]}")
        return nodes

    def make_if(self, tokens):
        branches = [(expression(tokens), self.body(("elif", "else", "endif")))]
        while (name := self.tag[0][1]) != "endif":
            if name == "elif":
                branches.append((expression(self.tag[1:]), self.body(("elif", "else", "endif"))))
            else:
                branches.append((lambda scope: True, self.body(("endif",))))

        def node(scope, out):
            for condition, body in branches:
                if truth(condition(scope)):
                    return run(body, scope, out)
        return node

    def make_for(self, tokens):
        names, rest = [], tokens
        for i, token in enumerate(tokens):
            if token == ("name", "in"):
                names, rest = [text for kind, text in tokens[:i] if kind == "name"], tokens[i + 1:]
                break
        parser = Expressions(rest)
        try:
            items = parser.binary_or()
            keep = parser.condition() if parser.take("if") else None
            parser.end()
            if not names:
                raise ValueError
        except ValueError:
            items, keep = later("this form of for"), None
        body, otherwise = self.body(("else", "endfor")), []
        if self.tag[0][1] == "else":
            otherwise = self.body(("endfor",))

        def node(scope, out):
            rounds = []
            for value in iterable(items(scope)):
                scope.count(1)
                inner = Scope(unpack(names, value), scope)
                if keep is None or truth(keep(inner)):
                    rounds.append((value, inner))
            for i, (_, inner) in enumerate(rounds):
                inner.variables["loop"] = {
                    "index": i + 1, "index0": i, "first": i == 0, "last": i == len(rounds) - 1,
                    "length": len(rounds), "revindex": len(rounds) - i, "revindex0": len(rounds) - i - 1,
                    "previtem": rounds[i - 1][0] if i else UNDEFINED,
                    "nextitem": rounds[i + 1][0] if i + 1 < len(rounds) else UNDEFINED}
                try:
                    run(body, inner, out)
                except Continue:
                    pass
                except Break:
                    break
            if not rounds:
                run(otherwise, scope, out)
        return node

    def make_set(self, tokens):
        target = tokens
        if ("operator", "=") in tokens:
            cut = tokens.index(("operator", "="))
            target, value = tokens[:cut], expression(tokens[cut + 1:])
        else:
            body = self.body(("endset",))

            def value(scope):
                out = []
                run(body, Scope({}, scope), out)
                return joined(scope, out)
        names = [text for kind, text in target if kind == "name"]
        shape = [text if kind == "operator" else kind for kind, text in target]
        if shape == ["name", ".", "name"]:
            def node(scope, out):
                space = scope.get(names[0])
                if not isinstance(space, Namespace):
                    refuse(f"a set of {names[0]}.{names[1]}, which is no namespace")
                space[names[1]] = value(scope)
            return node
        if shape != ["name"]:
            return later("this form of set")
        return lambda scope, out: scope.variables.update({names[0]: value(scope)})

    def make_macro(self, tokens):
        body = self.body(("endmacro",))
        try:
            parser = Expressions(tokens)
            name, parameters = parser.name(), parser.parameters()
        except ValueError:
            return later("this form of macro")

        def node(scope, out):
            def macro(*args, **more):
                given = dict(zip([key for key, _ in parameters], args))
                given = {key: default(scope) for key, default in parameters} | given | more
                written = []
                run(body, Scope(given, scope), written)
                return joined(scope, written)
            scope.variables[name] = macro
        return node

    def make_generation(self, tokens):
        body = self.body(("endgeneration",))
        return lambda scope, out: run(body, Scope({}, scope), out)

    def make_break(self, tokens):
        return lambda scope, out: raise_(Break())

    def make_continue(self, tokens):
        return lambda scope, out: raise_(Continue())


def raise_(error):
    raise error


def later(what):
    """A function that refuses `what` when it is called."""
    return lambda *_: refuse(what)


def unpack(names, value):
    if len(names) == 1:
        return {names[0]: value}
    return dict(zip(names, iterable(value), strict=True))


def joined(scope, parts):
    text = scope.bounded("".join(parts))
    return Said(text) if any(isinstance(part, Said) for part in parts) else text


# ---- expressions -------------------------------------------------------------------------------------------

def expression(tokens):
    """A function of the scope. One that cannot be read refuses itself when it is called."""
    parser = Expressions(tokens)
    try:
        f = parser.condition()
        parser.end()
        return f
    except ValueError:
        return later("the expression " + repr(" ".join(text for _, text in tokens))[:80])


class Expressions:
    """Recursive descent over tokens, in Jinja's order of precedence. ValueError: not read."""

    def __init__(self, tokens):
        self.tokens, self.at = tokens, 0

    def peek(self):
        return self.tokens[self.at] if self.at < len(self.tokens) else ("end", "")

    def take(self, *texts):
        """The next token's text if it is one of these operators or words, else None."""
        kind, text = self.peek()
        if kind in ("operator", "name") and text in texts:
            self.at += 1
            return text
        return None

    def need(self, text):
        if not self.take(text):
            raise ValueError(text)

    def name(self):
        kind, text = self.peek()
        if kind != "name":
            raise ValueError(text)
        self.at += 1
        return text

    def end(self):
        if self.at < len(self.tokens):
            raise ValueError(self.peek())

    def condition(self):
        value = self.binary_or()
        while self.take("if"):
            test = self.binary_or()
            other = self.condition() if self.take("else") else lambda scope: UNDEFINED
            value = (lambda value, test, other:
                     lambda scope: value(scope) if truth(test(scope)) else other(scope))(value, test, other)
        return value

    def binary_or(self):
        left = self.binary_and()
        while self.take("or"):
            left = either(left, self.binary_and(), True)
        return left

    def binary_and(self):
        left = self.negation()
        while self.take("and"):
            left = either(left, self.negation(), False)
        return left

    def negation(self):
        if self.take("not"):
            value = self.negation()
            return lambda scope: not truth(value(scope))
        return self.comparison()

    def comparison(self):
        first, rest = self.sum(), []
        while True:
            operator = self.take(*COMPARISONS)
            if not operator and self.peek() == ("name", "not") and self.tokens[self.at + 1:][:1] == [("name", "in")]:
                self.at += 2
                operator = "not in"
            if not operator:
                break
            rest.append((operator, self.sum()))
        if not rest:
            return first

        def f(scope):
            left = first(scope)
            for operator, part in rest:
                right = part(scope)
                if not compare(operator, left, right):
                    return False
                left = right
            return True
        return f

    def sum(self):
        left = self.concatenation()
        while operator := self.take("+", "-"):
            left = calculation(operator, left, self.concatenation())
        return left

    def concatenation(self):
        left = self.product()
        while self.take("~"):
            left = calculation("~", left, self.product())
        return left

    def product(self):
        left = self.unary()
        while operator := self.take("*", "/", "//", "%"):
            left = calculation(operator, left, self.unary())
        return left

    def unary(self, filters=True):
        if operator := self.take("-", "+"):
            value = self.unary(False)
            f = (lambda scope: -value(scope)) if operator == "-" else value
        else:
            f = self.primary()
        f = self.postfix(f)
        return self.filters(f) if filters else f

    def primary(self):
        kind, text = self.peek()
        self.at += 1
        if kind == "name":
            constants = {"true": True, "false": False, "none": None}
            if text.lower() in constants and text in (text.lower(), text.capitalize()):
                return constant(constants[text.lower()])
            return lambda scope: scope.get(text)
        if kind == "number":
            if len(text) > 18:
                raise ValueError(text)
            return constant(float(text) if "." in text else int(text))
        if kind == "string":
            while self.peek()[0] == "string":
                text += self.peek()[1]
                self.at += 1
            return constant(text)
        if text == "(":
            parts, is_tuple = self.sequence(")")
            return parts[0] if not is_tuple else lambda scope: tuple(part(scope) for part in parts)
        if text == "[":
            parts, _ = self.sequence("]")
            return lambda scope: [part(scope) for part in parts]
        if text == "{":
            pairs = []
            while not self.take("}"):
                key = self.condition()
                self.need(":")
                pairs.append((key, self.condition()))
                if not self.take(","):
                    self.need("}")
                    break
            return lambda scope: {key(scope): value(scope) for key, value in pairs}
        raise ValueError(text)

    def sequence(self, close):
        """(parts, whether a comma or nothing was there) up to a closing bracket."""
        parts, comma = [], False
        while not self.take(close):
            parts.append(self.condition())
            if self.take(","):
                comma = True
            else:
                self.need(close)
                break
        return parts, comma or not parts

    def postfix(self, f):
        while operator := self.take(".", "[", "("):
            if operator == ".":
                kind, text = self.peek()
                self.at += 1
                if kind not in ("name", "number"):
                    raise ValueError(text)
                f = attribute(f, text) if kind == "name" else subscript(f, constant(int(text)))
            elif operator == "[":
                f = self.index(f)
            else:
                f = call(f, *self.arguments())
        return f

    def index(self, f):
        bounds = []
        while True:
            stop = self.peek()[1] in (":", "]") and self.peek()[0] == "operator"
            bounds.append(constant(None) if stop else self.condition())
            if not self.take(":"):
                break
        self.need("]")
        if len(bounds) == 1:
            return subscript(f, bounds[0])

        def cut(scope):
            value = f(scope)
            if isinstance(value, Said):
                looks_into("a slice")
            return value[slice(*(bound(scope) for bound in bounds))]
        return cut

    def arguments(self):
        """Functions of the scope: positional ones and named ones, up to the closing bracket."""
        args, named = [], {}
        while not self.take(")"):
            kind, text = self.peek()
            if kind == "name" and self.tokens[self.at + 1:][:1] == [("operator", "=")]:
                self.at += 2
                named[text] = self.condition()
            else:
                args.append(self.condition())
            if not self.take(","):
                self.need(")")
                break
        return args, named

    def parameters(self):
        """[(name, default)] of a macro."""
        found = []
        self.need("(")
        while not self.take(")"):
            name = self.name()
            found.append((name, self.condition() if self.take("=") else constant(UNDEFINED)))
            if not self.take(","):
                self.need(")")
                break
        return found

    def filters(self, f):
        while True:
            if self.take("|"):
                name = self.name()
                args, named = self.arguments() if self.take("(") else ([], {})
                f = filtered(name, f, args, named)
            elif self.take("is"):
                negated, name, args = self.take("not"), self.name(), []
                if self.take("("):
                    args, _ = self.arguments()
                elif self.peek()[0] in ("string", "number") or self.peek()[0] == "name" and self.peek()[1] not in (
                        "else", "or", "and", "is", "if", "in", "not"):
                    args = [self.postfix(self.primary())]
                f = tested(name, f, args, bool(negated))
            elif self.take("("):
                f = call(f, *self.arguments())
            else:
                return f


def constant(value):
    return lambda scope: value


def either(left, right, wanted):
    def f(scope):
        value = left(scope)
        return value if truth(value) == wanted else right(scope)
    return f


def truth(value):
    return bool(value)


def is_text(value):
    return isinstance(value, str)


def is_flat(value):
    return not isinstance(value, (list, tuple, dict)) or not any(
        isinstance(part, (list, tuple, dict)) for part in (value.values() if isinstance(value, dict) else value))


def compare(sign, left, right):
    if sign in ("in", "not in"):
        if right is UNDEFINED:
            return sign == "not in"
        if isinstance(left, Said) or isinstance(right, Said):
            looks_into("in")
        if not is_flat(left) or isinstance(left, (list, tuple, dict)):
            refuse("in for lists")
        return (left in right) == (sign == "in")
    if isinstance(left, Said) or isinstance(right, Said):
        other = right if isinstance(left, Said) else left
        if sign not in ("==", "!=") or is_text(other) and other != "":
            looks_into(sign)
    if not (is_flat(left) and is_flat(right)):
        refuse("a comparison of nested lists")
    if sign in ("==", "!="):
        return (left == right) == (sign == "==")
    return {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}[sign](left, right)


def iterable(value):
    if value is UNDEFINED:
        return ()
    if isinstance(value, Said):
        looks_into("for")
    if not isinstance(value, (str, list, tuple, dict, range)):
        refuse(f"a loop over {type(value).__name__}")
    return value


def calculation(operator, left, right):
    def f(scope):
        a, b = left(scope), right(scope)
        if operator == "~":
            a, b = text_of(a), text_of(b)
        if operator in "+~" and is_text(a) and is_text(b):
            return joined(scope, (a, b))
        if isinstance(a, str) or isinstance(b, str) or UNDEFINED in (a, b) or not is_flat([a, b]) and operator != "+":
            refuse(f"{operator} of {type(a).__name__} and {type(b).__name__}")
        if operator == "+":
            return scope.bounded(a + b)
        return scope.bounded({"-": lambda: a - b, "*": lambda: a * b, "/": lambda: a / b, "//": lambda: a // b,
                              "%": lambda: a % b}[operator]())
    return f


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


def attribute(f, name):
    def g(scope):
        value = f(scope)
        methods = TEXT_METHODS if is_text(value) else DICT_METHODS if isinstance(value, dict) else {}
        if name in methods and not isinstance(value, Namespace):
            return lambda *args, **more: methods[name](scope, value, *args, **more)
        if isinstance(value, (str, dict, list, tuple)) and hasattr(value, name) and not isinstance(value, Namespace):
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
    parts, between = [text_of(part if attribute is None else part_of(part, attribute)) for part in iterable(value)], \
        text_of(between)
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
    return compare("==", left, right)


STRIPS = {name: strip(name) for name in ("strip", "lstrip", "rstrip")}
TEXT_METHODS = STRIPS | {"replace": replace, "join": lambda scope, value, parts: join(scope, parts, value)} | {
    name: of_text(name) for name in ("split", "rsplit", "splitlines", "startswith", "endswith", "find", "count",
                                     "upper", "lower", "title", "capitalize", "isdigit", "isspace")}
DICT_METHODS = {"items": items, "keys": lambda scope, value: list(value),
                "values": lambda scope, value: list(value.values()),
                "get": lambda scope, value, key, other=None: value.get(key, other)}
FUNCTIONS = {"raise_exception": error, "range": numbers, "dict": lambda scope, **more: more,
             "namespace": lambda scope, *args, **more: Namespace(*args, **more)}
FILTERS = {
    "trim": STRIPS["strip"], "replace": replace, "join": join, "tojson": tojson, "default": default, "d": default,
    "length": length, "count": length, "items": items, "map": attributes, "selectattr": select(True),
    "rejectattr": select(False), "list": lambda scope, value: list(iterable(value)),
    "first": lambda scope, value: next(iter(iterable(value)), UNDEFINED),
    "last": lambda scope, value: next(iter(list(iterable(value))[-1:]), UNDEFINED),
    "reverse": lambda scope, value: value[::-1] if is_text(value) else list(iterable(value))[::-1],
    "string": lambda scope, value: text_of(value), "safe": lambda scope, value: value,
    "int": lambda scope, value, other=0: int(value) if isinstance(value, (int, float)) else refuse("int of a text")
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
    "in": lambda value, other: compare("in", value, other),
    "ne": lambda value, other: not equals(value, other), "!=": lambda value, other: not equals(value, other),
} | dict.fromkeys(("eq", "equalto", "=="), equals)
