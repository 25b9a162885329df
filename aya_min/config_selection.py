"""The settings of how a stage chooses what it trains on while it trains (selection.py), and what of them does
not go together."""

from dataclasses import dataclass
from typing import Optional

from .command import setting

FROM_FILE = ("rho", "irreducible")              # the ways to choose that read irreducible losses
WITH_MODEL = ("rho", "loss", "grad-norm")       # those that score with the model
LARGE_BATCH = 10                        # RHO-LOSS's code keeps 32 of 320 examples


@dataclass
class Selecting:
    """Settings of choosing, which pretrain and sft have beside those of config.Training."""
    select: Optional[str] = setting(
        None,
        help="choose what is trained on: each step scores a large batch with the model as it is and trains "
             "on the --batch-size best. rho: the loss less the irreducible loss (RHO-LOSS, arXiv "
             "2206.07137); loss: the highest loss; irreducible: the lowest irreducible loss; grad-norm: the "
             "highest norm of the gradient at the logits (arXiv 1803.00942); uniform: drawn evenly "
             "instead",
        choices=["rho", "loss", "irreducible", "uniform", "grad-norm"])
    select_from: Optional[int] = setting(
        None, "[2, 100000]",
        f"the large batch is this many times --batch-size (unset: {LARGE_BATCH}, as in RHO-LOSS's code); "
        "--epochs counts the examples that are trained on, so the data is looked through this many times as "
        "often")
    select_tokens: Optional[float] = setting(
        None, "(0, 1)",
        "choose tokens instead of examples (RHO-1, arXiv 2404.07965): there is no large batch, and of a "
        "batch's supervised tokens this share is trained on, 0.6 without a number", const=0.6)
    irreducible: Optional[str] = setting(
        None, help="file of irreducible losses, which train.py irreducible writes; rho and irreducible need "
                   "it", metavar="PATH")
    replay: Optional[str] = setting(
        None, help="train on what another run chose, which its RUN/selected.jsonl says; the same examples, "
                   "tokenizer and --batch-size, but any model", metavar="PATH")

    @property
    def chooses(self):
        return bool(self.select or self.replay)

    @property
    def num_scored(self):
        """Examples that the model scores in each step."""
        return self.batch_size * (self.select_from or 1) if self.select in WITH_MODEL else 0

    def __post_init__(self):
        """Refuse what does not go together, and fill in what is unset, so that config.json says it."""
        for name in ("select_from", "select_tokens", "irreducible"):
            value = getattr(self, name)
            if value is not None and not self.select:
                raise ValueError(f"--{name.replace('_', '-')} {value} goes with --select; give it, or leave "
                                 "this out")
        if self.replay and self.select:
            raise ValueError(f"--replay {self.replay} chooses what another run chose; leave --select out")
        if self.select in FROM_FILE and not self.irreducible:
            raise ValueError(f"--select {self.select} needs --irreducible, a file that train.py irreducible "
                             "writes")
        if self.irreducible and self.select not in FROM_FILE:
            raise ValueError(f"--irreducible {self.irreducible} is for {' and '.join(FROM_FILE)}; --select "
                             f"{self.select} does not read it, leave it out")
        if self.select_tokens is not None and self.select_from is not None:
            raise ValueError(f"--select-from {self.select_from}: --select-tokens chooses within a batch and "
                             "has no large batch; leave one of them out")
        if self.select and self.select_tokens is None:
            self.select_from = self.select_from or LARGE_BATCH
