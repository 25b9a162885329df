"""What a SideNet saves, and what it costs in accuracy: `evaluate early-exit`. early_exit.py is the mechanism.

    python -m aya_min.evaluate early-exit --model MAIN --sidenet SIDE --data F.jsonl [--out F.json]
        --threshold 0.9, or --validation V.jsonl and --accuracy 0.8 or --cost 0.5

Both may be quantized, each by `merge.py quantize` with the same settings: that leaves the layers that they
share alike. Operations are counted as before; the bytes of the weights are what falls, and seconds depend on
the kernels (quantized.py).

A wanted accuracy or cost has its threshold chosen on the validation file, never on --data. Intervals resample
ids, because the translations of one text are no independent draws. Seconds are those of all texts, after the
tokenizer, in batches of texts of like lengths.
"""

import os

import numpy as np
import torch

from . import distributed, early_exit, quantized, weights
from .classifier import Classifier, SideNet
from .classify import load_texts, numbered
from .command import Parser, is_spare_rank, number, printable
from .config import Reading, add_flags, settings_from
from .evaluate_rates import bootstrap_mean
from .files import check_out, dumps, write_new
from .flops import head_flops
from .languages import CLUSTERS
from .report_charts import (esc, grid, html_page, html_table, interval_text, legend, reliability, scatter,
                            section)
from .report_data import by_cluster, language
from .tensorfiles import equal, num_bytes, read, read_config, read_header

POINTS = 10         # steps of the table's thresholds, by the share of the texts that leave


# ---- the figures -------------------------------------------------------------------------------------------

def load_nets(model_path, side_path, device):
    """(Classifier, SideNet, tokenizer), in eval mode. ValueError if the second is no SideNet of the first."""
    for flag, path, kind in (("--model", model_path, Classifier), ("--sidenet", side_path, SideNet)):
        found = weights.read_config(path)[1]
        if found is not kind:
            raise ValueError(f"{flag} {path}: {weights.ONE[found]}, not {weights.ONE[kind]}; give a "
                             f"folder that train.py {'classify' if kind is Classifier else 'sidenet'} wrote")
    schemes = [quantized.read(read_config(path), path) for path in (model_path, side_path)]
    if schemes[0] != schemes[1]:
        named = ["not quantized" if each is None else f"quantized ({each[0].name})" for each in schemes]
        raise ValueError(f"--sidenet {side_path} is {named[1]}, --model {model_path} is {named[0]}; merge.py "
                         "quantize both with the same settings, or neither, as they share layers")
    (main, tokenizer, whole), (side, its_tokenizer, part) = (
        weights.load_meta(path, packed=True) for path in (model_path, side_path))
    other = [name for name in part if name.startswith("model.") and not same(whole, part, name)]
    other += ["the tokenizer"] if tokenizer.meaning != its_tokenizer.meaning else []
    other += ["the order of the labels"] if main.config.labels != side.config.labels else []
    if other:
        made = "quantize both with the same settings, or " if schemes[0] else ""
        raise ValueError(f"--sidenet {side_path}: not a SideNet of --model {model_path}: {other[0]} differs; "
                         f"{made}train one with train.py sidenet on that model")
    main, side = (weights.load(path, device, packed=True)[0].eval() for path in (model_path, side_path))
    return main, side, tokenizer


def same(whole, part, name):
    """Whether a tensor of one folder is also in another. They may be kept in different floats."""
    if name not in whole or whole[name][2] != part[name][2]:
        return False
    if whole[name][1] == part[name][1]:
        return equal(whole, name, part, name)
    return torch.equal(*(read(header, name).float() for header in (whole, part)))


def sizes(model_path, side_path):
    """{"main", "both"}: bytes of the MainNet's weights, and with what the SideNet adds."""
    main, side = (sum(num_bytes(code, shape) for name, (_, code, shape) in read_header(path).items()
                      if not (own and name.startswith("model.")))
                  for path, own in ((model_path, False), (side_path, True)))
    return {"main": main, "both": main + side}


