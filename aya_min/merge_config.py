"""What a merge is told: the methods' settings and defaults, their values for each tensor, and mergekit's configuration of the same."""

import re

from .command import WHOLE, describe, in_range, shortened
from .files import depth

METHODS = {    # method: the settings it takes and their defaults, from the papers (DARE has none: ours); weights None: 1 each
    "linear": {"weights": None, "normalize": True},
    "slerp": {"t": 0.5, "convention": "paper"},
    "task-arithmetic": {"base": None, "weights": None, "lam": 1.0, "normalize": False},
    "model-stock": {"base": None, "convention": "paper"},
    "ties": {"base": None, "weights": None, "density": 0.2, "lam": 1.0, "normalize": True, "convention": "paper"},
    "dare-linear": {"base": None, "weights": None, "density": 0.5, "lam": 1.0, "normalize": False, "seed": 0, "convention": "paper"},
    "dare-ties": {"base": None, "weights": None, "density": 0.5, "lam": 1.0, "normalize": True, "seed": 0, "convention": "paper"},
}
OUTPUT_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
OF_EACH_MODEL, OF_EACH_TENSOR = ("weights", "density"), ("t", "lam")                 # their values may be gradients or filters
# What flags, configurations and Python callers may give: (flag, type, interval). Products of the largest
# stay within fp32.
RANGES = {"weights": ("--weights", float, "[-1e20, 1e20]"), "density": ("--density", float, "(0, 1]"),
          "t": ("--t", float, "[0, 1]"),
          "lam": ("--lambda", float, "[-1e10, 1e10]"), "seed": ("--seed", int, WHOLE)}
MOST_LEVELS = 12            # of lists and objects within one another: a gradient under a filter has 8


def check_settings(method, given, num_models, dtype):
    """{setting: value} of all that the method takes, weights and density as a list of one for each model; ValueError for what has no meaning."""
    if method not in METHODS:
        raise ValueError(f"unknown merge method {method!r}; choose one of {', '.join(METHODS)}")
    if unknown := given.keys() - METHODS[method].keys():
        raise ValueError(f"{method} takes no {', '.join(sorted(unknown))}; it takes {', '.join(METHODS[method])}")
    if dtype not in [None, *OUTPUT_DTYPES]:
        raise ValueError(f"unknown dtype {shortened(dtype)}; choose one of {', '.join(OUTPUT_DTYPES)}")
    if num_models < 1 or (method == "slerp" and num_models != 2):
        raise ValueError(f"{method} merges {'exactly two models' if method == 'slerp' else 'one model or more'}, not {num_models}")
    settings = {name: default if given.get(name) is None else given[name] for name, default in METHODS[method].items()}
    if "base" in settings and settings["base"] is None:
        raise ValueError(f"{method} needs the model that the others were trained from; give it with --base DIR")
    for name, allowed in {"convention": ["paper", "mergekit"], "normalize": [True, False]}.items():
        if settings.get(name, allowed[0]) not in allowed:
            raise ValueError(f"{name} is {shortened(settings[name])}; choose one of "
                             f"{', '.join(map(str, allowed))}")
    for name in settings.keys() & RANGES.keys():
        if settings[name] is not None:
            check_numbers(name, settings[name])
    if "density" in settings and not isinstance(settings["density"], (list, tuple)):
        settings["density"] = [settings["density"]]
    for name in settings.keys() & set(OF_EACH_MODEL):
        one_for_all = settings[name] is None or (name == "density" and len(settings[name]) == 1)
        if not isinstance(settings[name], (list, tuple, type(None))):
            raise ValueError(f"{name} must be a list, one for each model, got {shortened(settings[name])}")
        settings[name] = list(settings[name] or [1.0]) * (num_models if one_for_all else 1)
        if len(settings[name]) != num_models:
            raise ValueError(f"{len(settings[name])} {name} for {num_models} models; give one for each model, in the same order")
    return settings


