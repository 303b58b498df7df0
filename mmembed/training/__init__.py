"""Training: the trainer, the step that makes large contrastive batches fit, optimizers, callbacks, the batch report."""

import mmembed.backbones  # noqa: F401  (its torchvision shim has to be there before transformers is imported)
