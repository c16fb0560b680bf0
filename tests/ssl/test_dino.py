import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gcssl.augment import BYOL_1
from gcssl.config import AugmentConfig
from gcssl.errors import UserError
from gcssl.models.build import build_backbone
from gcssl.models.gcvit import GCViT
from gcssl.models.heads import DINOHead
from gcssl.ssl.base import Setup
from gcssl.ssl.dino import DINO, DINOConfig
from gcssl.ssl.prototypes import Center, crops_loss, entropy, koleo, warmed_up

Make = Callable[..., Any]
CROPS = {"local_crops": 2, "local_size": 32}


def softmax(x: np.ndarray, t: float) -> np.ndarray:
    e = np.exp((x - x.max()) / t)
    return e / e.sum()


def slow_dino(teacher: list[Tensor], student: list[Tensor], center: Tensor, tt: float, ts: float) -> float:
    """Pair by pair and sample by sample, in float64."""
    losses = []
    for t, outputs in enumerate(teacher):
        for v, others in enumerate(student):
            if v == t:
                continue
            for a, b in zip(outputs.double().numpy(), others.double().numpy(), strict=True):
                q = softmax(a - center.double().numpy(), tt)
                losses.append(-float((q * np.log(softmax(b, ts))).sum()))
    return sum(losses) / len(losses)


def test_loss_equals_the_slow_version_over_18_pairs() -> None:
    teacher, student = [torch.randn(3, 7) for _ in range(2)], [torch.randn(3, 7) for _ in range(10)]
    center = Center(7, 0.9)
    center.mean.copy_(torch.randn(7))
    loss = crops_loss([center(x, 0.04) for x in teacher], student, 0.1)
    assert loss.item() == pytest.approx(slow_dino(teacher, student, center.mean, 0.04, 0.1), rel=1e-5)


def test_a_crop_is_not_compared_with_itself() -> None:
    """What the student says of large crop 1 must not matter to the teacher's of crop 1, only to crop 2's."""
    teacher = [torch.randn(2, 5).log_softmax(-1), torch.full((2, 5), math.log(1 / 5))]
    student = [torch.zeros(2, 5), torch.zeros(2, 5)]
    student[0] = torch.tensor([[9.0, 0, 0, 0, 0]]).expand(2, 5)  # against the uniform teacher of crop 2
    expected = (torch.tensor([9.0, 0, 0, 0, 0]).log_softmax(0).mean().neg() + math.log(5)) / 2
    torch.testing.assert_close(crops_loss(teacher, student, 1.0), expected)


def test_uniform_outputs_give_ln_k(make_objective: Make, make_batch: Make) -> None:
    """The collapse that the trainer watches for: loss and teacher entropy are ln K, and kl is 0."""
    objective = make_objective("dino", **CROPS, out_dim=64)
    with torch.no_grad():
        for head in (objective.projector, objective.momentum_projector):
            head.mlp[-1].weight.zero_()
            head.mlp[-1].bias.fill_(1.0)
            head.last.weight.fill_(1.0)
    out = objective(make_batch(3, views=2, small=2), 0)
    assert out["loss"].item() == pytest.approx(math.log(64), rel=1e-5)
    assert out["teacher_entropy"].item() == pytest.approx(math.log(64), rel=1e-5)
    assert out["kl"].item() == pytest.approx(0.0, abs=1e-4)


def test_entropy_of_one_hot_and_uniform() -> None:
    assert entropy([torch.tensor([[0.0, -200.0, -200.0]])]).item() == pytest.approx(0.0, abs=1e-6)
    assert entropy([torch.full((2, 8), -math.log(8))]).item() == pytest.approx(math.log(8))


def test_losses_are_fp32_and_finite_under_autocast() -> None:
    center, outputs = Center(9, 0.9), 1e4 * torch.randn(4, 9)
    with torch.autocast("cpu", torch.bfloat16):
        log_q = center(outputs.bfloat16(), 0.04)
        loss = crops_loss([log_q, log_q], [outputs.bfloat16()] * 3, 0.1)
    assert log_q.dtype == loss.dtype == torch.float32 and loss.isfinite()


# ---- centre


def test_center_is_the_moving_mean_and_accumulation_changes_nothing() -> None:
    x = torch.randn(8, 5) + 3
    whole, parts = Center(5, 0.9), Center(5, 0.9)
    for step in range(3):
        whole.note(x + step, step)
        whole.commit()
        before = parts.mean.clone()
        parts.note(x[:4] + step, step)
        parts.note(x[4:] + step, step)
        assert torch.equal(parts.mean, before)  # nothing moves before the commit
        parts.commit()
        torch.testing.assert_close(parts.mean, whole.mean)
    mean = torch.zeros(5)
    for step in range(3):
        mean = 0.9 * mean + 0.1 * (x + step).mean(0)
    torch.testing.assert_close(whole.mean, mean)