class Measured:
    """What both nets say of the texts of files, and what each text costs."""

    def __init__(self, main, side, tokenizer, paths, reading, device):
        items = load_texts(paths, tokenizer, main.config.max_position_embeddings, reading)
        self.items = numbered(items, main.config.labels)
        self.batches = early_exit.batches_of(self.items, tokenizer.pad_id, device)
        both = early_exit.probabilities(main, side, self.batches)           # 2 x (N, M)
        for model, each in zip((main, side), both):
            if not np.isfinite(each).all():
                raise ValueError(f"{model.came_from}: its probabilities are not finite"
                                 + distributed.blame(model))
        labels = np.array([item.number for item in self.items])
        self.right = [each.argmax(1) == labels for each in both]            # main, side: 2 x (N,)
        self.confidences = [each.max(1) for each in both]
        lengths = [len(item.ids) for item in self.items]
        self.at_exit, self.of_main = early_exit.operations(main.config, side.config, lengths)
        self.side_head = head_flops(side.config)

    def curve(self, some=slice(None)):
        """The tradeoff of these texts."""
        return early_exit.tradeoff(self.confidences[1][some], self.right[1][some], self.right[0][some],
                                   self.at_exit[some], self.of_main[some], self.side_head)

    def accuracy(self, right, some=slice(None)):
        """{"accuracy", "ci95"}"""
        ids = [item.id for item in np.array(self.items, dtype=object)[some]]
        mean, ci95 = bootstrap_mean(right[some], ids)
        return {"accuracy": mean, "ci95": ci95}

    def net(self, which, some=slice(None)):
        """The figures of a net alone. which: 0, the MainNet, or 1, the SideNet."""
        confidences, right = self.confidences[which][some], self.right[which][some]
        return {**self.accuracy(self.right[which], some), "confidence": float(confidences.mean()),
                "ece": early_exit.calibration_error(confidences, right),
                "bins": early_exit.reliability(confidences, right)}

    def at(self, threshold, some=slice(None)):
        """The figures at a threshold."""
        leaves, curve = self.confidences[1] > threshold, self.curve(some)
        i = early_exit.at_threshold(curve, threshold)
        right = np.where(leaves, self.right[1], self.right[0])
        return {"threshold": threshold, **self.accuracy(right, some), "left": float(curve["left"][i]),
                "cost": float(curve["cost"][i])}


def figures(measured, threshold):
    """The figures on the texts: overall and by language. threshold: the one that was wanted, or None."""
    curve = measured.curve()
    wanted = np.linspace(1, 0, POINTS + 1)
    points = sorted({int(np.abs(curve["left"] - share).argmin()) for share in wanted})
    thresholds = [float(curve["threshold"][i]) for i in points]
    languages = np.array([item.language for item in measured.items])

    def by_language(code):
        some = np.flatnonzero(languages == code)
        found = {"num": len(some), "main": measured.net(0, some), "sidenet": measured.net(1, some)}
        return found | ({"at": measured.at(threshold, some)} if threshold is not None else {})
    return {"num": len(measured.items), "main": measured.net(0), "sidenet": measured.net(1),
            "operations": {"main": float(measured.of_main.mean()), "sidenet": float(measured.at_exit.mean())},
            "curve": [measured.at(t) for t in thresholds],
            **({"at": measured.at(threshold)} if threshold is not None else {}),
            "by_language": {code: by_language(code) for code in sorted(set(languages))}}


# ---- the terminal's table ----------------------------------------------------------------------------------

def percent(value):
    return f"{100 * value:.1f}"


def interval(part):
    return interval_text([100 * end for end in part["ci95"]])


def weights_line(result):
    """What the weights take, in a line."""
    size, scheme = result["bytes"], result["about"]["scheme"]
    return (f"weights{f' ({scheme})' if scheme else ''}: {size['main'] / 1e6:.3f} MB of the MainNet, "
            f"{size['both'] / 1e6:.3f} MB with the SideNet")


def table(result):
    """The text for the terminal."""
    side, at = result["about"], result.get("at")
    lines = [f"{result['model']} and its SideNet {result['sidenet_model']} (layer {side['layer']} of "
             f"{side['layers']}, {side['hidden']} units) on {result['num']} texts",
             weights_line(result),
             f"{'':24}{'accuracy %':>11}{'95% interval':>16}{'confidence %':>14}{'ECE %':>8}"
             f"{'operations':>12}"]
    for title, name in (("MainNet alone", "main"), ("SideNet alone", "sidenet")):
        part = result[name]
        lines.append(f"{title:24}{percent(part['accuracy']):>11}{interval(part):>16}"
                     f"{percent(part['confidence']):>14}{percent(part['ece']):>8}"
                     f"{result['operations'][name]:>12.3g}")
    lines.append(f"{'threshold':24}{'accuracy %':>11}{'95% interval':>16}{'leave %':>14}{'':8}"
                 f"{'operations %':>12}{'seconds':>10}")
    for part in [*result["curve"], *([at] if at else [])]:
        name = f"{part['threshold']:.4f}{' (asked for)' if part is at else ''}"
        seconds = f"{part['seconds']:.3f}" if "seconds" in part else "-"
        lines.append(f"{name:24}{percent(part['accuracy']):>11}{interval(part):>16}"
                     f"{percent(part['left']):>14}{'':8}{percent(part['cost']):>12}{seconds:>10}")
    more = f"{'at the threshold':>18}{'leave %':>9}{'operations %':>14}" if at else ""
    lines.append(f"{'accuracy % and ECE %':24}{'texts':>7}{'MainNet':>9}{'ECE':>6}{'SideNet':>9}{'ECE':>6}"
                 f"{more}")
    for code, part in result["by_language"].items():
        cells = "".join(f"{percent(part[name]['accuracy']):>9}{percent(part[name]['ece']):>6}"
                        for name in ("main", "sidenet"))
        if at:
            cells += (f"{percent(part['at']['accuracy']):>18}{percent(part['at']['left']):>9}"
                      f"{percent(part['at']['cost']):>14}")
        lines.append(f"{language(code):24}{part['num']:>7}{cells}")
    return printable("\n".join(line.rstrip() for line in lines))


