"""Parts of `recipes/build_nano.py`: the data it may see, its tokenizer, teacher, model, training loop and evaluator."""
