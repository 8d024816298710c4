"""The engine in JAX and Flax NNX. Every file has a twin of the same name in `torchinfer`."""

from jaxinfer.runner import ModelRunner as ModelRunner