# ---- the page ----------------------------------------------------------------------------------------------

def headline(result):
    main, at = result["main"], result.get("at")
    if not at:
        return ""
    return (f'<p class="headline"><b>{percent(at["left"])}%</b> of the texts leave at the threshold '
            f'{at["threshold"]:.3f}: accuracy <b>{percent(at["accuracy"])}%</b> instead of '
            f'{percent(main["accuracy"])}%, for <b>{percent(at["cost"])}%</b> of the operations.</p>')


def tradeoff_part(result):
    points = [(100 * part["cost"], 100 * part["accuracy"], f"threshold {part['threshold']:.3f}, "
               f"{percent(part['left'])}% leave") for part in result["curve"]]
    nets = [(100.0, 100 * result["main"]["accuracy"], "MainNet alone"),
            (100 * result["operations"]["sidenet"] / result["operations"]["main"],
             100 * result["sidenet"]["accuracy"], "SideNet alone")]
    series = [("dot", "a", points), ("ring", "b", nets)]
    if at := result.get("at"):
        series.append(("diamond", "b", [(100 * at["cost"], 100 * at["accuracy"], "the threshold asked for")]))
    drawn = [scatter("Accuracy against operations", ("operations, % of the MainNet's", "accuracy %"), series,
                     [point[:2] for point in points])]
    if timed := [(part["seconds"], 100 * part["accuracy"], f"threshold {part['threshold']:.3f}")
                 for part in result["curve"] if "seconds" in part]:
        drawn.append(scatter("Accuracy against seconds", ("seconds for all texts", "accuracy %"),
                             [("dot", "a", timed)], [point[:2] for point in timed]))
    key = legend(("dot", "a", "a threshold"), ("ring", "b", "each net alone"),
                 *([("diamond", "b", "the threshold asked for")] if at else []))
    note = ("The texts of whose label the SideNet is surest leave; for the others the rest of the MainNet is "
            "computed.")
    return section("What leaving saves", note, grid(drawn, key=key))


def calibration_part(result):
    drawn = [reliability(f"{title}: ECE {percent(result[name]['ece'])}%", title, result[name]["bins"], tone)
             for title, name, tone in (("MainNet", "main", "b"), ("SideNet", "sidenet", "a"))]
    note = ("Of the answers of one confidence, how many are right? Below the diagonal a net is surer than it "
            "should be. The area of a point is its share of the answers; ECE is the mean distance from the "
            "diagonal.")
    return section("Calibration", note, grid(drawn, "small"))


def languages_part(result):
    at, rows, parts = result.get("at"), "", result["by_language"]
    titles = ["texts", "MainNet %", "ECE %", "SideNet %", "ECE %"]
    titles += ["at the threshold %", "leave %", "operations %"] if at else []
    head = '<tr><th class="name">language</th>' + "".join(f"<th>{title}</th>" for title in titles) + "</tr>"
    for cluster, codes in by_cluster(parts, CLUSTERS):
        rows += f'<tr><th class="name within" colspan="{1 + len(titles)}">{esc(cluster)}</th></tr>'
        for code in codes:
            part = parts[code]
            cells = [str(part["num"])]
            for name in ("main", "sidenet"):
                cells += [percent(part[name]["accuracy"]), percent(part[name]["ece"])]
            cells += [percent(part["at"][key]) for key in ("accuracy", "left", "cost")] if at else []
            rows += f'<tr><th scope="row" class="name">{esc(language(code))}</th>' + "".join(
                f"<td>{cell}</td>" for cell in cells) + "</tr>"
    note = "Accuracy and expected calibration error (too high where texts are few) of each net alone" + (
        f", and what the threshold {at['threshold']:.3f} does." if at else ".")
    return section("By language", note, html_table(head, rows))


