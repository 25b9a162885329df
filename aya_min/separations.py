"""What tells transformers and recurrent models apart (arXiv 2406.09347): four tasks, each a stream of batches
for sequence_models.py, and the paper's one-layer transformer that looks up an index exactly, whose weights
are written down.

    lookup      s_1 ... s_N, then places p: the symbol s_p
    dyck        a string of two kinds of brackets: whether it is a word of depth at most DEPTH
    equality    s_1 ... s_N t_1 ... t_N: whether s = t
    nearest     x_1 y_1 ... x_N y_N, then vectors q: the y of the x nearest to q

A string to be refused is a right one with two symbols exchanged, so that counts do not give it away.
Departures: several places or vectors are asked after one string, and brackets and equality have a target at
every prefix, which makes more of a string; what is reported of these two is the answer after the whole string
alone.
"""

import math

import torch
import torch.nn.functional as F

from .sequence_models import NONE, SequenceModel, interleaved

SYMBOLS = 8                     # of lookup; a power of 2
LETTERS = 4                     # of equality
DEPTH = 2
DIMENSIONS = 12                 # of the vectors of nearest
QUERIES = 8
BRACKETS = "()[]"


# ---- tasks: (strings, length N, generator) -> (inputs (B, T, width of the task), targets (B, T)) -----------

def one_hot(ids, num_classes):
    return F.one_hot(ids, num_classes).float()


def lookup(num, length, generator, num_places=None):
    """num_places: of the longest string that the model reads, at least the length."""
    symbols = torch.randint(SYMBOLS, (num, length), generator=generator)
    places = torch.randint(length, (num, QUERIES), generator=generator)
    return lookup_of(symbols, places, num_places or length)


def lookup_of(symbols, places, num_places):
    """The batch of strings (B, N) and of the places (B, Q) asked, from 0."""
    num, length = symbols.shape
    inputs = one_hot(torch.cat((symbols, SYMBOLS + places), 1), SYMBOLS + num_places)
    nothing = torch.full((num, length), NONE)
    return inputs, torch.cat((nothing, symbols.gather(1, places)), 1)


def prefixes(brackets, depth=DEPTH):
    """brackets (B, T), numbers of BRACKETS -> (B, T): of each prefix 0 if no word of depth at most `depth`
    begins with it, 2 if it is a word, else 1."""
    num, length = brackets.shape
    stack = torch.full((num, depth + 1), NONE)
    height, alive, found = torch.zeros(num, dtype=torch.long), torch.ones(num, dtype=torch.bool), []
    rows = torch.arange(num)
    for t in range(length):
        kind, closes = brackets[:, t] // 2, brackets[:, t] % 2 == 1
        is_last = (height > 0) & (stack[rows, (height - 1).clamp(min=0)] == kind)
        fits = torch.where(closes, is_last, height < depth)
        alive = alive & fits
        stack[rows, height] = torch.where(closes, stack[rows, height], kind)
        height = torch.where(alive, height + 1 - 2 * closes.long(), height)
        found.append(torch.where(alive, 1 + (height == 0).long(), 0))
    return torch.stack(found, 1)


def words(num, length, generator):
    """Words (num, length) of depth at most DEPTH: a bracket opens or closes by chance where both may be."""
    assert length % 2 == 0, length
    stack, height = torch.zeros(num, DEPTH + 1, dtype=torch.long), torch.zeros(num, dtype=torch.long)
    rows, made = torch.arange(num), []
    for t in range(length):
        opens = torch.rand(num, generator=generator) < 0.5
        opens = ((opens | (height == 0)) & (height < DEPTH)) & (height < length - t)
        kind = torch.randint(2, (num,), generator=generator)
        made.append(torch.where(opens, 2 * kind, 2 * stack[rows, (height - 1).clamp(min=0)] + 1))
        stack[rows, height] = torch.where(opens, kind, stack[rows, height])
        height = height + torch.where(opens, 1, -1)
    return torch.stack(made, 1)