def test_center_of_a_skipped_step_is_forgotten() -> None:
    center = Center(2, 0.5)
    center.note(torch.full((3, 2), 100.0), 0)  # the scaler skipped this step: no commit
    center.note(torch.full((3, 2), 2.0), 1)
    center.commit()
    assert torch.equal(center.mean, torch.ones(2))


def test_center_is_saved_and_used(make_objective: Make, make_batch: Make) -> None:
    objective, batch = make_objective("dino"), make_batch(4, views=2)
    before = objective(batch, 0)["loss"]
    objective.after_step(0)
    assert objective.state_dict()["center.mean"].abs().sum() > 0
    assert not torch.equal(objective(batch, 0)["loss"], before)
    with torch.no_grad():
        outputs = torch.cat([objective.momentum_projector(objective.teacher(x)) for x in batch["views"]])
    fresh = make_objective("dino")
    fresh(batch, 0)
    fresh.after_step(0)
    torch.testing.assert_close(fresh.center.mean, 0.1 * outputs.mean(0), rtol=1e-2, atol=1e-4)


# ---- schedules


def test_teacher_temperature_warms_up(make_objective: Make) -> None:
    objective = make_objective("dino", teacher_temp=0.07, warmup_teacher_temp_epochs=3)  # of 10 steps
    assert objective.teacher_temp(0) == 0.04
    assert objective.teacher_temp(15) == pytest.approx(0.055)
    assert objective.teacher_temp(30) == objective.teacher_temp(99) == pytest.approx(0.07)
    assert warmed_up(0, 10, 1.0, 2.0, 0) == 2.0  # no warm-up


def test_prototypes_rest_in_the_first_epoch_and_move_after(make_objective: Make, make_batch: Make) -> None:
    objective, batch = make_objective("dino"), make_batch(4, views=2)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], 1e-2)
    for step, rests in ((0, True), (9, True), (10, False)):  # 10 steps an epoch
        last, first = objective.projector.last.weight.clone(), objective.projector.mlp[0].weight.clone()
        objective(batch, step)["loss"].backward()
        objective.freeze(step)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(objective.projector.last.weight, last) == rests
        assert not torch.equal(objective.projector.mlp[0].weight, first)


# ---- head


def test_head_is_the_published_one() -> None:
    head = DINOHead(6, 8, 4, 10)
    assert [type(m).__name__ for m in head.mlp] == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    assert not head.last.gain.requires_grad and DINOHead(6, 8, 4, 10, learn_gain=True).last.gain.requires_grad
    x = torch.randn(3, 6)
    unit = torch.nn.functional.normalize(head.mlp(x), dim=1)
    reference = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 10, bias=False))
    reference.parametrizations.weight.original0.data.fill_(1.0)
    reference.parametrizations.weight.original1.data.copy_(head.last.weight)
    torch.testing.assert_close(head(x), reference(unit))
    torch.testing.assert_close(DINOHead(6, 8, 4, 0)(x).norm(dim=1), torch.ones(3))
    assert head(x.view(3, 1, 6)).shape == (3, 1, 10)


# ---- crops


def test_draw_gives_two_large_and_n_small_crops(make_objective: Make) -> None:
    draw = pickle.loads(pickle.dumps(make_objective("dino", local_crops=3, local_size=32).draw))
    views, masks = draw(np.random.default_rng(0), (64, 96))
    specs = [spec for spec, _ in views]
    assert masks == [None] * 5 and [s.size for s in specs] == [(64, 96)] * 2 + [(32, 32)] * 3
    assert [s.scale for s in specs] == [(0.4, 1.0)] * 2 + [(0.05, 0.4)] * 3
    assert [s.blur_p for s in specs] == [1.0, 0.1, 0.5, 0.5, 0.5]
    assert [s.solarize_p for s in specs] == [0.0, 0.2, 0.0, 0.0, 0.0]
    assert {s.interpolation for s in specs} == {"bicubic"} and {s.jitter for s in specs} == {BYOL_1.jitter}
    assert not np.array_equal(views[3][1].crop, views[4][1].crop)


def test_overrides_of_scale_leave_the_small_crops_alone(make_encoder: Make) -> None:
    augment = AugmentConfig(scale=[0.3, 1.0], blur_p=[0.9, 0.8, 0.7], gray_p=0.0)
    cfg = DINOConfig(hidden_dim=8, bottleneck_dim=4, out_dim=8, local_crops=1, local_size=32, local_scale=[0.1, 0.2])
    views, _ = DINO(cfg, make_encoder(), Setup(augment, (64, 64), 10, 1)).draw(np.random.default_rng(0), (64, 64))
    specs = [spec for spec, _ in views]
    assert [s.scale for s in specs] == [(0.3, 1.0), (0.3, 1.0), (0.1, 0.2)]
    assert [s.blur_p for s in specs] == [0.9, 0.8, 0.7] and {s.gray_p for s in specs} == {0.0}