def page(result):
    """The whole text of the page."""
    side = result["about"]
    about = (f"{result['model']}, its SideNet of {side['hidden']} units on layer {side['layer']} of "
             f"{side['layers']}, {result['num']} texts; {weights_line(result)}.")
    parts = [headline(result), f'<p class="note">{esc(about)}</p>', tradeoff_part(result),
             calibration_part(result), languages_part(result)]
    return html_page("aya_min · early exit", "\n".join(filter(None, parts)))


# ---- the command -------------------------------------------------------------------------------------------

def check(args):
    """ValueError for flags that do not fit together, and for outputs that exist."""
    wanted = [name for name in ("threshold", "accuracy", "cost") if getattr(args, name) is not None]
    if len(wanted) > 1:
        raise ValueError(f"--{wanted[0]} and --{wanted[1]} both name a threshold; give one")
    needs = bool(wanted) and wanted[0] != "threshold"
    if needs and not args.validation:
        raise ValueError(f"--{wanted[0]} needs --validation: the threshold must not be chosen on --data")
    if args.validation and not needs:
        raise ValueError("--validation goes with --accuracy or --cost, for which a threshold is chosen on it")
    if args.validation and {*map(os.path.realpath, args.validation)} & {*map(os.path.realpath, args.data)}:
        raise ValueError("--validation and --data share a file: the threshold must not be chosen on --data")
    outputs = [args.out, str(args.out).removesuffix(".json") + ".html"] if args.out else []
    check_out(*outputs)
    return outputs


def evaluate(args, reading):
    """Measure, write the figures and the page to --out, print the table."""
    outputs, device = check(args), "cuda" if torch.cuda.is_available() else "cpu"
    main, side, tokenizer = load_nets(args.model, args.sidenet, device)

    def measured(paths):
        return Measured(main, side, tokenizer, paths, reading, device)
    threshold = args.threshold
    if args.validation:
        threshold = early_exit.choose(measured(args.validation).curve(), args.accuracy, args.cost)
    found, scheme = measured(args.data), quantized.read(read_config(args.model), args.model)
    result = {"model": str(args.model), "sidenet_model": str(args.sidenet), "data": list(map(str, args.data)),
              "about": {"layer": side.config.sidenet_layer, "layers": main.config.num_hidden_layers,
                        "hidden": side.config.sidenet_size, "labels": main.config.labels, "device": device,
                        "scheme": scheme and scheme[0].name,
                        "validation": list(map(str, args.validation or [])), "accuracy": args.accuracy,
                        "cost": args.cost}}
    result |= figures(found, threshold) | {"bytes": sizes(args.model, args.sidenet)}
    parts = result["curve"] + ([result["at"]] if "at" in result else [])
    if args.repeats:
        thresholds = [part["threshold"] for part in parts]
        times = early_exit.seconds_at(main, side, found.batches, thresholds, args.repeats)
        for part, seconds in zip(parts, times):
            part["seconds"] = seconds
    if outputs:
        write_new(dict(zip(outputs, (dumps(result, indent=1) + "\n", page(result)))))
    print(table(result), *([printable(f"written: {' '.join(outputs)}")] if outputs else []), sep="\n")


def main(argv):
    parser = Parser(prog="aya_min.evaluate early-exit",
                    description="What a SideNet saves, and what it costs in accuracy.")
    parser.add_argument("--model", required=True, help="folder of the MainNet, a classifier")
    parser.add_argument("--sidenet", required=True, help="folder of its SideNet")
    parser.add_argument("--data", required=True, nargs="+",
                        help="JSONL of text and label, with language and id")
    parser.add_argument("--validation", nargs="+", help="other such files, on which the threshold is chosen")
    parser.add_argument("--threshold", type=number(float, "[0, inf)"),
                        help="the SideNet answers where its largest probability is above it")
    parser.add_argument("--accuracy", type=number(float, "(0, 1]"),
                        help="the accuracy wanted, at the least cost")
    parser.add_argument("--cost", type=number(float, "(0, inf)"),
                        help="the share of the MainNet's operations that may be spent, for the best accuracy")
    parser.add_argument("--repeats", type=number(int, "[0, 1000]"), default=3,
                        help="passes over the texts at each threshold, of which the fastest counts; 0: no "
                             "seconds (default 3)")
    parser.add_argument("--out",
                        help="JSON file to write the figures to, with a page beside it; must not exist")
    add_flags(parser, Reading)
    args = parser.parse_args(argv)
    if not is_spare_rank():
        evaluate(args, settings_from(Reading, flags=vars(args)))
