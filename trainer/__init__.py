"""One training process: config, engine, loop, state on shards, and the commands that read a run."""
