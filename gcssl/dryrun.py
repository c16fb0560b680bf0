"""A run built but not started, and its images looked at: what the doctor checks and the plan counts."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from gcssl.config import PretrainConfig
from gcssl.data import BadImage, Images, Splits, open_data
from gcssl.errors import UserError
from gcssl.eval.online import probe_parts
from gcssl.loader import Sizes, TrainSet, ViewMaker, batch_to_device, collate
from gcssl.pretrain import build_pretrain_backbone, check_objective, pretrain_sizes
from gcssl.rng import rng
from gcssl.runfolder import check_writable
from gcssl.shard import check_shard
from gcssl.ssl.objectives import make_objective
from gcssl.workers import ReportingSet, WorkerLoader

THUMBNAIL = 16  # pixels a side, grey, of the search for duplicates
SAMPLES = 4  # images of the batch that the model is checked on


@dataclass
class DoctorOptions:
    scan: int = 2000  # images looked at, of each split; 0: all
    minutes: float = 0.5  # of real training, by one process; 0: none
    processes: int = 1  # that the run will have


@dataclass
class DoctorConfig(PretrainConfig):
    doctor: DoctorOptions = field(default_factory=DoctorOptions)


@dataclass
class Scan:
    """Of the images looked at: index, sides, hash and thumbnail (rows of unit length), and the bad ones."""

    index: np.ndarray
    sides: np.ndarray  # n 2
    hashes: list[str]
    thumbnails: Tensor  # n 256
    bad: list[tuple[str, str]]  # where, why

    def part(self, chosen: np.ndarray) -> "Scan":
        """Those of `chosen`, a bool for each image."""
        hashes = [one for one, taken in zip(self.hashes, chosen, strict=True) if taken]
        return Scan(self.index[chosen], self.sides[chosen], hashes, self.thumbnails[torch.from_numpy(chosen)], [])


class _Look(ReportingSet):
    def __init__(self, images: Images, indices: np.ndarray) -> None:
        super().__init__(images)
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Any:
        index = int(self.indices[i])
        try:
            image = self.load(index)
        except BadImage as error:
            return index, self.images.where(index), str(error)
        grey = Image.fromarray(image).convert("L")
        small = np.asarray(grey.resize((THUMBNAIL, THUMBNAIL)), np.float32).ravel()
        return index, grey.size, hashlib.sha256(image.tobytes()).hexdigest(), small - small.mean()


def scan(images: Images, cfg: DoctorConfig) -> Scan:
    count = min(len(images), cfg.doctor.scan or len(images))
    chosen = np.sort(rng(0, len(images)).permutation(len(images))[:count])
    how: dict[str, Any] = {"num_workers": cfg.data.workers, "timeout": cfg.data.timeout, "collate_fn": list}
    loader = WorkerLoader(_Look(images, chosen), batch_size=64, **how)
    seen = [one for batch in loader for one in batch]
    good = [one for one in seen if len(one) == 4]
    thumbnails = torch.from_numpy(np.stack([one[3] for one in good])) if good else torch.zeros(0, THUMBNAIL**2)
    index, sides = np.array([one[0] for one in good]), np.array([one[1] for one in good]).reshape(-1, 2)
    bad = [one[1:] for one in seen if len(one) == 3]
    return Scan(index, sides, [one[2] for one in good], nn.functional.normalize(thumbnails, dim=1), bad)


@dataclass
class DryRun:
    """What the checks look at: the run, built but not started."""

    cfg: DoctorConfig
    data: Splits
    backbone: Any
    objective: Any
    sizes: Sizes
    seen: "dict[str, Scan]"
    refused: str  # why evaluations will refuse the test split, if they will

    def batch(self, count: int = SAMPLES) -> dict[str, Any]:
        """The first images of the training set as the objective gets them, again where there are fewer."""
        maker = ViewMaker(self.objective.draw, self.backbone.img_size, self.cfg.augment)
        dataset = TrainSet(self.data.train, maker, self.cfg.train.seed)
        items = [dataset[(0, i % len(dataset), i)] for i in range(count)]
        return batch_to_device(collate(items), "cpu", self.backbone.mean, self.backbone.std, self.cfg.augment)


def examine(cfg: DoctorConfig) -> DryRun:
    if cfg.out:
        check_writable(cfg.out, cfg.data.path)
    couples = check_objective(cfg)
    backbone = build_pretrain_backbone(cfg)
    data = open_data(cfg.data, backbone.img_size)
    sizes = pretrain_sizes(cfg, len(data.train), cfg.doctor.processes, couples)
    probe_parts(cfg, data.train)  # may refuse them
    splits = {"train": data.train}
    refused = ""
    try:
        if data.test is not None:
            splits["val"] = data.test
    except UserError as error:  # pretraining does not open it
        refused = str(error)
    seen = {name: scan(images, cfg) for name, images in splits.items()}
    objective = make_objective(cfg, backbone, sizes.total_steps, sizes.steps_per_epoch)
    check_shard(cfg.train, objective)
    return DryRun(cfg, data, backbone, objective, sizes, seen, refused)