def exchanged(strings, wrong, generator):
    """The strings (B, N), each with two symbols exchanged so that wrong(strings) (B,) holds."""
    strings, num = strings.clone(), len(strings)
    left = torch.arange(num)
    for _ in range(1000):
        places = torch.rand(len(left), strings.shape[1], generator=generator).argsort(1)[:, :2]
        other = strings[left].scatter(1, places, strings[left].gather(1, places.flip(1)))
        is_wrong = wrong(other, left)
        strings[left[is_wrong]] = other[is_wrong]
        left = left[~is_wrong]
        if not len(left):
            break
    # What has one symbol alone cannot be changed, and stays; the targets say so.
    return strings


def dyck(num, length, generator):
    strings = words(num, length, generator)
    half = num // 2
    strings[:half] = exchanged(strings[:half], lambda some, _: prefixes(some)[:, -1] != 2, generator)
    return one_hot(strings, len(BRACKETS)), (prefixes(strings) == 2).long()


def equality(num, length, generator):
    first = torch.randint(LETTERS, (num, length), generator=generator)
    second, half = first.clone(), num // 2
    second[:half] = exchanged(first[:half], lambda some, left: (some != first[left]).any(1), generator)
    same = (first == second).long().cumprod(1)
    return one_hot(torch.cat((first, second), 1), LETTERS), torch.cat((torch.full_like(first, NONE), same), 1)


def nearest(num, length, generator):
    """Vectors of +-1, labels 0 or 1 in a column of +-1 beside them. Each q is one of the x with one entry
    turned. Of several nearest ones the first counts."""
    def signs(*shape):
        return 2.0 * torch.randint(2, shape, generator=generator) - 1
    x, y = signs(num, length, DIMENSIONS), torch.randint(2, (num, length), generator=generator)
    asked = torch.randint(length, (num, QUERIES), generator=generator)
    turned = one_hot(torch.randint(DIMENSIONS, (num, QUERIES), generator=generator), DIMENSIONS)
    q = x.gather(1, asked[..., None].expand(-1, -1, DIMENSIONS)) * (1 - 2 * turned)
    answers = y.gather(1, (q @ x.transpose(1, 2)).argmax(-1))                       # (B, Q)
    nothing = torch.full((num, 2 * length), NONE)
    return torch.cat((interleaved(x, y), F.pad(q, (0, 1))), 1), torch.cat((nothing, answers), 1)


TASKS = {"lookup": lookup, "dyck": dyck, "equality": equality, "nearest": nearest}
CLASSES = {"lookup": SYMBOLS, "dyck": 2, "equality": 2, "nearest": 2}


def sizes(task, length):
    """(width of a task's inputs, tokens of its sequences) at a length N."""
    return {"lookup": (SYMBOLS + length, length + QUERIES), "dyck": (len(BRACKETS), length),
            "equality": (LETTERS, 2 * length), "nearest": (DIMENSIONS + 1, 2 * length + QUERIES)}[task]


def answered(task, correct):
    """What is reported of each string, of `right` (B, T): the share of its questions, or the last answer."""
    return correct[:, -1] if task in ("dyck", "equality") else correct.nanmean(1)


# ---- the construction --------------------------------------------------------------------------------------

GAMMA = 0.5         # the greatest inner product of two position vectors, over that of one with itself
LOUD = 100.0        # of a place that is asked, so that where it is asked hardly counts


def width_bound(length, gamma=GAMMA):
    """The width k at which `length` vectors of k random signs have, by Hoeffding and the sum over all pairs,
    inner products of at most gamma k with a probability above 0: length^2 / 2 exp(-gamma^2 k / 2) < 1. The
    paper says O(log N), by the lemma of Johnson and Lindenstrauss; the constants are ours."""
    return math.floor(2 * math.log(length ** 2 / 2) / gamma ** 2) + 1


