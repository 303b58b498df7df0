"""One file a format; a class with a `name` and `read` in here is found by `mmembed.data.format_base.FORMATS`."""
