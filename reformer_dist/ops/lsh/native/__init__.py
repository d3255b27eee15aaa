"""LSH and local attention on CPUs, in C: `library` compiles it, `calls` calls it, `attention` attends."""