def check_numbers(name, value):
    """Refuse a number outside the setting's range, wherever it stands: alone, for a model, in a gradient,
    under a filter."""
    flag, kind, interval = RANGES[name]
    if isinstance(value, (list, tuple)) and kind is float:
        for part in value:
            check_numbers(name, part.get("value") if isinstance(part, dict) else part)
            if isinstance(part, dict) and (part.keys() - {"filter", "value"}
                                           or not isinstance(part.get("filter"), (str, type(None)))):
                raise ValueError(f'{name} ({flag}): {shortened(part)} is not '
                                 f'{{"filter": TEXT, "value": NUMBER}}')
    elif isinstance(value, bool) or not isinstance(value, (int, kind)):
        wanted = "a number, a list of numbers over the layers, or a list of filters"
        wanted = "a whole number" if kind is int else wanted
        raise ValueError(f"{name} ({flag}): {shortened(value)} is not {wanted}")
    elif not in_range(value, interval):
        raise ValueError(f"{name} ({flag}) must be {describe(kind, interval)}, got {shortened(value)}")


def settings_by_tensor(method, settings, names):
    """{tensor name: the settings as merge_methods.py takes them}, numbers in the place of gradients and filters. settings: checked."""
    last = max([1, *(layer_of(name) or 0 for name in names)])
    return {name: settings_of(name, (layer_of(name) or 0) / last, method, settings) for name in names}


def settings_of(name, depth, method, settings):
    values = {key: value for key, value in settings.items() if key != "base"} | ({"name": name} if "seed" in settings else {})
    values |= {key: [number_at(value, name, depth) for value in values[key]] for key in OF_EACH_MODEL if key in values}
    values |= {key: number_at(values[key], name, depth) for key in OF_EACH_TENSOR if key in values}
    weights, density = values.get("weights", [1.0]), values.get("density", [])
    if method in ("ties", "dare-ties") and (min(weights) < 0 or max(weights) == 0):
        problem = f"weights {weights} of {method} must not be negative nor all 0; for negation use task-arithmetic or dare-linear"
    elif values.get("normalize") and abs(sum(weights)) < 1e-6:
        problem = f"weights {weights} sum to 0, so they cannot be normalised; for differences of models use task-arithmetic"
    elif method == "ties" and settings["convention"] == "paper" and density != settings["density"]:
        problem = "density by layer or name needs tensors that are trimmed one by one; choose the convention mergekit, or one number for each model"
    else:
        return values
    raise ValueError(f"{problem} (at {name})")


def layer_of(name):
    """The number of a tensor's layer, None outside the layers."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def number_at(value, name, depth):
    """A number; or that of a gradient at this depth, 0 the first layer, 1 the last (0 for tensors outside the layers, as in mergekit);
    or that of the first {"filter", "value"} whose filter is in the tensor's name, or is absent."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, (list, tuple)) or not value or len({isinstance(part, dict) for part in value}) > 1:
        raise ValueError(f"{value!r} is not a number, a list of numbers over the layers, or a list of filters")
    if isinstance(value[0], dict):
        for part in value:
            if part.get("filter") is None or part["filter"] in name:
                return number_at(part.get("value"), name, depth)
        raise ValueError(f"no filter of {value} is in the name {name}; add an entry without a filter")
    points = [number_at(point, name, depth) for point in [*value, value[-1]]]
    low = int(depth * (len(value) - 1))
    return points[low] + (depth * (len(value) - 1) - low) * (points[low + 1] - points[low])


# ---- mergekit's configuration ------------------------------------------------------------------------------------------------------

KEYS = {"merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
        "allow_config_differences"}
THEIR = {"weights": "weight", "lam": "lambda"}                                       # mergekit's name of a setting, where it is another


