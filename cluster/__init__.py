"""Many processes: submit, follow, requeue. Torch-free on the login node."""
