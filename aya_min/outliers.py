"""Why a model quantizes well or badly, by layer: the diagnostics of "Intriguing Properties of Quantization at
Scale" (arXiv 2305.19268).

- What each projection reads: its standard deviation and largest magnitude. So for the residual stream.
- Outlier dimensions, after LLM.int8() (arXiv 2208.07339, section 4), which the paper follows: dimensions of
  the hidden size that, in what attention or the MLP reads, are above MAGNITUDE in at least LAYERS of the
  layers, and for at least TOKENS of the tokens over all layers. The paper finds that their number alone says
  little.
- Gains of the norms: mean, standard deviation, largest magnitude. Spectral norms of the projections.
- The error of quantized products against those of fp32, root mean square, in the outputs' units and as a
  share of their own root mean square: INT8 (a scale for each token and for each output) and INT4 (weights
  only, a scale for each output).

    python -m aya_min.evaluate outliers --model DIR --data F.jsonl [--out F.json] [--page F.html]

All tokens of the texts count, the prompts' too, padding not; everything is computed in fp32.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from .command import Parser, is_spare_rank, printable
from .config import Reading, add_flags, settings_from
from .data import batches_in_order, collate, load_examples
from .distributed import blame
from .files import check_out, dumps, write_new
from .quantization import SCHEMES, dequantize, round_to_nearest
from .report_charts import curves, esc, grid, html_page, html_table, number, section, short
from .weights import ONE, EncoderDecoder, load, read_config

MAGNITUDE, LAYERS, TOKENS = 6.0, 0.25, 0.06
# What reads the hidden states, and so shows their outlier dimensions.
READERS = ("self_attn.q_proj", "mlp.gate_proj")
ROUNDS = 500            # of the power iteration, at most


def rounded(matrix, scheme):
    """A matrix (N, K) to the nearest codes of a scheme, and back: a scale for each row."""
    return dequantize(*round_to_nearest(matrix, SCHEMES[scheme]), SCHEMES[scheme])


def quantized_products(x, weight):
    """{"int8", "int4": x W^T as it is quantized}. x (N, K), weight (M, K) -> (N, M) each."""
    return {"int8": F.linear(rounded(x, "w8"), rounded(weight, "w8")),
            "int4": F.linear(x, rounded(weight, "w4"))}


def spectral_norm(weight, generator):
    """The largest singular value of a matrix (M, K), by power iteration on W^T W, until a round
    changes it by less than 1e-6 of itself."""
    x = torch.randn(weight.shape[1], generator=generator).to(weight.device)
    norm = before = 0.0
    for _ in range(ROUNDS):
        x = weight.T @ (weight @ (x / x.norm()))
        norm = x.norm().sqrt().item()
        if norm == 0 or abs(norm - before) < 1e-6 * norm:
            break
        before = norm
    return norm


class Seen:
    """Sums over the tokens that one module has read, and over the errors of its products."""

    def __init__(self):
        self.count = self.sum = self.squares = self.largest = 0.0
        self.tokens, self.above, self.most = 0, 0, 0
        self.outputs, self.output_squares, self.errors = 0, 0.0, {}

    def read(self, x):
        """x (N, K): tokens that are no padding."""
        wide, size = x.double(), x.abs()
        self.count += x.numel()
        self.sum += wide.sum().item()
        self.squares += wide.square().sum().item()
        self.largest = max(size.max().item(), self.largest)         # in this order a NaN stays
        self.tokens += len(x)
        self.above = self.above + (size > MAGNITUDE).sum(0)                 # (K,) tokens
        self.most = torch.maximum(size.amax(0), torch.as_tensor(self.most, device=x.device))        # (K,)

    def multiply(self, x, weight):
        y = F.linear(x, weight)
        self.outputs += y.numel()
        self.output_squares += y.double().square().sum().item()
        for name, other in quantized_products(x, weight).items():
            error = (other - y).double().square().sum().item()
            self.errors[name] = self.errors.get(name, 0.0) + error

    def figures(self):
        """{"std", "largest"} of what was read, and {"int8": {"rmse", "relative"}, ...} of products."""
        mean = self.sum / self.count
        found = {"std": max(0.0, self.squares / self.count - mean ** 2) ** 0.5, "largest": self.largest}
        for name, error in self.errors.items():
            relative = (error / self.output_squares) ** 0.5 if self.output_squares else None
            found[name] = {"rmse": (error / self.outputs) ** 0.5, "relative": relative}
        return found


@torch.no_grad()
def look(model, batches, device):
    """{(layer, name): Seen} of every projection and of "residual", what the layer itself reads."""
    seen, handles = {}, []

    def before(key, module, inputs):
        x = inputs[0].flatten(0, -2)
        one = seen.setdefault(key, Seen())
        one.read(x)
        if isinstance(module, nn.Linear):
            one.multiply(x, module.weight)
    for i, block in enumerate(model.model.layers):
        handles.append(block.register_forward_pre_hook(partial(before, (i, "residual"))))
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                handles.append(module.register_forward_pre_hook(partial(before, (i, name))))
    try:
        # A line has no padding, and without repeats each text has all its tokens.
        model.eval().model.packing = True
        for _, batch in batches:
            batch = batch.to(device)
            model.model(batch.input_ids, batch.lengths)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def gains(norm):
    """{"mean", "std", "largest"} of what a norm multiplies by."""
    gain = norm.weight.detach().float() + getattr(norm, "plus", 0)
    return {"mean": gain.mean().item(), "std": gain.std(correction=0).item(),
            "largest": gain.abs().max().item()}


def outlier_dimensions(above, most, tokens):
    """[{"dimension", "layers", "tokens", "largest"}, ...] of the outlier dimensions: the share of layers and
    of the tokens of all layers, and the largest magnitude.

    above (L, h): tokens above MAGNITUDE; most (L, h): the largest magnitudes; tokens: of each layer.
    """
    layers = (above > 0).double().mean(0)                                   # (h,)
    share = above.double().mean(0) / tokens
    found = ((layers >= LAYERS) & (share >= TOKENS)).nonzero()[:, 0].tolist()
    return [{"dimension": d, "layers": layers[d].item(), "tokens": share[d].item(),
             "largest": most[:, d].max().item()} for d in found]


def figures_of(model, batches, device):
    """The figures of a model, as the JSON file has them."""
    seen, generator = look(model, batches, device), torch.Generator().manual_seed(0)
    rows, above, most = [], [], []
    for i, block in enumerate(model.model.layers):
        names = [name for layer, name in seen if layer == i and name != "residual"]
        readers = [seen[i, name] for name in READERS]
        above.append(torch.maximum(*(one.above for one in readers)))
        most.append(torch.maximum(*(one.most for one in readers)))
        rows.append({
            "layer": i, "residual": seen[i, "residual"].figures(),
            "dimensions_above": int((above[-1] > 0).sum()),
            "norms": {name: gains(module) for name, module in block.named_modules() if name.endswith("norm")},
            "projections": {name: seen[i, name].figures()
                            | {"spectral_norm": spectral_norm(block.get_submodule(name).weight, generator)}
                            for name in names}})
        if not math.isfinite(rows[-1]["residual"]["largest"]):
            raise ValueError(f"what layer {i} reads is not finite; look at the weights{blame(model)}")
    tokens = seen[0, "residual"].tokens
    return {"tokens": tokens, "final_norm": gains(model.model.norm), "layers": rows,
            "outlier_dimensions": outlier_dimensions(torch.stack(above), torch.stack(most), tokens)}


# ---- as text and as a page ---------------------------------------------------------------------------------

def told(found):
    """A sentence on the outlier dimensions."""
    rule = f"dimensions above {MAGNITUDE:g} in {LAYERS:.0%} of the layers and for {TOKENS:.0%} of the tokens"
    names = ", ".join(str(each["dimension"]) for each in found["outlier_dimensions"][:20]) or "none"
    return f"{len(found['outlier_dimensions'])} outlier dimensions ({rule}): {names}"


COLUMNS = ("input std", "largest", "spectral norm", "INT8 error %", "INT4 error %")


def cells(figures):
    """The texts of COLUMNS of one projection."""
    errors = [figures[name]["relative"] for name in ("int8", "int4")]
    return [short(figures["std"]), short(figures["largest"]), short(figures["spectral_norm"]),
            *("-" if error is None else short(100 * error) for error in errors)]


def table(path, found):
    """The terminal's table: a line for each projection, one for each norm."""
    lines = [f"{path}: {found['tokens']:,} tokens; {told(found)}",
             f"{'layer':6}{'':32}" + "".join(f"{name:>15}" for name in COLUMNS)]
    norms = [("final", "norm", found["final_norm"])]
    for row in found["layers"]:
        lines += [f"{row['layer']:<6}{name:32}" + "".join(f"{cell:>15}" for cell in cells(figures))
                  for name, figures in row["projections"].items()]
        norms += [(row["layer"], name, figures) for name, figures in row["norms"].items()]
    lines.append(f"{'layer':6}{'':32}" + "".join(f"{name:>15}" for name in ("gain mean", "std", "largest")))
    lines += [f"{layer!s:6}{name:32}" + "".join(f"{short(value):>15}" for value in figures.values())
              for layer, name, figures in norms]
    return printable("\n".join(lines))


