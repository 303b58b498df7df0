"""The papers' claims, measured again at the size of the packaged nano backbone: see `eval.claims.__main__`."""
