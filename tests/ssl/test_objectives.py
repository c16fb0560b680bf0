"""What holds for every objective."""

from collections.abc import Callable
from typing import Any

import pytest

from gcssl.ssl.objectives import OBJECTIVES

Make = Callable[..., Any]
EVALUATED = {
    "simmim": "student", "localmim": "student", "mae": "student", "ummae": "student", "simclr": "student",
    "mocov3": "student", "moby": "student", "byol": "student", "vicreg": "student", "dino": "teacher",
    "simdino": "teacher", "esvit": "teacher", "ibot": "teacher", "joint": "student",
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVES)
def test_unasked_the_encoder_that_the_paper_evaluates_is_kept(name: str, make_objective: Make) -> None:
    assert make_objective(name).default_encoder == EVALUATED[name]


def test_joint_keeps_the_encoder_of_its_view_objective(make_objective: Make) -> None:
    assert make_objective("joint", view="dino").default_encoder == "teacher"
