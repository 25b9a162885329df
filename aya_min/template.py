"""Chat templates rendered without Jinja: `Template(source).render(variables)`; see template_expressions.py.

White space is trimmed as in transformers (trim_blocks, lstrip_blocks). Of Jinja only what templates in
Cohere's format need is known here. The rest is refused when it is executed, not when it is read, because a
branch for tools does not matter to a conversation without them. Steps and sizes are bounded, so that a
foreign template can neither hang nor fill memory.
"""

import re
from types import SimpleNamespace

from .template_expressions import (GLOBALS, LONGEST, Loop, applied, constant, expression, later, printed,
                                   refuse)

MOST_STEPS = 200_000            # for all renderings of a template together
OPEN = re.compile(r"\{([{%#])(-?)")
CLOSE = {"%": re.compile(r"-%\}\s*|%\}\n?"), "{": re.compile(r"-\}\}\s*|\}\}"),
         "#": re.compile(r"-#\}\s*|#\}\n?")}
UNUSUAL = re.compile(r"\{[{%#]\+|\+[%#]\}|\{%-?\s*raw\b")
TOKEN = re.compile(r"""(?P<space>\s+)|(?P<number>[0-9]+)|(?P<name>[A-Za-z_][A-Za-z_0-9]*)
    |(?P<string>'[^'\\]*(?:\\.[^'\\]*)*'|"[^"\\]*(?:\\.[^"\\]*)*")
    |(?P<operator>==|!=|<=|>=|//|\*\*|[-+*/%~<>=.:|,()\[\]{}])""", re.X | re.S)


def pieces(source):
    """Yields a template's ("text", str), ("{", tokens) and ("%", tokens), white space trimmed as in Jinja."""
    source = re.sub(r"\r\n?", "\n", source).removesuffix("\n")
    at, line_start = 0, True
    while match := OPEN.search(source, at):
        text, (kind, sign) = source[at:match.start()], match.groups()
        start = text.rfind("\n") + 1
        if sign:
            text = text.rstrip()
        elif kind != "{" and (start or line_start) and text[start:].isspace():
            text = text[:start]                 # the tag's indentation is trimmed
        yield "text", text
        tokens, end = lex(source, match.end(), kind)
        if not end:
            raise ValueError(f"{match[0]} has no end")
        if kind != "#":
            yield kind, tokens
        at, line_start = end.end(), end[0].endswith("\n")
    yield "text", source[at:]


def lex(source, at, kind):
    """(tokens, match of the end or None) of a tag or comment that begins before `at`."""
    tokens, depth, close = [], 0, CLOSE[kind]
    while at < len(source) and kind != "#":
        if not depth and (end := close.match(source, at)):
            return tokens, end
        match = TOKEN.match(source, at)
        # An unknown character is refused only if its tag is executed.
        if not match:
            tokens.append(("bad", source[at]))
            break
        kind, text, at = match.lastgroup, match[0], match.end()
        if kind == "operator":
            depth += (text in "([{") - (text in ")]}")
        if kind == "string":
            text = text[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")
        if kind != "space":
            tokens.append((kind, text))
    return tokens, close.search(source, at)


class Template:
    """A chat template that was parsed.

    A body is a list of (steps, node). A node is a function of the scope that writes text; it returns "break"
    or "continue" if the loop around it should do so.
    """

    def __init__(self, source):
        if len(source) > LONGEST:
            raise ValueError(f"it has {len(source):,} characters, more than {LONGEST:,}")
        if unusual := UNUSUAL.search(source):
            refuse(unusual[0])
        self.pieces, self.steps_left = pieces(source), MOST_STEPS
        try:
            self.body = self.block()
        except RecursionError:
            raise ValueError("its blocks are nested too deeply") from None

    def render(self, variables):
        """The text for these variables, {name: value}. ValueError if the template cannot be followed."""
        self.written = []
        try:
            self.execute(self.body, {**GLOBALS, **variables})
        except (RecursionError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"it fails ({type(error).__name__}: {str(error)[:100]})") from None
        return "".join(self.written)

    def execute(self, body, scope):
        """Run the nodes of a body until one returns a signal ("break", "continue"), and return that."""
        for steps, node in body:
            self.count(steps)
            if signal := node(scope):
                return signal

    def count(self, steps):
        """Count steps. ValueError after too many."""
        self.steps_left -= steps
        if self.steps_left < 0:
            raise ValueError(f"it takes more than {MOST_STEPS:,} steps")

    def write(self, value):
        text = printed(value)
        self.count(len(text) // 16)
        self.written.append(text)

    def block(self, *ends):
        """The body up to a tag whose name is in `ends`; this tag is then `self.tag`."""
        body = []
        for kind, value in self.pieces:
            name = value[0][1] if kind == "%" and value and value[0][0] == "name" else ""
            if name in ends:
                self.tag = value
                return body
            if kind != "%":
                node = applied(self.write, constant(value) if kind == "text" else expression(value))
            elif name in ("break", "continue"):
                node = constant(name)
            else:
                make = getattr(self, "make_" + name, None)
                node = make(value[1:]) if make else later(f"the tag {name or value[:1]}")
            body.append((1 + len(value) // 4, node))
        if ends:
            raise ValueError(f"a block has no {ends[-1]}")
        return body

    def make_if(self, tokens):
        branches = [(expression(tokens), self.block("elif", "else", "endif"))]
        while self.tag[0][1] == "elif":
            branches.append((expression(self.tag[1:]), self.block("elif", "else", "endif")))
        if self.tag[0][1] == "else":
            branches.append((constant(True), self.block("endif")))
        return lambda scope: self.execute(next((body for test, body in branches if test(scope)), []), scope)

    def make_for(self, tokens):
        rounds, body = expression(tokens, "[0 for {}]"), self.block("else", "endfor")
        otherwise = self.block("endfor") if self.tag[0][1] == "else" else []

        def node(scope):
            scopes = rounds(scope)
            num = len(scopes)
            self.count(num * len(scope) // 8)
            for i, inner in enumerate(scopes):
                inner["loop"] = Loop(index=i + 1, index0=i, first=i == 0, last=i == num - 1, length=num)
                if self.execute(body, inner) == "break":
                    break
            return None if scopes else self.execute(otherwise, dict(scope))
        return node

    def make_set(self, tokens):
        match tokens:
            case [("name", name), ("operator", "="), *rest]:
                space, value = None, expression(rest)
            case [("name", space), ("operator", "."), ("name", name), ("operator", "="), *rest]:
                value = expression(rest)
            case _:
                return later("this form of set")

        def node(scope):
            if space and type(scope.get(space)) is not SimpleNamespace:
                refuse(f"a set of {space}.{name}, which is no namespace")
            (vars(scope[space]) if space else scope)[name] = value(scope)
        return node

    def make_macro(self, tokens):
        self.block("endmacro")
        name = tokens[0][1] if tokens else ""
        return lambda scope: scope.__setitem__(name, later(f"the macro {name}"))

    def make_generation(self, tokens):
        body = self.block("endgeneration")
        return lambda scope: self.execute(body, dict(scope))
