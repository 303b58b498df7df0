"""From files to examples to batches: formats, records, memory-mapped datasets, mixing and the batch plan."""
