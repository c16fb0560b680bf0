import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gcssl.config import AugmentConfig
from gcssl.errors import UserError
from gcssl.models.build import build_backbone
from gcssl.ssl.base import Setup
from gcssl.ssl.joint import MASKED, MOST_SCALE, VIEW, Joint, JointConfig

Make = Callable[..., Any]


def joint_batch(make_batch: Make, share: bool) -> dict[str, Any]:
    batch = make_batch(4, views=2 if share else 3)
    hidden = batch["masks"][0]
    return batch | {"masks": [hidden, None] if share else [None, None, hidden]}


def test_state_has_each_weight_once(make_objective: Make) -> None:
    state = make_objective("joint").state_dict()
    roots = {name.split(".")[0] for name in state}
    assert roots == {"encoder", "teacher", "masked", "view"}
    assert not [n for n in state if n.startswith(("masked.encoder", "view.encoder", "view.teacher"))]
    assert len({t.data_ptr() for t in state.values()}) == len(state)
    other = make_objective("joint")
    other.load_state_dict(state)
    assert other.view.encoder is other.encoder is other.masked.encoder and other.view.teacher is other.teacher


def test_state_names_of_encoder_and_teacher_are_those_of_the_parts(make_objective: Make) -> None:
    def under(name: str, objective: Any) -> set[str]:
        return {key for key in objective.state_dict() if key.startswith(name)}

    joint, simmim, mocov3 = (make_objective(n) for n in ("joint", "simmim", "mocov3"))
    assert under("encoder.", joint) == under("encoder.", simmim) == under("encoder.", mocov3)
    assert under("teacher.", joint) == under("teacher.", mocov3)


def test_moves_to_another_dtype_as_one(make_objective: Make) -> None:
    joint = make_objective("joint").double()
    assert next(joint.view.encoder.parameters()).dtype == torch.float64
    assert joint.view.encoder.stem is joint.encoder.stem


def test_loss_is_the_weighted_sum_of_the_parts(make_objective: Make, make_batch: Make) -> None:
    joint, batch = make_objective("joint", weights=[2.0, 0.5]), joint_batch(make_batch, share=False)
    out = joint(batch, 0)
    masked = joint.masked({"views": batch["views"][2:], "masks": batch["masks"][2:]}, 0)["loss"]
    view = joint.view({"views": batch["views"][:2]}, 0)["loss"]
    torch.testing.assert_close(out["loss"], 2 * masked + view / 2)
    torch.testing.assert_close(out["loss/simmim"], masked.detach())
    torch.testing.assert_close(out["loss/mocov3"], view.detach())
    assert not out["loss/simmim"].requires_grad and {"accuracy", "feature_std"} <= set(out)


def test_share_masks_view_one_in_one_pass(make_objective: Make, make_batch: Make) -> None:
    joint, batch = make_objective("joint", share=True), joint_batch(make_batch, share=True)
    out = joint(batch, 0)
    fmap = joint.masked.features(batch)
    view = joint.view.loss([fmap.mean((2, 3)), joint.encoder(batch["views"][1])], batch, 0)["loss"]
    torch.testing.assert_close(out["loss/mocov3"], view.detach())
    torch.testing.assert_close(out["loss/simmim"], joint.masked(batch, 0)["loss"].detach())
    whole = joint.view(batch, 0)["loss"]
    assert not torch.equal(out["loss/mocov3"], whole)


def test_it_compares_the_images_of_a_batch_as_its_view_part_does_or_to_balance(make_objective: Make) -> None:
    assert make_objective("joint").couples_batch  # mocov3
    assert not make_objective("joint", view="dino").couples_batch
    assert make_objective("joint", view="dino", koleo_weight=0.1).couples_batch
    assert make_objective("joint", view="dino", balance=True).couples_batch


@pytest.mark.parametrize("share", [False, True])
def test_gradient_reaches_student_and_heads_only(make_objective: Make, make_batch: Make, share: bool) -> None:
    joint = make_objective("joint", share=share)
    joint(joint_batch(make_batch, share), 0)["loss"].backward()
    for name, p in joint.named_parameters():
        frozen = name.startswith(("teacher.", "view.momentum_projector."))
        assert (p.grad is None) == frozen and p.requires_grad != frozen, name


def test_what_the_masked_part_froze_learns_from_the_view_part(make_objective: Make, make_batch: Make) -> None:
    """The norm behind a timm backbone's pooling, which SimMIM's last map does not pass."""
    simmim = make_objective("simmim", build_backbone("test_convnext", 64))
    assert not all(p.requires_grad for p in simmim.encoder.parameters())
    joint = make_objective("joint", build_backbone("test_convnext", 64), mask_unit=32)
    joint(joint_batch(make_batch, share=False), 0)["loss"].backward()
    assert all(p.grad is not None for p in joint.encoder.parameters())


