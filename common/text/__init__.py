"""Text in, text out: tokenizer, incremental detokenizer, stop strings, chat templates."""
