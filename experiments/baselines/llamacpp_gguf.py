"""`engine=llamacpp_gguf`: llama.cpp on a GGUF file as stored, quantized weights included."""

from experiments.baselines.llamacpp import build_engine

__all__ = ["build_engine"]
