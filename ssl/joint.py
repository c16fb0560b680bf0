"""Joint pretraining: a view objective and a masked one on ONE encoder, their losses added with weights.

share=false: the view objective's crops and one crop of the masked objective. share=true: no third crop; view
1 is masked, and its one pass through the encoder serves both parts (the teacher sees it whole): two passes of
the student instead of three. The pooled feature of view 1 is then the mean of the last map, as GC ViT pools.
"""

import dataclasses
from dataclasses import dataclass, field, make_dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from gcssl.augment import View, ViewSpec
from gcssl.config import AugmentConfig
from gcssl.errors import UserError
from gcssl.models.build import Backbone
from gcssl.models.gcvit import GCViT
from gcssl.ssl.base import Objective, Setup
from gcssl.ssl.byol import BYOL, BYOLConfig
from gcssl.ssl.dino import DINO, DINOConfig
from gcssl.ssl.esvit import EsViT, EsViTConfig
from gcssl.ssl.gather import all_reduce_mean
from gcssl.ssl.localmim import LocalMIM, LocalMIMConfig
from gcssl.ssl.mae import MAE, MAEConfig
from gcssl.ssl.masking import MaskedDraw
from gcssl.ssl.moby import MoBY, MoBYConfig
from gcssl.ssl.mocov3 import MoCoV3, MoCoV3Config
from gcssl.ssl.simclr import SimCLR, SimCLRConfig
from gcssl.ssl.simdino import SimDINO, SimDINOConfig
from gcssl.ssl.simmim import SimMIM, SimMIMConfig
from gcssl.ssl.ummae import UMMAE, UMMAEConfig, UniformDraw
from gcssl.ssl.vicreg import VICReg, VICRegConfig
from gcssl.ssl.views import CropDraw, run_views

MASKED: dict[str, tuple[type, type]] = {
    "simmim": (SimMIM, SimMIMConfig),
    "localmim": (LocalMIM, LocalMIMConfig),
    "ummae": (UMMAE, UMMAEConfig),
    "mae": (MAE, MAEConfig),
}
SHARING = ("localmim", "simmim")  # whose encoder sees the whole of view 1, hidden units too
VIEW: dict[str, tuple[type, type]] = {
    "simclr": (SimCLR, SimCLRConfig),
    "mocov3": (MoCoV3, MoCoV3Config),
    "moby": (MoBY, MoBYConfig),
    "byol": (BYOL, BYOLConfig),
    "vicreg": (VICReg, VICRegConfig),
    "dino": (DINO, DINOConfig),
    "simdino": (SimDINO, SimDINOConfig),
    "esvit": (EsViT, EsViTConfig),
}

BALANCE_EVERY = 10  # optimizer steps
NORMS_EVERY = 5  # logged steps: a measurement is two more backward passes
MOST_SCALE = 1e4


def part_keys() -> list[tuple[str, Any, Any]]:
    """Every key of every part, for make_dataclass: None keeps the part's default."""
    keys: dict[str, tuple[str, Any, Any]] = {}
    for _, schema in (MASKED | VIEW).values():
        for f in dataclasses.fields(schema):
            if f.name != "name":
                keys[f.name] = (f.name, f.type | None, field(default=None, metadata=f.metadata))  # type: ignore[operator]
    return list(keys.values())


@dataclass
class JointConfig(make_dataclass("PartKeys", part_keys())):  # type: ignore[misc]
    """The parts' own keys stand here too."""

    parts: ClassVar = [schema for _, schema in (MASKED | VIEW).values()]
    name: str = "joint"
    masked: str = "simmim"
    view: str = "mocov3"
    weights: list[float] = field(default_factory=lambda: [1.0, 1.0])  # of masked, of view
    share: bool = False
    balance: bool = False  # scale the parts, every ten steps, to gradients of norms weights[0] : weights[1]


@dataclass(frozen=True)
class JointDraw:
    """The view objective's crops, then the masked one's crop; with `share` its mask on view 1 and no crop of
    its own.
    """

    view: CropDraw
    masked: MaskedDraw | UniformDraw
    share: bool

    def __call__(
        self, rng: np.random.Generator, img_size: tuple[int, int]
    ) -> tuple[list[tuple[ViewSpec, View]], list[np.ndarray | None]]:
        views, masks = self.view(rng, img_size)
        crops, hidden = self.masked(rng, img_size)
        if self.share:
            return views, hidden + masks[1:]
        return views + crops, masks + hidden


def part_config(cfg: JointConfig, schema: type) -> Any:
    """The config of one part: its own defaults, overridden by the keys that `cfg` sets."""
    names = [f.name for f in dataclasses.fields(schema) if f.name != "name"]
    return schema(**{name: getattr(cfg, name) for name in names if getattr(cfg, name, None) is not None})


