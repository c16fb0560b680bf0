"""What the loop of pretrain.py asks of an objective."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gcssl.config import AugmentConfig


@dataclass(frozen=True)
class Setup:
    """What an objective is told of its run."""

    augment: AugmentConfig
    img_size: tuple[int, int]  # H W in pixels
    total_steps: int
    steps_per_epoch: int


class Objective(nn.Module):
    """Owns encoder, heads and buffers; gets tensors, returns scalars; does not step, log, save or move data.

    A subclass is made from its config, the encoder and the run's `Setup`, sets `encoder` and `draw`, and writes
    `forward`. The rest does nothing unless it is written anew. A step is that of the optimizer, from 0.
    """

    default_encoder = "student"  # student | teacher: the one that the objective's paper evaluates
    couples_batch: Any = False  # whether the loss compares the images of a batch: then micro-batches give another loss
    n_pictures = 0  # images that it wants to show after an epoch
    encoder: Any
    draw: Callable[..., Any]  # (rng, (H, W)) -> a sample's ([(spec, view), ...], [mask h w or None, ...])

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Any]:
        """`loss`, and what else is logged, from {"views": [B 3 H W, ...], "masks": [B h w, ...]}; changes no buffer.

        Tensors of no dimension. Names that begin with an underscore are not logged, the loop's (meter.TAKEN) refused.
        """
        raise NotImplementedError

    def freeze(self, step: int) -> None:
        """Drop the gradients that step `step` must not use: called before they are clipped."""

    def after_step(self, step: int) -> None:
        """Commit what step `step` changes beside the parameters: teachers, centres, queues. Not called when skipped."""

    def schedules(self, step: int) -> dict[str, float]:
        """What was in force at step `step`, to be logged."""
        return {}

    def loss_changes(self, step: int) -> bool:
        """Whether a term joins the loss at step `step`, so that earlier losses say nothing of a spike."""
        return False

    def chance(self, global_batch: int) -> dict[str, float]:
        """What losses are while the embeddings say nothing, by their logged names: for the collapse watch."""
        return {}

    def grad_norms(
        self, out: dict[str, Any], step: int, log_every: int = 1, accumulate: int = 1, scaler: Any = None
    ) -> dict[str, Tensor]:
        """Norms of the gradients of parts of the loss, in the steps that log them: from what `forward` returned, before
        its backward pass, which fp16's `scaler` scales.
        """
        return {}

    def pictures(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Rows of images to be shown, n 3 H W in 0..1, of a batch of n_pictures; in eval mode without gradients."""
        return {}