def test_small_crops_pass_the_same_backbone_and_count(make_midway: Make, make_batch: Make) -> None:
    objective, batch = make_midway("dino", **CROPS), make_batch(4, views=2, small=2)
    with torch.no_grad():
        student = [objective.projector(objective.encoder(x)) for x in batch["views"]]
        teacher = [objective.momentum_projector(objective.teacher(x)) for x in batch["views"][:2]]
        loss = objective(batch, 0)["loss"]
    assert loss.item() == pytest.approx(slow_dino(teacher, student, objective.center.mean, 0.04, 0.1), rel=1e-4)
    changed = batch | {"views": [*batch["views"][:3], batch["views"][3] + 1]}
    assert not torch.equal(objective(changed, 0)["loss"], loss)


def test_noise_goes_with_its_crop(make_objective: Make, make_encoder: Make, make_batch: Make) -> None:
    objective = make_objective("dino", make_encoder(drop_path=0.5), **CROPS).train()
    batch = make_batch(4, views=2, small=2)
    batch["noise"] = [torch.rand(objective.encoder.n_noise, 4) for _ in range(4)]
    loss = objective(batch, 0)["loss"]
    assert torch.equal(loss, objective(batch, 0)["loss"])
    swapped = batch | {"noise": [*batch["noise"][:2], *batch["noise"][:1:-1]]}
    assert not torch.equal(loss, objective(swapped, 0)["loss"])
    both = swapped | {"views": [*batch["views"][:2], *batch["views"][:1:-1]]}  # crops and their noise change places
    torch.testing.assert_close(loss, objective(both, 0)["loss"])


def test_crop_sizes_that_a_backbone_cannot_take_are_refused(make_objective: Make) -> None:
    with pytest.raises(UserError, match=r"objective.local_size=40: image size 40x40.*nearest legal: 32x32 or 64x64"):
        make_objective("dino", local_crops=1, local_size=40)
    with torch.device("meta"), pytest.raises(UserError, match="multiples of 32"):  # as pretrain checks it
        make_objective("dino", GCViT(16, (1, 1, 1, 1), (1, 1, 1, 1), img_size=64), local_crops=1, local_size=40)
    fixed = build_backbone("mixer_s32_224", 224)
    with pytest.raises(UserError, match="objective.local_size=96: image size 96x96: mixer_s32_224.*no smaller crops"):
        make_objective("dino", fixed, local_crops=1, local_size=96)


def test_a_backbone_on_which_crops_were_tried_out_is_in_the_mode_it_had(make_objective: Make) -> None:
    """The doctor looks at a new objective as it is: with drop path, and batch norms that take the batch's moments."""
    objective = make_objective("dino", local_crops=1, local_size=32)
    assert all(module.training for module in objective.encoder.modules())


def test_koleo_equals_a_slow_version() -> None:
    crops = [torch.randn(5, 3), torch.randn(5, 3)]
    total = 0.0
    for x in crops:
        z = [row / math.sqrt(sum(v * v for v in row)) for row in x.double().numpy()]
        for i in range(5):
            total += -math.log(min(np.linalg.norm(z[i] - z[j]) for j in range(5) if j != i)) / 5
    assert koleo(crops).item() == pytest.approx(total / 2, rel=1e-4)


def test_koleo_drives_the_images_of_a_batch_apart() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0]], requires_grad=True)
    koleo([x]).backward()
    angle = x.detach().flip(1) * torch.tensor([-1.0, 1.0])  # direction of a growing angle
    turned = -(x.grad * angle).sum(1)
    assert turned[0] < 0 < turned[1]


@pytest.mark.parametrize("name", ["dino", "esvit", "ibot"])
def test_koleo_is_of_the_students_large_crops(name: str, make_objective: Make, make_batch: Make) -> None:
    """Its weight moves the loss by its own value, the rest stays; none of its gradient is the heads'."""
    batch = make_batch(4, views=2, small=2) | {"masks": [torch.zeros(4, 2, 2, dtype=torch.bool)] * 2}
    outs = {}
    for weight in (0.0, 0.5):
        torch.manual_seed(0)
        objective = make_objective(name, koleo_weight=weight, **CROPS)
        outs[weight] = objective(batch, 0)
    plain, with_it = outs[0.0], outs[0.5]
    assert "loss/koleo" not in plain and torch.equal(plain["loss/view"], with_it["loss/view"])
    torch.testing.assert_close(with_it["loss"], plain["loss"] + 0.5 * with_it["loss/koleo"])
    with torch.no_grad():
        large = [objective.encoder.forward_features(x).mean((2, 3)) for x in batch["views"][:2]]
    torch.testing.assert_close(with_it["loss/koleo"], koleo(large), rtol=1e-4, atol=1e-4)
