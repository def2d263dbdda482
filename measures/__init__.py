"""What formulas and tables ask for, measured once: networks and tensors in, numbers out."""
