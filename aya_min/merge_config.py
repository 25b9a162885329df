"""What a merge is told: the methods with their settings and needs, the settings' values for each tensor, and
mergekit's configuration of the same merge.

METHODS declares what merge_folders.py and this module must know of a method; neither asks for one by name.
"""

import re
from dataclasses import dataclass, field

from .command import WHOLE, describe, in_range, shortened
from .files import depth

BOTH = ("paper", "mergekit")


@dataclass(frozen=True)
class Method:
    """A merge method; its function in merge_methods.py has the same name, with _ in place of -.

    A method without a setting `convention` declares its scans for "paper".
    """
    # {setting: default}, from the papers (DARE's gives none: ours); weights None: 1 each
    # (a method with a seed is also given the name of the tensor)
    settings: dict
    # the conventions in which it scans each tensor with `over_pieces` before it merges it
    tensor_scans: tuple = ()
    # {convention: function of merge_methods.py}: it takes `over_pieces` and the checked settings, scans all
    # tensors once, and returns keyword arguments for the method
    model_scans: dict = field(default_factory=dict)
    # it elects signs, so its weights must not be negative
    elects_signs: bool = False
    # it merges exactly two models; the first is mergekit's base_model
    between_two: bool = False
    # mergekit's default of normalize
    mergekit_normalizes: bool = False

    def passes(self, convention):
        """How often a merge reads every tensor."""
        return 1 + (convention in self.tensor_scans) + (convention in self.model_scans)


METHODS = {
    "linear": Method({"weights": None, "normalize": True}, mergekit_normalizes=True),
    "slerp": Method({"t": 0.5, "convention": "paper"}, tensor_scans=BOTH, between_two=True),
    "task-arithmetic": Method({"base": None, "weights": None, "lam": 1.0, "normalize": False}),
    "model-stock": Method({"base": None, "convention": "paper"}, tensor_scans=BOTH),
    "ties": Method({"base": None, "weights": None, "density": 0.2, "lam": 1.0, "normalize": True,
                    "convention": "paper"},
                   tensor_scans=("mergekit",), model_scans={"paper": "ties_limits"}, elects_signs=True,
                   mergekit_normalizes=True),
    "dare-linear": Method({"base": None, "weights": None, "density": 0.5, "lam": 1.0, "normalize": False,
                           "seed": 0, "convention": "paper"}, tensor_scans=("mergekit",)),
    "dare-ties": Method({"base": None, "weights": None, "density": 0.5, "lam": 1.0, "normalize": True,
                         "seed": 0, "convention": "paper"}, tensor_scans=("mergekit",), elects_signs=True),
}
OUTPUT_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# settings whose values may be gradients or filters
OF_EACH_MODEL = ("weights", "density")
OF_EACH_TENSOR = ("t", "lam")
# What flags, configurations and Python callers may give: (flag, type, interval). Products of the largest
# values stay within fp32.
RANGES = {"weights": ("--weights", float, "[-1e20, 1e20]"), "density": ("--density", float, "(0, 1]"),
          "t": ("--t", float, "[0, 1]"),
          "lam": ("--lambda", float, "[-1e10, 1e10]"), "seed": ("--seed", int, WHOLE)}
MOST_LEVELS = 12            # of nested lists and objects: a gradient under a filter has 8


def check_settings(method, given, num_models, dtype):
    """{setting: value} of all settings of the method; weights and density as lists with one value per model.

    Raises ValueError for an unknown method, setting or dtype, a value out of range, or a wrong number of
    models or values.
    """
    if method not in METHODS:
        raise ValueError(f"unknown merge method {method!r}; choose one of {', '.join(METHODS)}")
    takes = METHODS[method].settings
    if unknown := given.keys() - takes.keys():
        raise ValueError(f"{method} takes no {', '.join(sorted(unknown))}; it takes {', '.join(takes)}")
    if dtype not in [None, *OUTPUT_DTYPES]:
        raise ValueError(f"unknown dtype {shortened(dtype)}; choose one of {', '.join(OUTPUT_DTYPES)}")
    if METHODS[method].between_two and num_models != 2:
        raise ValueError(f"{method} merges exactly two models, not {num_models}")
    if num_models < 1:
        raise ValueError(f"{method} merges one model or more, not {num_models}")
    settings = {name: default if given.get(name) is None else given[name] for name, default in takes.items()}
    if "base" in settings and settings["base"] is None:
        raise ValueError(f"{method} needs the model that the others were trained from; give it with "
                         "--base DIR")
    for name, allowed in {"convention": [*BOTH], "normalize": [True, False]}.items():
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
            raise ValueError(f"{len(settings[name])} {name} for {num_models} models; give one for each "
                             "model, in the same order")
    return settings


