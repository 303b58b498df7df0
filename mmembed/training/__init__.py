"""Training: the trainer, the step that makes large contrastive batches fit, optimizers, callbacks, the batch report."""