def position_vectors(length, width, generator):
    """(length, width) of signs, with inner products of at most GAMMA width where such vectors were found: one
    that is too near to an earlier one is drawn anew, some times."""
    vectors = torch.empty(length, width)
    for i in range(length):
        for _ in range(20):
            vectors[i] = 2.0 * torch.randint(2, (width,), generator=generator) - 1
            if not i or (vectors[:i] @ vectors[i]).amax() <= GAMMA * width:
                break
    return vectors


@torch.no_grad()
def index_lookup(length, width, generator):
    """A one-layer SequenceModel that looks up every place of strings of up to `length` symbols, of the width
    `width` + log2 SYMBOLS. Its weights are written down, nothing is trained.

    A token of the string is (T(i), bits of s_i), with T(i) the position vector and bits of +-1; the place p
    that is asked is (LOUD T(p), 0). The query scores key i by beta <T(p), T(i)> / width, and the values are
    the bits. With beta (1 - gamma) = ln 4 N, all other tokens of the string together have about a quarter of
    the weight of the right one. So each bit of the sum has the right sign, and the head's greatest logit is
    that of s_p. Places that are asked have no bits, so they take weight from all tokens of the string alike.
    """
    num_bits = int(math.log2(SYMBOLS))
    bits = 2.0 * (torch.arange(SYMBOLS)[:, None] >> torch.arange(num_bits) & 1) - 1         # (SYMBOLS, bits)
    T = position_vectors(length, width, generator)
    total = width + num_bits + (width + num_bits) % 2                       # heads of an even width
    model = SequenceModel("transformer", 1, total, SYMBOLS + length, SYMBOLS, length + QUERIES, num_heads=1)
    for parameter in model.parameters():
        parameter.zero_()
    where = slice(width, width + num_bits)
    model.embed.weight[where, :SYMBOLS] = bits.T
    model.embed.weight[:width, SYMBOLS:] = LOUD * T.T
    model.places[:length, :width] = T
    block, at = model.layers[0], torch.arange(width)
    # RMSNorm divides a token of the string by sqrt((width + bits) / total), a place by sqrt(width / total).
    of_key, of_query = math.sqrt((width + num_bits) / total), math.sqrt(width / total)
    beta = math.log(4 * length) / (1 - GAMMA)
    block.self_attn.q_proj.weight[at, at] = beta / width * of_key * of_query * math.sqrt(total)
    block.self_attn.k_proj.weight[at, at] = 1.0
    there = torch.arange(width, width + num_bits)
    block.self_attn.v_proj.weight[there, there] = 1.0
    block.self_attn.o_proj.weight[there, there] = 1.0
    for norm in (block.input_layernorm, block.post_attention_layernorm, model.norm):
        norm.weight.fill_(1.0)
    model.head.weight[:, where] = bits
    return model


def hardest(length, num, generator):
    """(strings, places) of lookup: every place of `num` random strings, and of strings whose symbol at the
    place asked stands nowhere else, while all others are its opposite in every bit."""
    places = torch.arange(length)
    symbols = torch.randint(SYMBOLS, (num, length), generator=generator).repeat_interleave(length, 0)
    own = torch.randint(SYMBOLS, (length, 1), generator=generator)
    alone = torch.where(places == places[:, None], own, SYMBOLS - 1 - own)              # (length, length)
    return torch.cat((symbols, alone)), torch.cat((places.repeat(num), places))[:, None]


@torch.no_grad()
def mistakes(model, num_places, length, num, generator):
    """How many of the `hardest` questions at a length a lookup model answers wrongly, and of how many."""
    strings, places = hardest(length, num, generator)
    wrong = 0
    for some, asked in zip(strings.split(256), places.split(256)):
        inputs, targets = lookup_of(some, asked, num_places)
        wrong += int((model(inputs)[:, -1].argmax(-1) != targets[:, -1]).sum())
    return wrong, len(strings)
