"""Modules: attention in the shape of torch's, self-attention with SchoenbAt's normalisation, and the encoder."""
