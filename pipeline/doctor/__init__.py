"""What `schoenbat-exp doctor` says: whether everything that a grid needs is there, and how to mend what is not."""
