"""What erasers, inversion and attacks train with: the loop, its losses, trajectories, parameters, cost."""
