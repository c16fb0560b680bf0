import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from gcssl.errors import UserError
from gcssl.models.decoders import PixelHead
from gcssl.models.hidden import upsample_mask
from gcssl.ssl.masking import hide_pixels
from gcssl.ssl.targets import TARGETS, l1_hidden, make_target, target_loss

Make = Callable[..., Any]


def test_mask_leak_none_from_hidden_pixels(make_objective: Make, make_batch: Make, scramble: Make) -> None:
    objective, batch = make_objective("simmim").eval(), make_batch(4)
    with torch.no_grad():
        first, second = objective.features(batch), objective.features(scramble(batch))
        assert torch.equal(first, second)
        assert torch.equal(objective.head(first), objective.head(second))


def test_mask_leak_control_hiding_only_tokens_leaks(make_objective: Make, make_batch: Make, scramble: Make) -> None:
    """SimMIM's own placement (tokens, after the stem) changes every output: the test above can fail."""
    objective, batch = make_objective("simmim").eval(), make_batch(4)
    mask = batch["masks"][0]
    with torch.no_grad():
        first, second = (
            objective.encoder.forward_features(b["views"][0], mask, objective.mask_token)
            for b in (batch, scramble(batch))
        )
    changed = (first - second).norm(dim=1) / first.norm(dim=1)
    assert (changed > 1e-3).all()


def test_mask_leak_control_visible_pixels_reach_the_output(make_objective: Make, make_batch: Make) -> None:
    objective, batch = make_objective("simmim").eval(), make_batch(4)
    with torch.no_grad():
        moved = batch | {"views": [batch["views"][0].roll(1, 0)]}
        assert not torch.equal(objective.features(batch), objective.features(moved))


def test_hidden_tokens_hold_the_mask_token(make_objective: Make, make_batch: Make) -> None:
    objective, batch = make_objective("simmim").eval(), make_batch(2)
    assert 0.01 < objective.mask_token.std() < 0.03  # drawn with 0.02
    with torch.no_grad():
        before = objective.features(batch)
        objective.mask_token.add_(1.0)
        assert not torch.equal(before, objective.features(batch))
    assert objective.mask_token.shape == (16,)


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_loss_by_hand(share: float) -> None:
    mask = torch.rand(2, 8, 8) < share
    mask[:, 0, 0] = True
    zeros, ones = torch.zeros(2, 3, 64, 64), torch.ones(2, 3, 64, 64)
    assert l1_hidden(zeros, ones, mask).item() == pytest.approx(1.0)
    assert l1_hidden(zeros, -2 * ones, mask).item() == pytest.approx(2.0)


def test_loss_equals_a_slow_version_over_pixels(make_batch: Make) -> None:
    batch = make_batch(3)
    x, mask = batch["views"][0], batch["masks"][0]
    pred = torch.randn_like(x)
    total, count = 0.0, 0
    for i, row, col in mask.nonzero().tolist():  # one hidden unit of 8 x 8 pixels
        where = (i, slice(None), slice(8 * row, 8 * row + 8), slice(8 * col, 8 * col + 8))
        total += (pred[where] - x[where]).abs().sum().item()
        count += 3 * 64
    assert l1_hidden(pred, x, mask).item() == pytest.approx(total / count, rel=1e-5)


