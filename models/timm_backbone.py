"""Any timm model behind the same small interface as GCViT, and the GC ViT variants that timm lacks."""

import copy
import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import compress, pairwise
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, is_model, register_model
from timm.models._manipulate import group_parameters
from timm.models.gcvit import _create_gcvit
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gcssl.errors import UserError
from gcssl.models.windows import check_size, pair

UNNORMED = ("Hiera", "HieraDet")  # classes whose last norm comes after their pooling: timm norms no map of theirs


class TimmBackbone(nn.Module):
    """A timm model: B 3 H W -> features. It takes no token mask.

    The last map has num_features channels, as the pooled features do: where timm's head widens these, its layers are
    run at every position of the map. A model without such a map says so in `no_map`; only its pooled features serve.

    It draws its own drop path noise, seeded by the step and the process: a resume is exact, but with drop path another
    process layout is another run.
    """

    n_noise = 0
    model: Any

    def __init__(
        self,
        name: str,
        img_size: int | Sequence[int] = 224,
        num_classes: int = 0,
        drop_path: float = 0.0,
        in_chans: int = 3,
        grad_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.img_size, self.num_classes = name, pair(img_size), num_classes
        self.model = create(name, self.img_size, num_classes, drop_path, in_chans)
        cfg = self.model.pretrained_cfg
        self.num_features = self.model.head_hidden_size
        info = stated_maps(self.model)
        self.no_map = None if info else "timm states no pyramid of maps"
        last_at = {level["reduction"]: i for i, level in enumerate(info)}  # the last map of each stride
        self.levels = list(last_at.values())
        self.strides = tuple(info[i]["reduction"] for i in self.levels)
        self.stride = self.strides[-1] if info else 1
        stated = tuple(info[i]["num_chs"] for i in self.levels)
        self.widened = bool(info) and stated[-1] != self.num_features
        self.channels = (*stated[:-1], self.num_features) if info else ()
        self.normed = type(self.model).__name__ not in UNNORMED
        check_size(self.img_size, self.stride)
        self.mean, self.std = tuple(cfg["mean"]), tuple(cfg["std"])
        self.crop_pct, self.interpolation = cfg["crop_pct"], cfg["interpolation"]
        self.model_args: dict[str, Any] = {
            "img_size": list(self.img_size), "num_classes": num_classes, "drop_path": drop_path,
            "in_chans": in_chans, "grad_checkpointing": grad_checkpointing,
        }  # fmt: skip
        if grad_checkpointing:
            self.set_grad_checkpointing()
        if not next(self.parameters()).is_meta:
            self._try_out()

    def _try_out(self) -> None:
        """One blank image through a copy: UserError where timm's model does not run; `no_map` where its map is unfit.

        A copy, because some models keep what they compute in eval mode.
        """
        trial = copy.deepcopy(self).eval()
        height, width = self.img_size
        blank = next(self.parameters()).new_zeros(1, self.model_args["in_chans"], height, width)
        fit = (1, self.num_features, height // self.stride, width // self.stride)
        with torch.no_grad():
            try:
                trial.model(blank)
            except Exception as error:  # each class of timm raises its own
                own = "x".join(map(str, self.model.pretrained_cfg["input_size"][1:]))
                raise UserError(
                    f"model.img_size: {self.name} does not run on {height}x{width} images ({reason(error)}); "
                    f"give another size, its own is {own}"
                ) from None
            try:
                maps = trial.forward_pyramid(blank)
            except UserError:  # no_map, known already
                return
            except Exception as error:
                self.no_map = reason(error)
                return
        if maps[-1].shape != fit:
            self.no_map = f"its last map is {list(maps[-1].shape[1:])} instead of {list(fit[1:])}"
            return
        tiles = [m.shape[2:] == (height // s, width // s) for m, s in zip(maps, self.strides, strict=True)]
        self.levels = list(compress(self.levels, tiles))  # without PiT's first map, of patches that overlap
        self.strides, self.channels = tuple(compress(self.strides, tiles)), tuple(compress(self.channels, tiles))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable and any(isinstance(module, _BatchNorm) for module in self.model.modules()):
            raise UserError(
                f"model.grad_checkpointing=true: {self.name} has batch norm, whose statistics the second pass would "
                "update once more; leave it out"
            )
        self.model_args["grad_checkpointing"] = enable
        self.model.set_grad_checkpointing(enable)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """torch.compile of both ways into timm's model."""
        self.model.compile(*args, **kwargs)
        self._maps = torch.compile(self._maps, *args, **kwargs)  # type: ignore[method-assign]

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes = self.model_args["num_classes"] = num_classes
        self.model.reset_classifier(num_classes)

    def _run(self, call: Callable[[], Any], x: Tensor) -> Any:
        """call(), for images x; UserError where x has a size that timm's model, built for another, does not take."""
        size = (x.shape[-2], x.shape[-1])
        check_size(size, self.stride)
        if size == self.img_size:
            return call()
        try:
            return call()
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, IndexError, RuntimeError, ValueError) as error:
            built = f"{self.name} built for {self.img_size[0]}x{self.img_size[1]} images"
            raise UserError(
                f"image size {size[0]}x{size[1]}: {built} does not take it ({reason(error)}); "
                "give all images that size (no smaller crops), or take another backbone"
            ) from None

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """B 3 H W -> logits, or the pooled features B C when there is no head (timm's own pooling)."""
        return self._run(lambda: self.model(x), x)

    def _maps(self, x: Tensor, levels: list[int]) -> list[Tensor]:
        """B 3 H W -> the maps B C h w of `levels`, the last level being one of them."""
        if not self.widened:
            return self.model.forward_intermediates(x, indices=levels, norm=self.normed, intermediates_only=True)
        return self._widen(*self.model.forward_intermediates(x, indices=levels, norm=self.normed))

    def _widen(self, last: Tensor, maps: list[Tensor]) -> list[Tensor]:
        """`maps`, the last one after the layers by which timm's head widens it, from what goes into that head."""
        if isinstance(last, list):
            raise ValueError("its head pools several maps")
        channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"  # MambaOut
        last = last if channels_last else last.permute(0, 2, 3, 1)
        b, h, w, c = last.shape
        single = (-1, 1, 1, c) if channels_last else (-1, c, 1, 1)
        wide = self.model.forward_head(last.reshape(single), pre_logits=True)  # B*h*w C
        return [*maps[:-1], wide.view(b, h, w, -1).permute(0, 3, 1, 2)]

    def check_map(self) -> None:
        """UserError where the model has no map."""
        if self.no_map:
            raise UserError(
                f"model.name={self.name}: has no map of features for this ({self.no_map}); "
                "take an objective of pooled features, such as simclr or byol, or another backbone"
            )

    def _checked_maps(self, x: Tensor, levels: list[int]) -> list[Tensor]:
        self.check_map()
        return self._run(lambda: self._maps(x, levels), x)

    def forward_features(
        self,
        x: Tensor,
        mask: Tensor | None = None,  # noqa: ARG002
        mask_token: Tensor | None = None,  # noqa: ARG002
        noise: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """B 3 H W -> B C h w at the last stride; mask, mask_token and noise are ignored."""
        return self._checked_maps(x, self.levels[-1:])[-1]

    def forward_pyramid(
        self,
        x: Tensor,
        mask: Tensor | None = None,  # noqa: ARG002
        mask_token: Tensor | None = None,  # noqa: ARG002
        noise: Tensor | None = None,  # noqa: ARG002
    ) -> list[Tensor]:
        """B 3 H W -> one map B C h w for each stride the model has (one in all for a plain ViT).

        mask, mask_token and noise are ignored.
        """
        return self._checked_maps(x, self.levels)

    def pooled(self, x: Tensor) -> dict[str, Tensor]:
        """Probe features: last B C (timm's own pooling); stages34 B (C3 + C4) where the model has stages."""
        return self._run(lambda: self._pooled(x), x)

    def _pooled(self, x: Tensor) -> dict[str, Tensor]:
        if self.no_map or len(self.levels) < 2:
            return {"last": self.model.forward_head(self.model.forward_features(x), pre_logits=True)}
        last, maps = self.model.forward_intermediates(x, indices=self.levels[-2:], norm=self.normed)
        if self.widened:
            maps = self._widen(last, maps)
        pooled = self.model.forward_head(last, pre_logits=True)  # B C
        return {"last": pooled, "stages34": torch.cat([m.mean((2, 3)) for m in maps], 1)}

    def freeze_unused(self) -> list[str]:
        """Freezes, and names, what forward_features leaves without a gradient (the norm and layers of a head).

        For objectives that use nothing else: DistributedDataParallel stops on parameters without a gradient.
        """
        trial = copy.deepcopy(self).eval()  # a copy, as in _try_out
        named = {n: p for n, p in trial.model.named_parameters() if p.requires_grad}
        first = next(iter(named.values()), None)
        if first is None or first.is_meta:  # only tried out
            return []
        features = trial.forward_features(first.new_zeros(1, self.model_args["in_chans"], *self.img_size))
        used = torch.autograd.grad(features.sum(), list(named.values()), allow_unused=True)
        unused = [n for n, gradient in zip(named, used, strict=True) if gradient is None]
        for name in unused:
            self.model.get_parameter(name).requires_grad_(False)
        return unused

    def no_weight_decay(self) -> set[str]:
        names = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()
        return {f"model.{name}" for name in names}

    def layer_ids(self) -> dict[str, int]:
        """Depth of each parameter, from timm's own grouping; by order of the modules where it states none."""
        if hasattr(self.model, "group_matcher"):
            ids = group_parameters(self.model, self.model.group_matcher(coarse=False), reverse=True)
            return {f"model.{name}": depth for name, depth in ids.items()}
        parts = list(dict.fromkeys(name.split(".")[0] for name, _ in self.model.named_parameters()))
        return {f"model.{n}": parts.index(n.split(".")[0]) for n, _ in self.model.named_parameters()}


def stated_maps(model: Any) -> list[dict[str, Any]]:
    """timm's own description of a model's maps (num_chs, reduction), in order; empty where they make no pyramid.

    CrossViT's are those of two branches side by side, of strides 12 and "17".
    """
    info = model.feature_info if isinstance(model.feature_info, list) else []
    strides = [level["reduction"] for level in info]
    nested = all(coarse % fine == 0 for fine, coarse in pairwise(strides))
    return info if nested and hasattr(model, "forward_intermediates") else []


def reason(error: Exception) -> str:
    """One short line of what another library raised."""
    return " ".join(str(error).split())[:160] or type(error).__name__


def create(name: str, size: tuple[int, int], num_classes: int, drop_path: float, in_chans: int) -> nn.Module:
    """timm's model built for `size`, open to other sizes where its class can be; weights at random."""
    base: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans}
    rate: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    options = ({"img_size": size, "dynamic_img_size": True}, {"img_size": size, "strict_img_size": False})
    for option in (*options, {"img_size": size}, {}):
        try:
            return timm.create_model(name, **base, **rate, **option)
        except TypeError as error:  # an argument this class lacks
            if "unexpected keyword" not in str(error):
                raise
            if "drop_path_rate" in str(error):
                raise UserError(f"model.drop_path={drop_path}: {name} has no drop path; leave it at 0") from None
        except (ValueError, AssertionError, RuntimeError, IndexError, ZeroDivisionError) as error:
            raise UserError(
                f"model.img_size: {name} cannot be built for {size[0]}x{size[1]} images ({reason(error)}); "
                "give another size"
            ) from None
    raise UserError(f"{name}: timm cannot build it")


def known_models() -> list[str]:
    return timm.list_models()


def nearest_models(name: str, known: Sequence[str]) -> str:
    """The known names closest to `name`, for an error message."""
    return ", ".join(difflib.get_close_matches(name or "gcvit_tiny", list(dict.fromkeys(known)), n=3, cutoff=0.0))


# ---- timm's registry

default_cfgs: dict[str, Any] = {}  # timm's register_model reads it from the module of the entry point


def register_variants(variants: Mapping[str, Mapping[str, Any]]) -> None:
    """Makes timm.create_model build, from timm's own class, the variants (name -> arguments) it lacks."""
    module = sys.modules[__name__]
    for name, args in variants.items():
        if is_model(name):
            continue
        kwargs = dict(args)
        size = kwargs.pop("img_size", 224)
        default_cfgs[name] = timm_cfg(size).to_dict()
        entry_point = _entry_point(name, kwargs)
        setattr(module, name, entry_point)
        register_model(entry_point)


def _entry_point(name: str, variant: dict[str, Any]) -> Any:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create_gcvit(name, pretrained=pretrained, **{**variant, **kwargs})

    build.__name__ = build.__qualname__ = name
    build.__module__ = __name__
    return build


def timm_cfg(size: int | Sequence[int] = 224, **fields: Any) -> PretrainedCfg:
    """timm's description of a GC ViT for images of `size`."""
    height, width = pair(size)
    ours: dict[str, Any] = {
        "input_size": (3, height, width), "fixed_input_size": True, "pool_size": (height // 32, width // 32),
        "crop_pct": 0.875, "interpolation": "bicubic", "first_conv": "stem.conv1", "classifier": "head.fc",
    }  # fmt: skip
    return PretrainedCfg(**{**ours, **fields})