def page(title, found):
    """The same as a page: curves over the layers, then the tables."""
    rows = found["layers"]

    def over_layers(value):
        return [(row["layer"], value(row)) for row in rows]

    def charts(figure):
        return grid([curves(name, [(name, over_layers(lambda row: figure(row["projections"][name])), "a")])
                     for name in rows[0]["projections"]], "curves")

    residual = [curves(f"residual stream, {key}", [(key, over_layers(lambda row: row["residual"][key]), "a")])
                for key in ("std", "largest")]
    norms = [curves(f"{norm}, {key}", [(norm, over_layers(lambda row: row["norms"][norm][key]), "a")])
             for norm in rows[0]["norms"] for key in ("mean", "std", "largest")]
    body = section("What the layers read", "The standard deviation and the largest magnitude of the residual "
                   "stream, then the standard deviation of each projection's input, by layer.",
                   grid(residual, "curves") + charts(lambda figures: figures["std"]))
    for key, name in (("int8", "INT8: a scale for each token and each output"),
                      ("int4", "INT4: weights only, a scale for each output")):
        body += section(f"Error of quantized products, {key.upper()}", f"{name}. In percent of the outputs' "
                        "root mean square, by layer.",
                        charts(lambda figures: 100 * (figures[key]["relative"] or 0)))
    body += section("Spectral norms", "The largest singular value of each projection, by layer.",
                    charts(lambda figures: figures["spectral_norm"]))
    body += section("Gains of the norms", "What each norm multiplies by, over its dimensions, by layer.",
                    grid(norms, "curves"))
    dims = "".join(f'<tr><th scope="row" class="name">{each["dimension"]}</th>'
                   f'<td>{number(100 * each["layers"], 0)}</td><td>{number(100 * each["tokens"])}</td>'
                   f'<td>{number(each["largest"])}</td></tr>' for each in found["outlier_dimensions"])
    head = '<tr><th class="name">dimension</th><th>layers %</th><th>tokens %</th><th>largest</th></tr>'
    body += section("Outlier dimensions", told(found), html_table(head, dims) if dims else "<p>None.</p>")
    full = "".join(f'<tr><th scope="row" class="name">{row["layer"]} {esc(name)}</th>'
                   + "".join(f"<td>{cell}</td>" for cell in cells(figures)) + "</tr>"
                   for row in rows for name, figures in row["projections"].items())
    head = '<tr><th class="name">projection</th>' + "".join(f"<th>{name}</th>" for name in COLUMNS) + "</tr>"
    body += section("Every projection", f"{found['tokens']:,} tokens.", html_table(head, full))
    return html_page(title, body)


