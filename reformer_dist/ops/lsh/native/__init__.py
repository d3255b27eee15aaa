"""LSH and local attention on CPUs, in C: `library` compiles it, `calls` wraps it."""
