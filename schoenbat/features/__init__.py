"""Feature maps phi with <phi(x), phi(y)> close to f(<x, y>). All their randomness is drawn in `resample`."""
