"""docs/timm.md says what is true: each model works there, or is refused with the line that stands there."""

import re
from dataclasses import asdict

import pytest
from timm.models import list_models, list_modules

from gcssl.errors import UserError
from scripts.timm_matrix import DOC, FAMILIES, document, judge, main, read_rows

TEXT = DOC.read_text()
ROWS = read_rows(TEXT)
KINDS = {  # what each of the quick ones stands for
    "test_vit": "a plain ViT, any size",
    "gcvit_nano": "ours",
    "convnext_atto": "hierarchical, a norm in its head",
    "mobilenetv3_small_050": "a head that widens the last map",
    "convit_tiny": "one size only",
    "efficientvim_m1": "pooled features of several maps",
    "crossvit_tiny_240": "no one map",
    "halonet26t": "takes no small images",
}


def test_every_family_of_timm_has_its_row() -> None:
    listed = [(name, family) for family, names in FAMILIES.items() for name in names.split()]
    assert sorted(listed) == sorted((row.model, row.family) for row in ROWS.values())
    models = {name for name, _ in listed}
    assert [m for m in list_modules() if not models & set(list_models(module=m))] == []


def test_the_document_is_the_one_that_the_script_writes() -> None:
    again = document(list(ROWS.values()), "", 0.0)
    made = r"^Made by .*$"
    assert re.sub(made, "", again, flags=re.M) == re.sub(made, "", TEXT, flags=re.M)
    assert "dirty" not in TEXT and "``" not in TEXT


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(UserError, match="swim: no such family; expected some of .*swin"):
        main(["swim"])


def check(name: str) -> None:
    row = judge(ROWS[name].family, name)
    assert asdict(row) == asdict(ROWS[name])
    assert not any("\n" in text for text in asdict(row).values())


@pytest.mark.parametrize("name", KINDS)
def test_some_models_do_what_the_document_says(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ROWS if name not in KINDS])
def test_each_model_does_what_the_document_says(name: str) -> None:
    check(name)
