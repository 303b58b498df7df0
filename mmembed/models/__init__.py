"""Models: a backbone, a pooling and what lies around them, and the self-describing checkpoints they are saved as."""
