"""Pipelines that make training data: stages that ask a language model, and stages that choose.

    stages/       a file each: what is asked and made of the answers, what is kept
    templates/    what is asked, as YAML that users copy and edit
    inputs.py     documents, queries or records, as items with ids
    answers.py    every answer on the disk, under a digest of its request
    asking.py     an item's asks until they are answered or lost
    pipeline.py   the stages of a run one behind another, each into a file
    estimate.py   what a run will ask, before it starts

An item's result is a function of the item, the stage's settings and the stored answers. So a run that was killed does
what every run does: it looks each answer up, and asks for those that are missing.
"""
