"""Chat templates rendered without Jinja: `Template(source).render(variables)`; see also expressions.py.

Settings are those of transformers (trim_blocks, lstrip_blocks, `generation` blocks, break and continue). What
is not known here is refused when it is executed, not when it is read: a branch for tools does not matter to a
plain conversation. Sizes and steps are bounded: a foreign template can neither hang nor fill memory.
"""

import ast
import re

from .expressions import (LONGEST, MOST_WRITTEN, TOKEN, UNDEFINED, Namespace, Scope, built, expression,
                          iterable, joined, later, new_budget, parsed, refuse)

OPEN = re.compile(r"\{(?:%([-+]?)\s*raw\s*(-?)%\}|([{%#])([-+]?))")
CLOSE = {"%": re.compile(r"\+%\}|-%\}\s*|%\}\n?"), "{": re.compile(r"-\}\}\s*|\}\}"),
         "#": re.compile(r"\+#\}|-#\}\s*|#\}\n?")}
ENDRAW = re.compile(r"\{%([-+]?)\s*endraw\s*(?:\+%\}|-%\}\s*|%\}\n?)")


class Break(Exception):
    pass


class Continue(Exception):
    pass


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
        if not match:                                   # not known here; refused if it is executed
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
                if condition(scope):
                    return run(body, scope, out)
        return node

    def make_for(self, tokens):
        cut = tokens.index(("name", "in")) if ("name", "in") in tokens else len(tokens)
        names, rest = [text for kind, text in tokens[:cut] if kind == "name"], tokens[cut + 1:]
        depth, keep = 0, None
        for i, (kind, text) in enumerate(rest):
            depth += (text in ("(", "[", "{")) - (text in (")", "]", "}")) if kind == "operator" else 0
            if not depth and (kind, text) == ("name", "if"):
                rest, keep = rest[:i], expression(rest[i + 1:])
                break
        items = expression(rest) if names and rest else later("this form of for")
        body, otherwise = self.body(("else", "endfor")), []
        if self.tag[0][1] == "else":
            otherwise = self.body(("endfor",))

        def node(scope, out):
            rounds = []
            for value in iterable(items(scope)):
                scope.count(1)
                inner = Scope(unpack(names, value), scope)
                if keep is None or keep(inner):
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
            head = parsed(tokens)                       # name(a, b="x")
            name = head.func.id.removeprefix("j_")
            parameters = [(arg.id, ast.Constant(...)) for arg in head.args]
            parameters += [(arg.arg, arg.value) for arg in head.keywords]
            parameters = [(key.removeprefix("j_"), built(value)) for key, value in parameters]
        except (SyntaxError, AttributeError, ValueError):
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


def unpack(names, value):
    if len(names) == 1:
        return {names[0]: value}
    return dict(zip(names, iterable(value), strict=True))