def from_config(config):
    """mergekit's configuration (a dict) -> the arguments of merge_folders but `out`. Its defaults, and its convention where none is given."""
    if depth(config) > MOST_LEVELS:
        raise ValueError(f"lists and objects within one another, more than {MOST_LEVELS} levels; give "
                         f"numbers, gradients or filters")
    keys = ("merge_method", "models", "parameters", "base_model")
    method, models, common, base = map(config.get, keys)
    method, common = str(method).replace("_", "-"), {} if common is None else common
    if method not in METHODS:
        raise ValueError(f"merge_method {shortened(config.get('merge_method'))} is not supported; supported: "
                         f"{', '.join(METHODS).replace('-', '_')}")
    if not (isinstance(models, list) and models and all(isinstance(model, dict) and isinstance(model.get("model"), str) for model in models)):
        raise ValueError('models is not a list of {"model": FOLDER, "parameters": {...}}')
    if not isinstance(base, (str, type(None))):
        raise ValueError(f"base_model is {shortened(base)}, not the name of a folder")
    if type(allow := config.get("allow_config_differences", False)) is not bool:
        raise ValueError(f"allow_config_differences is {shortened(allow)}; give true or false")
    parameters = [model.get("parameters") or {} for model in models]
    if not all(isinstance(one, dict) for one in [common, *parameters]):
        raise ValueError("parameters is not an object of names and values")
    takes = METHODS[method].keys() - {"base"}
    known = {THEIR.get(key, key) for key in takes} | {"int8_mask"}                   # which saves mergekit memory and changes nothing
    unknown = config.keys() - KEYS | {f"models.{key}" for model in models for key in model.keys() - {"model", "parameters"}}
    unknown |= {f"parameters.{key}" for one in [common, *parameters] for key in one.keys() - known}
    if unknown or config.get("tokenizer_source", "base") != "base":
        raise ValueError(f"{method} cannot honour {', '.join(sorted(unknown)) or 'a tokenizer_source other than base'}; remove it")
    if (base is None) == (method == "slerp" or "base" in METHODS[method]):
        raise ValueError(f"{method} {'needs a' if base is None else 'takes no'} base_model")
    if method == "slerp":                                                            # t = 0 is the base
        models = sorted(models, key=lambda model: model["model"] != base)
    models = [model for model in models if model["model"] != base or method == "slerp"]
    defaults = {"convention": "mergekit", "normalize": method in ("linear", "ties"), "density": 1.0}
    settings = {key: common.get(THEIR.get(key, key), defaults.get(key)) for key in takes}
    settings |= {key: [(model.get("parameters") or {}).get(THEIR.get(key, key), settings[key]) for model in models] for key in OF_EACH_MODEL if key in takes}
    if None in [*settings.get("weights", []), settings.get("t", 0)]:
        raise ValueError(f"{method} needs a {'t' if method == 'slerp' else 'weight for each model'} in its parameters")
    return {"folders": [model["model"] for model in models], "method": method, "dtype": config.get("out_dtype") or config.get("dtype"),
            **settings, **({"base": base} if "base" in METHODS[method] else {}),
            **({"allow_config_differences": True} if allow else {})}


def to_config(folders, method, settings, dtype, allow_config_differences=False):
    """mergekit's configuration of a merge (checked settings), JSON and so YAML. It passes over the parameters seed and convention, which it does not know."""
    models = [{"model": str(folder), "parameters": {THEIR.get(key, key): settings[key][i] for key in OF_EACH_MODEL if key in settings}}
              for i, folder in enumerate(folders)]
    parameters = {THEIR.get(key, key): value for key, value in settings.items() if key not in ("base", *OF_EACH_MODEL)}
    base = {"base_model": str(settings.get("base", folders[0]))} if method == "slerp" or "base" in settings else {}
    return {"merge_method": method.replace("-", "_"), "models": models, **base, "parameters": parameters,
            **({"dtype": "float32", "out_dtype": dtype} if dtype else {}),
            **({"allow_config_differences": True} if allow_config_differences else {})}