def check_config(cfg: JointConfig) -> None:
    """UserError for an unknown part, weights that cannot be, or a key of neither part."""
    for key, choices in (("masked", MASKED), ("view", VIEW)):
        if getattr(cfg, key) not in choices:
            raise UserError(f"objective.{key}={getattr(cfg, key)} is unknown; one of {', '.join(sorted(choices))}")
    known = {f.name for schema in (MASKED[cfg.masked][1], VIEW[cfg.view][1]) for f in dataclasses.fields(schema)}
    optional = [f.name for f in dataclasses.fields(JointConfig) if f.default is None]
    if foreign := [name for name in optional if getattr(cfg, name) is not None and name not in known]:
        unset = " ".join(f"objective.{name}=null" for name in foreign)
        kept = [name for name in optional if getattr(cfg, name) is not None and name in known]
        told = f"neither {cfg.masked} nor {cfg.view} has it; leave it out: {unset}"
        recipes = f"; {', '.join(kept)} stay as given: compare the parts' own in configs/pretrain" if kept else ""
        raise UserError(f"objective.{foreign[0]}: {told}{recipes}")
    if cfg.share and cfg.masked not in SHARING:
        raise UserError(f"objective.share=true: {cfg.masked} drops what it hides; one of {', '.join(SHARING)} can")
    if len(cfg.weights) != 2 or min(cfg.weights) < 0 or max(cfg.weights) <= 0:
        raise UserError(f"objective.weights={list(cfg.weights)} must be two numbers >= 0, not both 0: masked, view")
    if cfg.balance and min(cfg.weights) == 0:
        raise UserError(f"objective.balance=true: weights={list(cfg.weights)} must both be above 0; 1 and 1 is even")


def lend(part: nn.Module, name: str) -> nn.Module:
    """Take module `name` of `part` out of its registry while `part.name` still finds it.

    Joint registers encoder and teacher itself, so that each weight has one name in its state dict and no
    part's objective needs to know whether it is alone.
    """
    module = part._modules.pop(name)
    assert module is not None
    object.__setattr__(part, name, module)
    return module


