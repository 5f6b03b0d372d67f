"""Training: data, losses, recipes and the loop. Never imported by the runtime."""