def test_what_both_parts_froze_stays_frozen(make_objective: Make, make_batch: Make) -> None:
    """Neither EsViT nor SimMIM passes it: DistributedDataParallel would stop on it."""
    joint = make_objective("joint", build_backbone("test_convnext", 64), mask_unit=32, view="esvit", local_crops=0)
    batch = make_batch(4, views=3)
    batch["masks"] = [None, None, batch["masks"][0]]
    joint(batch, 0)["loss"].backward()
    named = dict(joint.encoder.named_parameters())
    assert [n for n, p in named.items() if p.requires_grad] == [n for n, p in named.items() if p.grad is not None]
    assert not all(p.requires_grad for p in named.values())


def test_gradient_norms_of_an_encoder_that_is_partly_frozen(make_objective: Make, make_batch: Make) -> None:
    """esvit reads maps alone, so that convnext's last norm is frozen."""
    encoder = build_backbone("convnext_atto", 64)
    joint = make_objective("joint", encoder, view="esvit", temperature=None, projector_layers=None,
                           predictor_layers=None, local_crops=0)  # fmt: skip
    assert not all(p.requires_grad for p in joint.encoder.parameters())
    norms = joint.grad_norms(joint(joint_batch(make_batch, share=False), 0), 0)
    assert all(norms[f"grad_norm/{name}"] > 0 for name in joint.names)


def test_a_part_without_gradient_does_not_run_away_with_the_scale(make_objective: Make) -> None:
    joint = make_objective("joint", balance=True)
    joint.measured = torch.tensor([1.0, 0.0])
    joint.commit_scale()
    assert joint.scale.tolist() == pytest.approx([0.5, MOST_SCALE])
    joint.measured = torch.tensor([0.0, 0.0])
    joint.commit_scale()
    assert joint.scale.isfinite().all() and (joint.scale > 0).all()


def test_grad_norms_are_those_of_the_parts(make_objective: Make, make_batch: Make) -> None:
    joint, batch = make_objective("joint", weights=[3.0, 1.0]), joint_batch(make_batch, share=False)
    out = joint(batch, 0)
    norms = joint.grad_norms(out, 0)
    out["loss"].backward()  # the graph is still there
    for key, weight, loss in (
        ("grad_norm/simmim", 3.0, lambda: joint.masked(joint.masked_batch(batch), 0)["loss"]),
        ("grad_norm/mocov3", 1.0, lambda: joint.view(batch, 0)["loss"]),
    ):
        joint.zero_grad()
        loss().backward()
        flat = torch.cat([p.grad.flatten() for p in joint.encoder.parameters() if p.grad is not None])
        torch.testing.assert_close(norms[key], weight * flat.norm())


def test_norms_of_stages_and_cosine(make_objective: Make, make_batch: Make) -> None:
    joint, batch = make_objective("joint"), joint_batch(make_batch, share=False)
    norms = joint.grad_norms(joint(batch, 0), 0)
    grads = []
    for loss in (joint.masked(joint.masked_batch(batch), 0)["loss"], joint.view(batch, 0)["loss"]):
        joint.zero_grad()
        loss.backward()
        grads.append({n: p.grad.clone() for n, p in joint.encoder.named_parameters()})
    flat = [torch.cat([g.flatten() for g in each.values()]) for each in grads]
    torch.testing.assert_close(norms["grad_cosine"], torch.cosine_similarity(*flat, dim=0))
    third = torch.cat([g.flatten() for n, g in grads[1].items() if n.startswith("stages.2.")])
    torch.testing.assert_close(norms["grad_norm/mocov3/stage3"], third.norm())
    assert {f"grad_norm/simmim/stage{i}" for i in (1, 2, 3, 4)} <= norms.keys()


