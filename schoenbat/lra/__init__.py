"""Long Range Arena and recall: tasks, their data, the encoder, training, and exported models."""
