"""The signs of a collapse, watched on every optimizer step: which one stays, what it means, what usually helps."""

import math
from dataclasses import dataclass

PATIENCE = 100  # steps in a row; a single batch proves nothing
LEAST_STD = 0.01  # of feature_std; healthy runs here went from 0.03 to 0.9
LEAST_RANK = 1.5  # of feature_rank; healthy: 4 and more
LEAST_ENTROPY = 0.05  # nats of teacher_entropy; collapsed runs here had 0.04 and less, healthy ones 1 and more
LEAST_PREDICTION_STD = 0.001  # of prediction_std; runs that learn: 0.1 and more, on a plateau 0.003, dead: 0.0001
NEAR = 0.01  # share of ln K or of the chance loss


@dataclass(frozen=True)
class Sign:
    name: str
    told: str


class CollapseWatch:
    """`see` each step's values once the warm-up is over; it returns the signs that have stayed for `patience`
    steps, each once.

    chance: metric -> the loss of an objective whose embeddings say nothing, such as {"loss": ln K}.
    """

    def __init__(self, chance: dict[str, float], patience: int | None = None) -> None:
        self.chance, self.patience = chance, PATIENCE if patience is None else patience
        self.since: dict[str, int] = {}

    def see(self, values: dict[str, float]) -> list[Sign]:
        present = {sign.name: sign for sign in self.signs(values)}
        self.since = {name: self.since.get(name, 0) + 1 for name in present}
        return [present[name] for name, steps in self.since.items() if steps == self.patience]

    def state_dict(self) -> dict[str, int]:
        return dict(self.since)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.since = dict(state)

    def signs(self, values: dict[str, float]) -> list[Sign]:
        found = []
        if (std := values.get("feature_std", 1.0)) < LEAST_STD:
            told = f"feature_std {std:.2g} (healthy: 0.03 to 1): all images have one feature"
            found.append(Sign("feature_std", f"{told}; lower train.blr, raise objective.momentum or the batch"))
        if (rank := values.get("feature_rank", math.inf)) < LEAST_RANK:
            told = f"feature_rank {rank:.2f}: embeddings vary in one direction"
            found.append(Sign("feature_rank", f"{told}; lower train.blr, lengthen train.warmup_epochs"))
        if (entropy := values.get("teacher_entropy", math.inf)) < LEAST_ENTROPY:
            told = f"teacher_entropy {entropy:.2g} nats: the teacher gives each image one prototype, whichever it is"
            found.append(Sign("teacher_entropy", f"{told}; raise objective.momentum, lower train.blr"))
        if (std := values.get("prediction_std", 1.0)) < LEAST_PREDICTION_STD:
            told = f"prediction_std {std:.2g} (healthy: 0.002 to 1): all images get one prediction"
            found.append(Sign("prediction_std", f"{told}; lower train.blr, lengthen train.warmup_epochs"))
        for key, chance in self.chance.items():
            loss = values.get(key, math.inf)
            if abs(loss - chance) < NEAR * abs(chance):
                told = f"{key} {loss:.4g} stays at {chance:.4g}, that of embeddings that say nothing"
                cure = "lower train.blr or raise it, check augment.*"
                if "teacher_entropy" in values:
                    cure = "lower objective.teacher_temp (0.02), lengthen its warm-up and the last layer's freeze"
                found.append(Sign(key, f"{told}; {cure}"))
        return found
