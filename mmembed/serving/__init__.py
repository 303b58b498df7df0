"""A model behind HTTP: OpenAI's `/v1/embeddings` and `/rerank`, by vLLM's own server or by this package.

Where vLLM has the model, `vllm.py` starts vLLM's server. Elsewhere `app.py` answers in the same schema: a client does
not see which of the two it talks to. A request passes through

    app.py       bytes, under limits, of whoever has the key
    schemas.py   JSON to contents, strictly: an unknown field is refused, not ignored
    pictures.py  data URLs to encoded pictures; no path is opened, and no address that was not allowed by name
    models.py    contents to rows (tokenized), rows to vectors or scores
    batcher.py   rows of many requests to batches of the model, in one thread

Tokenizing happens before the queue, so what is wrong with a request is said at once and concerns nobody else, and what
waits is counted in tokens.
"""
