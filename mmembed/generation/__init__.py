"""Rerankers that answer in words: what they are asked, what they answer, and what their answers mean.

`orders` writes and reads `[2] > [1] > [3]` and ranks more documents than fit one prompt; `prompts` writes queries and
documents as a chat, `judgements` writes and reads a reason with its verdict; `conversations` makes records into what
trl trains on. Training and inference use the same ones.
"""
