"""docs/timm.md says what is true: each model works there, or is refused with the line that stands there."""

import re
from pathlib import Path

import pytest
import timm
import torch
from timm.models import list_models, list_modules
from torch import nn

from gcssl.config import AugmentConfig
from gcssl.errors import UserError
from gcssl.models.build import build_backbone
from gcssl.ssl.base import Setup
from gcssl.ssl.objectives import OBJECTIVES
from scripts import timm_matrix
from scripts.timm_matrix import DOC, FAMILIES, TRIED, Row, document, judge, main, random_batch, read_rows, try_objective

TEXT = DOC.read_text()
ROWS = read_rows(TEXT)
KINDS = {  # what each of the quick ones stands for
    "test_vit": "a plain ViT, any size",
    "gcvit_nano": "ours",
    "convnext_atto": "hierarchical, a norm in its head",
    "mobilenetv3_small_050": "a head that widens the last map",
    "convit_tiny": "one size only",
    "efficientvim_m1": "pooled features of several maps, no one map",
}
MORE = (
    "swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 deit_tiny_patch16_224 mvitv2_tiny davit_tiny"
    " maxvit_pico_rw_256 mobilevit_xxs efficientvit_b0 crossvit_tiny_240 tnt_s_patch16_224 volo_d1_224 mixer_s16_224"
    " resnet10t halonet26t hiera_tiny_224 levit_128s mambaout_femto pit_ti_224 legacy_xception"
).split()


def test_every_family_of_timm_has_its_row() -> None:
    listed = [(name, family) for family, names in FAMILIES.items() for name in names.split()]
    assert sorted(listed) == sorted((row.model, row.family) for row in ROWS.values())
    models = {name for name, _ in listed}
    made = re.search(r"^Made by .* timm (\S+),", TEXT, re.M)
    assert made
    if timm.__version__ != made[1]:
        pytest.skip(
            f"docs/timm.md was made with timm {made[1]}, this is {timm.__version__}: it may have other families"
        )
    assert [m for m in list_modules() if not models & set(list_models(module=m))] == []


def test_the_document_is_the_one_that_the_script_writes() -> None:
    again = document(list(ROWS.values()), "", "", 0.0)
    made = r"^Made by .*$"
    assert re.sub(made, "", again, flags=re.M) == re.sub(made, "", TEXT, flags=re.M)
    assert "dirty" not in TEXT and "``" not in TEXT


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(UserError, match="swim: no such family; expected some of .*swin"):
        main(["swim"])


def test_every_objective_but_mae_and_joint_is_tried() -> None:
    assert sorted(TRIED) == sorted(OBJECTIVES.keys() - {"mae", "joint"})


def test_crops_and_masks_are_those_of_the_objective() -> None:
    cls, schema = OBJECTIVES["ibot"]
    cfg = schema(hidden_dim=16, out_dim=8, mask_prob=1.0, local_crops=2, local_size=32)
    model = cls(cfg, build_backbone("test_vit", 64), Setup(AugmentConfig(), (64, 64), 1, 1))
    batch = random_batch(model.draw, 64)
    assert [tuple(view.shape) for view in batch["views"]] == [(2, 3, s, s) for s in (64, 64, 32, 32)]
    assert [m.shape for m in batch["masks"][:2]] == [(2, 4, 4)] * 2 and batch["masks"][2:] == [None, None]
    assert all(m.flatten(1).any(1).all() for m in batch["masks"][:2])


def test_a_parameter_without_a_gradient_is_a_fault() -> None:
    backbone = build_backbone("test_vit", 64)
    try_objective("byol", backbone, 64, {})
    backbone.model.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(RuntimeError, match=r"byol: loss .* without a gradient: \['encoder.model.extra'\]"):
        try_objective("byol", backbone, 64, {})


def test_a_fault_ends_the_program_but_not_before_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails_once(family: str, name: str) -> Row:
        if name == "swin_tiny_patch4_window7_224":
            raise ZeroDivisionError("a fault")
        return Row(family, name, "1.0", "64", "no", {"ibot": "a line", "ummae": "a line"})

    monkeypatch.setattr(timm_matrix, "judge", fails_once)
    monkeypatch.setattr(timm_matrix, "DOC", tmp_path / "timm.md")
    with pytest.raises(RuntimeError, match="these failed, .* of them: swin_tiny_patch4_window7_224"):
        main(["swin"])
    text = (tmp_path / "timm.md").read_text()
    assert read_rows(text) == {"swin_s3_tiny_224": fails_once("swin", "swin_s3_tiny_224")}
    assert "| no | yes | not ibot | yes | yes | no |" in text and "| swin_s3_tiny_224 | ibot, ummae | a line |" in text


def check(name: str) -> None:
    row = judge(ROWS[name].family, name)
    assert row == ROWS[name]
    assert not any("\n" in line for line in row.refusals.values())


@pytest.mark.parametrize("name", KINDS)
def test_some_models_do_what_the_document_says(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_models_do_what_the_document_says(name: str) -> None:
    check(name)
