"""Pure torch: tensors in, tensors out. Imports nothing else of ours."""
