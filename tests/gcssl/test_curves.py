"""What scripts/curves.py draws: places and values; a picture needs matplotlib."""

import json
from pathlib import Path

import pytest

from gcssl.errors import UserError
from scripts.curves import chosen, curve, main, read


def test_points_of_a_metric_over_epochs_and_minutes(tmp_path: Path) -> None:
    lines = [{"step": s, "epoch": s / 5, "loss": 9.0 - s, "images_per_s": speed} for s, speed in ((5, 4.0), (10, 8.0))]
    lines.insert(1, {"step": 5, "probe": 30.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert curve(tmp_path, read(tmp_path), "loss", "epochs") == ([1.0, 2.0], [4.0, -1.0])
    assert curve(tmp_path, read(tmp_path), "probe", "epochs") == ([1.0], [30.0])
    with pytest.raises(UserError, match="no env.json there, which tells the batch"):
        curve(tmp_path, read(tmp_path), "loss", "minutes")
    (tmp_path / "env.json").write_text(json.dumps({"facts": {"global_batch": 48}}))
    assert curve(tmp_path, read(tmp_path), "loss", "minutes") == (
        [1.0, 1.5],
        [4.0, -1.0],
    )  # 5 steps of 48 at 4, then at 8 images/s
    with pytest.raises(UserError, match="no los in its metrics; one of epoch, images_per_s, loss, probe"):
        curve(tmp_path, read(tmp_path), "los", "epochs")


def test_what_is_not_a_picture_is_not_written_over(tmp_path: Path) -> None:
    photo = tmp_path / "a.jpg"
    photo.write_bytes(b"mine")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    for out in (str(photo), "", str(tmp_path)):
        with pytest.raises(UserError, match="expected the name of a .png"):
            main([str(tmp_path), f"out={out}"])
    with pytest.raises(UserError, match="a.jpg is a file"):
        main([str(tmp_path), f"out={photo}/x.png"])
    with pytest.raises(UserError, match="no online_knn/top1@20 in its metrics; one of loss"):
        main([str(tmp_path), f"out={tmp_path}/x.png", "metrics=online_knn/top1@20"])
    with pytest.raises(UserError, match="expected run folders, out=<file>.png, x=epochs or minutes"):
        main([str(tmp_path), "x=steps"])
    assert photo.read_bytes() == b"mine"


def test_what_every_run_has_is_drawn_where_nothing_is_asked_for() -> None:
    probed, plain = [{"loss": 1.0}, {"online_knn/top1@20": 9.0}], [{"loss": 2.0}]
    assert chosen({}, [probed, probed]) == ["loss", "online_knn/top1@20"]
    assert chosen({}, [probed, plain]) == ["loss"]
    assert chosen({"metrics": "lr,wd"}, [probed, plain]) == ["lr", "wd"]