class Joint(Objective):
    """Holds encoder.*, teacher.*, and the parts' heads under masked.* and view.*."""

    scale: Tensor  # of each part, when balanced
    measured: Tensor | None  # norms of the parts' gradients in the last forward, for the scale

    def __init__(self, cfg: JointConfig, encoder: Backbone, setup: Setup) -> None:
        super().__init__()
        check_config(cfg)
        self.names, self.weights, self.share = (cfg.masked, cfg.view), tuple(cfg.weights), cfg.share
        self.balance, self.measured = cfg.balance, None
        if cfg.balance:
            self.register_buffer("scale", torch.ones(2))
        # Of the overrides, the masked crop takes those that speak of the images, not of the view pair.
        asked = setup.augment
        plain = AugmentConfig(ratio=asked.ratio, flip_p=asked.flip_p, interpolation=asked.interpolation)
        if cfg.share and cfg.view == "esvit":
            raise UserError("objective.share=true: esvit needs the whole maps of its crops; set objective.share=false")
        if cfg.share and not isinstance(encoder, GCViT):
            raise UserError(f"objective.share=true: needs GC ViT, whose pooling is the mean; given {encoder.name}")
        view_class, view_schema = VIEW[cfg.view]
        masked_class, masked_schema = MASKED[cfg.masked]
        view = view_class(part_config(cfg, view_schema), encoder, setup)
        learning = [p for p in encoder.parameters() if p.requires_grad]
        masked = masked_class(part_config(cfg, masked_schema), encoder, dataclasses.replace(setup, augment=plain))
        self.default_encoder, self.n_pictures = view.default_encoder, masked.n_pictures
        self.couples_batch = view.couples_batch or cfg.balance  # the scales are of the whole batch's gradients
        self.draw = JointDraw(view.draw, masked.draw, cfg.share)
        lend(masked, "encoder")
        self.encoder: Any = lend(view, "encoder")
        for p in learning:  # the masked part froze what it does not use; the view part uses some of that
            p.requires_grad_(True)
        if hasattr(view, "teacher"):
            self.teacher = lend(view, "teacher")
        self.masked: Any = masked
        self.view: Any = view  # after teacher, so that its train() has the last word and keeps that in eval mode

    def masked_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The masked part's one view and its masks: view 1 when shared, else the crop after the view objective's."""
        at = slice(0, 1) if self.share else slice(self.view.n_views, None)
        return {key: batch[key][at] for key in ("views", "masks", "noise") if batch.get(key)}

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Any]:
        self.measured = None  # a step that was skipped leaves its own
        own = self.masked_batch(batch)
        if self.share:
            features = self.masked.features(own)  # B C h w, or one such map a stage
            last = features if isinstance(features, Tensor) else features[-1]
            pooled = [last.mean((2, 3)), *run_views(self.encoder, batch, range(1, self.view.n_views))]  # B C
            outs = self.masked.loss(features, own), self.view.loss(pooled, batch, step)
        else:
            outs = self.masked(own, step), self.view(batch, step)
        scales = self.scale if self.balance else (1.0, 1.0)
        weights = [w * scale for w, scale in zip(self.weights, scales, strict=True)]
        parts = {name: w * out["loss"] for name, w, out in zip(self.names, weights, outs, strict=True)}
        result: dict[str, Any] = {"loss": torch.stack(list(parts.values())).sum(), "_parts": parts}
        for name, out in zip(self.names, outs, strict=True):
            result[f"loss/{name}"] = out.pop("loss").detach()
            result.update(out)
        if self.balance:
            result |= {f"scale/{name}": x for name, x in zip(self.names, self.scale.clone(), strict=True)}
        return result

    def balances(self, step: int) -> bool:
        """Whether the gradients of optimizer step `step` set the scales of the next ones."""
        return self.balance and step % BALANCE_EVERY == 0

    def measures(self, step: int, log_every: int, accumulate: int = 1) -> bool:
        """Whether step `step` measures its parts' gradients: the first and every fifth of the logged ones, and never
        the gradients of a micro-batch, which are not those of the step.
        """
        due = self.balances(step) or step % (NORMS_EVERY * log_every) == log_every - 1
        return due and accumulate == 1

    def grad_norms(
        self, out: dict[str, Any], step: int, log_every: int = 1, accumulate: int = 1, scaler: Any = None
    ) -> dict[str, Tensor]:
        """Of each weighted part's gradient on the encoder, of the mean loss over processes: its norm, that of each
        stage, and the cosine between the two.

        Call it before `backward` and on every process: it runs each part's backward pass and keeps the graph.
        scaler: its scale multiplies the loss for that, so that no fp16 gradient is lost; reading it waits for a GPU.
        """
        if not self.measures(step, log_every, accumulate):
            return {}
        scale = scaler.get_scale() if scaler else 1.0
        named = [(n, p) for n, p in self.encoder.named_parameters() if p.requires_grad]
        norms, flats = {}, []
        for name, loss in out["_parts"].items():
            grads = torch.autograd.grad(scale * loss, [p for _, p in named], retain_graph=True, allow_unused=True)
            whole = [torch.zeros_like(p) if g is None else g for (_, p), g in zip(named, grads, strict=True)]
            whole = [g / scale for g in whole]
            flat = all_reduce_mean(torch.cat([g.flatten() for g in whole]))
            norms[f"grad_norm/{name}"] = flat.norm()
            pieces = flat.split([g.numel() for g in whole])
            for stage in range(len(self.encoder.depths)) if isinstance(self.encoder, GCViT) else ():
                inside = [x for x, (n, _) in zip(pieces, named, strict=True) if n.startswith(f"stages.{stage}.")]
                norms[f"grad_norm/{name}/stage{stage + 1}"] = torch.cat(inside).norm()
            flats.append(flat)
        if self.balances(step):
            self.measured = torch.stack([flat.norm() for flat in flats])
        return norms | {"grad_cosine": torch.cosine_similarity(flats[0], flats[1], dim=0)}

    def chance(self, global_batch: int) -> dict[str, float]:
        """The view part's losses when its embeddings say nothing, under their names here."""
        parts = self.view.chance(global_batch)
        return {f"loss/{self.names[1]}" if key == "loss" else key: value for key, value in parts.items()}

    @torch.no_grad()
    def commit_scale(self) -> None:
        """Move the scales towards those at which the unweighted parts' gradients would be of equal norm."""
        assert self.measured is not None
        raw = self.measured.to(self.scale) / (self.scale * self.scale.new_tensor(self.weights))
        wanted = (raw.mean() / raw.clamp(min=1e-12)).clamp(1 / MOST_SCALE, MOST_SCALE)
        first = (self.scale == 1).all()  # a step that fp16 skips commits nothing: the first is not always step 0
        self.scale.lerp_(wanted, torch.where(first, 1.0, 0.1))
        self.measured = None

    def freeze(self, step: int) -> None:
        self.view.freeze(step)

    def schedules(self, step: int) -> dict[str, float]:
        return self.view.schedules(step)

    def after_step(self, step: int) -> None:
        """The view part's commits after optimizer step `step`, the one that `forward` got, and the scales'."""
        self.view.after_step(step)
        if self.measured is not None:
            self.commit_scale()

    def pictures(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The masked part's original, hidden and reconstructed images."""
        return self.masked.pictures(self.masked_batch(batch))