def test_gradients_of_a_scaled_loss_give_the_norms_of_the_plain_one(
    make_objective: Make, make_batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    joint, batch = make_objective("joint"), joint_batch(make_batch, share=False)
    out, grad, losses = joint(batch, 0), torch.autograd.grad, []
    monkeypatch.setattr(
        torch.autograd, "grad", lambda loss, *args, **kw: losses.append(loss) or grad(loss, *args, **kw)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plain, scaled = joint.grad_norms(out, 0), joint.grad_norms(out, 0, scaler=scaler)
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-7)
    assert torch.equal(torch.stack(losses[2:]), 1024 * torch.stack(losses[:2]))


def test_balance_brings_the_gradients_to_the_ratio_of_the_weights(make_objective: Make, make_batch: Make) -> None:
    joint, batch = make_objective("joint", weights=[3.0, 1.0], balance=True), joint_batch(make_batch, share=False)
    out = joint(batch, 0)
    before = joint.grad_norms(out, 0)
    torch.testing.assert_close(out["loss"], 3 * out["loss/simmim"] + out["loss/mocov3"])  # scales are 1 at first
    joint.after_step(0)
    assert joint.scale.tolist() != [1.0, 1.0] and "scale" in joint.state_dict()
    joint.view.teacher.load_state_dict(joint.encoder.state_dict())  # undo the teacher's step
    after = joint.grad_norms(joint(batch, 1), 1, log_every=2)
    ratio = [n["grad_norm/simmim"] / n["grad_norm/mocov3"] for n in (before, after)]
    assert ratio[1].item() == pytest.approx(3.0, rel=1e-3) and abs(ratio[0].item() - 3.0) > 0.1
    assert joint.balances(10) and not joint.balances(11)
    plain = make_objective("joint")
    assert [step for step in range(105) if plain.measures(step, 10)] == [9, 59]
    assert [step for step in range(35) if joint.measures(step, 10)] == [0, 9, 10, 20, 30]
    assert not any(plain.measures(step, 10, accumulate=2) for step in range(105))  # a micro-batch's are others
    assert plain.grad_norms(out, 8, 10) == {} == plain.grad_norms(out, 9, 10, accumulate=2)
    late = make_objective("joint", weights=[3.0, 1.0], balance=True)
    late.measured = torch.tensor([8.0, 1.0])
    late.after_step(10)  # fp16 skipped the first steps: the first scales are taken whole, whichever step has them
    torch.testing.assert_close(late.scale, (8 / 3 + 1) / 2 / torch.tensor([8 / 3, 1.0]))
    scale, joint.measured = joint.scale.clone(), torch.tensor([8.0, 1.0])
    raw = joint.measured / (scale * torch.tensor([3.0, 1.0]))
    joint.commit_scale()  # after the first time, a tenth of the way
    torch.testing.assert_close(joint.scale, scale + 0.1 * (raw.mean() / raw - scale))
    scale = joint.scale.clone()
    joint.after_step(1)  # not a balancing step: nothing measured, nothing moves
    assert torch.equal(joint.scale, scale) and not make_objective("joint").balances(0)


@pytest.mark.parametrize("share", [False, True])
def test_draw_matches_what_forward_reads(make_objective: Make, share: bool) -> None:
    draw = pickle.loads(pickle.dumps(make_objective("joint", share=share).draw))
    views, masks = draw(np.random.default_rng(0), (64, 64))
    assert [spec.blur_p for spec, _ in views] == ([1.0, 0.1] if share else [1.0, 0.1, 0.0])
    assert [mask is not None for mask in masks] == ([True, False] if share else [False, False, True])
    assert views[-1][0].scale == ((0.08, 1.0) if share else (0.67, 1.0))


def test_overrides_of_the_pair_leave_the_masked_crop_alone(make_encoder: Make) -> None:
    augment = AugmentConfig(scale=[0.2, 1.0], blur_p=[0.6, 0.5], jitter_p=0.3, flip_p=0.0, ratio=[0.5, 2.0])
    augment.interpolation = "nearest"
    cfg = JointConfig(hidden_dim=8, out_dim=4)
    views, _ = Joint(cfg, make_encoder(), Setup(augment, (64, 64), 10, 1)).draw(np.random.default_rng(0), (64, 64))
    specs = [spec for spec, _ in views]
    assert [s.scale for s in specs] == [(0.2, 1.0), (0.2, 1.0), (0.67, 1.0)]
    assert [s.jitter_p for s in specs] == [0.3, 0.3, 0.0] and [s.flip_p for s in specs] == [0.0] * 3
    assert [s.blur_p for s in specs] == [0.6, 0.5, 0.0]
    assert {(s.ratio, s.interpolation) for s in specs} == {((0.5, 2.0), "nearest")}


def test_keys_of_the_parts_arrive(make_objective: Make) -> None:
    joint = make_objective("joint", mask_ratio=0.5, mask_unit=16, momentum=0.9, temperature=0.5)
    assert (joint.masked.draw.ratio, joint.masked.draw.unit) == (0.5, 16)
    assert (joint.view.cfg.momentum, joint.view.cfg.temperature, joint.view.cfg.out_dim) == (0.9, 0.5, 16)
    first, last = joint.schedules(0)["momentum"], joint.schedules(99)["momentum"]
    assert 0.9 < first == joint.view.momentum(0) < 0.91 and last == 1.0


def test_teacher_follows_once_a_step_and_stays_in_eval_mode(make_objective: Make) -> None:
    joint = make_objective("joint", total_steps=10).train()
    assert joint.encoder.training and not joint.teacher.training and not joint.view.momentum_projector.training
    start = joint.teacher.stem.conv1.weight.clone()
    with torch.no_grad():
        joint.encoder.stem.conv1.weight.add_(1.0)
    joint.after_step(0)
    torch.testing.assert_close(joint.teacher.stem.conv1.weight, start + 1 - joint.view.momentum(0))


def test_pictures_are_those_of_the_masked_crop(make_objective: Make, make_batch: Make) -> None:
    joint, batch = make_objective("joint").eval(), joint_batch(make_batch, share=False)
    shown = joint.pictures(batch)
    assert joint.n_pictures == joint.masked.n_pictures > 0
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (joint.encoder.mean, joint.encoder.std))
    torch.testing.assert_close(shown["original"], (batch["views"][2] * std + mean).clamp(0, 1))


