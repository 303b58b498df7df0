"""Using a trained model: encode contents to vectors, make vectors smaller, search them exactly."""