def test_loss_is_a_mean_over_samples_even_when_counts_differ() -> None:
    """So the mean over processes is the loss of the joined batch, whatever the masks."""
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[0, 0, 0] = mask[1] = True
    pred, x = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64)
    alone = [l1_hidden(pred[i : i + 1], x[i : i + 1], mask[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(l1_hidden(pred, x, mask), torch.stack(alone).mean())


def test_loss_gradient_is_on_hidden_pixels_only(make_batch: Make) -> None:
    batch = make_batch(2)
    x, hidden = batch["views"][0], upsample_mask(batch["masks"][0], 64, 64)[:, None].expand(2, 3, 64, 64)
    pred = torch.randn_like(x, requires_grad=True)
    loss = l1_hidden(pred, x, batch["masks"][0])
    (grad,) = torch.autograd.grad(loss, pred)
    assert (grad[hidden] != 0).all() and (grad[~hidden] == 0).all()
    assert torch.equal(l1_hidden(torch.where(hidden, pred, pred + 5), x, batch["masks"][0]), loss)


def test_head_puts_channel_row_and_column_on_the_right_pixel() -> None:
    head = PixelHead(4, upscale=8)
    with torch.no_grad():
        head.proj.weight.zero_()
        head.proj.bias.copy_(torch.arange(3 * 64.0))
    y = head(torch.randn(1, 4, 2, 3))
    assert y.shape == (1, 3, 16, 24)
    c, i, j = torch.meshgrid(torch.arange(3), torch.arange(16), torch.arange(24), indexing="ij")
    assert torch.equal(y[0], (c * 64 + i % 8 * 8 + j % 8).float())


def test_head_of_one_token_covers_its_own_cell() -> None:
    head = PixelHead(4, upscale=32)
    x = torch.randn(1, 4, 2, 2)
    y, moved = head(x), x.clone()
    moved[..., 0, 1] += 1.0
    rows, cols = (head(moved) - y)[0].abs().sum(0).nonzero().T
    assert rows.max() < 32 and cols.min() >= 32 and len(rows) == 32 * 32


def test_gradient_reaches_every_parameter(make_objective: Make, make_batch: Make) -> None:
    objective = make_objective("simmim")
    objective(make_batch(2), 0)["loss"].backward()
    assert not [n for n, p in objective.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert objective.mask_token.grad.abs().sum() > 0


FASTMIM = {"target": "hog", "fill": "learned", "decoder_depth": 2, "decoder_dim": 32}


@pytest.mark.parametrize(
    "cfg", [{"target": "norm_pixels"}, {"target": "hog"}, {"target": "hog", "fill": "learned"}, FASTMIM]
)
def test_other_targets_and_fill(make_objective: Make, make_batch: Make, scramble: Make, cfg: dict[str, Any]) -> None:
    """No leak, a gradient for every parameter, two samples = the mean of each alone, pictures."""
    objective, batch = make_objective("simmim", **cfg), make_batch(2)
    loss = objective(batch, 0)["loss"]
    loss.backward()
    assert not [n for n, p in objective.named_parameters() if p.grad is None or not p.grad.any()]
    halves = [objective({k: [v[i : i + 1] for v in batch[k]] for k in ("views", "masks")}, 0)["loss"] for i in (0, 1)]
    torch.testing.assert_close(loss, torch.stack(halves).mean())
    objective.eval()
    with torch.no_grad():
        assert torch.equal(objective.features(batch), objective.features(scramble(batch)))
        assert objective(scramble(batch), 0)["loss"] != loss  # the hidden pixels are the target
    shown = objective.pictures(batch)
    assert ("reconstructed" in shown) == (cfg["target"] != "hog")
    assert all(p.shape == (2, 3, 64, 64) and 0 <= p.min() and p.max() <= 1 for p in shown.values())


def test_learned_fill_is_one_colour_for_hidden_pixels(make_objective: Make, make_batch: Make) -> None:
    objective, plain, batch = make_objective("simmim", fill="learned"), make_objective("simmim"), make_batch(2)
    assert torch.equal(objective(batch, 0)["loss"], plain(batch, 0)["loss"])  # it begins as the zero fill
    with torch.no_grad():
        objective.mask_color.copy_(torch.tensor([0.1, 0.2, 0.3]))
    shown = objective.eval().pictures(batch)["hidden"]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (objective.encoder.mean, objective.encoder.std))
    colour = (objective.mask_color.detach().view(3, 1, 1) * std + mean).expand_as(shown)
    hidden = upsample_mask(batch["masks"][0], 64, 64)[:, None].expand_as(shown)
    torch.testing.assert_close(shown[hidden], colour[hidden])
    assert not torch.equal(objective.features(batch), plain.features(batch))


def test_bf16_run_has_an_fp32_loss(make_objective: Make, make_batch: Make) -> None:
    objective = make_objective("simmim")
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(make_batch(2), 0)["loss"]
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_draw_gives_one_crop_and_its_mask_and_pickles(make_objective: Make) -> None:
    draw = pickle.loads(pickle.dumps(make_objective("simmim").draw))
    views, masks = draw(np.random.default_rng(0), (64, 96))
    assert len(views) == 1 and views[0][0].size == (64, 96) and views[0][0].scale == (0.67, 1.0)
    assert masks[0].shape == (8, 12) and masks[0].sum() == 58  # ceil(0.6 * 96)


def test_pictures_show_what_is_hidden_and_predicted(make_objective: Make, make_batch: Make) -> None:
    objective = make_objective("simmim").eval()
    batch = make_batch(objective.n_pictures)
    shown = objective.pictures(batch)
    assert set(shown) == {"original", "hidden", "reconstructed"}
    assert all(p.shape == (8, 3, 64, 64) and 0 <= p.min() and p.max() <= 1 for p in shown.values())
    hidden = upsample_mask(batch["masks"][0], 64, 64)[:, None].expand(8, 3, 64, 64)
    assert torch.equal(shown["original"][~hidden], shown["reconstructed"][~hidden])
    assert not torch.equal(shown["original"][hidden], shown["reconstructed"][hidden])
    mean = torch.tensor(objective.encoder.mean).view(3, 1, 1).expand_as(hidden)
    torch.testing.assert_close(shown["hidden"][hidden], mean[hidden])


@pytest.mark.parametrize(
    "cfg",
    [
        {"mask_unit": 12},
        {"mask_unit": 64},
        {"mask_ratio": 1.0},
        {"mask_ratio": 0.999},
        {"mask_unit": 4, "target": "hog"},
    ],
)
def test_masks_that_do_not_fit_are_refused(make_objective: Make, cfg: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="objective.mask_"):
        make_objective("simmim", **cfg)


def test_a_wrapped_backbone_is_masked_in_its_pixels(make_objective: Make, make_batch: Make, scramble: Make) -> None:
    from gcssl.models.build import build_backbone

    encoder = build_backbone("resnet10t", img_size=64)
    objective, batch = make_objective("simmim", encoder), make_batch(2)
    assert objective.mask_token is None and "mask_token" not in objective.state_dict()
    objective.eval()
    with torch.no_grad():
        assert torch.equal(objective.features(batch), objective.features(scramble(batch)))
        pixels = hide_pixels(batch["views"][0], batch["masks"][0], 0.5)
        assert torch.equal(objective.features(batch), encoder.forward_features(pixels))
    assert objective(batch, 0)["loss"].isfinite()


@pytest.mark.parametrize("target", [t if t == "pixels" else pytest.param(t, marks=pytest.mark.slow) for t in TARGETS])
def test_overfits_a_few_images(make_objective: Make, make_batch: Make, target: str) -> None:
    objective, batch = make_objective("simmim", target=target), make_batch(16)
    optimizer = torch.optim.AdamW(objective.parameters(), 2e-3 if target == "hog" else 5e-3)
    x, mask = batch["views"][0], batch["masks"][0]
    losses = []
    for step in range(40):
        loss = objective(batch, step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    nothing = target_loss(target, torch.zeros_like(make_target(target, x, 8)), x, mask, 8)["loss"].item()
    assert losses[-1] < 0.5 * min(nothing, losses[0]), losses[::10]


def test_the_decoder_is_between_the_last_map_and_the_head(make_objective: Make) -> None:
    linear, deep = make_objective("simmim"), make_objective("simmim", decoder_depth=2, decoder_dim=64)
    decoder, head = deep.head
    assert len(decoder.blocks) == 2 and head.proj.in_channels == 64
    assert linear.head.proj.in_channels == linear.encoder.num_features
    x = torch.randn(2, deep.encoder.num_features, 2, 2)
    assert torch.equal(deep.head(x), head(decoder(x)))


@pytest.mark.parametrize("cfg", [{"decoder_depth": 2, "decoder_dim": 40}, {"decoder_depth": -1}])
def test_a_decoder_that_cannot_be_is_refused(make_objective: Make, cfg: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=r"objective.decoder_dim=\d+, objective.decoder_depth=-?\d: expected a multiple of 32"
    ):
        make_objective("simmim", **cfg)
