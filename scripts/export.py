"""python -m scripts.export backbone=... format=timm|torch|onnx out=...: the same as python -m gcssl.export."""

from gcssl.export import main
from gcssl.runtime import entry

if __name__ == "__main__":
    entry(main)