def check_numbers(name, value):
    """Refuse a number outside the setting's range wherever it stands: alone, in a list of one for each model,
    in a gradient or under a filter."""
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
    """{tensor name: keyword arguments of the method's function}; gradients and filters become numbers.

    settings: as check_settings returns them. Raises ValueError where the numbers of a tensor mean nothing.
    """
    last = max([1, *(layer_of(name) or 0 for name in names)])
    return {name: settings_of(name, (layer_of(name) or 0) / last, method, settings) for name in names}


def settings_of(name, depth, method, settings):
    """`settings_by_tensor` for one tensor at this depth, 0 the first layer, 1 the last."""
    values = {key: value for key, value in settings.items() if key != "base"}
    if "seed" in settings:
        values["name"] = name
    for key in values:
        if key in OF_EACH_MODEL:
            values[key] = [number_at(value, name, depth) for value in values[key]]
        elif key in OF_EACH_TENSOR:
            values[key] = number_at(values[key], name, depth)
    weights = values.get("weights", [1.0])
    scanned_whole = settings.get("convention", "paper") in METHODS[method].model_scans
    if METHODS[method].elects_signs and (min(weights) < 0 or max(weights) == 0):
        problem = (f"weights {weights} of {method} must not be negative nor all 0; for negation use "
                   "task-arithmetic or dare-linear")
    elif values.get("normalize") and abs(sum(weights)) < 1e-6:
        problem = (f"weights {weights} sum to 0, so they cannot be normalised; for differences of models use "
                   "task-arithmetic")
    elif scanned_whole and values.get("density") != settings.get("density"):
        problem = ("density by layer or name needs tensors that are trimmed one by one; choose the "
                   "convention mergekit, or one number for each model")
    else:
        return values
    raise ValueError(f"{problem} (at {name})")


