"""Log-probs without gradients: the reference of DPO and KTO, computed once and stored with the items, and the
reference and the policy of rl before a step."""

import hashlib
import os

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from . import checkpoint, distributed
from .data import batches_in_order, collate, in_step, rows_of
from .files import check_place, publish_file, scratch
from .loop import autocast
from .losses import supervised_logps
from .model import CohereForCausalLM
from .token_logps import sum_by_row


@torch.no_grad()
def answer_logps(model, items, pad_id, device, settings, size=64, name="the reference", by_token=False):
    """Log-probs (nats, summed over supervised tokens) of each example, (N,), or of each pair's two answers,
    (N, 2), under a plain or sharded model, on every rank. The ranks share the work, `size` rows at a time.
    by_token: instead a list of the tensors (tokens,) of each example's supervised tokens, on the CPU; of a
    critic.Critic they are its values.

    The dtype is that of the training: another one would put the rounding of every token into the ratio.
    Raises ValueError for a log-prob that is not finite; `name` names the model in it."""
    was_training, done = model.training, []
    model.eval()
    model.model.packing = settings.packing
    num_sides = len(items[0].sides)
    batches = batches_in_order(items, lambda some: collate(rows_of(some), pad_id), size // num_sides)
    for indices, batch in in_step(batches):
        batch = batch.to(device)
        with autocast(model, settings, device):
            logps = supervised_logps(model, batch)                          # (tokens,)
        sums = sum_by_row(logps, batch.mask)                                # (rows,)
        found = sums.view(num_sides, -1).T.tolist()
        if by_token:
            # Copies, because a part of a tensor is sent to the other ranks with the whole of it.
            found = [each.clone() for each in logps.cpu().split(batch.mask.sum(1).tolist())]
        done += zip(indices, found)
    model.train(was_training)
    logps = dict(sum(distributed.gather_objects(done), []))
    if by_token:
        logps = [logps[i] for i in range(len(items))]
        check_logps(torch.stack([each.sum() for each in logps]), items, name, model)
        return logps
    logps = torch.tensor([logps[i] for i in range(len(items))]).squeeze(1)
    check_logps(logps, items, name, model)
    return logps


def check_logps(logps, items, name, model=None):
    """Raise ValueError, with model and row, if a log-prob of these items is not finite. A collective if the
    model is given, whose weights are looked at first then."""
    bad = [i for i, fine in enumerate(logps.isfinite().view(len(items), -1).all(1).tolist()) if not fine]
    if bad:
        first = items[bad[0]].sides[0]
        fault = model is not None and checkpoint.weights_fault(model)
        remedy = f"look at the weights of {name} and at this row"
        if fault:
            remedy = f"{fault}; copy or train the model again"
        raise ValueError(f"{first.where}: its log-prob under {name} is {logps[bad[0]].tolist()}, not finite "
                         f"({len(bad)} of {len(items)} rows); {remedy}")


def reference_rows(settings):
    """Rows of a batch in DPO's reference pass: four times those of a micro-batch of pairs, because nothing is
    kept for a backward, but at most 32 (64 were slower on a CPU)."""
    return min(32, 8 * (settings.micro_batch_size or 4))


def store_reference(model, pairs, pad_id, device, settings, path, model_print):
    """Store the reference's log-probs in the pairs, so that training holds one model in memory, and in the
    file `path`, which later runs read instead. The file's key names the model (model_print: its
    distributed.fingerprint), the texts and the compute dtype.

    Raises ValueError for a file with another key, a damaged one, and one that cannot be written."""
    texts = hashlib.sha256()
    for pair in pairs:
        for side in pair.sides:
            texts.update(len(side.ids).to_bytes(8, "little") + side.ids.tobytes() + side.mask.tobytes())
    key = f"{model_print} {texts.hexdigest()} {settings.dtype}"

    def read():
        if not os.path.lexists(path):
            return None
        try:
            with safe_open(path, "pt") as file:
                logps, about = file.get_tensor("ref_logps"), file.metadata() or {}
        except (SafetensorError, OSError):
            logps, about = torch.empty(0), {}
        if (about.get("key"), about.get("sha256")) != (key, sha256_of(logps)):
            raise ValueError(f"{path}: not the reference log-probs of this model, these pairs and "
                             f"{settings.dtype}; remove it, or give another file")
        check_logps(logps, pairs, f"the reference ({path})")
        return logps

    def write(logps):
        with scratch(path) as folder:
            try:
                save_file({"ref_logps": logps}, folder / "file", {"key": key, "sha256": sha256_of(logps)})
            except SafetensorError as error:
                raise ValueError(f"{path}: the reference log-probs cannot be written ({error}); make room, "
                                 "or give another file") from None
            if os.path.lexists(path):
                # Another run wrote the file in the meantime.
                read()
            else:
                publish_file(folder / "file", path)

    logps = distributed.from_main(read)
    if logps is None:
        distributed.from_main(lambda: check_place(path))
        logps = answer_logps(model, pairs, pad_id, device, settings, reference_rows(settings))  # (pairs, 2)
        distributed.from_main(lambda: write(logps))
    for pair, both in zip(pairs, logps):
        pair.ref_logps = both.numpy()


def sha256_of(tensor):
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


@torch.no_grad()
def copy_of(model, settings, device, architecture=CohereForCausalLM):
    """A copy of the model, sharded in the same way. rl's reference is the policy's copy at the start.
    architecture: of the copy, which takes the tensors of its own names."""
    with torch.device("meta"):
        other = architecture(model.config)
    distributed.shard(other, getattr(torch, settings.dtype), settings.replicate, settings.cpu_offload)
    other.to_empty(device="cpu" if settings.cpu_offload else device)
    theirs = model.state_dict()
    for name, own in other.state_dict().items():
        distributed.own_rows(own)[0].copy_(distributed.own_rows(theirs[name])[0])
    return other
