"""train.compile: every objective's encoder is traced in one piece, and computes what it did."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gcssl.config import PretrainConfig, load_config
from gcssl.dryrun import DoctorConfig, examine
from gcssl.eval.features import frozen
from gcssl.log import RunLog
from gcssl.pretrain import compile_encoders, pretrain, show_batch
from gcssl.rng import seed_torch
from gcssl.ssl.objectives import OBJECTIVES, SCHEMAS

YAML = Path(__file__).parent.parent / "configs/pretrain"
SMALL = ["data.shapes_n=16", "data.workers=0", "train.batch_size=4", "eval.online_every=0", "model.drop_path=0.1"]


def step(objective: Any, batch: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    seed_torch(0, 1)
    objective.zero_grad()
    loss = objective(batch, 0)["loss"]
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in objective.encoder.parameters() if p.grad is not None]


@pytest.mark.slow
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_compiled_encoder_is_one_graph_a_size_and_computes_the_same(objective: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    cfg = load_config(DoctorConfig, [str(YAML / f"{objective}_gcvit_nano.yaml"), *SMALL], SCHEMAS)
    dry = examine(cfg)
    objective_, batch, graphs = dry.objective.train(), dry.batch(4), []

    def traced(graph: Any, _: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    loss, grads = step(objective_, batch)
    for name, part in objective_.named_children():
        if name in ("encoder", "teacher"):
            part.compile(backend=traced, fullgraph=True, dynamic=False)
    again, others = step(objective_, batch)
    assert graphs and min(graphs) > 100
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(others, grads)
    known = len(graphs)
    with RunLog(tmp_path, 2, 0, 1, ["tensorboard"], True) as log:
        show_batch(objective_, batch, 1, log)
    with frozen(objective_.encoder):
        objective_.encoder(torch.rand(7, 3, *objective_.encoder.img_size))
    assert len(graphs) == known, "what one process alone does, or once an epoch, must not wait for a compiler"


def test_a_compiled_graph_can_be_walked_again_after_a_step_that_did_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """As joint measures its parts' gradients before backward, with log.every=10 first in the tenth step."""
    torch._dynamo.reset()
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compiled(self, backend="aot_eager", **how))
    parts = torch.nn.ModuleDict({"encoder": torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())})
    compile_encoders(parts)  # type: ignore[arg-type]
    encoder, x = parts["encoder"], torch.randn(4, 8)
    encoder(x).square().mean().backward()
    loss = encoder(x).square().mean()
    (grad,) = torch.autograd.grad(loss, encoder[0].weight, retain_graph=True)
    encoder.zero_grad()
    loss.backward()
    assert torch.equal(grad, encoder[0].weight.grad)


@pytest.mark.slow
def test_a_compiled_run_trains(tmp_path: Path) -> None:
    keys = [*SMALL, "train.steps=2", "log.every=1", "log.trackers=[]", "train.warmup_epochs=0"]
    told = []
    for on in ("false", "true"):
        argv = [str(YAML / "simmim_gcvit_nano.yaml"), *keys, f"train.compile={on}", f"out={tmp_path / on}"]
        out = pretrain(load_config(PretrainConfig, argv, SCHEMAS))
        told.append([line.split('"loss": ')[1].split(",")[0] for line in (out / "metrics.jsonl").open()])
    assert [float(x) for x in told[1]] == pytest.approx([float(x) for x in told[0]], rel=1e-4)