@pytest.mark.parametrize("view", VIEW)
def test_every_view_objective_joins(view: str, make_objective: Make, make_batch: Make) -> None:
    joint, batch = make_objective("joint", view=view), joint_batch(make_batch, share=False)
    out = joint(batch, 0)
    out["loss"].backward()
    assert not [n for n, p in joint.named_parameters() if p.requires_grad and p.grad is None]
    joint.after_step(0)
    joint.view.freeze, told = (lambda step: told.append(step)), []
    joint.freeze(3)
    assert told == [3]


def test_small_crops_come_before_the_masked_one(make_objective: Make, make_batch: Make) -> None:
    joint = make_objective("joint", view="dino", local_crops=2, local_size=32)
    views, masks = joint.draw(np.random.default_rng(0), (64, 64))
    assert [spec.size for spec, _ in views] == [(64, 64), (64, 64), (32, 32), (32, 32), (64, 64)]
    assert [mask is not None for mask in masks] == [False] * 4 + [True]
    batch = make_batch(4, views=3, small=2)
    batch["views"] = batch["views"][:2] + batch["views"][3:] + batch["views"][2:3]
    batch["masks"] = [None] * 4 + batch["masks"][:1]
    out = joint(batch, 0)
    torch.testing.assert_close(out["loss"], out["loss/simmim"] + joint.view(batch, 0)["loss"])


@pytest.mark.parametrize(
    "cfg", [{"queue": 5}, {"view": "byol", "temperature": 0.1}, {"view": "simclr", "momentum": 0.9}]
)
def test_keys_of_neither_part_are_refused(make_objective: Make, cfg: dict[str, Any]) -> None:
    with pytest.raises(
        UserError,
        match=rf"objective.{list(cfg)[-1]}: neither simmim nor .* leave it out: objective.{list(cfg)[-1]}=null",
    ):
        make_objective("joint", **cfg)


def test_keys_that_would_keep_another_parts_values_are_named(make_objective: Make) -> None:
    with pytest.raises(UserError, match="temperature=null; out_dim, .*stay as given: compare the parts' own"):
        make_objective("joint", view="dino", out_dim=128, temperature=0.1, hidden_dim=None)


def test_every_key_of_every_part_is_a_key_of_joint() -> None:
    def keys(schema: Any) -> set[str]:
        return {f.name for f in dataclasses.fields(schema)}

    for name, (_, schema) in (MASKED | VIEW).items():
        assert keys(schema) <= keys(JointConfig), name
    choices = {f.name: f.metadata.get("choices") for f in dataclasses.fields(JointConfig)}
    parts = [f for _, schema in (MASKED | VIEW).values() for f in dataclasses.fields(schema) if f.name != "name"]
    assert not [f.name for f in parts if choices[f.name] != f.metadata.get("choices")]


@pytest.mark.parametrize(
    "cfg",
    [
        {"masked": "byol"},
        {"view": "simmim"},
        {"weights": [1.0]},
        {"weights": [-1.0, 1.0]},
        {"weights": [0.0, 0.0]},
        {"balance": True, "weights": [0.0, 1.0]},
    ],
)
def test_bad_values_are_refused(make_objective: Make, cfg: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"objective.{next(iter(cfg))}="):
        make_objective("joint", **cfg)


def test_sharing_needs_gc_vits_pooling(make_objective: Make) -> None:
    """View 1's query is the mean of the map; other models pool in other ways, so the two views would not match."""
    vit = build_backbone("vit_tiny_patch16_224", 64)
    with pytest.raises(UserError, match="share=true: needs GC ViT.*vit_tiny_patch16_224"):
        make_objective("joint", vit, share=True)
