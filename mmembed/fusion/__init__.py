"""Several trained models of one backbone become one, tensor by tensor, in float32.

`rules/` says by which weights the models are summed (one small file a rule), `sources` reads what the tensors of a
checkpoint are worth, adapters multiplied out, `fuse` writes the sum as a checkpoint of its own, `soup` chooses which
models go into it, `learning` finds a coefficient for each model and tensor from labelled records.
"""
