"""The makers of pairs out of raw documents; a class registers by lying in a module here (see `pair_base`)."""
