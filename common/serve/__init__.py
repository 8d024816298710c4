"""Serving: how do clients of OpenAI and vLLM reach an engine over HTTP?

The command is `python -m common.serve --model smollm2-135m`.
"""
