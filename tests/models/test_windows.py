"""Bias tables read at other window sizes."""

import pytest
import torch

from gcssl.models import windows
from gcssl.models.gcvit import GCViT
from gcssl.models.windows import resize_matrix, resize_table


@pytest.mark.parametrize("mode", ["bicubic", "crop"])
def test_resize_matrices(mode: str) -> None:
    cpu = torch.device("cpu")
    for w0, w1 in ((7, 7), (7, 12), (7, 3), (1, 4), (4, 1), (14, 24)):
        m = resize_matrix(w0, w1, mode, cpu)
        assert m.shape == (2 * w1 - 1, 2 * w0 - 1)
        torch.testing.assert_close(m.sum(1), torch.ones(2 * w1 - 1))  # a constant stays one
        torch.testing.assert_close(m, m.flip(0, 1))  # left and right alike
        if w0 == w1:
            assert torch.equal(m, torch.eye(2 * w0 - 1))


def test_bicubic_keeps_the_fraction_of_the_window_and_crop_the_distance() -> None:
    cpu = torch.device("cpu")
    offset = torch.arange(-6.0, 7.0)  # a table of windows of 7 whose value is the offset
    inner = torch.arange(-11.0, 12.0)  # of 12
    bicubic = resize_matrix(7, 12, "bicubic", cpu) @ offset
    keep = inner.abs() * 7 / 12 < 5
    torch.testing.assert_close(bicubic[keep], inner[keep] * 7 / 12)
    assert torch.equal(resize_matrix(7, 12, "crop", cpu) @ offset, inner.clamp(-6, 6))
    assert torch.equal(resize_matrix(7, 3, "crop", cpu) @ offset, torch.arange(-2.0, 3.0))


def test_resized_tables_are_separable_and_fp32_under_autocast() -> None:
    torch.manual_seed(0)
    table = torch.randn(5 * 9, 2)  # window 3 x 5
    with torch.autocast("cpu", torch.bfloat16):
        out = resize_table(table, (3, 5), (4, 2), "bicubic")
    cpu = torch.device("cpu")
    rows, cols = resize_matrix(3, 4, "bicubic", cpu), resize_matrix(5, 2, "bicubic", cpu)
    want = torch.einsum("ij,jlk,ml->imk", rows, table.view(5, 9, 2), cols)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.view(7, 3, 2), want)


def test_a_table_in_float64_is_resized_in_it() -> None:
    """fp32 in between would make the gradients of several processes differ from those of one."""
    table = torch.randn(5 * 9, 2, dtype=torch.float64)
    out, rounded = (resize_table(t, (3, 5), (4, 2), "bicubic") for t in (table, table.float()))
    assert out.dtype == torch.float64 and not torch.equal(out.float(), rounded)
    torch.testing.assert_close(out.float(), rounded)


def test_a_size_first_seen_in_inference_mode_can_be_trained_later() -> None:
    """What is kept of a size then has to serve a training step too."""
    windows._CONSTANTS.clear()
    model = GCViT(16, (1, 2, 1, 1), (1, 1, 2, 2), img_size=64, window_ratio=(16, 16, 16, 32))
    with torch.inference_mode():
        model(torch.randn(1, 3, 96, 96))
    model(torch.randn(1, 3, 96, 96)).sum().backward()
