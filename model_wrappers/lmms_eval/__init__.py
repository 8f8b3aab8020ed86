"""lmms-eval: the chat model, its requests, every wrap of the host, records and commands."""