def main(argv):
    parser = Parser(prog="aya_min.evaluate outliers", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--data", required=True, nargs="+", help="JSONL files of texts or conversations")
    parser.add_argument("--out", help="JSON file to write the figures to; must not exist")
    parser.add_argument("--page", help="HTML file to draw them in; must not exist")
    add_flags(parser, Reading)
    args = parser.parse_args(argv)
    if is_spare_rank():
        return
    check_out(*filter(None, (args.out, args.page)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (kind := read_config(args.model)[1]) is EncoderDecoder:
        raise ValueError(f"--model {args.model}: {ONE[kind]}, and outliers measures decoders; give "
                         "a language model of a decoder alone")
    model, tokenizer = load(args.model, device)
    if model.config.mixture:
        raise ValueError(f"--model {args.model}: a mixture of experts, and outliers measures dense models; "
                         "give one of the models that it is made of")
    if hasattr(model.config, "sidenet_layer"):
        raise ValueError(f"--model {args.model}: a SideNet, which has only the first layers of a model; give "
                         "its MainNet")
    limit = model.config.max_position_embeddings
    examples = load_examples(args.data, tokenizer, limit, settings_from(Reading, flags=vars(args)))
    batches = batches_in_order(examples, lambda some: collate(some, tokenizer.pad_id), size=16)
    found = {"model": args.model, "data": args.data, **figures_of(model, batches, device)}
    texts = {args.out: dumps(found, indent=1) + "\n", args.page: page(f"Outliers of {args.model}", found)}
    write_new({path: text for path, text in texts.items() if path})
    print(table(args.model, found))