def layer_of(name):
    """The number of a tensor's layer; None outside the layers."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def number_at(value, name, depth):
    """The number that a setting has for the tensor `name`. value is one of

    a number; a gradient, interpolated at this depth (0 the first layer, 1 the last; 0 for tensors outside the
    layers, as in mergekit); or a list of {"filter", "value"}, of which the first counts whose filter is part
    of the name or is absent.
    """
    if isinstance(value, (int, float)):
        return float(value)
    is_list = isinstance(value, (list, tuple)) and value
    if not is_list or len({isinstance(part, dict) for part in value}) > 1:
        raise ValueError(f"{value!r} is not a number, a list of numbers over the layers, or a list of "
                         "filters")
    if isinstance(value[0], dict):
        for part in value:
            if part.get("filter") is None or part["filter"] in name:
                return number_at(part.get("value"), name, depth)
        raise ValueError(f"no filter of {value} is in the name {name}; add an entry without a filter")
    points = [number_at(point, name, depth) for point in [*value, value[-1]]]
    low = int(depth * (len(value) - 1))
    return points[low] + (depth * (len(value) - 1) - low) * (points[low + 1] - points[low])


# ---- mergekit's configuration ------------------------------------------------------------------------------

KEYS = {"merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source",
        "allow_config_differences"}
THEIRS = {"weights": "weight", "lam": "lambda"}         # settings that have another name in mergekit
IGNORED = {"int8_mask"}                                 # saves mergekit memory and changes no number


def from_config(config):
    """mergekit's configuration (a dict) as the arguments of merge_folders, without `out`.

    A value that is absent is mergekit's default, its convention included. Raises ValueError for wrong types
    and for everything that cannot be honoured.
    """
    method, models, common, base = check_types(config)
    entry = METHODS[method]
    takes = entry.settings.keys() - {"base"}
    check_known(config, method, models, common, takes)
    if (base is None) == (entry.between_two or "base" in entry.settings):
        raise ValueError(f"{method} {'needs a' if base is None else 'takes no'} base_model")
    if entry.between_two:                               # mergekit's t = 0 is the base
        models = sorted(models, key=lambda model: model["model"] != base)
    else:
        models = [model for model in models if model["model"] != base]

    defaults = {"convention": "mergekit", "normalize": entry.mergekit_normalizes, "density": 1.0}
    settings = {key: common.get(THEIRS.get(key, key), defaults.get(key)) for key in takes}
    for key in takes & set(OF_EACH_MODEL):
        settings[key] = [(model.get("parameters") or {}).get(THEIRS.get(key, key), settings[key])
                         for model in models]
    if None in settings.get("weights", []):
        raise ValueError(f"{method} needs a weight for each model in its parameters")
    if settings.get("t", 0) is None:
        raise ValueError(f"{method} needs a t in its parameters")
    if "base" in entry.settings:
        settings["base"] = base
    if config.get("allow_config_differences"):
        settings["allow_config_differences"] = True
    return {"folders": [model["model"] for model in models], "method": method,
            "dtype": config.get("out_dtype") or config.get("dtype"), **settings}


def check_types(config):
    """(method, models, parameters, base_model) of a configuration; ValueError for a wrong type or method."""
    if depth(config) > MOST_LEVELS:
        raise ValueError(f"lists and objects are nested in more than {MOST_LEVELS} levels; give numbers, "
                         "gradients or filters")
    keys = ("merge_method", "models", "parameters", "base_model")
    method, models, common, base = map(config.get, keys)
    method = str(method).replace("_", "-")
    common = {} if common is None else common
    if method not in METHODS:
        raise ValueError(f"merge_method {shortened(config.get('merge_method'))} is not supported; supported: "
                         f"{', '.join(METHODS).replace('-', '_')}")
    if not (isinstance(models, list) and models
            and all(isinstance(model, dict) and isinstance(model.get("model"), str) for model in models)):
        raise ValueError('models is not a list of {"model": FOLDER, "parameters": {...}}')
    if not isinstance(base, (str, type(None))):
        raise ValueError(f"base_model is {shortened(base)}, not the name of a folder")
    if type(allow := config.get("allow_config_differences", False)) is not bool:
        raise ValueError(f"allow_config_differences is {shortened(allow)}; give true or false")
    parameters = [common, *(model.get("parameters") or {} for model in models)]
    if not all(isinstance(one, dict) for one in parameters):
        raise ValueError("parameters is not an object of names and values")
    return method, models, common, base


def check_known(config, method, models, common, takes):
    """Refuse a configuration with a key that this method cannot honour; takes: the settings that it has."""
    known = {THEIRS.get(key, key) for key in takes} | IGNORED
    unknown = config.keys() - KEYS
    for model in models:
        unknown |= {f"models.{key}" for key in model.keys() - {"model", "parameters"}}
    for parameters in [common, *(model.get("parameters") or {} for model in models)]:
        unknown |= {f"parameters.{key}" for key in parameters.keys() - known}
    if unknown or config.get("tokenizer_source", "base") != "base":
        what = ", ".join(sorted(unknown)) or "a tokenizer_source other than base"
        raise ValueError(f"{method} cannot honour {what}; remove it")


def to_config(folders, method, settings, dtype, allow_config_differences=False):
    """mergekit's configuration of a merge as a dict for JSON, which is YAML too. settings: checked.

    mergekit does not know the parameters seed and convention, and ignores them.
    """
    models = [{"model": str(folder), "parameters": {}} for folder in folders]
    for key in OF_EACH_MODEL:
        for model, value in zip(models, settings.get(key, [])):
            model["parameters"][THEIRS.get(key, key)] = value
    config = {"merge_method": method.replace("-", "_"), "models": models}
    if "base" in settings or METHODS[method].between_two:
        config["base_model"] = str(settings.get("base", folders[0]))
    config["parameters"] = {THEIRS.get(key, key): value for key, value in settings.items()
                            if key not in ("base", *OF_EACH_MODEL)}
    if dtype:
        config |= {"dtype": "float32", "out_dtype": dtype}
    if allow_config_differences:
        config["allow_config_differences"] = True
    return config
