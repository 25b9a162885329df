"""Floating-point operations of a model, counted from its sizes and the lengths of texts."""


def layers_flops(config, lengths, first=0, last=None):
    """Operations of the forward of the layers after layer `first` up to layer `last` (default: all) over
    texts of these lengths (tokens). Layers count from 1.

    Each weight costs 2 operations per token that it multiplies, and each layer 4 head_dim per head and pair
    of a query and a key that it sees. Of a mixture's experts those count that a token is sent to; what a
    router computes once for all tokens does not.
    """
    (H, K), D, hidden, mixture = config.num_heads, config.head_dim, config.hidden_size, config.mixture
    last = config.num_hidden_layers if last is None else last
    mlps = mixture.top_k + mixture.shared if mixture else 1
    routers = (1 + bool(mixture.attention)) * len(mixture.experts) if mixture else 0
    # q, k, v, o; gate, up, down; the routers' scores
    block = hidden * (2 * (H + K) * D + 3 * mlps * config.intermediate_size + routers)
    windows = [config.window(i) or max(lengths) for i in range(first, last)]
    pairs = sum(min(T, w) * (min(T, w) + 1) // 2 + max(T - w, 0) * w for w in windows for T in lengths)
    return 2 * (last - first) * block * sum(lengths) + 4 * H * D * pairs


def head_flops(config):
    """Operations of the forward of a classifier's head, or of a SideNet's two, for one text."""
    hidden, num_labels = config.hidden_size, len(config.labels)
    size = getattr(config, "sidenet_size", None)
    return 2 * hidden * num_labels if size is None else 2 * size * (hidden + num_labels)


def training_flops(config, lengths, num_supervised):
    """Operations of forward and backward over texts of these lengths (tokens), without recomputation.

    A backward costs two forwards. The embedding's lookup is free, and the head multiplies supervised tokens
    only; if all are supervised, each weight costs the usual 6 operations per token. The layers below a
    SideNet are frozen and have no backward.
    """
    if hasattr(config, "training_flops"):               # an encoder-decoder's
        return config.training_flops(lengths, num_supervised)
    if hasattr(config, "sidenet_layer"):
        heads = len(lengths) * head_flops(config)
        return layers_flops(config, lengths, last=config.sidenet_layer) + 3 * heads
    head = 2 * config.hidden_size * config.vocab_size * num_supervised
    return 3 * (layers_flops(config, lengths) + head)
