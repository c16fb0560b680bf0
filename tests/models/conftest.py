"""The inverse of convert.from_nvlabs, written apart from it, to make checkpoints as NVIDIA released them."""

import re
from collections.abc import Callable, Mapping

import pytest
from torch import Tensor

from gcssl.models.convert import TABLE, State, table_side
from gcssl.models.windows import relative_index

# conv-block parts, timm's name -> NVlabs' name
UNIT = {"conv_dw": "conv.0", "se.fc1": "conv.2.fc.0", "se.fc2": "conv.2.fc.2", "conv_pw": "conv.3"}
BLOCK = {"attn.rel_pos.relative_position_bias_table": "attn.relative_position_bias_table"}
BLOCK |= {"ls1.gamma": "gamma1", "ls2.gamma": "gamma2"}


@pytest.fixture(scope="session")
def to_nvlabs() -> Callable[[Mapping[str, Tensor]], State]:
    return _to_nvlabs


def _to_nvlabs(state: Mapping[str, Tensor]) -> State:
    """timm's names and shapes -> NVlabs', with the index buffers that its strict loading expects."""
    out = {}
    for key, value in state.items():
        name = nvlabs_name(key)
        out[name] = value[:, :, 0, 0] if ".se." in key else value
        if key.endswith(TABLE):
            side = table_side(value.shape[0])
            assert side is not None, "NVlabs' layout has square windows only"
            index = relative_index(side, side, value.device).view(side**2, side**2)
            out[name.replace("_bias_table", "_index")] = index
    return out


def nvlabs_name(key: str) -> str:
    if key.startswith("stem.conv1."):
        return key.replace("stem.conv1", "patch_embed.proj")
    for name, nv in UNIT.items():
        key = re.sub(rf"(\.conv_block|\.conv\d+)\.{re.escape(name)}\.", rf"\1.{nv}.", key)
    key = key.replace(".conv_block.", ".")
    if m := re.fullmatch(r"stem\.down\.(.+)", key):
        return f"patch_embed.conv_down.{m[1]}"
    if m := re.fullmatch(r"stages\.(\d+)\.downsample\.(.+)", key):
        return f"levels.{int(m[1]) - 1}.downsample.{m[2]}"
    if m := re.fullmatch(r"stages\.(\d+)\.global_block\.blocks\.conv(\d+)\.(.+)", key):
        return f"levels.{m[1]}.q_global_gen.to_q_global.{int(m[2]) - 1}.{m[3]}"
    if m := re.fullmatch(r"stages\.(\d+)\.blocks\.(\d+)\.(.+)", key):
        return f"levels.{m[1]}.blocks.{m[2]}.{BLOCK.get(m[3], m[3])}"
    return re.sub(r"^head\.fc\.", "head.", re.sub(r"^stages\.3\.norm\.", "norm.", key))
