"""A page to look at what models find: `mmembed explore`.

sides.py        the models, each with its vectors of the same documents
comparison.py   a question, and the rankings of models and reranker that answer it
projection.py   the documents as points of a plane
cards.py        rankings as HTML
page.py         the page itself, the only module that imports Gradio
"""
