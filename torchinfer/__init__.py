"""The engine in PyTorch. Every file has a twin of the same name in `jaxinfer`."""

from torchinfer.runner import ModelRunner as ModelRunner
