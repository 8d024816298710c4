"""The engines over HTTP, as clients of OpenAI and of vLLM expect it: `python -m common.serve --model smollm2-135m`."""
