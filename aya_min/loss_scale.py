"""Dynamic loss scaling for --dtype float16 (arXiv 1710.03740, section 3.2, with the numbers of torch's
GradScaler): float16 has 5 bits for the exponent, so small gradients would become 0.

The loss is multiplied by the scale before the backward, and the gradients, which are kept in fp32, are
divided by it before their norm is taken and clipped. A step whose gradients are not finite is skipped: the
weights, the moments and AdamW's count stay as they were, and the scale is halved. After GROWTH_INTERVAL good
steps in succession it is doubled. Scales are powers of two, so that they round nothing.

The norm is that of all ranks' gradients, so all ranks skip the same steps. The state of a run holds the
scale and the counts. In other dtypes the scale is 1, nothing is skipped and nothing is saved.
"""

import math
import sys

import torch
from tqdm import tqdm

from . import distributed

START, GROWTH_INTERVAL = 2.0 ** 16, 2000


class LossScale:
    """scale; good: the good steps since it changed; skipped: the steps skipped since the run began."""

    def __init__(self, dtype):
        self.is_dynamic = dtype == "float16"
        self.scale, self.good, self.skipped = START if self.is_dynamic else 1.0, 0, 0

    def tensors(self):
        """{name: tensor} for a run's state."""
        values = torch.tensor([self.scale, self.good, self.skipped], dtype=torch.float64)
        return {"loss_scale": values} if self.is_dynamic else {}

    def load(self, tensors):
        """Take the values of `tensors`, which a state was loaded into. -> how many steps were skipped"""
        if self.is_dynamic:
            self.scale, self.good, self.skipped = tensors["loss_scale"].tolist()
        return self.skipped

    @torch.no_grad()
    def unscale(self, model):
        """Divide the gradients by the scale, in place."""
        if self.is_dynamic:
            for p in model.parameters():
                if p.grad is not None:
                    distributed.own_rows(p.grad)[0].div_(self.scale)

    def takes(self, step, loss, grad_norm):
        """Whether to take the step; if not, because its gradients overflowed, the scale is halved and rank 0
        says so. A loss that is not finite is no matter of the scale, and below 1 there is nothing to gain:
        those are faults, which the caller refuses."""
        if not self.is_dynamic:
            return True
        if math.isfinite(grad_norm):
            self.good += 1
            if self.good == GROWTH_INTERVAL:
                self.scale, self.good = 2 * self.scale, 0
            return True
        if not math.isfinite(loss) or self.scale < 2:
            return True
        self.scale, self.good, self.skipped = self.scale / 2, 0, self.skipped + 1
        if distributed.is_main():
            tqdm.write(f"step {step}: skipped, its gradients overflowed in float16; the loss scale is now "
                       f"{self.scale:g}, {self.skipped:g} steps were skipped so far", file=sys.stderr)
        return False

    def logged(self):
        """{name: value} for the log, after the step."""
        return {"loss_scale": self.scale, "skipped_steps": int(self.skipped)} if self.is_dynamic else {}
