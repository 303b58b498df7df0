"""What `python -m data_tools.inspect` counts, asks of a training config, generates and shows."""
