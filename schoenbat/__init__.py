"""Linear-time attention for dot-product kernels, its exact rivals, and the tasks to compare them on."""
