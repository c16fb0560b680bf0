from collections.abc import Callable
from typing import Any

import pytest
import torch

from gcssl.errors import UserError
from gcssl.models.build import build_backbone
from gcssl.ssl.esvit import matched_regions, region_loss

Make = Callable[..., Any]


def test_same_view_matches_itself() -> None:
    x = torch.randn(2, 9, 8)
    assert torch.equal(matched_regions(x, x), torch.arange(9).expand(2, 9))
    order = torch.randperm(9)
    assert torch.equal(order[matched_regions(x, 3 * x[:, order])], torch.arange(9).expand(2, 9))  # whatever the length


def test_regions_are_matched_in_fp32_under_autocast() -> None:
    """Neighbouring regions are alike: cosines of 0.999 and more, which bf16 does not tell apart."""
    common = torch.randn(2, 1, 64)
    student, teacher = (common + 0.03 * torch.randn(2, 49, 64) for _ in "12")
    with torch.autocast("cpu", torch.bfloat16):
        found = matched_regions(student, teacher)
    assert torch.equal(found, matched_regions(student, teacher))


def test_region_loss_equals_the_slow_version() -> None:
    log_q = [torch.randn(2, 4, 6).log_softmax(-1) for _ in range(2)]
    student = [torch.randn(2, n, 6) for n in (4, 4, 1)]  # a small crop has fewer regions
    tf, sf = [torch.randn(2, 4, 5) for _ in range(2)], [torch.randn(2, n, 5) for n in (4, 4, 1)]
    pairs = []
    for t in range(2):
        for v in range(3):
            if t == v:
                continue
            each = []
            for b in range(2):
                for i in range(student[v].shape[1]):
                    similar = torch.stack([torch.cosine_similarity(sf[v][b, i], tf[t][b, j], 0) for j in range(4)])
                    q = log_q[t][b, similar.argmax()].exp()
                    each.append(-(q * (student[v][b, i] / 0.1).log_softmax(0)).sum())
            pairs.append(torch.stack(each).mean())
    torch.testing.assert_close(region_loss(log_q, student, tf, sf, 0.1), torch.stack(pairs).mean())


def test_loss_equals_the_slow_version(make_midway: Make, make_batch: Make) -> None:
    """One image and region at a time; views and regions have a head and a centre each."""
    own = {"local_crops": 2, "local_size": 32, "teacher_temp": 0.05, "student_temp": 0.2}
    objective, batch = make_midway("esvit", **own), make_batch(3, views=2, small=2)
    out = objective(batch, 0)

    def assigned(outputs: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
        return ((outputs - center) / 0.05).softmax(0)

    view, region = [], {}
    with torch.no_grad():
        for b in range(3):
            found = [objective.encoder.forward_features(x[b, None])[0].flatten(1).T for x in batch["views"]]  # n C
            taught = [objective.teacher.forward_features(x[b, None])[0].flatten(1).T for x in batch["views"][:2]]
            for t, v in [(t, v) for t in range(2) for v in range(4) if t != v]:
                q = assigned(objective.momentum_projector(taught[t].mean(0)), objective.center.mean)
                view.append(-(q * (objective.projector(found[v].mean(0)) / 0.2).log_softmax(0)).sum())
                for r in found[v]:
                    like = max(taught[t], key=lambda other, r=r: torch.cosine_similarity(r, other, 0))
                    q = assigned(objective.momentum_region_projector(like), objective.region_center.mean)
                    error = -(q * (objective.region_projector(r) / 0.2).log_softmax(0)).sum()
                    region.setdefault((t, v), []).append(error)
    torch.testing.assert_close(out["loss/view"], torch.stack(view).mean())
    pairs = [torch.stack(errors).mean() for errors in region.values()]
    torch.testing.assert_close(out["loss/region"], torch.stack(pairs).mean())
    torch.testing.assert_close(out["loss"].detach(), (out["loss/view"] + out["loss/region"]) / 2)


def test_both_heads_freeze_follow_and_have_centres(make_objective: Make, make_batch: Make) -> None:
    objective, batch = make_objective("esvit", total_steps=10), make_batch(4, views=2)
    objective(batch, 0)["loss"].backward()
    objective.freeze(0)
    assert objective.projector.last.weight.grad is None and objective.region_projector.last.weight.grad is None
    assert objective.region_projector.mlp[0].weight.grad is not None
    start = objective.momentum_region_projector.mlp[0].weight.clone()
    with torch.no_grad():
        objective.region_projector.mlp[0].weight.add_(1.0)
    objective.after_step(0)
    moved = objective.momentum_region_projector.mlp[0].weight - start
    torch.testing.assert_close(moved, torch.full_like(moved, 1 - objective.momentum(0)), rtol=1e-3, atol=1e-6)
    assert objective.center.mean.abs().sum() > 0 and objective.region_center.mean.abs().sum() > 0
    assert not torch.equal(objective.center.mean, objective.region_center.mean)


def test_centres_move_to_what_the_teacher_says_of_both_crops(make_objective: Make, make_batch: Make) -> None:
    objective, batch = make_objective("esvit"), make_batch(4, views=2)
    with torch.no_grad():
        taught = torch.cat([objective.teacher.forward_features(x) for x in batch["views"]]).flatten(2).mT  # 2B m C
        outputs = objective.momentum_projector(taught.mean(1))  # 2B K
        regions = objective.momentum_region_projector(taught).flatten(0, 1)  # 2B*m K
    objective(batch, 0)
    objective.after_step(0)
    torch.testing.assert_close(objective.center.mean, 0.1 * outputs.mean(0))
    torch.testing.assert_close(objective.region_center.mean, 0.1 * regions.mean(0))


def test_joint_cannot_share_its_maps(make_objective: Make) -> None:
    with pytest.raises(UserError, match="share=true: esvit"):
        make_objective("joint", view="esvit", share=True)


def test_every_parameter_of_a_timm_backbone_that_is_not_frozen_learns(make_objective: Make, make_batch: Make) -> None:
    objective = make_objective("esvit", build_backbone("test_convnext", 64))
    objective(make_batch(4, views=2), 0)["loss"].backward()
    assert all((p.grad is not None) == p.requires_grad for p in objective.parameters())
