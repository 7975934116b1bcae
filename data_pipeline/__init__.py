"""From images to batches of latents. Imports nothing else of ours."""
