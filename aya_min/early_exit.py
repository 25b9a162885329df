"""Early exit: a SideNet answers where its largest probability passes a threshold, else its MainNet does
("Add a SideNet to your MainNet", arXiv 2007.13512; classifier.py has both nets).

What it costs is counted in floating-point operations of the forward (flops.py) and is a share of those of the
MainNet alone. A text that leaves costs the layers below the SideNet and the SideNet; one that stays costs the
SideNet and the whole MainNet.
"""

import time

import numpy as np
import torch

from .classify import collate_texts
from .data import batches_in_order
from .flops import head_flops, layers_flops

NUM_BINS = 15       # of confidences, as in arXiv 1706.04599
TEXTS = 64          # of a batch


# ---- both nets on texts ------------------------------------------------------------------------------------

@torch.no_grad()
def answer(main, side, batch, threshold):
    """Logits (B, M) of the net that answers each text, and whether that is the SideNet (B,).

    A text leaves if the largest softmax of the SideNet is above the threshold: all leave at 0, none at 1 and
    above. Rows that leave are taken out of the batch before the remaining layers, which are not computed at
    all if none is left. main, side: a Classifier and a SideNet of it, plain, in eval mode."""
    layer, lengths = side.config.sidenet_layer, batch.lengths
    x = main.model.through(main.model.embedded(batch.input_ids), lengths, last=layer)
    logits = side.head(x, lengths)
    leaves = logits.softmax(1).amax(1) > threshold
    stay = (~leaves).nonzero()[:, 0]
    if len(stay):
        lengths = lengths[stay]
        # What stays needs no more columns than its longest text; all of them where nothing left.
        width = x.shape[1] if len(stay) == len(x) else -(-int(lengths.max()) // 16) * 16
        x = main.model.through(x[stay, :width], lengths, first=layer)
        logits[stay] = main.head(x, lengths)
    return logits, leaves


def batches_of(items, pad_id, device):
    """[(indices, batch), ...] of all items, on the device."""
    return [(indices, batch.to(device)) for indices, batch in batches_in_order(
        items, lambda some: collate_texts(some, pad_id), TEXTS)]


def in_item_order(batches, found):
    """The results of batches, each a tensor of its rows, as one tensor in the order of the items."""
    order = torch.tensor([i for indices, _ in batches for i in indices])
    rows = torch.cat(found).cpu()
    return torch.empty_like(rows).index_copy(0, order, rows)


def probabilities(main, side, batches):
    """(softmax (N, M) of the MainNet alone, that of the SideNet alone) for all items, as arrays."""
    both = [torch.stack([answer(main, side, batch, t)[0].softmax(1) for t in (1.0, 0.0)], 1)
            for _, batch in batches]                                        # (B, 2, M) each
    return in_item_order(batches, both).double().numpy().transpose(1, 0, 2)


def seconds_at(main, side, batches, thresholds, repeats):
    """The fastest of `repeats` passes over all batches at each threshold. The thresholds take turns, so that
    a slow moment of the machine does not hit one of them alone."""
    found = [[] for _ in thresholds]
    for _ in range(repeats):
        for times, threshold in zip(found, thresholds):
            wait = torch.cuda.synchronize if batches[0][1].lengths.is_cuda else (lambda: None)
            wait()
            started = time.perf_counter()
            for _, batch in batches:
                answer(main, side, batch, threshold)
            wait()
            times.append(time.perf_counter() - started)
    return [min(times) for times in found]


# ---- calibration -------------------------------------------------------------------------------------------

def bins_of(confidences, num_bins=NUM_BINS):
    """The bin m + 1 of each confidence (N,), above 0, where bin m + 1 is (m/M, (m+1)/M]."""
    return np.ceil(np.asarray(confidences) * num_bins).astype(int).clip(1, num_bins)


def reliability(confidences, right, num_bins=NUM_BINS):
    """[(number, mean confidence, accuracy), ...] of the bins (m/M, (m+1)/M] that hold answers (arXiv
    1706.04599, section 2). confidences: (N,) largest probabilities, above 0. right: (N,) bool."""
    bins = bins_of(confidences, num_bins)
    return [(int(mine.sum()), float(np.mean(confidences[mine])), float(np.mean(right[mine])))
            for mine in (bins == m for m in range(1, num_bins + 1)) if mine.any()]


def calibration_error(confidences, right, num_bins=NUM_BINS):
    """The expected calibration error, eq. 3 of arXiv 1706.04599, from 0 to 1:

        ECE = sum over bins m of |B_m| / N  |acc(B_m) - conf(B_m)|

    Known gap: of few answers it is too high, also for a calibrated net, as each bin holds one or two.
    """
    bins = reliability(confidences, right, num_bins)
    return sum(num * abs(accuracy - confidence) for num, confidence, accuracy in bins) / len(right)


# ---- what a threshold costs --------------------------------------------------------------------------------

def operations(main, side, lengths):
    """(operations up to the SideNet's answer, those of the MainNet alone) of each text, two arrays (N,).
    main, side: their configs."""
    at_exit = [layers_flops(main, [T], last=side.sidenet_layer) + head_flops(side) for T in lengths]
    of_main = [layers_flops(main, [T]) + head_flops(main) for T in lengths]
    return np.array(at_exit, np.float64), np.array(of_main, np.float64)


def tradeoff(confidences, side_right, main_right, at_exit, of_main, side_head):
    """{"threshold", "accuracy", "left", "cost"}: arrays with one entry for each way in which the texts can be
    divided, from all that leave (threshold 0) to none (the largest confidence).

    left: the share of the texts that leave. cost: operations as a share of the MainNet's alone. at_exit,
    of_main: of `operations`; side_head: operations of the SideNet without the layers below, which a text that
    stays costs beside the MainNet."""
    order = np.argsort(confidences, kind="stable")                          # the first to stay come first
    N, ordered = len(order), np.asarray(confidences)[order]

    def stays_then_leaves(if_stays, if_leaves):
        """The sums where the first k stay and the others leave, for k from 0 to N."""
        return np.concatenate([[0], np.cumsum(if_stays[order])]) + np.concatenate(
            [np.cumsum(if_leaves[order][::-1])[::-1], [0]])
    right = stays_then_leaves(main_right.astype(float), side_right.astype(float))
    spent = stays_then_leaves(of_main + side_head, at_exit)
    # Equal confidences leave or stay together: only the last of them is a threshold.
    ends = np.concatenate([[0], np.flatnonzero(np.append(ordered[1:] > ordered[:-1], True)) + 1])
    return {"threshold": np.concatenate([[0.0], ordered])[ends], "accuracy": right[ends] / N,
            "left": 1 - ends / N, "cost": spent[ends] / of_main.sum()}


def at_threshold(curve, threshold):
    """The index of a tradeoff's entry that divides the texts as this threshold does."""
    return max(0, int(np.searchsorted(curve["threshold"], threshold, side="right")) - 1)


def choose(curve, accuracy=None, cost=None):
    """The threshold of the least cost with this accuracy or more, or of the best accuracy at this cost or
    less. ValueError if no threshold has it."""
    if accuracy is not None:
        fit = np.flatnonzero(curve["accuracy"] >= accuracy)
        best = fit[np.argmin(curve["cost"][fit])] if len(fit) else None
    else:
        fit = np.flatnonzero(curve["cost"] <= cost)
        best = fit[np.lexsort((curve["cost"][fit], -curve["accuracy"][fit]))[0]] if len(fit) else None
    if best is None and accuracy is not None:
        raise ValueError(f"--accuracy {accuracy}: no threshold reaches it on --validation, the best is "
                         f"{curve['accuracy'].max():.4f}; ask for less")
    if best is None:
        raise ValueError(f"--cost {cost}: the least on --validation, where all texts leave, is "
                         f"{curve['cost'].min():.4f} of the MainNet's operations; train a SideNet on an "
                         "earlier layer")
    # Where no text leaves here, none shall leave elsewhere.
    return 1.0 if curve["left"][best] == 0 else float(curve["threshold"][best])
